"""What a compiled program costs one device: products, bytes of main memory, collectives, each as often as it runs.

XLA's `cost_analysis` counts the body of a loop once, however often it turns, and with `scan_layers` nearly all of a
model is in a loop. Here the optimised HLO is walked from its entry; a loop's body counts as often as the loop turns.

- *FLOPs* are those of matrix products and convolutions, 2 for a multiplication and an addition, by the dtype of what is
  multiplied. Elementwise work is not counted: it is bound by memory. A TPU writes products as convolutions, some of
  them with padding that is never multiplied; only pairs that are inside both windows count, as XLA counts them.
- *Bytes of main memory* are an estimate: what each fusion (each operation that stands alone) reads and writes. Of an
  operand that is only sliced, the slice counts; an update in place counts what is updated. On a TPU, arrays in the
  on-chip vector memory (`S(1)`) count nothing, the copies to and from it count. Padding of tiled layouts does not
  count.
- *Collectives* come with what one device sends in the algorithms that use a ring's bandwidth fully: of n devices that
  each hold b bytes, (n - 1) b to gather, 2 b (n - 1) / n to reduce everywhere, b (n - 1) / n to reduce and scatter or
  to exchange, b to permute (Chan et al. 2007, "Collective communication: theory, practice, and experience").
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from deptjax.planning.groups import group_of
from deptjax.planning.hlo import Computation, Instruction, Module, Shape
from deptjax.planning.traffic import traffic

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind over the same axes.

    Attributes:
      kind: `all-gather`, `all-reduce`, ...
      axes: the axes of the mesh over which it runs.
      devices: how many take part in one; in a permutation, those along its axes.
      count: how often it runs in a step.
      bytes: what goes in on one device, all together (for `all-gather` what comes out).
      sent_bytes: what one device sends at least.
    """

    kind: str
    axes: tuple[str, ...]
    devices: int
    count: int
    bytes: float
    sent_bytes: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one run of a program costs one device.

    Attributes:
      flops: of matrix products, by HLO's name of the dtype multiplied.
      memory_bytes: read from and written to main memory, estimated.
      collectives: by kind and axes.
      unknown_loops: loops whose number of turns the program does not say; their bodies count once.
      unknown_kernels: runs of hand-written kernels that do not say what they compute; their FLOPs are not counted.
    """

    flops: dict[str, float]
    memory_bytes: float
    collectives: tuple[Collective, ...]
    unknown_loops: int
    unknown_kernels: int

    @property
    def total_flops(self) -> float:
        """The FLOPs of all dtypes."""
        return sum(self.flops.values())

    @property
    def sent_bytes(self) -> float:
        """What one device sends in all collectives."""
        return sum(collective.sent_bytes for collective in self.collectives)


def count(text: str, mesh: Mapping[str, int]) -> Cost:
    """Returns what a compiled program costs one device.

    Args:
      text: `compiled.as_text()`.
      mesh: the size of each axis of the mesh that it was compiled for, in their order.
    """
    tally = _Counter(Module.parse(text), mesh).of_computation(None, fused=False)
    flops = {key[1]: value for key, value in tally.items() if key[0] == "flops"}
    found = [
        Collective(kind, axes, devices, round(value), tally["bytes", *key[1:]], tally["sent", *key[1:]])
        for key, value in tally.items()
        if key[0] == "collective"
        for _, kind, axes, devices in [key]
    ]
    ordered = tuple(sorted(found, key=lambda c: -c.sent_bytes))
    unknown = (round(tally[what,]) for what in ("unknown_loops", "unknown_kernels"))
    return Cost(flops, tally["memory",], ordered, *unknown)


# Sums by ("flops", dtype), ("memory",), ("collective" | "bytes" | "sent", kind, axes, devices), ("unknown_...",).
Tally = collections.defaultdict[tuple[Any, ...], float]


class _Counter:
    """Walks a program; what a computation costs is kept, since many call the same one."""

    def __init__(self, module: Module, mesh: Mapping[str, int]) -> None:
        self._module = module
        self._mesh = mesh
        self._known: dict[tuple[str, bool], Tally] = {}

    def of_computation(self, name: str | None, fused: bool) -> Tally:
        """Returns the tally of a computation (`None`: the entry). Inside a fusion nothing touches main memory."""
        key = (name or self._module.entry, fused)
        if key not in self._known:
            tally = Tally(float)
            computation = self._module.computations[key[0]]
            for instruction in computation.instructions:
                for what, value in self._of_instruction(computation, instruction, fused).items():
                    tally[what] += value
            self._known[key] = tally
        return self._known[key]

    def _of_instruction(self, computation: Computation, instruction: Instruction, fused: bool) -> Tally:
        opcode, called = instruction.opcode, instruction.called
        if opcode == "while":
            turns = self._module.trip_count(computation, instruction)
            inside = self._sum([*called["condition"], *called["body"]], fused)
            tally = Tally(float, {what: value * (1 if turns is None else turns) for what, value in inside.items()})
            if turns is None:
                tally["unknown_loops",] += 1
            return tally
        if opcode == "conditional":
            branches = [name for key in called for name in called[key] if key != "to_apply"]
            return max((self.of_computation(name, fused) for name in branches), key=_weight, default=Tally(float))
        if opcode in ("call", "async-start"):
            return self._sum([*called.get("to_apply", ()), *called.get("calls", ())], fused)
        tally = self._sum(list(called.get("calls", ())), fused=True) if opcode == "fusion" else Tally(float)
        flops, dtype = _flops(computation, instruction)
        if flops:
            tally["flops", dtype] += flops
        elif '"tpu_custom_call"' in instruction.text:
            tally["unknown_kernels",] += 1
        kind = opcode.removesuffix("-start")
        if kind in COLLECTIVES and _runs_here(computation, instruction):
            self._add_collective(tally, computation, instruction, kind)
        if not fused:
            tally["memory",] += traffic(self._module, computation, instruction)
        return tally

    def _sum(self, names: list[str], fused: bool) -> Tally:
        tally = Tally(float)
        for name in names:
            for what, value in self.of_computation(name, fused).items():
                tally[what] += value
        return tally

    def _add_collective(self, tally: Tally, computation: Computation, instruction: Instruction, kind: str) -> None:
        axes, devices = group_of(instruction.text, self._mesh)
        if devices < 2:
            return
        own = sum(shape.nbytes for shapes in computation.shapes_of(instruction) for shape in shapes)
        if kind == "all-reduce" and _is_scattered(computation, instruction, devices):
            kind = "reduce-scatter"
        key = (kind, axes, devices)
        tally["collective", *key] += 1
        tally["bytes", *key] += own * devices if kind == "all-gather" else own
        tally["sent", *key] += own * _sent_share(kind, devices)


def _sent_share(kind: str, devices: int) -> float:
    """Returns what a device sends in a collective, by what it puts in."""
    if kind == "all-gather":
        return devices - 1
    if kind == "all-reduce":
        return 2 * (devices - 1) / devices
    return 1 if kind in ("collective-permute", "collective-broadcast") else (devices - 1) / devices


def _weight(tally: Tally) -> tuple[float, float]:
    """Returns by what the costliest branch is chosen."""
    return sum(value for key, value in tally.items() if key[0] == "flops"), tally["memory",]


def _runs_here(computation: Computation, instruction: Instruction) -> bool:
    """Returns whether a collective is to be counted where it stands.

    A TPU spreads an asynchronous collective over several fusions, each of which repeats it: the one that starts it,
    those that go on with it beside their own work, the one that ends it. All but the first are left out.
    """
    if "chain_id=" not in instruction.text:
        return True
    return any('custom_call_target="AsyncCollectiveStart"' in other.text for other in computation.instructions)


def _is_scattered(computation: Computation, instruction: Instruction, devices: int) -> bool:
    """Returns whether an all-reduce is only sliced: so a TPU writes a reduce-scatter, as a fusion of the two."""
    users = computation.users[instruction.name]
    sizes = sum(shape.size for shapes in computation.shapes_of(instruction) for shape in shapes)
    return bool(users) and all(u.opcode == "dynamic-slice" and u.shapes[0].size * devices == sizes for u in users)


def _flops(computation: Computation, instruction: Instruction) -> tuple[float, str]:
    """Returns the FLOPs of a product and the dtype multiplied; 0 for everything else."""
    if instruction.opcode not in ("dot", "convolution", "custom-call"):
        return 0.0, ""
    operands = [shapes[0] for shapes in computation.shapes_of(instruction) if shapes]
    if instruction.opcode == "custom-call":
        return _custom_flops(instruction, operands)
    dtype = max((operand.dtype for operand in operands[:2]), key=lambda name: Shape(name, (1,)).nbytes)
    if instruction.opcode == "dot":
        contracted = _dims(instruction.text, "lhs_contracting_dims")
        return 2.0 * instruction.shapes[0].size * math.prod(operands[0].dims[i] for i in contracted), dtype
    return _convolution_flops(instruction, *operands[:2]), dtype


def _convolution_flops(instruction: Instruction, left: Shape, right: Shape) -> float:
    """Returns the FLOPs of the pairs of input and kernel elements that meet inside the window."""
    labels = _LABELS.search(instruction.text)
    if labels is None:
        return 0.0
    window = _WINDOW.search(instruction.text)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    pairs = 1
    for i in range(len(labels[1]) - 2):
        sides = (("input", left), ("kernel", right), ("output", instruction.shapes[0]))
        size = {side: shape.dims[labels[n].index(str(i))] for n, (side, shape) in enumerate(sides, 1)}
        pairs *= _meetings(size, fields, i)
    batch, out = left.dims[labels[1].index("b")], right.dims[labels[2].index("o")]
    features = right.dims[labels[2].index("i")]  # already those of one group
    batch_groups = re.search(r"batch_group_count=(\d+)", instruction.text)
    return 2.0 * pairs * batch * out * features / (int(batch_groups[1]) if batch_groups else 1)


def _meetings(size: dict[str, int], fields: dict[str, str], i: int) -> int:
    """Returns for how many pairs (output position, kernel position) of a dimension there is an input element."""

    def field(name: str, default: str) -> str:
        return fields[name].split("x")[i] if name in fields else default

    low = int(field("pad", "0_0").split("_")[0])
    stride, spread, dilation = (int(field(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    count = 0
    for k in range(size["kernel"]):
        first = k * dilation - low
        for at in range(first, first + size["output"] * stride, stride):
            count += 0 <= at <= (size["input"] - 1) * spread and at % spread == 0
    return count


def _custom_flops(instruction: Instruction, operands: list[Shape]) -> tuple[float, str]:
    """Returns the FLOPs of a product that a library computes: a GPU's cuBLAS, or a kernel that tells its own."""
    told = re.search(r'"cost_estimate":\{"flops":"?(\d+)', instruction.text)
    if told:
        return float(told[1]), operands[0].dtype if operands else ""
    if "__cublas$" not in instruction.text:
        return 0.0, ""
    numbers = re.search(r'"dot_dimension_numbers":(\{.*?\})', instruction.text)
    if numbers is None:
        return 0.0, ""
    contracted = json.loads(numbers[1])["lhs_contracting_dimensions"]
    depth = math.prod(operands[0].dims[int(i)] for i in contracted)
    return 2.0 * instruction.shapes[0].size * depth, operands[0].dtype


def _dims(text: str, name: str) -> list[int]:
    found = re.search(rf"\b{name}=\{{([\d,]*)\}}", text)
    return [int(number) for number in found[1].split(",") if number] if found else []
