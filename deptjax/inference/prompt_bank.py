"""`PromptBank`: many tuned prompts on one frozen backbone, stacked, so that each row of a batch can use its own.

The prompts' parameters lie on the device with a leading task axis, and a batch gathers those of its rows. A prompt that
is shorter than the others, or of a smaller rank, is padded so that it computes what it did
(`deptjax.methods.room`). On a causal backbone a task also has its prompt's keys and values, computed when the prompt
is added and never again.

A program that runs a batch sees the gathered rows and not the bank: how many tasks there are, and which, is no part of
its shape. So tasks come and go without compiling anything anew, as long as they fit the bank's room.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deptjax.errors import UserError, nearest
from deptjax.inference.rows import Rows, front_of
from deptjax.methods.base import Method
from deptjax.methods.room import has_room, move_in, room_for
from deptjax.models.backbone import Backbone
from deptjax.models.prompted import PromptedModel
from deptjax.prompt import Prompt
from deptjax.typing import Array, Tree

logger = logging.getLogger(__name__)

GROWTH = 1.25  # a full bank makes room for a quarter more: bounded waste, and few copies


class PromptBank:
    """Saved prompts of one method kind on one backbone, by name; safe to use from several threads.

    ```python
    bank = PromptBank(backbone, {"sst2": "runs/sst2/prompt", "cola": "runs/cola/prompt"})
    rows = bank.rows(["cola", "sst2", "cola"])  # what a batch of three is decoded with
    ```

    Args:
      backbone: the frozen model; a prompt tuned on another one is refused.
      prompts: a `Prompt` or a folder for each name; at least one, unless `room` is given.
      room: a method that describes the largest prompt to come, such as `DePT(prompt_length=100, rank=60)`. A prompt
        that does not fit makes the bank larger, and batches are compiled anew. By default the largest of `prompts`.
      capacity: tasks to make room for at the start.

    Attributes:
      model: the `PromptedModel` of the bank's room, which runs the rows that `rows` returns.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompts: Mapping[str, Prompt | str | os.PathLike[str]] | None = None,
        *,
        room: Method | None = None,
        capacity: int = 1,
    ) -> None:
        loaded = {name: self._checked(backbone, name, prompt) for name, prompt in (prompts or {}).items()}
        if room is None and not loaded:
            raise UserError("a PromptBank needs a prompt, or room=... to say what will come, such as room=DePT()")
        methods = [prompt.method for prompt in loaded.values()] + (
            [] if room is None else [room.resolve(backbone.width)]
        )
        self._backbone = backbone
        self._lock = threading.Lock()
        self._slots: dict[str, int] = {}
        self._free = list(range(max(capacity, len(loaded), 1)))
        self._settle(room_for(methods))
        self._stack = self._zeros(len(self._free))
        for name, prompt in loaded.items():
            self.add(name, prompt)

    @property
    def frozen(self) -> Tree:
        """The backbone's parameters, for what takes the model, these and the rows."""
        return self._backbone.params

    @property
    def names(self) -> list[str]:
        """The names of the tasks."""
        return list(self._slots)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that the bank's arrays take."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._stack))

    @property
    def capacity(self) -> int:
        """Tasks that the bank can hold before it grows."""
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

    def add(self, name: str, prompt: Prompt | str | os.PathLike[str]) -> None:
        """Adds a task, or replaces the one of that name. Batches under way are not disturbed.

        Raises `UserError` for a prompt that cannot be loaded, was tuned on another backbone, or cannot be stacked with
        those here; the bank is then as it was.
        """
        prompt = self._checked(self._backbone, name, prompt)
        room = room_for([self.model.method, prompt.method])
        with self._lock:
            if not has_room(self.model.method, prompt.method):
                self._move(room)
            member = self._member(prompt.method, prompt.trainable)
            slot = self._slots.get(name)
            if slot is None:
                if not self._free:
                    self._grow()
                slot = self._free.pop(0)
            self._stack = _put(self._stack, slot, member)
            self._slots[name] = slot

    def remove(self, name: str) -> None:
        """Removes a task. Batches under way are not disturbed. Raises `UserError` for a name that is not there."""
        with self._lock:
            self._free.append(self._slot(name))
            del self._slots[name]

    def rows(self, names: Sequence[str]) -> Rows:
        """Returns what a batch is run with whose row i belongs to task `names[i]`.

        Raises `UserError` for a name that is not there.
        """
        with self._lock:
            slots = np.asarray([self._slot(name) for name in names], np.int32)
            taken = _take(self._stack, slots)
        front = taken["front"]
        if front is None and self._has_prompt:
            front = _fronts(self.model, taken["trainable"], self._backbone.params, taken["length"])
        return Rows(taken["trainable"], front, apart=True)

    def _slot(self, name: str) -> int:
        if name not in self._slots:
            there = ", ".join(list(self._slots)[:20])
            raise UserError(f"no prompt is loaded for task '{name}'; there are: {there}.{nearest(name, self._slots)}")
        return self._slots[name]

    @staticmethod
    def _checked(backbone: Backbone, name: str, prompt: Prompt | str | os.PathLike[str]) -> Prompt:
        where = f"prompt '{name}'"
        if not isinstance(prompt, Prompt):
            where, prompt = str(prompt), Prompt.load(prompt)
        prompt.check_backbone(backbone, where)
        if prompt.method.tunes_backbone:
            raise UserError(f"{where} is a whole model of its own and cannot be stacked; use it by itself")
        return prompt

    def _settle(self, room: Any) -> None:
        """Makes `room` the method of the bank's model."""
        self.model = PromptedModel.build(self._backbone, room)
        self._shapes = self.model.shapes(self._backbone.width)
        self._has_prompt = room.positions_in_front() > 0
        # An encoder computes nothing of a prompt ahead: what is kept of it would only be a copy.
        self._keeps_front = self._has_prompt and not self._backbone.config.is_encoder_decoder

    def _member(self, method: Method, trainable: Tree) -> Tree:
        """Returns what the stack holds of one task."""
        moved = move_in(method, trainable, self.model.method, self._shapes)
        if not self._has_prompt:
            return {"trainable": moved, "length": None, "front": None}
        return self._with_front(moved, jnp.asarray(method.positions_in_front(), jnp.int32))

    def _with_front(self, trainable: Tree, length: Array) -> Tree:
        front = front_of(self.model, trainable, self._backbone.params, length) if self._keeps_front else None
        return {"trainable": trainable, "length": length, "front": front}

    def _zeros(self, count: int) -> Tree:
        """Returns an empty stack of `count` tasks."""
        method = self.model.method
        zeros = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), self._shapes)
        member = jax.eval_shape(lambda: self._member(method, zeros))
        return jax.tree.map(lambda like: jnp.zeros((count, *like.shape), like.dtype), member)

    def _grow(self) -> None:
        """Makes room for more tasks. Batches are not compiled anew for it."""
        have = len(self._slots)
        want = max(math.ceil(have * GROWTH), have + 1)
        self._stack = jax.tree.map(lambda a: jnp.pad(a, [(0, want - have)] + [(0, 0)] * (a.ndim - 1)), self._stack)
        self._free.extend(range(have, want))

    def _move(self, room: Method) -> None:
        """Moves all tasks into a larger room."""
        logger.info("the prompt bank grows to hold %s; batches are compiled anew", room)
        old, stack = self.model.method, self._stack
        self._settle(room)
        moved = jax.vmap(lambda tree: move_in(old, tree, room, self._shapes))(stack["trainable"])
        self._stack = {**self._zeros(self.capacity), "trainable": moved, "length": stack["length"]}
        if self._keeps_front:
            for slot in self._slots.values():
                member = _take(self._stack, np.int32(slot))
                self._stack = _put(self._stack, slot, self._with_front(member["trainable"], member["length"]))


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: Tree, slot: Array | int, member: Tree) -> Tree:
    return jax.tree.map(lambda all_, one: all_.at[slot].set(one), stack, member)


@jax.jit
def _take(stack: Tree, slots: Array) -> Tree:
    return jax.tree.map(lambda a: a[slots], stack)


@functools.partial(jax.jit, static_argnums=0)
def _fronts(model: PromptedModel, trainable: Tree, frozen: Tree, lengths: Array) -> Any:
    return jax.vmap(lambda tree, length: model.front(tree, frozen, length))(trainable, lengths)
