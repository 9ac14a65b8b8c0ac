"""Reads the text of a compiled program: computations, their instructions, and how often each of them runs.

The text is that of `compiled.as_text()`: optimised HLO, which every backend of XLA prints alike. What the instructions
cost is counted in `deptjax.planning.count`; here is the grammar and the call graph.

    %name = bf16[16,256]{1,0:T(8,128)S(1)} opcode(%operand, ...), attribute=..., calls=%computation

A `while` says nothing in its shape of how often it turns. XLA's own `cost_analysis` counts its body once; here it is
its `known_trip_count` where the backend has written one (CPU, GPU), else it is read from the loop itself: a counter
that starts at a constant, grows by a constant, and is compared with a constant, as `lax.scan` makes it (TPU).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?[\]})]) ([a-z][a-z0-9\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([0-9,<= ]*)\](?:\{([^{}]*)\})?")
_NAMES = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|branch_computations|called_computations)=(\{[^}]*\}|%[\w.\-]+)")
_BITS = {"pred": 8, "token": 0, "opaque": 0}  # a pred is a byte; every other type has its bits in its name
_SUB_BYTE = {"s2": 2, "u2": 2, "s4": 4, "u4": 4}  # packed in memory


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: `dtype` as HLO names it (`bf16`, `f32`), its dimensions, and the memory space of its layout.

    `space` is 0 for a device's main memory; on a TPU 1 is the vector memory on the chip, others hold semaphores.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        """The bytes of the elements, without the padding of a tiled layout."""
        return -(-self.size * _bits(self.dtype) // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: its result's arrays (several for a tuple), its opcode, the names of its operands, the rest as text."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    text: str
    is_root: bool

    @functools.cached_property
    def called(self) -> dict[str, tuple[str, ...]]:
        """The computations that it names, by attribute: `calls`, `to_apply`, `body`, `condition`, ..."""
        return {key: tuple(_NAMES.findall(names)) for key, names in _CALLED.findall(self.text)}

    @property
    def number(self) -> int | None:
        """The number of a parameter, or the value of an integer constant; `None` for all else."""
        found = re.match(r"(-?\d+)\)", self.text) if self.opcode in ("parameter", "constant") else None
        return int(found[1]) if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """A list of instructions in their order."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """The instructions by name."""
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Who uses the result of each instruction."""
        found: dict[str, list[Instruction]] = {instruction.name: [] for instruction in self.instructions}
        for instruction in self.instructions:
            for name in dict.fromkeys(instruction.operands):
                found[name].append(instruction)
        return found

    @property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """The parameters by their number."""
        return {i.number: i for i in self.instructions if i.opcode == "parameter" and i.number is not None}

    def shapes_of(self, instruction: Instruction) -> list[tuple[Shape, ...]]:
        """Returns the shapes of an instruction's operands."""
        return [self.by_name[name].shapes for name in instruction.operands]


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str

    @classmethod
    def parse(cls, text: str) -> Module:
        """Returns the program that a text describes. Raises `ValueError` for one without an entry computation."""
        computations: dict[str, Computation] = {}
        entry = ""
        for is_entry, name, lines in _blocks(text):
            computations[name] = Computation(name, tuple(_instructions(lines)))
            entry = name if is_entry else entry
        if not entry:
            raise ValueError("the text holds no ENTRY computation; give compiled.as_text()")
        return cls(computations, entry)

    def trip_count(self, caller: Computation, loop: Instruction) -> int | None:
        """Returns how often the body of a `while` runs, or `None` where the program does not say."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text)
        return int(known[1]) if known else self._counted(caller, loop)

    def _counted(self, caller: Computation, loop: Instruction) -> int | None:
        """Returns the trip count of a loop that counts: from a constant, by a constant, up to a constant."""
        condition = self.computations[loop.called["condition"][0]]
        body = self.computations[loop.called["body"][0]]
        compared = self._compared(condition)
        if compared is None:
            return None
        index, limit, direction = compared
        start = _integer(caller, _tuple_element(caller, loop.operands[0], index))
        step = self._step(body, index)
        if start is None or step is None or step < 1:
            return None
        return max(0, math.ceil((limit - start + (direction == "LE")) / step))

    def _compared(self, condition: Computation) -> tuple[int, int, str] | None:
        """Returns (index of the counter in the loop's tuple, limit, direction) of a condition `counter < limit`."""
        compare, operands = self._through_fusion(condition, condition.root)
        if compare.opcode != "compare":
            return None
        told = re.search(r"direction=(\w+)", compare.text)
        direction = told[1] if told else ""
        if direction in ("GT", "GE"):
            operands, direction = operands[::-1], {"GT": "LT", "GE": "LE"}[direction]
        index, limit = _index(operands[0]), _integer(condition, operands[1])
        return None if index is None or limit is None or direction not in ("LT", "LE") else (index, limit, direction)

    def _step(self, body: Computation, index: int) -> int | None:
        """Returns by how much a turn of the loop raises the element `index` of its tuple."""
        new = _tuple_element(body, body.root.name, index)
        while new is not None and new.opcode == "copy":
            new = body.by_name[new.operands[0]]
        if new is None:
            return None
        add, operands = self._through_fusion(body, new)
        steps = [_integer(body, operand) for operand in operands] if add.opcode == "add" else []
        return next((step for step in steps if step is not None), None)

    def _through_fusion(self, caller: Computation, made: Instruction) -> tuple[Instruction, list[Instruction]]:
        """Returns what computes a value, and what it computes it of; where a fusion does it, seen through it."""
        if made.opcode != "fusion":
            return made, [caller.by_name[name] for name in made.operands]
        inside = self.computations[made.called["calls"][0]]
        sources = [inside.by_name[name] for name in inside.root.operands]
        return inside.root, [
            caller.by_name[made.operands[source.number]]
            if source.opcode == "parameter" and source.number is not None
            else source
            for source in sources
        ]


def _blocks(text: str) -> Iterator[tuple[bool, str, list[str]]]:
    lines: list[str] | None = None
    name, is_entry = "", False
    for line in text.splitlines():
        if lines is None:
            found = _COMPUTATION.match(line)
            if found:
                is_entry, name, lines = bool(found[1]), found[2], []
        elif line.startswith("}"):
            yield is_entry, name, lines
            lines = None
        else:
            lines.append(line)


def _instructions(lines: list[str]) -> Iterator[Instruction]:
    for line in lines:
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        rest = found[5]
        operands = (
            () if found[4] in ("constant", "parameter") else tuple(_NAMES.findall(rest[: _end_of_operands(rest)]))
        )
        yield Instruction(found[2], _shapes(found[3]), found[4], operands, rest, bool(found[1]))


def _end_of_operands(rest: str) -> int:
    """Returns where the operands end: at the parenthesis that closes those before it (layouts have some of their own).

    >>> _end_of_operands("f32[8]{0:T(8)} %a, %b), calls=%c")
    21
    """
    depth = 0
    for found in re.finditer(r"[()]", rest):
        depth += 1 if found[0] == "(" else -1
        if depth < 0:
            return found.start()
    return len(rest)


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(_shape(*found) for found in _SHAPE.findall(text))


@functools.lru_cache(maxsize=65536)
def _shape(dtype: str, dims: str, layout: str) -> Shape:
    space = re.search(r"S\((\d+)\)", layout)
    sizes = tuple(int(size.lstrip("<= ")) for size in dims.split(",") if size)
    return Shape(dtype, sizes, int(space[1]) if space else 0)


def _bits(dtype: str) -> int:
    """Returns the bits that one element takes in memory.

    >>> _bits("bf16"), _bits("pred"), _bits("f8e4m3fn"), _bits("s4")
    (16, 8, 8, 4)
    """
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.match(r"[a-z]+(\d+)", dtype)
    if found is None:
        return 0
    return _SUB_BYTE.get(dtype, int(found[1]))


def _index(instruction: Instruction) -> int | None:
    found = re.search(r"index=(\d+)", instruction.text) if instruction.opcode == "get-tuple-element" else None
    return int(found[1]) if found else None


def _tuple_element(computation: Computation, name: str, index: int) -> Instruction | None:
    made = computation.by_name[name]
    return computation.by_name[made.operands[index]] if made.opcode == "tuple" else None


def _integer(computation: Computation, instruction: Instruction | None) -> int | None:
    """Returns an integer constant, through copies of it."""
    while instruction is not None and instruction.opcode in ("copy", "copy-done", "copy-start", "bitcast"):
        instruction = computation.by_name[instruction.operands[0]]
    return instruction.number if instruction is not None and instruction.opcode == "constant" else None
