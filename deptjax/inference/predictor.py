"""`Predictor`: texts in, labels or texts out, for one frozen backbone and any number of tuned prompts."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deptjax.data.buckets import bucket_of
from deptjax.data.pipeline import collate
from deptjax.data.preprocess import Example, Preprocessor
from deptjax.data.tasks import Task, get_task
from deptjax.data.templates import Row
from deptjax.errors import UserError, nearest
from deptjax.inference.answers import Answer, Generation, Reader, answer_batch
from deptjax.inference.decoding import Decoding
from deptjax.inference.prompt_bank import PromptBank
from deptjax.inference.rows import Rows
from deptjax.inference.scoring import sequence_scores
from deptjax.methods.room import kind_of, room_for
from deptjax.models.backbone import Backbone
from deptjax.models.prompted import PromptedModel, check_context
from deptjax.prompt import Prompt
from deptjax.typing import Tree

logger = logging.getLogger(__name__)

# The sizes that texts, labels and batches are padded to: few, so that a handful of programs serves all requests.
LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384, 32768)
LABELS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096)

Text = str | Mapping[str, object] | Row
Source = Prompt | str | os.PathLike[str]


class Single:
    """A prompt that cannot be stacked, a whole model of its own, behind the interface of a `PromptBank`."""

    def __init__(self, backbone: Backbone, prompt: Prompt) -> None:
        self.model = PromptedModel.build(backbone, prompt.method)
        self.frozen: Tree = {}
        self._rows = Rows.shared(self.model, jax.tree.map(jnp.asarray, prompt.trainable), self.frozen)

    def rows(self, names: Sequence[str]) -> Rows:
        """Returns what all rows share."""
        return self._rows


class _Loaded:
    """A task that is served: how its answers are read, and where its prompt lies, until its last request is done."""

    def __init__(self, name: str, reader: Reader, bank: PromptBank | Single, key: str) -> None:
        self.name, self.reader, self.bank, self.key = name, reader, bank, key
        self.requests = 0
        self.retired = False

    def leave(self) -> None:
        """Frees the prompt's place once it is retired and nobody needs it."""
        if self.retired and self.requests == 0 and isinstance(self.bank, PromptBank):
            self.bank.remove(self.key)


@dataclasses.dataclass(frozen=True, eq=False)
class _Request:
    """A text on its way: its place among the texts, its task, how it is read, and its tokens."""

    place: int
    loaded: _Loaded
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
      prompts: a `Prompt`, a folder, or several by name: `{"sst2": prompt, "cola": "runs/cola/prompt"}`.
      batch_size: the most rows a batch.
      decoding: how text is generated, where a task has no labels; by default greedily.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompts: Source | Mapping[str, Source],
        batch_size: int = 32,
        decoding: Decoding | None = None,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; it must be at least 1")
        self._backbone, self._batch_size, self._decoding = backbone, batch_size, decoding
        self._tasks: dict[str, _Loaded] = {}
        self._serial = 0
        self._lock = threading.Lock()  # of the tasks, which are replaced and never changed in place
        self._tokenizing = threading.Lock()  # tokenizers are not made to be called by two threads at once
        if not isinstance(prompts, Mapping):
            only = prompts if isinstance(prompts, Prompt) else Prompt.load(prompts)
            prompts = {only.task["name"]: only}
        self._load(prompts)

    @property
    def tasks(self) -> list[str]:
        """The names under which prompts are loaded."""
        return list(self._tasks)

    def add(self, name: str, prompt: Source) -> None:
        """Adds a task, or replaces the one of that name; requests under way are not disturbed.

        Raises `UserError` for a prompt that cannot be used; the predictor then serves what it served.
        """
        self._load({name: prompt})

    def remove(self, name: str) -> None:
        """Removes a task. Raises `UserError` for a name that is not there."""
        with self._lock:
            self._retire(self._task(self._tasks, name))
            self._tasks = {other: kept for other, kept in self._tasks.items() if other != name}

    def __call__(
        self,
        texts: Sequence[Text],
        task: str | Sequence[str] | None = None,
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
        self, texts: Sequence[Text], task: str | Sequence[str] | None = None, decoding: Decoding | None = None
    ) -> list[tuple[Generation, ...]]:
        """Returns `decoding.num_return` generated texts for each text, best first, also where a task has labels.

        Arguments and errors as those of a call; `decoding` replaces the predictor's own.
        """
        chosen = decoding or self._decoding or Decoding()
        return [answer.candidates for answer in self._answers(texts, task, chosen, as_text=True)]

    def score(
        self,
        texts: Sequence[Text],
        continuations: Sequence[str] | Sequence[Sequence[str]],
        task: str | Sequence[str] | None = None,
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
        lists = _lists(continuations, len(texts))
        with self._serving(texts, task) as requests:
            ids = [self._continuation_ids(r, lists[r.place], end) for r in requests]

            def scored(batch: Sequence[_Request]) -> list[dict[str, float]]:
                ours = [ids[r.place] for r in batch]
                count, length = (
                    bucket_of(n, LABELS) for n in (max(map(len, ours)), max(len(i) for c in ours for i in c))
                )
                self._check_context(batch[0], length)
                sequences = np.zeros((self._size(len(batch)), count, length), np.int32)
                mask = np.zeros(sequences.shape, bool)
                for row, some in enumerate(ours):
                    for c, tokens in enumerate(some):
                        sequences[row, c, : len(tokens)], mask[row, c, : len(tokens)] = tokens, True
                sequences[len(batch) :], mask[len(batch) :] = sequences[:1], mask[:1]
                found = np.asarray(sequence_scores(*self._batch(batch), sequences, mask))
                return [
                    dict(zip(lists[r.place], map(float, row), strict=False))
                    for r, row in zip(batch, found, strict=False)
                ]

            return self._in_batches(requests, scored)

    def _answers(
        self,
        texts: Sequence[Text],
        task: str | Sequence[str] | None,
        decoding: Decoding | None,
        first: int = 0,
        on_rows: Callable[[int], object] = lambda rows: None,
        as_text: bool = False,
    ) -> list[Answer]:
        def answered(batch: Sequence[_Request]) -> list[Answer]:
            reader = batch[0].reader
            if reader.kind == "text":
                longest = max(request.reader.preprocessor.max_target_length for request in batch)
                self._check_context(batch[0], decoding.max_new_tokens if decoding else longest)
            answers = answer_batch(
                *self._batch(batch),
                [request.reader for request in batch],
                label_shape=self._label_shape(batch[0].loaded),
                decoding=decoding,
                numbers=[first + request.place for request in batch],
            )
            on_rows(len(batch))
            return answers

        with self._serving(texts, task) as requests:
            if as_text:
                text = {r.loaded: Reader(r.reader.preprocessor, "generate") for r in requests}
                requests = [dataclasses.replace(r, reader=text[r.loaded]) for r in requests]
            return self._in_batches(requests, answered)

    @contextlib.contextmanager
    def _serving(self, texts: Sequence[Text], task: str | Sequence[str] | None) -> Iterator[list[_Request]]:
        """Yields the requests of the texts; until the end their prompts stay where they are."""
        if isinstance(texts, str):
            raise UserError("a Predictor takes a list of texts, not one text: write predict([text])")
        with self._lock:
            if task is None or isinstance(task, str):
                each = [self._task(self._tasks, task)] * len(texts)
            else:
                each = [self._task(self._tasks, name, f"text {number}: ") for number, name in enumerate(task, 1)]
            if len(each) != len(texts):
                raise UserError(f"there are {len(texts)} texts and {len(each)} names of tasks; give one for each")
            used = set(each)
            for loaded in used:
                loaded.requests += 1
        try:
            yield self._encoded(texts, each)
        finally:
            with self._lock:
                for loaded in used:
                    loaded.requests -= 1
                    loaded.leave()

    def _encoded(self, texts: Sequence[Text], each: Sequence[_Loaded]) -> list[_Request]:
        """Returns the requests in the order of the texts."""
        placeholder = np.zeros(1, np.int32)
        requests: list[_Request | None] = [None] * len(texts)
        for loaded in dict.fromkeys(each):
            pre = loaded.reader.preprocessor
            places = [place for place, one in enumerate(each) if one is loaded]
            origins = [_origin(texts[place], place + 1) for place in places]
            sources = [
                _source_text(pre.task, texts[place], where) for place, where in zip(places, origins, strict=True)
            ]
            with self._tokenizing:
                cut = pre.cut_count
                ids = pre.encode_texts(sources, origins)
                if cut == 0 and pre.cut_count:
                    logger.warning(
                        "task '%s': texts of more than %d tokens, the prompt's max_length, are cut",
                        *(loaded.name, pre.max_length),
                    )
            for place, text, source in zip(places, sources, ids, strict=True):
                requests[place] = _Request(place, loaded, loaded.reader, text, Example(source, placeholder, -1))
        return [request for request in requests if request is not None]

    def _in_batches(self, requests: Sequence[_Request], run: Callable[[Sequence[_Request]], list[Any]]) -> list[Any]:
        """Returns what `run` returns for each request, in their order; it is given batches of like length and kind."""
        groups: dict[tuple[int, str], list[_Request]] = {}
        for request in requests:
            groups.setdefault((id(request.loaded.bank), request.reader.kind), []).append(request)
        results: list[Any] = [None] * len(requests)
        for group in groups.values():
            group.sort(key=lambda request: len(request.example.source))
            for start in range(0, len(group), self._batch_size):
                batch = group[start : start + self._batch_size]
                for request, result in zip(batch, run(batch), strict=True):
                    results[request.place] = result
        return results

    def _batch(self, batch: Sequence[_Request]) -> tuple[Any, Tree, Rows, Any, Any]:
        """Returns what a compiled function needs: model, frozen, rows, source and its mask, padded to their buckets."""
        bank = batch[0].loaded.bank
        length = bucket_of(max(len(request.example.source) for request in batch), LENGTHS)
        limit = bank.model.method.source_limit()
        length = length if limit is None else min(length, limit)
        size = self._size(len(batch))
        arrays = collate([request.example for request in batch], length, 1, rows=size)
        keys = [request.loaded.key for request in batch]
        rows = bank.rows(keys + keys[-1:] * (size - len(keys)))
        return bank.model, bank.frozen, rows, jnp.asarray(arrays["source"]), jnp.asarray(arrays["source_mask"])

    def _size(self, count: int) -> int:
        """Returns the number of rows that a batch of `count` is padded to: a power of two, or the largest batch."""
        return min(1 << (count - 1).bit_length(), self._batch_size)

    def _label_shape(self, loaded: _Loaded) -> tuple[int, int] | None:
        """Returns the shape that labels are padded to: one for all tasks of a bank, so that they share programs."""
        if loaded.reader.kind == "text":
            return None
        kin = [t.reader for t in self._tasks.values() if t.bank is loaded.bank and t.reader.kind == loaded.reader.kind]
        shapes = [reader.sequences.shape for reader in [*kin, loaded.reader]]
        count, length = (bucket_of(max(shape[axis] for shape in shapes), LABELS) for axis in (0, 1))
        return count, length

    def _check_context(self, request: _Request, new_tokens: int) -> None:
        method = request.loaded.bank.model.method
        check_context(self._backbone, method, request.reader.preprocessor.max_length, new_tokens)

    def _continuation_ids(self, request: _Request, texts: Sequence[str], end: bool) -> list[list[int]]:
        if not texts:
            raise UserError(f"text {request.place + 1}: there are no continuations to score; give at least one")
        with self._tokenizing:
            return request.reader.preprocessor.continuation_ids(request.source_text, texts, end)

    @staticmethod
    def _task(tasks: Mapping[str, _Loaded], name: str | None, where: str = "") -> _Loaded:
        if name is None and len(tasks) == 1:
            return next(iter(tasks.values()))
        if name is None or name not in tasks:
            there = ", ".join(list(tasks)[:20]) or "none"
            told = "name the task of the texts" if name is None else f"no prompt is loaded for task '{name}'"
            raise UserError(f"{where}{told}; there are: {there}.{nearest(str(name), tasks)}")
        return tasks[name]

    @staticmethod
    def _retire(loaded: _Loaded) -> None:
        loaded.retired = True
        loaded.leave()

    def _load(self, prompts: Mapping[str, Source]) -> None:
        """Loads prompts under these names, in place of those that have them."""
        checked = {name: self._checked(name, prompt) for name, prompt in prompts.items()}
        with self._lock:
            banks = [
                bank for bank in dict.fromkeys(t.bank for t in self._tasks.values()) if isinstance(bank, PromptBank)
            ]
            kin: dict[Any, list[str]] = {}  # names by what their methods must have in common to be stacked
            for name, (prompt, _) in checked.items():
                kin.setdefault(name if prompt.method.tunes_backbone else kind_of(prompt.method), []).append(name)
            new: dict[str, _Loaded] = {}
            for names in kin.values():
                bank = self._bank_for([checked[name][0] for name in names], banks)
                for name in names:
                    prompt, reader = checked[name]
                    self._serial += 1
                    new[name] = _Loaded(name, reader, bank, f"{name}#{self._serial}")
                    if isinstance(bank, PromptBank):
                        bank.add(new[name].key, prompt)
            for name in new.keys() & self._tasks.keys():
                self._retire(self._tasks[name])
            self._tasks = {**self._tasks, **{name: new[name] for name in checked}}

    def _bank_for(self, prompts: Sequence[Prompt], banks: Sequence[PromptBank]) -> PromptBank | Single:
        """Returns the bank that takes prompts of one kind, or a new one with room for all of them."""
        if prompts[0].method.tunes_backbone:
            return Single(self._backbone, prompts[0])
        for bank in banks:
            if bank.accepts(prompts[0].method):
                return bank
        room = room_for([prompt.method for prompt in prompts])
        return PromptBank(self._backbone, room=room, capacity=len(prompts))

    def _checked(self, name: str, prompt: Source) -> tuple[Prompt, Reader]:
        """Returns a prompt that fits the backbone, and how its answers are read."""
        where = f"prompt '{name}'"
        if not isinstance(prompt, Prompt):
            where, prompt = str(prompt), Prompt.load(prompt)
        prompt.check_backbone(self._backbone, where)
        task = dataclasses.replace(Task.from_config(prompt.task), source=None)
        length = prompt.settings["max_length"]
        causal = not self._backbone.config.is_encoder_decoder
        preprocessor = Preprocessor(self._backbone.tokenizer, task, causal=causal, max_length=length)
        check_context(self._backbone, prompt.method, length, preprocessor.longest_target())
        return prompt, Reader(preprocessor, prompt.settings.get("evaluation", "auto"))


def _lists(continuations: Sequence[str] | Sequence[Sequence[str]], count: int) -> list[list[str]]:
    """Returns a list of continuations for each of `count` texts."""
    if isinstance(continuations, str):
        raise UserError("continuations is one text; give a list: [text]")
    if all(isinstance(one, str) for one in continuations):
        return [[str(one) for one in continuations]] * count
    if len(continuations) != count:
        raise UserError(f"there are {count} texts and {len(continuations)} lists of continuations; give one for each")
    return [list(one) for one in continuations]


def _origin(text: Text, number: int) -> str:
    return text.origin if isinstance(text, Row) else f"text {number}"


def _source_text(task: Task, text: Text, where: str) -> str:
    try:
        return task.source_text(text)
    except UserError as error:
        told = str(error)
        raise UserError(told if told.startswith(where) else f"{where}: {told}") from None


def evaluate(
    backbone: Backbone,
    prompt: Source,
    task: Task | str | None = None,
    *,
    split: str = "test",
    batch_size: int = 32,
    on_rows: Callable[[int], object] = lambda rows: None,
) -> dict[str, float]:
    """Returns the task's metrics of a prompt on a split: `{"test/accuracy": 0.9}`.

    Args:
      backbone: the one the prompt was tuned on.
      prompt: a `Prompt` or its folder.
      task: `None` for the task the prompt was tuned for, with its own data.
      split: `train`, `dev` or `test`.
      batch_size: rows a batch.
      on_rows: called after each batch with the number of its rows.
    """
    prompt = prompt if isinstance(prompt, Prompt) else Prompt.load(prompt)
    chosen = Task.from_config(prompt.task) if task is None else get_task(task) if isinstance(task, str) else task
    data = chosen.load()
    rows = getattr(data, split, None)
    if split not in ("train", "dev", "test") or not rows:
        raise UserError(f"task '{chosen.name}' has no rows in split '{split}'")
    answers = Predictor(backbone, {"task": prompt}, batch_size)(rows, on_rows=on_rows)
    scores = data.task.score([answer.text for answer in answers], rows)
    return {f"{split}/{name}": value for name, value in scores.items()}
