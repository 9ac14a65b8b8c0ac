"""What is given for an answer, checked before anything is computed: texts, names of tasks, continuations, settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from deptjax.data.forms import form_of
from deptjax.data.preprocess import Preprocessor
from deptjax.data.tasks import Task
from deptjax.data.templates import Row
from deptjax.errors import UserError
from deptjax.models.backbone import Backbone
from deptjax.prompt import Prompt

Text = str | Mapping[str, object] | Row


def text_list(texts: Iterable[Text]) -> list[Text]:
    """Returns the texts of any iterable but those that are one text or have no order.

    Raises `UserError` for what is no list of texts, and with its number for a text that is none.
    """
    given = type(texts).__name__
    if isinstance(texts, (str, bytes, bytearray, Mapping, Row)):
        raise UserError(f"texts must be a list of texts, not one {given}: write [text]")
    if isinstance(texts, (set, frozenset)):
        raise UserError(f"texts must be a list of texts, not a {given}, which has no order for the answers")
    try:
        each = iter(texts)
    except TypeError:
        raise UserError(f"texts must be a list of texts, not {given}: write [text]") from None
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


def preprocessor_of(backbone: Backbone, prompt: Prompt, on_too_long: str = "cut") -> Preprocessor:
    """Returns what makes tokens of texts as in the training of a prompt, whose method is resolved.

    Raises `UserError` for a card whose task or `max_length` is damaged, or a length that its method cannot take.
    """
    length = prompt.settings.get("max_length")
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        told = "is missing from" if length is None else f"is {length!r:.40} in"
        raise UserError(f"max_length {told} its settings, expected a whole number of at least 1")
    limit = prompt.method.source_limit()
    if limit is not None and length > limit:
        raise UserError(f"max_length is {length} in its settings, and its method takes {limit} tokens at most")
    try:
        task = Task.from_config({**prompt.task, "source": None})  # where its rows came from may be gone
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError) as error:  # fields of a card that somebody edited
        raise UserError(f"its task was not written by deptjax, or is damaged: {error}") from None
    form = form_of(backbone.config)
    return Preprocessor(backbone.tokenizer, task, form=form, max_length=length, on_too_long=on_too_long)
