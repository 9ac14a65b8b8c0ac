"""Few-shot training sets: k rows drawn from all training rows, as many of each class as can be."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence

import numpy as np

from deptjax.data.templates import Row
from deptjax.errors import UserError


def few_shot_rows(
    rows: Sequence[Row],
    k: int,
    *,
    seed: int,
    class_of: Callable[[Row], str] | None,
    classes: Sequence[str],
    paper_compat: bool = False,
    name: str = "the task",
) -> tuple[Row, ...]:
    """Returns `k` of the rows, in the order in which `seed` draws them.

    The order is that of `datasets.Dataset.shuffle(seed)`, a permutation by numpy's default generator. With C classes
    each gets k // C rows, and the first k % C classes one more.

    Args:
        rows: all training rows.
        k: how many to draw.
        seed: decides the order.
        class_of: the class of a row; None for rows without classes, of which the first k in the order are taken.
        classes: all classes.
        paper_compat: sample as the paper's code does: every class gets k // C rows, and only the k-th row may be of any
            class. So with two classes the last row may upset the balance (3 and 1 of 4), and with three classes 32
            becomes 30, for the 31st row is never drawn.
        name: the task's name for messages.

    Raises `UserError` when there are fewer rows than asked for, of all or of a class, or fewer than one for a class.
    """
    order = [rows[index] for index in np.random.default_rng(seed).permutation(len(rows))]
    if len(rows) < k:
        raise UserError(f"task '{name}': few_shot={k} is more than the {len(rows)} training rows; ask for fewer")
    if class_of is None:
        return tuple(order[:k])
    if k < len(classes):
        raise UserError(
            f"task '{name}': few_shot={k} is less than one row for each of {len(classes)} classes; "
            f"ask for at least {len(classes)}"
        )
    share, rest = divmod(k, len(classes))
    if paper_compat:
        return _as_the_papers_code(order, k, share, class_of)
    wanted = {label: share + (place < rest) for place, label in enumerate(classes)}
    drawn = []
    for row in order:
        if wanted.get(label := class_of(row), 0):
            wanted[label] -= 1
            drawn.append(row)
    short = [f"{count} of '{label}'" for label, count in wanted.items() if count]
    if short:
        raise UserError(f"task '{name}': few_shot={k}: the training rows lack {', '.join(short)}; ask for fewer")
    return tuple(drawn)


def _as_the_papers_code(order: Sequence[Row], k: int, share: int, class_of: Callable[[Row], str]) -> tuple[Row, ...]:
    counts: collections.Counter[str] = collections.Counter()
    drawn: list[Row] = []
    for row in order:
        if len(drawn) == k:
            break
        if counts[class_of(row)] < share or len(drawn) == k - 1:
            counts[class_of(row)] += 1
            drawn.append(row)
    return tuple(drawn)
