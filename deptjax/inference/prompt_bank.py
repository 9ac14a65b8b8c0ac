"""`PromptBank`: many tuned prompts on one frozen backbone, stacked, so that each row of a batch can use its own.

The prompts' parameters lie on the device with a leading task axis, and a batch gathers those of its rows. A prompt that
is shorter than the others, or of a smaller rank, is padded so that it computes what it did
(`deptjax.methods.room`). On a causal backbone a task also has its prompt's keys and values, computed when the prompt
is added and never again.

A program that runs a batch sees the gathered rows and not the bank: how many tasks there are, and which, is no part of
its shape. So tasks come and go without compiling anything anew, as long as they fit the bank's room.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deptjax.errors import UserError, nearest
from deptjax.inference.rows import Rows, front_of
from deptjax.inference.text_encoder import SavedEncoders, TextEncoder
from deptjax.methods.base import ENCODER, Method
from deptjax.methods.encoded import without_encoder
from deptjax.methods.room import has_room, move_in, room_for
from deptjax.models.backbone import Backbone
from deptjax.models.fused_attention import MAPPED
from deptjax.models.prompted import PromptedModel, check_parameters
from deptjax.prompt import Prompt
from deptjax.typing import Array, Tree

logger = logging.getLogger(__name__)

GROWTH = 1.25  # a full bank makes room for a quarter more: bounded waste, and few copies

Source = Prompt | str | os.PathLike[str]


class PromptBank:
    """Saved prompts of one method kind on one backbone, by name; safe to use from several threads.

    ```python
    bank = PromptBank(backbone, {"sst2": "runs/sst2/prompt", "cola": "runs/cola/prompt"})
    rows = bank.rows(["cola", "sst2", "cola"])  # what a batch of three is decoded with
    ```

    Args:
      backbone: the frozen model; a prompt tuned on another one is refused.
      prompts: for each name a `Prompt`, or the path of one in any format that `load_prompt` knows; at least one, unless
        `room` is given.
      room: a method that describes the largest prompt to come, such as `DePT(prompt_length=100, rank=60)`; of one with
        parts that only training needs (P-tuning's network) what its runs save, since prompts are held so. A prompt
        that does not fit makes the bank larger, and batches are compiled anew. By default the largest of `prompts`.
      capacity: tasks to make room for at the start.
      encoder: a loaded encoder for prompts that need one, in place of the one that each names.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompts: Mapping[str, Source] | None = None,
        *,
        room: Method | None = None,
        capacity: int = 1,
        encoder: Backbone | None = None,
    ) -> None:
        loaded = {name: self._checked(backbone, name, prompt) for name, prompt in (prompts or {}).items()}
        if room is None and not loaded:
            raise UserError("a PromptBank needs a prompt, or room=... to say what will come, such as room=DePT()")
        methods = [prompt.method for prompt in loaded.values()] + ([] if room is None else [_folded(backbone, room)])
        self._backbone = backbone
        self._changing = threading.Lock()  # of who makes the next arrays, which may take long
        self._lock = threading.Lock()  # of who reads them or puts them in place
        self._slots: dict[str, int] = {}
        self._encoders = SavedEncoders(backbone, encoder)
        self._readers: dict[str, _Reader] = {}
        room_of_all, size = _Room.build(backbone, room_for(methods)), max(capacity, len(loaded), 1)
        self._free = list(range(size))
        self._now = _Arrays(room_of_all, room_of_all.empty(size), size)
        for name, prompt in loaded.items():
            self._put(name, prompt)

    @property
    def model(self) -> PromptedModel:
        """The model of the bank's room, which runs the rows that `rows` returns; `take` returns the two together."""
        return self._now.room.model

    @property
    def frozen(self) -> Tree:
        """The backbone's parameters, for what takes the model, these and the rows."""
        return self._backbone.params

    @property
    def names(self) -> list[str]:
        """The names of the tasks."""
        with self._lock:
            return list(self._slots)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that the bank's arrays take."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._now.stack))

    @property
    def capacity(self) -> int:
        """Tasks that the bank can hold before it grows."""
        with self._lock:
            return len(self._slots) + len(self._free)

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    def accepts(self, method: Method) -> bool:
        """Returns whether a prompt of `method` can be stacked with those here, be it that the bank must grow for it."""
        try:
            room_for([self.model.method, method])
        except UserError:
            return False
        return True

    def add(self, name: str, prompt: Source) -> None:
        """Adds a task, or replaces the one of that name. Batches under way are not disturbed.

        Raises `UserError` for a prompt that cannot be loaded, was tuned on another backbone, or cannot be stacked with
        those here; the bank is then as it was.
        """
        self._put(name, self._checked(self._backbone, name, prompt))

    def remove(self, name: str) -> None:
        """Removes a task. Batches under way are not disturbed. Raises `UserError` for a name that is not there."""
        with self._lock:
            slot = self._slot(name)
            del self._slots[name], self._readers[name]
            self._free.append(slot)

    def rows(self, names: Sequence[str], texts: Sequence[str] | None = None) -> Rows:
        """Returns what a batch is run with whose row i belongs to task `names[i]`.

        Args:
          names: of the tasks, B of them.
          texts: B texts as the tasks' templates make them (without a masked model's mask), for methods with an encoder,
            which reads each text once; `encoding` (B, H) is then what it says of them. Without texts it is left open.

        Raises `UserError` for a name that is not there, and an encoder that cannot be loaded or is not the prompt's.
        """
        return self.take(names, texts)[1]

    def take(self, names: Sequence[str], texts: Sequence[str] | None = None) -> tuple[PromptedModel, Rows]:
        """Returns what `rows` does, and the model that runs it, also when another thread makes the bank larger."""
        with self._lock:
            room, stack, _ = self._now
            slots = np.asarray([self._slot(name) for name in names], np.int32)
            readers = [self._readers[name] for name in names]
            taken = _take(stack, slots)
        front = taken["front"]
        if front is None and room.has_prompt:
            front = _fronts(room.model, taken["trainable"], self._backbone.params, taken["length"])
        encoding = None
        if texts is not None and room.model.method.encoder_choice() is not None:
            encoding = _encodings(readers, names, texts)
        return room.model, Rows(taken["trainable"], front, apart=True, encoding=encoding)

    def _slot(self, name: str) -> int:
        if name not in self._slots:
            there = ", ".join(list(self._slots)[:20])
            raise UserError(f"no prompt is loaded for task '{name}'; there are: {there}.{nearest(name, self._slots)}")
        return self._slots[name]

    @staticmethod
    def _checked(backbone: Backbone, name: str, prompt: Source) -> Prompt:
        where, checked = usable_prompt(backbone, prompt, name)
        if checked.method.tunes_backbone:
            raise UserError(f"{where} is a whole model of its own and cannot be stacked; use it by itself")
        return checked

    def _put(self, name: str, prompt: Prompt) -> None:
        with self._changing:  # all that takes long is done beside the arrays in use, which others go on reading
            room, stack, size = self._now
            method = room_for([room.model.method, prompt.method])
            if not has_room(room.model.method, prompt.method):
                room, stack = self._moved(self._now, method)
            member = room.member(prompt.method, without_encoder(prompt.trainable))
            if name not in self._slots and not self._free:
                size = max(math.ceil(size * GROWTH), size + 1)
                stack = _grown(stack, size)
            with self._lock:
                free = self._free + list(range(self._now.size, size))
                slot = self._slots[name] if name in self._slots else free[0]
                self._now = _Arrays(room, _put(stack, slot, member), size)
                self._slots[name] = slot
                self._readers[name] = _Reader(self._encoders, prompt)
                self._free = [place for place in free if place != slot]

    def _moved(self, old: _Arrays, method: Method) -> tuple[_Room, Tree]:
        """Returns a larger room, and the arrays of all tasks moved into it."""
        logger.info("the prompt bank grows to hold %s; batches are compiled anew", method)
        room = _Room.build(self._backbone, method)
        moved = jax.vmap(lambda tree: move_in(old.room.model.method, tree, method, room.shapes))(old.stack["trainable"])
        # Copied, for what shares its memory with the old arrays would be lost to their readers when `_put` takes it.
        kept = jax.tree.map(jnp.copy, {"trainable": moved, "length": old.stack["length"]})
        new = {**room.empty(old.size), **kept}
        if room.keeps_front:
            for slot in list(self._slots.values()):
                member = _take(new, np.int32(slot))
                new = _put(new, slot, room.with_front(member["trainable"], member["length"]))
        return room, new


@dataclasses.dataclass(frozen=True)
class _Room:
    """What a bank's arrays hold of each task.

    Attributes:
      backbone: the frozen model.
      model: the backbone with the method that has room for all tasks.
      shapes: of that method's parameters.
      has_prompt: whether it puts a prompt in front of the text, the same for all texts.
      keeps_front: whether what the prompt is to a text is kept as well; an encoder computes nothing of it ahead.
    """

    backbone: Backbone
    model: PromptedModel
    shapes: Tree
    has_prompt: bool
    keeps_front: bool

    @classmethod
    def build(cls, backbone: Backbone, method: Method) -> _Room:
        model = PromptedModel.build(backbone, method)
        has_prompt = method.positions_in_front() > 0
        has_prompt = has_prompt and not method.by_instance  # then it is made of each text
        keeps_front = has_prompt and backbone.config.is_causal
        return cls(backbone, model, model.shapes(backbone.width), has_prompt, keeps_front)

    def member(self, method: Method, trainable: Tree) -> Tree:
        """Returns what is held of a task."""
        moved = move_in(method, trainable, self.model.method, self.shapes)
        if not self.has_prompt:
            return {"trainable": moved, "length": None, "front": None}
        return self.with_front(moved, jnp.asarray(method.positions_in_front(), jnp.int32))

    def with_front(self, trainable: Tree, length: Array) -> Tree:
        front = front_of(self.model, trainable, self.backbone.params, length) if self.keeps_front else None
        return {"trainable": trainable, "length": length, "front": front}

    def empty(self, count: int) -> Tree:
        """Returns the arrays of `count` tasks, all zeros."""
        zeros = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), self.shapes)
        member = jax.eval_shape(lambda: self.member(self.model.method, zeros))
        return jax.tree.map(lambda like: jnp.zeros((count, *like.shape), like.dtype), member)


class _Arrays(NamedTuple):
    """A bank's arrays, with a leading axis of `size` tasks, and the room that they are made for.

    They are replaced together, so that nobody, not even after an interrupt, sees the one without the other.
    """

    room: _Room
    stack: Tree
    size: int


class _Reader:
    """What reads the texts of a prompt, which is loaded when a text comes."""

    def __init__(self, encoders: SavedEncoders, prompt: Prompt) -> None:
        tuned = {name: tree for name, tree in prompt.trainable.items() if name == ENCODER}
        self._encoders, self._prompt = encoders, dataclasses.replace(prompt, trainable=tuned)

    @functools.cached_property
    def encoder(self) -> TextEncoder:
        encoder = self._encoders.of(self._prompt)
        assert encoder is not None
        return encoder


def _encodings(readers: Sequence[_Reader], names: Sequence[str], texts: Sequence[str]) -> Array:
    """Returns what each row's encoder says of its text, (B, H) float32."""
    if len(texts) != len(readers):
        raise UserError(f"{len(texts)} texts are given for {len(readers)} rows; give one for each")
    found: dict[int, np.ndarray] = {}
    for reader in dict.fromkeys(readers):
        places = [place for place, own in enumerate(readers) if own is reader]
        try:
            encoder = reader.encoder
        except UserError as error:
            raise UserError(f"task '{names[places[0]]}': {error}") from None
        vectors = encoder.vectors(encoder.tokens([texts[place] for place in places]))
        found.update(zip(places, vectors, strict=True))
    return jnp.asarray(np.stack([found[place] for place in range(len(readers))]))


def usable_prompt(backbone: Backbone, prompt: Source, name: str) -> tuple[str, Prompt]:
    """Returns what messages call a prompt, and the prompt itself, its method resolved, and folded where it can be.

    Args:
      backbone: the one that it must have been tuned on.
      prompt: a `Prompt`, or the path of one in any format that `load_prompt` knows.
      name: of its task.

    Raises `UserError` for one that cannot be read, belongs to another backbone, or whose parameters are not those of
    its method, or not all finite numbers.
    """
    from deptjax.interop.prompts import load_prompt  # formats are loaded when a file is named

    if not isinstance(name, str) or not name:
        raise UserError(f"a task is named {name!r}; its name must be a text of at least one character")
    where = f"prompt '{name}'"
    if isinstance(prompt, (str, os.PathLike)):
        where = str(prompt)
        try:
            prompt = load_prompt(prompt, backbone)
        except OSError as error:
            raise UserError(f"{where} cannot be read: {error.strerror}") from error
    elif not isinstance(prompt, Prompt):
        raise UserError(f"{where} is a {type(prompt).__name__}; give a Prompt, or the path of one")
    prompt.check_backbone(backbone, where)
    prompt.check_is_of_a_task(where)
    prompt = prompt.on(backbone)
    check_parameters(backbone, prompt.method, without_encoder(prompt.trainable), where)
    for path, leaf in jax.tree_util.tree_leaves_with_path(prompt.trainable):
        if not (jnp.issubdtype(leaf.dtype, jnp.floating) and bool(np.all(np.isfinite(np.asarray(leaf))))):
            tensor = "/".join(str(key.key) for key in path)
            raise UserError(f"{where}: tensor '{tensor}' holds what is no finite number; tune it again")
    method, trainable = prompt.method.resolve(backbone.width).fold(prompt.trainable)
    return where, dataclasses.replace(prompt, method=method, trainable=trainable)


def _folded(backbone: Backbone, method: Method) -> Method:
    """Returns the method of which a run of `method` saves its prompt."""
    method = method.resolve(backbone.width)
    shapes = PromptedModel.build(backbone, method).shapes(backbone.width)
    return method.fold(jax.tree.map(lambda like: np.zeros(like.shape, like.dtype), shapes))[0]


def _grown(stack: Tree, size: int) -> Tree:
    """Returns the arrays with room for `size` tasks. Batches are not compiled anew for it."""
    return jax.tree.map(lambda a: jnp.pad(a, [(0, size - a.shape[0])] + [(0, 0)] * (a.ndim - 1)), stack)


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: Tree, slot: Array | int, member: Tree) -> Tree:
    return jax.tree.map(lambda all_, one: all_.at[slot].set(one), stack, member)


@jax.jit
def _take(stack: Tree, slots: Array) -> Tree:
    return jax.tree.map(lambda a: a[slots], stack)


@functools.partial(jax.jit, static_argnums=0)
def _fronts(model: PromptedModel, trainable: Tree, frozen: Tree, lengths: Array) -> Any:
    return jax.vmap(lambda tree, length: model.front(tree, frozen, length), axis_name=MAPPED)(trainable, lengths)
