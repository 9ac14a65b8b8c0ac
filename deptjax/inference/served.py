"""The tasks that a `Predictor` serves: they come and go while calls are under way."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deptjax.errors import UserError, nearest
from deptjax.inference.answers import MODES, Reader
from deptjax.inference.inputs import preprocessor_of
from deptjax.inference.prompt_bank import PromptBank, Source, usable_prompt
from deptjax.inference.rows import Rows
from deptjax.inference.text_encoder import SavedEncoders, TextEncoder
from deptjax.methods.base import Method
from deptjax.methods.room import kind_of, room_for
from deptjax.models.backbone import Backbone
from deptjax.models.prompted import PromptedModel, check_context
from deptjax.prompt import Prompt
from deptjax.typing import Tree


class Single:
    """A prompt that cannot be stacked, a whole model of its own, behind the interface of a `PromptBank`."""

    def __init__(self, backbone: Backbone, prompt: Prompt) -> None:
        self.frozen: Tree = {}
        self._model = PromptedModel.build(backbone, prompt.method)
        self._rows = Rows.shared(self._model, jax.tree.map(jnp.asarray, prompt.trainable), self.frozen)

    def take(self, names: Sequence[str]) -> tuple[PromptedModel, Rows]:
        """Returns the model, and what all rows share."""
        return self._model, self._rows


class Served:
    """A task that is served: how its answers are read, and where its prompt lies, until its last call ends.

    Attributes:
      name: of the task.
      method: of its prompt, resolved.
      reader: how its answers are read.
      bank: where its prompt lies, under `key`.
      encoder: what reads its texts, for a method with an encoder.
    """

    def __init__(
        self,
        name: str,
        method: Method,
        reader: Reader,
        bank: PromptBank | Single,
        key: str,
        encoder: TextEncoder | None = None,
    ) -> None:
        self.name, self.method, self.reader, self.bank, self.key = name, method, reader, bank, key
        self.encoder = encoder
        self.calls: set[object] = set()  # those under way; a set, so that leaving twice, after an interrupt, is once
        self.retired = False
        self.told_no_numbers = False  # the user knows that its model computes no numbers

    def free(self) -> None:
        """Gives the prompt's place back once it is retired and no call needs it."""
        if self.retired and not self.calls and isinstance(self.bank, PromptBank) and self.key in self.bank:
            self.bank.remove(self.key)


class _Checked(NamedTuple):
    """What a task is served with."""

    prompt: Prompt
    reader: Reader
    encoder: TextEncoder | None


class ServedTasks:
    """Tasks by name, on one backbone; safe to use from several threads.

    Args:
      backbone: a prompt that was tuned on another one is refused.
      on_too_long: what happens to texts of more than a prompt's `max_length`: `cut`, or `error`.
      tokenizing: the lock under which tokenizers are called.
      encoder: a loaded encoder, in place of those that prompts name.
    """

    def __init__(self, backbone: Backbone, on_too_long: str, tokenizing: Any, encoder: Backbone | None = None) -> None:
        self._encoders = SavedEncoders(backbone, encoder)
        self._backbone, self._on_too_long, self._tokenizing = backbone, on_too_long, tokenizing
        self._loading = threading.Lock()  # of who adds tasks, which may take long
        self._lock = threading.Lock()  # of the tasks, which are replaced and never changed in place
        self._tasks: dict[str, Served] = {}
        self._serial = 0

    @property
    def tasks(self) -> Mapping[str, Served]:
        """The tasks by name, as they are now."""
        return self._tasks

    def add(self, prompts: Mapping[str, Source]) -> None:
        """Serves prompts under these names, in place of those that have them; calls under way are not disturbed.

        Raises `UserError` for a prompt that cannot be used; what was served is then served as before.
        """
        self._publish({name: self._checked(name, prompt) for name, prompt in prompts.items()})

    def remove(self, name: str) -> None:
        """Serves a task no more. Raises `UserError` for a name that is not there."""
        with self._lock:
            gone = self._find(name)
            self._tasks = {other: kept for other, kept in self._tasks.items() if other != name}
            self._retire([gone])

    @contextlib.contextmanager
    def held(self, names: Sequence[str | None]) -> Iterator[list[Served]]:
        """Yields the task of each text, by name or `None` for the only one; until the end their prompts stay.

        Raises `UserError` for a name that is not there, with the text's number where texts differ in it.
        """
        call, used = object(), set[Served]()
        several = len(set(names)) > 1
        try:
            with self._lock:
                found = [self._find(name, f"text {i}: " if several else "") for i, name in enumerate(names, 1)]
                used.update(found)
                for served in used:
                    served.calls.add(call)
            yield found
        finally:
            with self._lock:
                for served in used:
                    served.calls.discard(call)
                    served.free()

    def _find(self, name: str | None, where: str = "") -> Served:
        if name is None and len(self._tasks) == 1:
            return next(iter(self._tasks.values()))
        if name is None or name not in self._tasks:
            there = ", ".join(list(self._tasks)[:20]) or "none"
            told = "name the task of the texts" if name is None else f"no prompt is loaded for task '{name}'"
            raise UserError(f"{where}{told}; there are: {there}.{nearest(str(name), self._tasks)}")
        return self._tasks[name]

    @staticmethod
    def _retire(tasks: Sequence[Served]) -> None:
        for served in tasks:
            served.retired = True
            served.free()

    def _publish(self, checked: Mapping[str, _Checked]) -> None:
        """Serves prompts that have been checked: all of them, or after an error none."""
        new: dict[str, Served] = {}
        with self._loading:
            try:
                self._place(checked, new)
                with self._lock:
                    old = [self._tasks[name] for name in new if name in self._tasks]
                    self._tasks = {**self._tasks, **{name: new[name] for name in checked}}
                    self._retire(old)
            finally:  # also after an error or an interrupt in the middle
                with self._lock:
                    self._retire([served for served in new.values() if self._tasks.get(served.name) is not served])

    def _place(self, checked: Mapping[str, _Checked], new: dict[str, Served]) -> None:
        """Puts prompts into banks and their tasks into `new`, each before its prompt takes a place."""
        banks = [b for b in dict.fromkeys(t.bank for t in self._tasks.values()) if isinstance(b, PromptBank)]
        kin: dict[Any, list[str]] = {}  # names by what their methods must have in common to be stacked
        for name, (prompt, _, _) in checked.items():
            kin.setdefault(name if prompt.method.tunes_backbone else kind_of(prompt.method), []).append(name)
        for names in kin.values():
            bank = self._bank_for([checked[name].prompt for name in names], banks)
            for name in names:
                prompt, reader, encoder = checked[name]
                self._serial += 1
                new[name] = Served(name, prompt.method, reader, bank, f"{name}#{self._serial}", encoder)
                if isinstance(bank, PromptBank):
                    bank.add(new[name].key, prompt)

    def _bank_for(self, prompts: Sequence[Prompt], banks: Sequence[PromptBank]) -> PromptBank | Single:
        """Returns the bank that takes prompts of one kind, or a new one with room for all of them."""
        if prompts[0].method.tunes_backbone:
            return Single(self._backbone, prompts[0])
        for bank in banks:
            if bank.accepts(prompts[0].method):
                return bank
        room = room_for([prompt.method for prompt in prompts])
        return PromptBank(self._backbone, room=room, capacity=len(prompts))

    def _checked(self, name: str, prompt: Source) -> _Checked:
        """Returns a prompt that fits the backbone, how its answers are read, and what reads its texts."""
        where, usable = usable_prompt(self._backbone, prompt, name)
        try:
            return _Checked(usable, self._reader(usable), self._encoders.of(usable))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def _reader(self, prompt: Prompt) -> Reader:
        mode = prompt.settings.get("evaluation", "auto")
        if mode not in MODES:
            raise UserError(f"evaluation is {mode!r} in its settings, expected one of {', '.join(MODES)}")
        preprocessor = preprocessor_of(self._backbone, prompt, self._on_too_long)
        with self._tokenizing:
            check_context(self._backbone, prompt.method, preprocessor.max_length, preprocessor.longest_target())
            return Reader(preprocessor, mode)
