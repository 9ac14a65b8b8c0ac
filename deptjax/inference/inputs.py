"""What is given to a `Predictor`, checked before anything is computed: texts, names of tasks, continuations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from deptjax.data.tasks import Task
from deptjax.data.templates import Row
from deptjax.errors import UserError

Text = str | Mapping[str, object] | Row


def text_list(texts: Iterable[Text]) -> list[Text]:
    """Returns the texts of any iterable but those that are one text or have no order.

    Raises `UserError` for what is no list of texts, and with its number for a text that is none.
    """
    given = type(texts).__name__
    if isinstance(texts, (str, bytes, bytearray, Mapping, Row)):
        raise UserError(f"a Predictor takes a list of texts, not one {given}: write predict([text])")
    if isinstance(texts, (set, frozenset)):
        raise UserError(f"a Predictor takes a list of texts, not a {given}, which has no order for the answers")
    try:
        each = iter(texts)
    except TypeError:
        raise UserError(f"a Predictor takes a list of texts, not {given}: write predict([text])") from None
    found = list(each)
    for number, text in enumerate(found, 1):
        if not isinstance(text, (str, Mapping, Row)):
            kind = type(text).__name__
            raise UserError(f"text {number} is of type {kind}; give a text, or an object with the template's columns")
    return found


def name_list(task: str | Iterable[str] | None, count: int) -> list[str | None]:
    """Returns the name of the task of each of `count` texts: `None` stands for the only one.

    Raises `UserError` for what is neither a name nor as many names as there are texts.
    """
    if task is None or isinstance(task, str):
        return [task] * count
    try:
        names: list[str | None] = [] if isinstance(task, (bytes, Mapping, set)) else list(task)
    except TypeError:
        names = []
    if (not names and count) or not all(isinstance(name, str) for name in names):
        raise UserError(f"task is {task!r:.80}; give the name of a task, or a list of names, one for each text")
    if len(names) != count:
        raise UserError(f"there are {count} texts and {len(names)} names of tasks; give one for each")
    return names


def continuation_lists(continuations: Iterable[str] | Iterable[Iterable[str]], count: int) -> list[list[str]]:
    """Returns a list of continuations for each of `count` texts.

    Raises `UserError` for what is neither a list of texts nor as many lists as there are texts.
    """
    expected = "give a list of texts, the same for all, or a list of lists, one for each text"
    if isinstance(continuations, (str, bytes, Mapping)):
        raise UserError(f"continuations is one {type(continuations).__name__}; {expected}")
    try:
        given = list(continuations)
        if all(isinstance(one, str) for one in given):
            return [[str(one) for one in given]] * count
        lists = [[one] if isinstance(one, (str, bytes)) else list(one) for one in given]
    except TypeError:
        raise UserError(f"continuations is {continuations!r:.80}; {expected}") from None
    if not all(isinstance(one, str) for some in lists for one in some) or any(isinstance(one, str) for one in given):
        raise UserError(f"continuations holds what is no text; {expected}")
    if len(lists) != count:
        raise UserError(f"there are {count} texts and {len(lists)} lists of continuations; give one for each")
    return lists


def text_origin(text: Text, number: int) -> str:
    """Returns what messages call a text: the place that a `Row` names, or else its number."""
    return text.origin or f"text {number}" if isinstance(text, Row) else f"text {number}"


def source_text(task: Task, text: Text, where: str) -> str:
    """Returns the task's template filled with a text. Raises `UserError` that begins with `where`."""
    try:
        return task.source_text(text)
    except UserError as error:
        told = str(error)
        raise UserError(told if told.startswith(where) else f"{where}: {told}") from None
