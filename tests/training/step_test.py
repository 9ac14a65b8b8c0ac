"""The training step: what it computes, what it leaves out, when it compiles, and what it does with a NaN."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.data.pipeline import train_batches
from deptjax.data.preprocess import Example
from deptjax.methods import DePT, FullFineTuning
from deptjax.sharding import Placement
from deptjax.testing import tiny_llama, tiny_t5
from deptjax.training.optim import make_optimizer
from deptjax.training.state import TrainState
from deptjax.training.step import make_loss, make_train_step
from deptjax.typing import Tree
from tests.cases import METHODS, RATES, Case, backbone_of, batch_of, case_of, make_case, rows_of, some_batch

LABELS = jnp.asarray([20, 30, 31, 40, 41, 42, 43, 44, 45])


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yields the equations of a jaxpr and of all that are in it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(inner)
            elif hasattr(inner, "jaxpr"):
                yield from equations(inner.jaxpr)


def computed(function: Callable[..., Any], *args: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Returns the primitive and the shape of all that is computed."""
    closed = jax.make_jaxpr(function)(*args)
    return [(e.primitive.name, v.aval.shape) for e in equations(closed.jaxpr) for v in e.outvars]


def products(function: Callable[..., Any], *args: Any) -> list[tuple[int, ...]]:
    """Returns the shapes of all matrix products."""
    return [shape for name, shape in computed(function, *args) if name == "dot_general"]


def gradient(case: Case, labels: jax.Array | None = None) -> Callable[[Tree, Tree, Tree], Tree]:
    loss = make_loss(case.model, labels)
    return lambda trainable, frozen, batch: jax.value_and_grad(loss)(trainable, frozen, batch, None)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_no_gradient_of_a_frozen_weight_is_computed(family: str) -> None:
    backbone = backbone_of(family)
    kernels = {leaf.shape for leaf in jax.tree.leaves(backbone.params) if leaf.ndim == 2}
    transposed = {shape[::-1] for shape in kernels}
    for name in ("dept", "prompt_tuning", "full"):
        case = case_of(family, name)
        found = computed(gradient(case), case.trainable, case.frozen, some_batch())
        # A transpose of a frozen kernel is a view for the backward pass; new numbers of its shape are a gradient.
        new = {shape for primitive, shape in found if primitive not in ("transpose", "copy", "convert_element_type")}
        if name == "full":
            assert kernels <= new | {shape[::-1] for shape in new}
        else:
            assert not (kernels | transposed) & new


def flops(function: Callable[..., Any], *args: Any) -> float:
    return float(jax.jit(function).lower(*args).cost_analysis()["flops"])


@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        (tiny_llama, {"width": 96, "mlp_dim": 256, "num_layers": 4, "num_heads": 6, "num_kv_heads": 3, "head_dim": 16}),
        (tiny_t5, {"width": 96, "mlp_dim": 256, "num_encoder_layers": 4, "num_decoder_layers": 4, "head_dim": 16}),
    ],
)
def test_a_step_of_dept_costs_two_forwards_and_of_full_fine_tuning_three(make: Callable[..., Any], sizes: dict) -> None:
    backbone = make(**sizes)
    sources, targets = rows_of([32] * 4), rows_of([4] * 4, seed=1)
    batch = batch_of(sources, targets, 32, 4)
    ratios = {}
    for name, method in {"dept": DePT(prompt_length=4, rank=3, max_length=32), "full": FullFineTuning()}.items():
        case = make_case(backbone, method)
        args = (case.trainable, case.frozen, batch)
        ratios[name] = flops(gradient(case), *args) / flops(case.model.target_logits, *args)
    assert ratios["dept"] < 2.2
    assert 2.6 < ratios["full"] < 3.3


@pytest.mark.parametrize("method", ["dept", "lora"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_logits_are_computed_at_targets_alone_and_over_labels_alone(family: str, method: str) -> None:
    case, batch = case_of(family, method), some_batch()
    vocab = case.backbone.config.vocab_size
    over_vocab = [s for s in products(gradient(case), case.trainable, case.frozen, batch) if vocab in s]
    assert over_vocab == [(3, 3, vocab)]  # (B, U, V), once, and never (B, T, V)
    with_labels = products(gradient(case, LABELS), case.trainable, case.frozen, batch)
    assert [s for s in with_labels if vocab in s] == []
    assert [s for s in with_labels if len(LABELS) in s] == [(3, 1, len(LABELS))]


def test_label_loss_is_the_softmax_over_the_labels_tokens() -> None:
    """At the position of the label, the first target; the numbers of the other tokens do not count."""
    for family in ("llama", "t5"):
        case, batch = case_of(family, "dept"), some_batch()
        batch = {**batch, "label": jnp.asarray([2, 0, 3]), "weight": jnp.asarray([1.0, 0.0, 1.0])}
        logits = np.asarray(case.logits(case.moved, case.frozen, batch))[:, 0, LABELS].astype(np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        wanted = -(log_probs[0, 2] + log_probs[2, 3]) / 2
        got = jax.jit(make_loss(case.model, LABELS))(case.moved, case.frozen, batch, None)
        np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_filler_rows_do_not_count() -> None:
    case, batch = case_of("llama", "dept"), some_batch()
    filled = {**batch, "weight": jnp.asarray([1.0, 1.0, 0.0])}
    other = {**filled, "source": batch["source"].at[2].set(9), "targets": batch["targets"].at[2].set(8)}
    run = jax.jit(gradient(case))
    (one, grads), (two, same) = (run(case.moved, case.frozen, b) for b in (filled, other))
    np.testing.assert_allclose(one, two, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grads, same)
    assert abs(one - run(case.moved, case.frozen, batch)[0]) > 1e-3


def optimizer(case: Case, **fields: Any) -> Any:
    groups = case.model.method.groups(case.trainable)
    return make_optimizer({name: (lambda step, rate=rate: rate) for name, rate in RATES.items()}, groups, **fields)


def state_of(case: Case, tx: Any) -> TrainState:
    return TrainState.create(jax.tree.map(jnp.copy, case.moved), tx, jax.random.key(5))


def test_two_half_batches_are_a_whole_one() -> None:
    case = case_of("llama", "dept")
    rows = [rows_of([5] * 4), rows_of([2] * 4, seed=1)]
    whole = batch_of(*rows, 5, 2)
    halves = [{k: v[i : i + 2] for k, v in whole.items()} for i in (0, 2)]
    once, twice = optimizer(case), optimizer(case, accumulate=2)
    wanted, _ = make_train_step(make_loss(case.model), once)(state_of(case, once), case.frozen, whole)
    step, state = make_train_step(make_loss(case.model), twice), state_of(case, twice)
    state, _ = step(state, case.frozen, halves[0])
    jax.tree.map(np.testing.assert_array_equal, state.trainable, case.moved)
    state, _ = step(state, case.frozen, halves[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), state.trainable, wanted.trainable)


@pytest.mark.parametrize(("bad", "accumulate"), [(math.nan, 1), (math.inf, 2)])
def test_a_step_that_is_not_finite_changes_nothing(bad: float, accumulate: int) -> None:
    case = case_of("llama", "dept")
    tx = optimizer(case, accumulate=accumulate)
    step, state = make_train_step(make_loss(case.model), tx), state_of(case, tx)
    state, metrics = step(state, case.frozen, some_batch())
    assert bool(metrics["finite"])
    assert np.isfinite(metrics["loss"])
    kept = jax.tree.map(np.array, (state.trainable, state.opt_state))
    state, metrics = step(state, case.frozen, {**some_batch(), "weight": jnp.asarray([1.0, bad, 1.0])})
    assert not bool(metrics["finite"])
    jax.tree.map(np.testing.assert_array_equal, (state.trainable, state.opt_state), kept)
    assert int(state.step) == 2
    state, metrics = step(state, case.frozen, some_batch())
    assert bool(metrics["finite"])


def test_a_finite_loss_with_an_infinite_gradient_changes_nothing() -> None:
    case = case_of("llama", "dept")

    def loss(trainable: Tree, frozen: Tree, batch: Tree, key: object) -> jax.Array:
        return jnp.sqrt(jnp.sum(jnp.square(trainable["input"]["lora_b"])))  # at zero: value 0, gradient 0 / 0

    tx = optimizer(case)
    state = TrainState.create(jax.tree.map(jnp.copy, case.trainable), tx, jax.random.key(0))
    state, metrics = make_train_step(loss, tx)(state, case.frozen, some_batch())
    assert float(metrics["loss"]) == 0
    assert not bool(metrics["finite"])
    jax.tree.map(np.testing.assert_array_equal, state.trainable, case.trainable)


def test_grad_norm_is_that_before_clipping() -> None:
    case = case_of("llama", "dept")
    _, grads = jax.jit(gradient(case))(case.trainable, case.frozen, some_batch())
    norm = math.sqrt(sum(float(np.square(np.asarray(g, np.float64)).sum()) for g in jax.tree.leaves(grads)))
    _, metrics = case.step(case.state(), case.frozen, some_batch())
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)


def test_dropout_is_on_only_when_asked_and_differs_from_step_to_step() -> None:
    case, batch = case_of("t5", "dept"), some_batch()
    losses = {}
    for dropout in (False, True):
        step = jax.jit(make_loss(case.model, dropout=dropout))
        keys = [jax.random.fold_in(jax.random.key(5), n) for n in (0, 0, 1)]
        losses[dropout] = [float(step(case.moved, case.frozen, batch, key)) for key in keys]
    assert len(set(losses[False])) == 1
    assert losses[True][0] == losses[True][1]
    assert losses[True][0] != losses[True][2]
    assert losses[True][0] != losses[False][0]


def test_same_start_same_bits() -> None:
    """Two models made apart from each other end with the same bits, dropout included."""
    results = []
    for _ in range(2):
        case = make_case(tiny_t5(), METHODS["dept"])
        tx = optimizer(case)
        step, state = make_train_step(make_loss(case.model, dropout=True), tx), state_of(case, tx)
        for i in range(4):
            state, metrics = step(state, case.frozen, some_batch(i))
        results.append((state.trainable, state.opt_state, metrics))
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_one_program_for_each_shape_and_none_after() -> None:
    """Three epochs of batches in buckets: the step is compiled when a shape is new, and never again."""
    lengths = [3, 4, 5, 6, 9, 10, 11, 12, 3, 4, 9, 12, 6, 5, 10, 3]
    examples = [
        Example(source, target, -1)
        for source, target in zip(rows_of(lengths), rows_of([1, 2, 5, 6] * 4, seed=1), strict=True)
    ]
    case = case_of("llama", "dept")
    tx = optimizer(case)
    placement = Placement.over()
    step = make_train_step(make_loss(case.model), tx)
    state, frozen = placement.put(state_of(case, tx)), placement.put(case.frozen)
    seen: set[tuple[int, int]] = set()
    batches = iter(train_batches(examples, batch_size=4, buckets=(6, 12), target_buckets=(3, 6), seed=0, window=2))
    for _ in range(3 * len(examples) // 4):
        batch = next(batches)
        seen.add((batch["source"].shape[1], batch["targets"].shape[1]))
        state, _ = step(state, frozen, placement.put_batch(batch))
        assert step._cache_size() == len(seen)
    assert 2 <= len(seen) <= 4


def test_a_step_moves_nothing_between_host_and_device_and_reuses_its_state() -> None:
    case = case_of("llama", "dept")
    state, batch, go = case.state(), some_batch(), jnp.asarray(True)
    compiled = case.step.lower(state, case.frozen, batch, go).compile()
    leaves = [jax.random.key_data(leaf) if leaf.dtype == state.key.dtype else leaf for leaf in jax.tree.leaves(state)]
    # Each leaf of the new state lies where the old one's did.
    assert len(re.findall(r"(?:may|must)-alias", compiled.as_text().partition("\n")[0])) == len(leaves)
    assert compiled.memory_analysis().alias_size_in_bytes >= sum(leaf.nbytes for leaf in leaves)
    on_host = jax.tree.map(np.asarray, batch)
    with jax.transfer_guard("disallow"):
        state, metrics = case.step(state, case.frozen, batch, go)
        state, metrics = case.step(state, case.frozen, batch, metrics["finite"])
        with pytest.raises(Exception, match="host-to-device transfer"):  # so the guard does see what it is here for
            case.step(state, case.frozen, on_host, metrics["finite"])
    assert bool(metrics["finite"])


def test_a_step_that_may_not_go_changes_nothing() -> None:
    case = case_of("llama", "dept")
    state, metrics = case.step(case.state(), case.frozen, some_batch(), jnp.asarray(False))
    assert not metrics["finite"]
    assert np.isfinite(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, state.trainable, case.trainable)
