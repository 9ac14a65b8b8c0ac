"""Bytes of main memory that one operation of a compiled program reads and writes; `deptjax.planning.count` sums them.

The bytes are those of the arrays, by what the operation does with them, as XLA's own cost model has it: a fusion reads
its operands once and writes its results once, whatever happens inside; of an operand that is only sliced or gathered
from, what comes out is read; an update in place writes what is updated.
"""

from __future__ import annotations

from deptjax.planning.hlo import Computation, Instruction, Module, Shape

_NOTHING = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "opt-barrier",
    "partition-id",
    "replica-id",
    "while",
    "conditional",
    "call",
    "async-start",
)
_SLICES = ("dynamic-slice", "slice", "gather")
# Calls of the compiler's own that move nothing: a buffer is named, or seen as another shape.
_EMPTY_CALLS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding")
_ALIASES = ("bitcast", "reshape")


def traffic(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Returns the bytes of main memory that an instruction outside of a fusion reads and writes."""
    opcode = instruction.opcode
    if opcode in _NOTHING or opcode.endswith(("-done", "-update")):
        return 0.0
    operands = computation.shapes_of(instruction)
    if opcode == "custom-call" and any(f'"{name}"' in instruction.text for name in _EMPTY_CALLS):
        return 0.0
    if opcode == "copy-start":  # the result's tuple has where to and where from
        return _bytes(instruction.shapes[:2])
    if opcode == "slice-start":
        moved = instruction.shapes[1]
        return float(_main(operands[0]) * moved.nbytes + _bytes([moved]))
    if opcode in _SLICES:
        return float(_main(operands[0]) * instruction.shapes[0].nbytes) + _bytes(instruction.shapes)
    if opcode == "dynamic-update-slice":
        return _bytes(operands[1]) + _main(instruction.shapes) * operands[1][0].nbytes
    if opcode == "scatter":
        return _bytes(operands[1]) + _bytes(operands[2]) + 2 * _main(instruction.shapes) * operands[2][0].nbytes
    if opcode == "fusion":
        return _of_fusion(module, instruction, operands)
    return sum(_bytes(shapes) for shapes in operands) + _bytes(instruction.shapes)


def _of_fusion(module: Module, fusion: Instruction, operands: list[tuple[Shape, ...]]) -> float:
    inside = module.computations[fusion.called["calls"][0]]
    total = 0.0
    for number, shapes in enumerate(operands):
        if len(shapes) == 1 and number in inside.parameters:
            total += _main(shapes) * _read(module, inside, inside.parameters[number])
        else:
            total += _bytes(shapes)
    root = inside.root
    results = [inside.by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(results) != len(fusion.shapes):
        return total + _bytes(fusion.shapes)
    return total + sum(
        _main([shape]) * _written(module, inside, result, shape) for shape, result in zip(fusion.shapes, results)
    )


def _read(module: Module, inside: Computation, source: Instruction) -> float:
    """Returns how much of an array is read by those who use it inside a fusion, at most all of it."""
    total, whole = 0.0, float(source.shapes[0].nbytes)
    for user in inside.users[source.name]:
        places = [n for n, name in enumerate(user.operands) if name == source.name]
        if user.opcode in _ALIASES:
            total += _read(module, inside, user)
        elif user.opcode in _SLICES and places == [0]:
            total += user.shapes[0].nbytes
        elif user.opcode == "fusion":
            nested = module.computations[user.called["calls"][0]]
            total += sum(_read(module, nested, nested.parameters[place]) for place in places)
        elif not _passes_on(user, places):
            return whole
    return min(total, whole)


def _passes_on(user: Instruction, places: list[int]) -> bool:
    """Returns whether an operation only hands an array on: updates it in place, returns it, goes on sending it."""
    if user.opcode in ("dynamic-update-slice", "scatter"):
        return places == [0]
    return user.opcode == "tuple" or _goes_on(user)


def _goes_on(instruction: Instruction) -> bool:
    """Returns whether this is a part of a collective that a TPU spreads over several fusions."""
    return "chain_id=" in instruction.text or '"AsyncCollective' in instruction.text


def _written(module: Module, inside: Computation, result: Instruction, shape: Shape) -> float:
    """Returns how much of a fusion's result is written: all of it, unless an operand is updated in place."""
    if result.opcode == "parameter" or _goes_on(result):
        return 0.0
    if result.opcode in _ALIASES:
        return _written(module, inside, inside.by_name[result.operands[0]], shape)
    if result.opcode == "fusion":
        nested = module.computations[result.called["calls"][0]]
        if nested.root.opcode != "tuple":
            return _written(module, nested, nested.root, shape)
    if result.opcode in ("dynamic-update-slice", "scatter") and _is_operand(inside, result.operands[0]):
        changed = inside.by_name[result.operands[1 if result.opcode == "dynamic-update-slice" else 2]]
        return float(changed.shapes[0].nbytes)
    return float(shape.nbytes)


def _is_operand(inside: Computation, name: str) -> bool:
    """Returns whether a value is one of the fusion's own operands, perhaps seen as another shape."""
    source = inside.by_name[name]
    while source.opcode in _ALIASES:
        source = inside.by_name[source.operands[0]]
    return source.opcode == "parameter"


def _bytes(shapes: tuple[Shape, ...] | list[Shape]) -> float:
    """Returns the bytes of those arrays that lie in main memory."""
    return float(sum(shape.nbytes for shape in shapes if shape.space == 0))


def _main(shapes: tuple[Shape, ...] | list[Shape]) -> bool:
    """Returns whether an array lies in main memory."""
    return shapes[0].space == 0
