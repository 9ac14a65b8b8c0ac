"""`Predictor`: texts in, labels or texts out, for one frozen backbone and any number of tuned prompts."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from deptjax.data.buckets import bucket_of
from deptjax.data.forms import WRITES_NO_TEXT
from deptjax.data.pipeline import collate
from deptjax.data.preprocess import Example
from deptjax.data.tasks import Task, get_task
from deptjax.errors import UserError
from deptjax.inference.answers import Answer, Generation, Reader, answer_batch
from deptjax.inference.decoding import Decoding
from deptjax.inference.inputs import Text, continuation_lists, name_list, source_text, text_list, text_origin
from deptjax.inference.prompt_bank import Source, usable_prompt
from deptjax.inference.rows import Rows
from deptjax.inference.scoring import sequence_scores
from deptjax.inference.served import Served, ServedTasks
from deptjax.inference.text_encoder import TextEncoder
from deptjax.models.backbone import Backbone
from deptjax.typing import Tree

logger = logging.getLogger(__name__)

# The sizes that texts, labels and batches are padded to: few, so that a handful of programs serves all requests.
LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384, 32768)
LABELS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096)
SEQUENCES = (4, 16, 64, 256, 1024, 4096)  # tasks with at most so many label sequences are batched together


@dataclasses.dataclass(frozen=True, eq=False)
class _Request:
    """A text on its way: its place among the texts, its task, how it is read, and its tokens."""

    place: int
    served: Served
    reader: Reader
    source_text: str
    example: Example


class Predictor:
    """Answers with tuned prompts on one frozen backbone; a batch may mix their tasks. Threads may share one.

    ```python
    predict = Predictor(backbone, {"trec": "runs/trec/prompt", "sms": "runs/sms/prompt"})
    predict(["How far is it to the moon ?"], "trec")  # [Answer(text='number', scores={'description': 0.01, ...})]
    predict(["How far is the moon ?", "You have won !"], ["trec", "sms"])  # one batch
    ```

    Prompts of one method kind share a `PromptBank`. Texts are sorted by length, batched and padded inside; answers come
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
        self._backbone, self._batch_size, self._decoding = backbone, batch_size, _decoding(decoding)
        if decoding is not None and backbone.config.is_masked:
            raise UserError(f"decoding: {WRITES_NO_TEXT}; leave it out, or take another backbone")
        self._tokenizing = threading.Lock()  # tokenizers are not made to be called by two threads at once
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

            def scored(batch: Sequence[_Request]) -> list[dict[str, float]]:
                ours = [ids[r.place] for r in batch]
                count, length = (
                    _padded(max(sizes), LABELS) for sizes in (map(len, ours), (len(i) for c in ours for i in c))
                )
                sequences = np.zeros((self._size(len(batch)), count, length), np.int32)
                mask = np.zeros(sequences.shape, bool)
                for row, some in enumerate(ours):
                    for c, tokens in enumerate(some):
                        sequences[row, c, : len(tokens)], mask[row, c, : len(tokens)] = tokens, True
                sequences[len(batch) :], mask[len(batch) :] = sequences[:1], mask[:1]
                found = np.asarray(sequence_scores(*self._batch(batch), sequences, mask))
                for request, row in zip(batch, found, strict=False):
                    _tell_no_numbers(request.served, not np.isnan(row).any())
                return [
                    dict(zip(lists[r.place], map(float, row), strict=False))
                    for r, row in zip(batch, found, strict=False)
                ]

            return self._in_batches(requests, lambda request: 0, lambda group: scored)

    def _answers(
        self,
        texts: Iterable[Text],
        task: str | Iterable[str] | None,
        decoding: Decoding | None,
        first: int = 0,
        on_rows: Callable[[int], object] = lambda rows: None,
        as_text: bool = False,
    ) -> list[Answer]:
        def answers_of(group: Sequence[_Request]) -> Callable[[Sequence[_Request]], list[Answer]]:
            shape = self._label_shape(group)

            def answered(batch: Sequence[_Request]) -> list[Answer]:
                answers = answer_batch(
                    *self._batch(batch),
                    [request.reader for request in batch],
                    label_shape=shape,
                    decoding=decoding,
                    numbers=[first + request.place for request in batch],
                )
                for request, answer in zip(batch, answers, strict=True):
                    _tell_no_numbers(request.served, answer.has_numbers)
                on_rows(len(batch))
                return answers

            return answered

        with self._requests(text_list(texts), task) as requests:
            if as_text:
                text = {r.served: Reader(r.reader.preprocessor, "generate") for r in requests}
                requests = [dataclasses.replace(r, reader=text[r.served]) for r in requests]
            if decoding is not None:  # a prompt's own targets have been checked when it was loaded
                writing = [request for request in requests if request.reader.kind == "text"]
                self._check_context(writing, [decoding.max_new_tokens] * len(writing))
            return self._in_batches(requests, lambda request: _label_class(request.reader), answers_of)

    @contextlib.contextmanager
    def _requests(self, texts: Sequence[Text], task: str | Iterable[str] | None) -> Iterator[list[_Request]]:
        """Yields the requests of the texts; until the end their prompts stay where they are."""
        with self._served.held(name_list(task, len(texts))) as each:
            yield self._encoded(texts, each)

    def _encoded(self, texts: Sequence[Text], each: Sequence[Served]) -> list[_Request]:
        """Returns the requests in the order of the texts."""
        placeholder = np.zeros(1, np.int32)
        requests: list[_Request | None] = [None] * len(texts)
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
                requests[place] = _Request(place, served, served.reader, text, Example(source, placeholder, -1, own))
        return [request for request in requests if request is not None]

    def _in_batches(
        self,
        requests: Sequence[_Request],
        kind_of: Callable[[_Request], object],
        run: Callable[[Sequence[_Request]], Callable[[Sequence[_Request]], list[Any]]],
    ) -> list[Any]:
        """Returns a result for each request, in their order.

        Requests of one bank and `kind_of` are a group; what `run` returns for it is called with its batches, of texts
        of like length, and returns the results of each.
        """
        groups: dict[tuple[int, object], list[_Request]] = {}
        for request in requests:
            groups.setdefault((id(request.served.bank), kind_of(request)), []).append(request)
        results: list[Any] = [None] * len(requests)
        for group in groups.values():
            group.sort(key=lambda request: len(request.example.source))
            run_batch = run(group)
            for start in range(0, len(group), self._batch_size):
                batch = group[start : start + self._batch_size]
                for request, result in zip(batch, run_batch(batch), strict=True):
                    results[request.place] = result
        return results

    def _batch(self, batch: Sequence[_Request]) -> tuple[Any, Tree, Rows, Any, Any]:
        """Returns what a compiled function needs: model, frozen, rows, source and its mask, padded to their buckets."""
        bank, size = batch[0].served.bank, self._size(len(batch))
        keys = [request.served.key for request in batch]
        model, rows = bank.take(keys + keys[-1:] * (size - len(keys)))
        length = _padded(max(len(request.example.source) for request in batch), LENGTHS)
        limit = model.method.source_limit()
        length = length if limit is None else min(length, limit)
        arrays = collate([request.example for request in batch], length, 1, rows=size)
        rows = dataclasses.replace(rows, encoding=_encodings(batch, size))
        return model, bank.frozen, rows, jnp.asarray(arrays["source"]), jnp.asarray(arrays["source_mask"])

    def _size(self, count: int) -> int:
        """Returns the number of rows that a batch of `count` is padded to: a power of two, or the largest batch."""
        return min(1 << (count - 1).bit_length(), self._batch_size)

    def _label_shape(self, group: Sequence[_Request]) -> tuple[int, int] | None:
        """Returns the shape that labels are padded to: one for all tasks like these, so that they share programs."""
        bank, reader = group[0].served.bank, group[0].reader
        if reader.kind == "text":
            return None
        tasks = self._served.tasks.values()  # beside those of the group, which may have been removed since
        kin = [t.reader for t in tasks if t.bank is bank and _label_class(t.reader) == _label_class(reader)]
        shapes = {reader.sequences.shape for reader in [*kin, *(request.reader for request in group)]}
        count, length = (_padded(max(shape[axis] for shape in shapes), LABELS) for axis in (0, 1))
        return count, length

    def _check_context(self, requests: Sequence[_Request], new_tokens: Sequence[int]) -> None:
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

    def _continuation_ids(self, request: _Request, texts: Sequence[str], end: bool) -> list[list[int]]:
        if not texts:
            raise UserError(f"text {request.place + 1}: there are no continuations to score; give at least one")
        try:
            with self._tokenizing:
                return request.reader.preprocessor.continuation_ids(request.source_text, texts, end)
        except UserError as error:
            raise UserError(f"text {request.place + 1}: {error}") from None


def _encodings(batch: Sequence[_Request], size: int) -> Any:
    """Returns what its task's encoder makes of each text of a batch, (size, H), or `None` without encoders."""
    read: dict[TextEncoder, list[int]] = {}
    for row, request in enumerate(batch):
        if request.served.encoder is not None:
            read.setdefault(request.served.encoder, []).append(row)
    if not read:
        return None
    found = np.zeros((size, next(iter(read)).width), np.float32)
    for encoder, rows in read.items():
        texts = [batch[row].example.encoder_source for row in rows]
        found[rows] = encoder.vectors([tokens for tokens in texts if tokens is not None])
    return jnp.asarray(found)


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
    return reader.kind, _padded(len(reader.sequences), SEQUENCES) if reader.kind == "sequence" else 0


def _padded(size: int, sizes: Sequence[int]) -> int:
    """Returns the least of the sizes that holds `size`, or a power of two above them all."""
    return bucket_of(size, sizes) if size <= sizes[-1] else 1 << (size - 1).bit_length()


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
      task: `None` for the task the prompt was tuned for, with its own data.
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
    answers = Predictor(backbone, {chosen.name or "task": prompt}, batch_size, encoder=encoder)(rows, on_rows=on_rows)
    scores = data.task.score([answer.text for answer in answers], rows)
    return {f"{split}/{name}": value for name, value in scores.items()}
