"""A training step, compiled for devices that need not be there: what it takes of each, and the least time it can take.

    plan = make_plan("llama2-7b", config, method, placement, CHIPS["v5e"], Rows(64, 256, 8))

The step is `deptjax.training.step.make_train_step`, with the loss and the optimiser that `train` gives it, compiled by
the devices' own compiler. All arrays are abstract: nothing is allocated, so a model may be larger than this machine.

What is compiled: the program and its memory. What is counted, in the compiled program: FLOPs, collectives
(`deptjax.planning.count`). What is estimated: bytes of main memory, from what each operation reads and writes, and the
*roofline* time, the largest of FLOPs by the chip's peak, bytes by its memory's bandwidth, and bytes sent by its
interconnect (Williams et al. 2009). A step takes longer than that: it is what remains if the three overlap perfectly
and each runs at its published peak.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deptjax.errors import UserError
from deptjax.methods.base import Method
from deptjax.models.bert import BertConfig
from deptjax.models.prompted import PromptedModel
from deptjax.models.sizes import Config, parameter_count, parameter_shapes
from deptjax.planning.chips import Chip
from deptjax.planning.count import Cost, count
from deptjax.quantization import quantize_tree
from deptjax.sharding import Placement
from deptjax.training.config import TrainConfig
from deptjax.training.state import TrainState, count_trained
from deptjax.training.step import make_loss, make_train_step
from deptjax.typing import Tree

# The two ways in which a TPU's compiler refuses a step: by all that it needs, and by its temporaries alone.
_ALL = re.compile(r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?)")
_TEMPORARIES = re.compile(r"HLO temporaries \(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)")
_UNITS = {**dict.fromkeys("0123456789", 1), "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Rows(NamedTuple):
    """The shape of a batch: rows over all devices, source tokens and target tokens of each, padding included."""

    batch: int
    length: int
    targets: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one chip.

    Attributes:
      weights: of the frozen backbone.
      state: trained parameters, the optimiser's moments, the step and the key.
      rest: activations and other temporaries, the batch, the program itself, the padding of tiled layouts.
      total: all of it, as the compiler has it.
      limit: of the chip.
    """

    weights: int
    state: int
    rest: int
    total: int
    limit: int

    @property
    def fits(self) -> bool:
        """Whether the step runs at all."""
        return self.total <= self.limit


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step takes.

    Attributes:
      model: the name of the backbone.
      method: the kind of the method.
      mesh: the sizes of the mesh's axes that are larger than 1.
      devices: of the mesh.
      chip: its peaks.
      dtype: of the backbone.
      quantize: the scheme of its kernels, `None` where they are in its dtype.
      attention: its implementation, as it was asked for.
      remat: what layers keep for the gradient.
      rows: the shape of the batch.
      backbone_parameters: of the backbone.
      trainable_parameters: of what is tuned.
      memory: on one chip.
      cost: of one chip in one step; `None` where the compiler refused a step that does not fit.
      compile_seconds: how long the compiler took.
    """

    model: str
    method: str
    mesh: dict[str, int]
    devices: int
    chip: Chip
    dtype: str
    quantize: str | None
    attention: str
    remat: str
    rows: Rows
    backbone_parameters: int
    trainable_parameters: int
    memory: Memory
    cost: Cost | None
    compile_seconds: float

    @property
    def seconds(self) -> dict[str, float]:
        """The least time of each part: `compute`, `memory`, `network`; empty where the step does not fit."""
        if self.cost is None:
            return {}
        return {
            "compute": sum(flops / self.chip.peak(dtype) for dtype, flops in self.cost.flops.items()),
            "memory": self.cost.memory_bytes / self.chip.bandwidth,
            "network": self.cost.sent_bytes / self.chip.interconnect if self.chip.interconnect else 0.0,
        }

    @property
    def roofline_seconds(self) -> float:
        """The least time of a step, NaN where it does not fit."""
        return max(self.seconds.values(), default=math.nan)

    @property
    def bound(self) -> str:
        """Which part takes the longest, or an empty text."""
        seconds = self.seconds
        return max(seconds, key=seconds.__getitem__) if seconds else ""

    @property
    def tokens_per_second(self) -> float:
        """Source and target tokens of a batch that one chip works through in a second at most; a prompt is none."""
        return self.rows.batch * (self.rows.length + self.rows.targets) / self.roofline_seconds / self.devices

    def to_json(self) -> dict[str, Any]:
        """Returns all of it as plain values; a number that there is not is `None`."""
        fields = dataclasses.asdict(self) | {"rows": self.rows._asdict()}
        fields["memory"]["fits"] = self.memory.fits
        numbers = {"roofline_seconds": self.roofline_seconds, "tokens_per_second_per_chip": self.tokens_per_second}
        plain = {name: None if math.isnan(value) else value for name, value in numbers.items()}
        return {**fields, "seconds": self.seconds, "bound": self.bound or None, **plain}


def make_plan(
    model: str,
    config: Config,
    method: Any,
    placement: Placement,
    chip: Chip,
    rows: Rows,
    train: TrainConfig | None = None,
) -> Plan:
    """Returns what one training step takes.

    Args:
      model: what the plan calls the backbone.
      config: of the backbone, with how it is computed: dtype, attention, whether layers are scanned.
      method: what is tuned.
      placement: the mesh, over devices at hand or of a topology.
      chip: the peaks of its devices.
      rows: the shape of a batch.
      train: settings of training; those that do not change the step are not looked at.

    Raises `UserError` for a batch that does not divide, a text that does not fit the model or the method.
    """
    train = TrainConfig() if train is None else train
    config, method = dataclasses.replace(config, remat=train.remat), method.resolve(config.width)
    if isinstance(config, BertConfig):  # one place is filled, and which token it holds is no part of the program
        config, rows = dataclasses.replace(config, mask_token=0), rows._replace(targets=1)
    check_rows(model, config, method, placement, rows)
    prompted = PromptedModel(config.make(method.sites()), method, train.share_prompt)
    frozen, trainable = abstract_trees(config, prompted)
    tx = train.optimizer(train.learning_rates(method.learning_rates(1.0)), method.groups(trainable))
    state = jax.eval_shape(lambda tree: TrainState.create(tree, tx, jax.random.key(0)), trainable)
    state = _placed(state, placement.of_trainable(state, method.axes))
    frozen = _placed(frozen, placement.of_backbone(frozen))
    batch = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement.rows)
        for name, leaf in _batch(rows, method).items()
    }
    step = make_train_step(make_loss(prompted, dropout=train.dropout), tx, placement, method.axes)
    start = time.perf_counter()
    weights, own = _bytes(frozen), _bytes(state)
    cost, total, limit = _compiled(step, (state, frozen, batch), weights + own, placement, chip)
    return Plan(
        model=model,
        method=method.kind,
        mesh={axis: size for axis, size in placement.mesh.shape.items() if size > 1},
        devices=placement.mesh.size,
        chip=chip,
        dtype=config.dtype,
        quantize=config.quantize,
        attention=config.attention,
        remat=config.remat,
        rows=rows,
        backbone_parameters=parameter_count(config),
        trainable_parameters=count_trained(trainable, method.groups(trainable)),
        memory=Memory(weights, own, max(0, total - weights - own), total, limit),
        cost=cost,
        compile_seconds=time.perf_counter() - start,
    )


def abstract_trees(config: Config, prompted: PromptedModel) -> tuple[Tree, Tree]:
    """Returns `frozen` and `trainable` as a run has them, their leaves `ShapeDtypeStruct`."""
    shapes = parameter_shapes(config) if config.scan_layers else _one_by_one(parameter_shapes(config))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, config.dtype), shapes)
    if prompted.method.tunes_backbone:
        wide = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), params)
        return {}, {"backbone": wide}
    if config.quantize is not None:
        params = jax.eval_shape(functools.partial(quantize_tree, scheme=config.quantize), params)
    return params, prompted.shapes(config.width)


def _one_by_one(tree: Tree) -> Tree:
    """Returns a tree of stacked layers with each layer apart, as a model has it whose layers are not scanned."""
    if not isinstance(tree, dict):
        return tree
    apart = {name: _one_by_one(child) for name, child in tree.items() if name != "layers"}
    if "layers" in tree:
        layer = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tree["layers"])
        count = jax.tree.leaves(tree["layers"])[0].shape[0]
        apart |= {f"layers_{i}": layer for i in range(count)}
    return apart


def refused_bytes(told: str, arguments: int) -> tuple[int, int] | None:
    """Returns what a step needs and what there is, in bytes, as a compiler that refused it told; `None` if it did not.

    >>> refused_bytes("Ran out of memory in memory space hbm. Used 37.50G of 15.75G hbm.", 0)
    (40265318400, 16911433728)

    Where it only tells of temporaries, the `arguments` come on top.
    """
    whole, temporaries = _ALL.search(told), _TEMPORARIES.search(told)
    found = whole or temporaries
    if found is None:
        return None
    used, limit = (round(float(text.rstrip("KMGT")) * _UNITS[text[-1]]) for text in found.groups())
    return (used if whole else used + arguments), limit


def _compiled(
    step: Any, trees: tuple[Any, ...], arguments: int, placement: Placement, chip: Chip
) -> tuple[Cost | None, int, int]:
    """Returns what a step costs, its bytes on one device, and the device's limit."""
    try:
        compiled = step.lower(*trees).compile()
    except jax.errors.JaxRuntimeError as error:
        refused = refused_bytes(str(error), arguments)
        if refused is None:
            raise
        return None, *refused
    stats = compiled.memory_analysis()
    total = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )
    return count(compiled.as_text(), placement.mesh.shape), int(total), int(chip.memory_bytes)


def check_rows(model: str, config: Config, method: Any, placement: Placement, rows: Rows) -> None:
    """Raises `UserError` for rows that do not divide over the mesh, or do not fit the method or the model."""
    placement.check_batch_size(rows.batch)
    if method.tunes_backbone and config.quantize is not None:
        raise UserError(
            f"quantize '{config.quantize}': method '{method.kind}' trains the weights themselves, and quantised ones "
            "cannot be; plan for it without quantize"
        )
    limit = method.source_limit()
    if limit is not None and rows.length > limit:
        raise UserError(f"length {rows.length} is more than the {limit} of the method; raise the method's max_length")
    behind = 0 if config.is_masked else rows.targets
    total = method.positions_in_front() + rows.length + behind
    if config.context is not None and total > config.context:
        raise UserError(
            f"{method.positions_in_front()} prompt vectors, length {rows.length} and targets of {rows.targets} tokens "
            f"are {total} positions, and '{model}' has {config.context}; lower one of them"
        )


def _batch(rows: Rows, method: Method) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns a batch as ARCHITECTURE.md has it; of a method with an encoder, that has read the texts before.

    Raises `UserError` for an encoder that is tuned, and so a part of the step that nobody has described.
    """
    b, t, u = rows
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "source": ((b, t), jnp.int32),
        "source_mask": ((b, t), bool),
        "targets": ((b, u), jnp.int32),
        "target_mask": ((b, u), bool),
        "label": ((b,), jnp.int32),
        "weight": ((b,), jnp.float32),
    }
    choice, width = method.encoder_choice(), method.encoding_width()
    if choice is not None and choice.trainable:
        raise UserError("encoder_trainable: a plan does not count an encoder that is tuned; leave it frozen")
    if width is not None:
        shapes["encoding"] = ((b, width), jnp.float32)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}


def _placed(tree: Tree, shardings: Tree) -> Tree:
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings)


def _bytes(tree: Tree) -> int:
    """Returns the bytes of one device's shards of a tree."""
    total = 0.0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * _bits(leaf.dtype) / 8
    return math.ceil(total)


def _bits(dtype: Any) -> int:
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return 64
    return int(jax.dtypes.itemsize_bits(dtype))
