"""The members of a population: what each one varies, which of them go on, and the table of all.

Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943): of K members that all train towards the same last
step, only the best ceil(K / factor) go on behind each rung, and rungs stand where the steps of a member that goes on
grow by the same factor.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deptjax.data.tasks import Task, get_task
from deptjax.errors import UserError, nearest
from deptjax.methods.base import Method, method_fields, method_from_config, method_to_config
from deptjax.training.folder import check_folder_name

TASK = "task"
SETTINGS = ("seed", "prompt_lr", "low_rank_lr", "backbone_lr")  # the fields of `TrainConfig` that members may vary


def grid(**values: Iterable[Any]) -> list[dict[str, Any]]:
    """Returns all combinations of the values given, one dict a member.

    >>> grid(prompt_lr=[0.3, 0.4], seed=[0, 1])[1:3]
    [{'prompt_lr': 0.3, 'seed': 1}, {'prompt_lr': 0.4, 'seed': 0}]
    """
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def default_grid(rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Returns a grid around the learning rates of a method's groups: each of them at a third, once and three times.

    >>> default_grid({"prompt": 0.3})
    [{'prompt_lr': 0.1}, {'prompt_lr': 0.3}, {'prompt_lr': 0.9}]
    """
    return grid(**{f"{group}_lr": [float(f"{rate * by:.3g}") for by in (1 / 3, 1, 3)] for group, rate in rates.items()})


def member_name(varied: Mapping[str, Any]) -> str:
    """Returns a member's name, which is also that of its folder.

    >>> member_name({"prompt_lr": 0.3, "seed": 1})
    'prompt_lr=0.3,seed=1'
    """
    return ",".join(f"{name}={_plain(value)}" for name, value in varied.items()) or "default"


def _plain(value: Any) -> str:
    text = value.name if isinstance(value, Task) else _number(value) if isinstance(value, float) else str(value)
    return "".join(c if c.isalnum() or c in "+-._" else "-" for c in text)[:60]


def _number(value: float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else repr(value)  # two rates that differ late have two names


@dataclasses.dataclass(frozen=True)
class Member:
    """One member: its name, what it varies, and the method, task and settings that follow from it."""

    name: str
    varied: dict[str, Any]
    method: Method
    task: Task
    settings: dict[str, Any]


def make_members(
    method: Method, task: Task | str | None, varied: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> list[Member]:
    """Returns the members of a population.

    Args:
      method: the method of all.
      task: the task of those that vary none.
      varied: for each member what is its own: `task`, fields of `SETTINGS`, fields of the method.
      settings: the fields of `TrainConfig` that all have.

    Raises:
      UserError: for a name that cannot vary, two members that are alike, or none at all; for two tasks of one name.
    """
    if not varied:
        raise UserError("a population of no members; give at least one, such as {'seed': 0}")
    fields = method_fields(type(method))
    members = []
    for own in varied:
        for name in own:
            if name not in (TASK, *SETTINGS, *fields):
                known = [TASK, *SETTINGS, *fields]
                raise UserError(
                    f"members cannot vary '{name}'; they can vary {', '.join(known)}.{nearest(name, known)}"
                )
        which = own.get(TASK, task)
        if which is None:
            raise UserError(f"member {member_name(own)} has no task; name one for all, or vary task")
        of_method = {name: value for name, value in own.items() if name in fields and name not in SETTINGS}
        members.append(
            Member(
                name=member_name(own),
                varied={name: value.name if isinstance(value, Task) else value for name, value in own.items()},
                method=method_from_config({**method_to_config(method), **of_method}) if of_method else method,
                task=get_task(which) if isinstance(which, str) else which,
                settings={**settings, **{name: value for name, value in own.items() if name in SETTINGS}},
            )
        )
    names = [member.name for member in members]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two members are both '{name}'; keep one")
    _check_tasks([member.task for member in members])
    return members


def _check_tasks(tasks: Sequence[Task]) -> None:
    """Raises `UserError` where a task's name cannot tell it from the others: the best of each is kept under it."""
    named: dict[str, Task] = {}
    for task in tasks:
        if named.setdefault(task.name, task) != task:
            raise UserError(
                f"two different tasks of the population are both named '{task.name}'; rename one, or share it"
            )
    for name in named if len(named) > 1 else ():
        check_folder_name(name)


def rungs(steps: int, members: int, factor: int) -> tuple[int, ...]:
    """Returns the steps behind which only the best go on; none with a factor of 0.

    The last `members` of them end at one, and each rung stands at 1/factor of the steps of the next.

    >>> rungs(270, 9, 3), rungs(240, 9, 2), rungs(240, 9, 0)
    ((30, 90), (15, 30, 60, 120), ())
    """
    if factor == 0 or members < 2:
        return ()
    count = math.ceil(math.log(members) / math.log(factor) - 1e-9)
    steps_at = [round(steps / factor ** (count - i)) for i in range(count)]
    return tuple(step for step in dict.fromkeys(steps_at) if 0 < step < steps)


def survivors(scores: Sequence[float | None], factor: int) -> list[int]:
    """Returns the indices, in order, of the ceil(n / factor) best scores; of equal ones the first go on.

    A member without a score (`None`) goes on only where there are not enough with one.

    >>> survivors([0.2, 0.9, None, 0.9, 0.1], factor=2)
    [0, 1, 3]
    """
    ranked = sorted(range(len(scores)), key=lambda i: -math.inf if (own := scores[i]) is None else own, reverse=True)
    return sorted(ranked[: math.ceil(len(scores) / factor)])


@dataclasses.dataclass(frozen=True)
class MemberResult:
    """How a member ended.

    Attributes:
      name: the member's, and its folder's.
      task: its task's name.
      varied: what it varied.
      ended: `finished`, `cut` (by successive halving) or `diverged`; empty while it trains.
      step: the last update that it took part in.
      best_step: the step of its best prompt.
      metrics: of its best prompt.
    """

    name: str
    task: str
    varied: dict[str, Any]
    ended: str
    step: int
    best_step: int
    metrics: dict[str, float]

    @property
    def score(self) -> float | None:
        """The metric that selects the best, or `None` without an evaluation."""
        return next(iter(self.metrics.values()), None)


def winners(results: Sequence[MemberResult]) -> dict[str, MemberResult]:
    """Returns the best member of each task; of equal scores the first.

    Only a member with a prompt that was kept can be the best. Without scores, one that is its task's only member is.
    """
    best: dict[str, MemberResult] = {}
    for result in results:
        leader = best.get(result.task)
        if result.score is None:
            only = sum(other.task == result.task for other in results) == 1
            if only and result.best_step:
                best[result.task] = result
        elif leader is None or leader.score is None or result.score > leader.score:
            best[result.task] = result
    return best


def markdown_table(results: Sequence[MemberResult]) -> str:
    """Returns all members as a Markdown table, the best of each task in bold, in the order of tasks and scores."""
    best = {id(result) for result in winners(results).values()}
    columns = list(dict.fromkeys(name for result in results for name in result.varied))
    metrics = list(dict.fromkeys(name for result in results for name in result.metrics))
    heads = [*columns, *metrics, "best step", "ended"]
    lines = [" | ".join(heads), " | ".join(["---"] * len(heads))]
    tasks = list(dict.fromkeys(result.task for result in results))
    for result in sorted(results, key=lambda r: (tasks.index(r.task), -(r.score if r.score is not None else -1e9))):
        ended = result.ended if result.ended == "finished" else f"{result.ended or 'training'} at {result.step}"
        cells = [_cell(result.varied.get(name)) for name in columns]
        cells += [f"{result.metrics[name]:.4f}" if name in result.metrics else "" for name in metrics]
        cells += [str(result.best_step or ""), ended]
        lines.append(" | ".join(f"**{cell}**" if id(result) in best and cell else cell for cell in cells))
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return _number(value) if isinstance(value, float) else " ".join(str(value).split()).replace("|", "\\|")
