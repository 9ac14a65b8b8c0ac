"""What every method promises on every backbone, whether its layers are scanned or not."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.methods import ZeroShot, method_names
from deptjax.methods.base import FIXED, Texts
from deptjax.prompt import Prompt
from deptjax.training.state import count_parameters, count_trained
from tests.cases import (
    ENCODED,
    METHODS,
    PROMPT_METHODS,
    SOURCED,
    VARIANTS,
    Case,
    backbone_of,
    batch_of,
    case_of,
    make_case,
    method_on,
    rows_of,
    some_batch,
)

# The methods of each kind of site in both layouts, all others once on each family: what a family adds to the others'
# blocks is in its own tests, and a prompt that comes about in another way is to a backbone what any prompt is.
OTHERS = [*PROMPT_METHODS, *ENCODED, *VARIANTS, SOURCED]
CASES = [(b, m, scan) for b in ("llama", "t5") for m in METHODS for scan in (False, True)]
CASES += [("bert", m, m in ("dept", "prefix_tuning")) for m in METHODS]
CASES += [(b, m, (i + j) % 2 == 0) for i, b in enumerate(("llama", "t5", "bert")) for j, m in enumerate(OTHERS)]
CASES += [("gpt2", m, m in ("dept", "lopa")) for m in ("dept", "lora", "full", "lopa", "prefix_tuning")]
LAYER, MODEL = 1e-5, 1e-4


def case_id(case: tuple[str, str, bool]) -> str:
    family, method, scan = case
    return f"{family}-{method}-{'scan' if scan else 'loop'}"


@pytest.fixture(params=CASES, ids=case_id, scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return case_of(*request.param)


def close(got: object, wanted: object, atol: float = LAYER) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=atol, atol=atol), got, wanted)


def same(got: object, wanted: object) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_no_method_is_left_out(family: str) -> None:
    kinds = {method_on(backbone_of(family), method).kind for name, method, _ in CASES if name == family}
    assert kinds == set(method_names())


def test_no_effect_at_step_0(case: Case) -> None:
    """DePT starts as prompt tuning with its prompt; LoRA and full fine-tuning start as the frozen model.

    A prefix cannot: whatever its keys and values are, it draws some of the attention. A method says so itself.
    """
    batch, prompt = case.taken(some_batch()), first_prompt(case)
    got, untuned = (c.logits(c.trainable, c.frozen, batch) for c in (case, make_case_of_nothing(case)))
    plain = untuned
    if prompt is not None:
        behind = case_of(case.backbone.config.family, "prompt_tuning", case.backbone.config.scan_layers)
        plain = behind.logits({"input": {"prompt": prompt}}, case.backbone.params, batch)
    if case.model.method.starts_plain:
        close(got, plain)
    else:
        assert np.abs(got - plain).max() > 1e-2
    assert prompt is None or np.abs(got - untuned).max() > 1e-2


def first_prompt(case: Case) -> jax.Array | None:
    """Returns the prompt that a method puts in front of all texts at first, `None` for one without."""
    fill = case.model.method.sites().input
    if fill is None or case.model.method.by_instance:
        return None
    embeds = jnp.zeros((1, 0, case.backbone.width))
    prompt, _ = fill.apply({"params": case.trainable.get("input", {})}, embeds, Texts.whole(embeds), method="streams")
    return jnp.asarray(prompt)


def make_case_of_nothing(case: Case) -> Case:
    """Returns the frozen model without a method, which needs no parameters."""
    from deptjax.models.prompted import PromptedModel

    return Case(case.backbone, PromptedModel.build(case.backbone, ZeroShot()), {}, case.backbone.params)


def test_steps_move_all_labelled_leaves_and_nothing_else(case: Case) -> None:
    groups = case.model.method.groups(case.trainable)
    assert set(jax.tree.leaves(groups)) <= {"prompt", "low_rank", "backbone", FIXED}
    assert jax.tree.structure(groups) == jax.tree.structure(case.trainable)
    before = jax.tree.map(np.array, case.frozen)
    state, losses = case.state(), []
    for _ in range(4):
        state, metrics = case.step(state, case.frozen, case.taken(some_batch()))
        losses.append(float(metrics["loss"]))
    same(jax.tree.map(np.array, case.frozen), before)
    assert losses[-1] < losses[0]
    same(jax.tree.map(jnp.shape, state.trainable), jax.tree.map(jnp.shape, case.trainable))
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), state.trainable, case.trainable)
    trained = jax.tree.map(lambda group: group != FIXED, groups)
    assert moved == trained, jax.tree.map(lambda a, b: a == b, moved, trained)
    # Two moments for each trained number; all else in the optimiser's state are counts.
    moments = [leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(moments) == 2 * count_trained(case.trainable, groups)


def test_saved_and_loaded_is_the_same_bit_for_bit(case: Case, tmp_path: pathlib.Path) -> None:
    prompt = case.prompt()
    prompt.save(tmp_path / "prompt")
    loaded = Prompt.load(tmp_path / "prompt")
    assert loaded.method == case.model.method
    same(loaded.trainable, prompt.trainable)
    loaded.check_backbone(case.backbone)
    batch = case.taken(some_batch())
    again = make_case(case.backbone, loaded.method)
    got = case.logits(jax.tree.map(jnp.asarray, loaded.trainable), again.frozen, batch)
    same(got, case.logits(case.moved, case.frozen, batch))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_jit_is_eager(family: str, method: str) -> None:
    case, batch = case_of(family, method), some_batch()  # the body of a scan is compiled in both, so: a loop
    eager = case.model.target_logits(case.moved, case.frozen, batch)
    close(case.logits(case.moved, case.frozen, batch), eager)


def test_padding_side_does_not_matter(case: Case) -> None:
    sources, targets = rows_of((7, 3, 5)), rows_of((2, 3, 1), seed=100)
    right, left = (case.taken(batch_of(sources, targets, 7, 3, side)) for side in ("right", "left"))
    assert not np.array_equal(right["source"], left["source"])
    close(case.logits(case.moved, case.frozen, left), case.logits(case.moved, case.frozen, right))


def test_bucket_does_not_matter(case: Case) -> None:
    sources, targets = rows_of((7, 3, 5)), rows_of((2, 3, 1), seed=100)
    tight = case.logits(case.moved, case.frozen, case.taken(batch_of(sources, targets, 7, 3)))
    wide = case.logits(case.moved, case.frozen, case.taken(batch_of(sources, targets, 12, 5)))
    close(wide[:, :3], tight)


def test_rows_do_not_see_each_other(case: Case) -> None:
    sources, targets = rows_of((7, 3, 5)), rows_of((2, 3, 1), seed=100)
    others = [sources[0], *rows_of((6, 1), seed=9)], [targets[0], *rows_of((1, 3), seed=10)]
    first = case.logits(case.moved, case.frozen, case.taken(batch_of(sources, targets, 7, 3)))
    second = case.logits(case.moved, case.frozen, case.taken(batch_of(*others, 7, 3)))
    close(second[0], first[0])
    assert np.abs(second[1] - first[1]).max() > 1e-2


WRITERS = [c for c in CASES if c[0] != "bert"]  # a masked model has one target


@pytest.mark.parametrize("case", WRITERS, ids=case_id, indirect=True, scope="module")
def test_targets_see_only_the_targets_before_them(case: Case) -> None:
    batch = some_batch()
    other = {**batch, "targets": batch["targets"].at[:, 1:].set(7)}
    logits, changed = (case.logits(case.moved, case.frozen, b) for b in (batch, other))
    close(changed[:, :2], logits[:, :2])
    assert np.abs(changed[:, 2] - logits[:, 2]).max() > 1e-2


def test_moved_parameters_have_an_effect(case: Case) -> None:
    """Else the tests above could hold of a method that does nothing."""
    batch = case.taken(some_batch())
    moved, first = (case.logits(t, case.frozen, batch) for t in (case.moved, case.trainable))
    assert np.abs(moved - first).max() > 1e-2


def test_scanned_layers_are_the_layers_one_by_one() -> None:
    """The same numbers, stacked, give the same logits for a method that sits in every layer."""
    for family in ("llama", "t5"):
        loop, scan = (case_of(family, "lora", s) for s in (False, True))
        stacked = jax.tree.map(jnp.copy, scan.trainable)
        frozen = dict(scan.frozen)
        assert count_parameters(stacked) == count_parameters(loop.trainable)
        got = scan.logits(stack(loop.moved["backbone"], "backbone"), stack(loop.frozen, None), some_batch())
        close(got, loop.logits(loop.moved, loop.frozen, some_batch()))
        assert jax.tree.structure(stack(loop.frozen, None)) == jax.tree.structure(frozen)


def stack(tree: dict, under: str | None) -> dict:
    """Returns a tree with `layers_0`, `layers_1` .. of each stack put together under `layers`."""
    if not isinstance(tree, dict):
        return tree
    numbered = sorted((k for k in tree if k.startswith("layers_")), key=lambda k: int(k.split("_")[1]))
    rest = {k: stack(v, None) for k, v in tree.items() if k not in numbered}
    if numbered:
        rest["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(tree[k] for k in numbered))
    return {under: rest} if under else rest


@pytest.mark.parametrize("method", ["dept", "prompt_tuning"])
@pytest.mark.parametrize("scan", [False, True])
def test_shared_prompt_is_a_prompt_in_each_row(scan: bool, method: str) -> None:
    """Computed once a batch or once a row: the same logits, and the same gradients of all that is trained."""
    shared = case_of("llama", method, scan)
    copied = make_case(backbone_of("llama", scan), METHODS[method], share_prompt=False)

    def loss(case: Case) -> tuple[jax.Array, jax.Array]:
        def weighted(trainable: dict) -> tuple[jax.Array, jax.Array]:
            logits = case.model.target_logits(trainable, case.frozen, some_batch())
            return jnp.sum(jax.nn.log_softmax(logits)[..., 4]), logits

        return jax.jit(jax.grad(weighted, has_aux=True))(shared.moved)

    (grads, logits), (copied_grads, copied_logits) = loss(shared), loss(copied)
    close(copied_logits, logits)
    scale = jax.tree.map(lambda g: np.abs(g).max(), grads)
    close(*(jax.tree.map(jnp.divide, g, scale) for g in (copied_grads, grads)))
    assert min(jax.tree.leaves(scale)) > 1e-2
