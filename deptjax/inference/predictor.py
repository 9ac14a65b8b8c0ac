"""`Predictor`: texts in, labels or texts out, for one frozen backbone and any number of tuned prompts."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np

from deptjax.data.forms import WRITES_NO_TEXT
from deptjax.data.preprocess import Example
from deptjax.data.tasks import Task, get_task
from deptjax.errors import UserError
from deptjax.inference.answers import Answer, Generation, Reader, answer_batch
from deptjax.inference.batches import LABELS, SEQUENCES, Batches, Request, padded
from deptjax.inference.decoding import Decoding
from deptjax.inference.inputs import Text, continuation_lists, name_list, source_text, text_list, text_origin
from deptjax.inference.prompt_bank import Source, usable_prompt
from deptjax.inference.scoring import sequence_scores
from deptjax.inference.served import Served, ServedTasks
from deptjax.models.backbone import Backbone

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class Predictor:
    """Answers with tuned prompts on one frozen backbone; a batch may mix their tasks. Threads may share one.

    ```python
    predict = Predictor(backbone, {"trec": "runs/trec/prompt", "sms": "runs/sms/prompt"})
    predict(["How far is it to the moon ?"], "trec")  # [Answer(text='number', scores={'description': 0.01, ...})]
    predict(["How far is the moon ?", "You have won !"], ["trec", "sms"])  # one batch
    ```

    Prompts of one method kind share a `PromptBank`, and those that act at the input alone share batches whatever their
    kinds. Texts are sorted by length, batched and padded inside; answers come
    in the order of the texts.

    Args:
      backbone: from `load_backbone`; a prompt that was tuned on another one is refused.
      prompts: a `Prompt`, the path of one in any format that `load_prompt` knows, or several by name:
        `{"sst2": prompt, "cola": "runs/cola/prompt"}`.
      batch_size: the most rows a batch.
      decoding: how text is generated, where a task has no labels; by default greedily.
      on_too_long: a text of more tokens than its prompt's `max_length` is `cut`, with a warning, or an `error`.
      encoder: a loaded encoder for prompts of methods that have one, in place of the one that they name.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompts: Source | Mapping[str, Source],
        batch_size: int = 32,
        decoding: Decoding | None = None,
        on_too_long: str = "cut",
        encoder: Backbone | None = None,
    ) -> None:
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise UserError(f"batch_size is {batch_size!r}; it must be a whole number of at least 1")
        self._backbone, self._decoding = backbone, _decoding(decoding)
        self._batches = Batches(backbone, batch_size)
        if decoding is not None and backbone.config.is_masked:
            raise UserError(f"decoding: {WRITES_NO_TEXT}; leave it out, or take another backbone")
        self._tokenizing = threading.Lock()  # preprocessors count what they cut
        self._served = ServedTasks(backbone, on_too_long, self._tokenizing, encoder)
        if not isinstance(prompts, Mapping):
            _, only = usable_prompt(backbone, prompts, "prompt")
            prompts = {str(only.task.get("name", "prompt")): only}
        self._served.add(prompts)

    @property
    def tasks(self) -> list[str]:
        """The names under which prompts are loaded."""
        return list(self._served.tasks)

    def add(self, name: str, prompt: Source) -> None:
        """Adds a task, or replaces the one of that name; requests under way are not disturbed.

        Raises `UserError` for a prompt that cannot be used; the predictor then serves what it served.
        """
        self._served.add({name: prompt})

    def remove(self, name: str) -> None:
        """Removes a task. Raises `UserError` for a name that is not there."""
        self._served.remove(name)

    def __call__(
        self,
        texts: Iterable[Text],
        task: str | Iterable[str] | None = None,
        *,
        first: int = 0,
        on_rows: Callable[[int], object] = lambda rows: None,
    ) -> list[Answer]:
        """Returns an answer for each text.

        Args:
          texts: bare texts, where the task's template has one column, or objects with its columns. A mistake is told
            with the text's number, that in a `Row` with its place.
          task: the name of a loaded prompt, or one for each text; may be left out when there is only one.
          first: the number of the first text among all of a stream: what is sampled for a text depends on its number.
          on_rows: called after each batch with the number of its rows.

        Raises:
          UserError: for an unknown task, an empty text, or a missing column.
        """
        return self._answers(texts, task, self._decoding, first, on_rows)

    def generate(
        self, texts: Iterable[Text], task: str | Iterable[str] | None = None, decoding: Decoding | None = None
    ) -> list[tuple[Generation, ...]]:
        """Returns `decoding.num_return` generated texts for each text, best first, also where a task has labels.

        Arguments and errors as those of a call; `decoding` replaces the predictor's own.
        """
        chosen = _decoding(decoding) or self._decoding or Decoding()
        return [answer.candidates for answer in self._answers(texts, task, chosen, as_text=True)]

    def score(
        self,
        texts: Iterable[Text],
        continuations: Iterable[str] | Iterable[Iterable[str]],
        task: str | Iterable[str] | None = None,
        *,
        end: bool = True,
    ) -> list[dict[str, float]]:
        """Returns log p(continuation | text) in nats of each continuation of each text.

        Args:
          texts: as in a call.
          continuations: texts that may follow, the same for all texts, or a list for each.
          task: as in a call.
          end: whether a continuation ends with the end token, which then counts, as targets do in training.
        """
        texts = text_list(texts)
        lists = continuation_lists(continuations, len(texts))
        with self._requests(texts, task) as requests:
            ids = [self._continuation_ids(r, lists[r.place], end) for r in requests]
            self._check_context(requests, [max(map(len, some)) for some in ids])

            def scored(batch: Sequence[Request]) -> list[dict[str, float]]:
                ours = [ids[r.place] for r in batch]
                count, length = (
                    padded(max(sizes), LABELS) for sizes in (map(len, ours), (len(i) for c in ours for i in c))
                )
                sequences = np.zeros((self._batches.size(len(batch)), count, length), np.int32)
                mask = np.zeros(sequences.shape, bool)
                for row, some in enumerate(ours):
                    for c, tokens in enumerate(some):
                        sequences[row, c, : len(tokens)], mask[row, c, : len(tokens)] = tokens, True
                sequences[len(batch) :], mask[len(batch) :] = sequences[:1], mask[:1]
                found = np.asarray(sequence_scores(*self._batches.arrays(batch), sequences, mask))
                for request, row in zip(batch, found, strict=False):
                    _tell_no_numbers(request.served, not np.isnan(row).any())
                return [
                    dict(zip(lists[r.place], map(float, row), strict=False))
                    for r, row in zip(batch, found, strict=False)
                ]

            return _in_order(self._batches.of(requests, lambda request: 0), scored)

    def _answers(
        self,
        texts: Iterable[Text],
        task: str | Iterable[str] | None,
        decoding: Decoding | None,
        first: int = 0,
        on_rows: Callable[[int], object] = lambda rows: None,
        as_text: bool = False,
    ) -> list[Answer]:
        def answered(batch: Sequence[Request]) -> list[Answer]:
            answers = answer_batch(
                *self._batches.arrays(batch),
                [request.reader for request in batch],
                label_shape=self._label_shape(batch),
                decoding=decoding,
                numbers=[first + request.place for request in batch],
            )
            for request, answer in zip(batch, answers, strict=True):
                _tell_no_numbers(request.served, answer.has_numbers)
            on_rows(len(batch))
            return answers

        with self._requests(text_list(texts), task) as requests:
            if as_text:
                text = {r.served: Reader(r.reader.preprocessor, "generate") for r in requests}
                requests = [dataclasses.replace(r, reader=text[r.served]) for r in requests]
            if decoding is not None:  # a prompt's own targets have been checked when it was loaded
                writing = [request for request in requests if request.reader.kind == "text"]
                self._check_context(writing, [decoding.max_new_tokens] * len(writing))
            return _in_order(self._batches.of(requests, lambda request: _label_class(request.reader)), answered)

    @contextlib.contextmanager
    def _requests(self, texts: Sequence[Text], task: str | Iterable[str] | None) -> Iterator[list[Request]]:
        """Yields the requests of the texts; until the end their prompts stay where they are."""
        with self._served.held(name_list(task, len(texts))) as each:
            yield self._encoded(texts, each)

    def _encoded(self, texts: Sequence[Text], each: Sequence[Served]) -> list[Request]:
        """Returns the requests in the order of the texts."""
        placeholder = np.zeros(1, np.int32)
        requests: list[Request | None] = [None] * len(texts)
        places_of: dict[Served, list[int]] = {}
        for place, served in enumerate(each):
            places_of.setdefault(served, []).append(place)
        for served, places in places_of.items():
            pre = served.reader.preprocessor
            origins = [text_origin(texts[place], place + 1) for place in places]
            sources = [source_text(pre.task, texts[place], where) for place, where in zip(places, origins, strict=True)]
            with self._tokenizing:
                cut = pre.cut_count
                ids = pre.encode_texts(sources, origins)
                if cut == 0 and pre.cut_count:
                    logger.warning(
                        "task '%s': texts of more than %d tokens, the prompt's max_length, are cut",
                        *(served.name, pre.max_length),
                    )
                read = [None] * len(places) if served.encoder is None else served.encoder.tokens(pre.unmasked(sources))
            for place, text, source, own in zip(places, sources, ids, read, strict=True):
                requests[place] = Request(place, served, served.reader, text, Example(source, placeholder, -1, own))
        return [request for request in requests if request is not None]

    def _label_shape(self, batch: Sequence[Request]) -> tuple[int, int] | None:
        """Returns the shape that labels are padded to: one for all tasks like these, so that they share programs."""
        reader = batch[0].reader
        if reader.kind == "text":
            return None
        banks, alike = {id(request.served.bank) for request in batch}, _label_class(reader)
        tasks = self._served.tasks.values()  # beside those of the batch, which may have been removed since
        kin = [t.reader for t in tasks if id(t.bank) in banks and _label_class(t.reader) == alike]
        shapes = {reader.sequences.shape for reader in [*kin, *(request.reader for request in batch)]}
        count, length = (padded(max(shape[axis] for shape in shapes), LABELS) for axis in (0, 1))
        return count, length

    def _check_context(self, requests: Sequence[Request], new_tokens: Sequence[int]) -> None:
        """Raises `UserError` for a text that leaves the backbone no positions for so many new tokens."""
        context, is_masked = self._backbone.config.context, self._backbone.config.is_masked
        for request, new in zip(requests, new_tokens, strict=True):
            prompt, text = request.served.method.positions_in_front(), len(request.example.source)
            new = 0 if is_masked else new  # what fills a mask takes no position of its own
            if context is not None and prompt + text + new > context:
                raise UserError(
                    f"text {request.place + 1}: {prompt} prompt vectors, {text} tokens of text and {new} new ones are "
                    f"{prompt + text + new} positions, and '{self._backbone.name}' has {context}; ask for fewer new "
                    "tokens, or shorten the text"
                )

    def _continuation_ids(self, request: Request, texts: Sequence[str], end: bool) -> list[list[int]]:
        if not texts:
            raise UserError(f"text {request.place + 1}: there are no continuations to score; give at least one")
        try:
            with self._tokenizing:
                return request.reader.preprocessor.continuation_ids(request.source_text, texts, end)
        except UserError as error:
            raise UserError(f"text {request.place + 1}: {error}") from None


def _in_order(batches: Sequence[Sequence[Request]], run: Callable[[Sequence[Request]], list[Result]]) -> list[Result]:
    """Returns the results of all requests, in the order of the texts that they came of."""
    found = [pair for batch in batches for pair in zip((request.place for request in batch), run(batch), strict=True)]
    return [result for _, result in sorted(found, key=lambda pair: pair[0])]


def _tell_no_numbers(served: Served, has_numbers: bool) -> None:
    """Warns once of a task whose prompt makes the model compute NaN: all its answers are then alike, and mean nothing.

    Each number of the prompt is finite, or it would not be served; what is computed of them overflows.
    """
    if not has_numbers and not served.told_no_numbers:
        served.told_no_numbers = True
        logger.warning("task '%s': the scores are not finite, so its answers mean nothing; tune it again", served.name)


def _label_class(reader: Reader) -> tuple[str, int]:
    """Returns what readers must have in common to share a batch.

    Label sequences are run one after the other, so a task with two of them does not wait for one with a hundred.
    """
    return reader.kind, padded(len(reader.sequences), SEQUENCES) if reader.kind == "sequence" else 0


def _decoding(decoding: Decoding | None) -> Decoding | None:
    if decoding is not None and not isinstance(decoding, Decoding):
        raise UserError(f"decoding is of type {type(decoding).__name__}; give a Decoding(max_new_tokens=...)")
    return decoding


def evaluate(
    backbone: Backbone,
    prompt: Source,
    task: Task | str | None = None,
    *,
    split: str = "test",
    examples: int | None = None,
    batch_size: int = 32,
    on_rows: Callable[[int], object] = lambda rows: None,
    encoder: Backbone | None = None,
) -> dict[str, float]:
    """Returns the task's metrics of a prompt on a split: `{"test/accuracy": 0.9}`.

    Args:
      backbone: the one the prompt was tuned on.
      prompt: a `Prompt`, or the path of one in any format that `load_prompt` knows.
      task: `None` for the task the prompt was tuned for, with its own data; else another one's data, template and
        labels.
      split: `train`, `dev` or `test`.
      examples: how many rows are scored, the first of the split; `None` for all.
      batch_size: rows a batch.
      on_rows: called after each batch with the number of its rows.
      encoder: as a `Predictor` takes it.
    """
    _, prompt = usable_prompt(backbone, prompt, "task")
    chosen = Task.from_config(prompt.task) if task is None else get_task(task) if isinstance(task, str) else task
    data = chosen.load()
    rows = getattr(data, split, None)
    if split not in ("train", "dev", "test") or not rows:
        raise UserError(f"task '{chosen.name}' has no rows in split '{split}'")
    rows = rows[:examples]
    if task is not None:  # its template and labels, too
        prompt = dataclasses.replace(prompt, task=data.task.to_config())
    answers = Predictor(backbone, {chosen.name or "task": prompt}, batch_size, encoder=encoder)(rows, on_rows=on_rows)
    scores = data.task.score([answer.text for answer in answers], rows)
    return {f"{split}/{name}": value for name, value in scores.items()}
