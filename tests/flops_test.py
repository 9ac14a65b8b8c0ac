"""The formula of a step's operations against the products of the step itself, and what a frozen model does not need."""

from __future__ import annotations

import re
from typing import Any

import jax
import pytest

from deptjax.flops import BatchShape, Flops, forward_flops, step_flops
from deptjax.methods import ADePT, DePT, FullFineTuning, LoRA, Method, PrefixTuning, PromptTuning, PTuning
from deptjax.models.backbone import Backbone
from deptjax.products import product_flops, products
from deptjax.testing import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from deptjax.training.step import make_loss
from tests.cases import Case, batch_of, make_case, rows_of

BATCH = BatchShape(rows=4, source=52, targets=8)
METHODS: dict[str, Method] = {
    "dept": DePT(prompt_length=12, rank=4, max_length=BATCH.source),
    "prompt_tuning": PromptTuning(prompt_length=20),
    "prefix_tuning": PrefixTuning(prefix_length=6),
    "lora": LoRA(rank=4),
    "full": FullFineTuning(),
}
MADE: dict[str, Method] = {
    "adept": ADePT(prompt_length=12, rank=4),
    "p_tuning": PTuning(prompt_length=5, hidden=4, network="lstm"),
    "prefix_tuning": PrefixTuning(prefix_length=6, hidden=5),
}
CLOSE = 1e-9  # the formula has every product of a step, so it is exact


def backbone_of(family: str, scan: bool) -> Backbone:
    if family == "t5":
        return tiny_t5(width=48, mlp_dim=96, num_heads=4, head_dim=12, gated=True, tied=False, scan_layers=scan)
    if family == "bert":
        return tiny_bert(width=48, mlp_dim=96, num_heads=4, num_layers=3, has_pooler=False, scan_layers=scan)
    if family == "gpt2":
        return tiny_gpt2(width=48, mlp_dim=96, num_heads=4, num_layers=3, scan_layers=scan)
    sizes = {"width": 48, "mlp_dim": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 12, "num_layers": 3}
    return tiny_llama(**sizes, scan_layers=scan)


def batch() -> dict[str, jax.Array]:
    sources, targets = rows_of((BATCH.source,) * BATCH.rows, vocab=40), rows_of((BATCH.targets,) * BATCH.rows, 1, 40)
    return batch_of(sources, targets, BATCH.source, BATCH.targets)


def case_of(family: str, method: str, scan: bool = False, **fields: Any) -> Case:
    return make_case(backbone_of(family, scan), METHODS[method], **fields)


def kernel_shapes(case: Case) -> set[tuple[int, ...]]:
    scanned = case.backbone.config.scan_layers
    shapes = {leaf.shape for leaf in jax.tree.leaves(case.backbone.params) if leaf.ndim == (3 if scanned else 2)}
    kernels = {shape[-2:] for shape in shapes}
    return kernels | {shape[::-1] for shape in kernels}


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_the_formula_is_what_a_step_computes(family: str, method: str, scan: bool) -> None:
    """And no product of a step makes the gradient of a frozen weight."""
    case = case_of(family, method, scan)
    found = products(case.step, case.state(), case.frozen, case.taken(batch()))
    flops = step_flops(case.backbone.config, METHODS[method], BATCH)
    assert flops.total == pytest.approx(sum(product.flops * product.times for product in found), rel=CLOSE)
    made = {product.result for product in found}
    assert bool(made & kernel_shapes(case)) == case.model.method.tunes_backbone
    assert flops.forward >= forward_flops(case.backbone.config, BATCH)


@pytest.mark.parametrize("method", MADE)
def test_the_formula_of_networks_of_methods(method: str) -> None:
    """The first layer of ADePT's net has no gradient to hand on: what it is given is frozen."""
    case = make_case(backbone_of("llama", True), MADE[method])
    counted = sum(product.flops * product.times for product in products(case.step, case.state(), case.frozen, batch()))
    assert step_flops(case.backbone.config, MADE[method], BATCH).total == pytest.approx(counted, rel=CLOSE)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_loss_over_labels_has_one_position_and_few_logits(family: str) -> None:
    case = case_of(family, "dept")
    loss = make_loss(case.model, jax.numpy.asarray([5, 6, 7]))
    counted = product_flops(jax.value_and_grad(loss), case.trainable, case.frozen, batch(), None)
    flops = step_flops(case.backbone.config, METHODS["dept"], BATCH._replace(targets=1, logits=3))
    assert flops.total == pytest.approx(counted, rel=CLOSE)


def test_a_prompt_in_front_of_each_row() -> None:
    case = case_of("llama", "prompt_tuning", share_prompt=False)
    counted = product_flops(case.step, case.state(), case.frozen, batch())
    copied = step_flops(case.backbone.config, METHODS["prompt_tuning"], BATCH, share_prompt=False)
    assert copied.total == pytest.approx(counted, rel=CLOSE)
    assert copied.total > step_flops(case.backbone.config, METHODS["prompt_tuning"], BATCH).total


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_full_fine_tuning_is_three_forward_passes_and_a_frozen_model_two(family: str) -> None:
    config = backbone_of(family, False).config
    full = step_flops(config, METHODS["full"], BATCH)
    assert full.forward == forward_flops(config, BATCH)
    assert 0.97 < full.total / (3 * full.forward) <= 1
    frozen = step_flops(config, METHODS["dept"], BATCH)
    assert 0.9 < frozen.total / (2 * frozen.forward) < 1.2  # attention's second operands are the rest
    assert 0 < frozen.weight_gradient < 0.01 * full.weight_gradient  # of DePT's own two factors


def test_products_inside_of_a_scan_count_as_often_as_they_run() -> None:
    def powers(x: jax.Array) -> Any:
        return jax.lax.scan(lambda carry, _: (carry @ x, None), x, length=5)[0]

    (found,) = products(powers, jax.ShapeDtypeStruct((3, 3), "float32"))
    assert (found.left, found.right, found.result, found.flops, found.times) == ((3, 3), (3, 3), (3, 3), 54, 5)
    assert product_flops(lambda x: (x @ x)[0, 0] * 0 + 1, jax.ShapeDtypeStruct((3, 3), "float32")) == 54
    assert product_flops(lambda x: (x @ x, 1)[1], jax.ShapeDtypeStruct((3, 3), "float32")) == 0  # nobody uses it


@pytest.mark.parametrize("method", ["dept", "full"])
def test_the_compiled_step_makes_no_such_gradient_either(method: str) -> None:
    case = case_of("llama", method)
    lowered = case.step.lower(case.state(), case.frozen, batch())
    text = lowered.compile({"xla_backend_optimization_level": 0}).as_text()
    results = re.findall(r"= f32\[([\d,]+)\]\S* (?:dot|custom-call)\(", text)
    made = {tuple(map(int, shape.split(","))) for shape in results}
    assert len(made) > 5
    assert bool(made & kernel_shapes(case)) == case.model.method.tunes_backbone


def test_the_total_is_the_sum() -> None:
    assert Flops(3, 2, 1).total == 6
