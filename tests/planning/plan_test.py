"""Plans of tiny models on the CPU at hand: what is compiled, counted and added up."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.methods import DePT, FullFineTuning, LoRA, PromptTuning
from deptjax.models.prompted import PromptedModel
from deptjax.models.sizes import parameter_count, parameter_shapes
from deptjax.planning import CHIPS, Plan, Rows, comparison, make_plan, report
from deptjax.planning.plan import abstract_trees, refused_bytes
from deptjax.planning.table import duration
from deptjax.sharding import Placement
from deptjax.testing import random_params, tiny_llama, tiny_t5
from deptjax.training.config import TrainConfig

CONFIG = dataclasses.replace(tiny_llama().config, scan_layers=True, mlp_dim=1024)  # so that its products are most of it
DEPT = DePT(prompt_length=5, rank=3, max_length=32)
ROWS = Rows(4, 32, 3)


@pytest.fixture(scope="module")
def placement() -> Placement:
    return Placement.over(mesh="data", config=CONFIG)


@pytest.fixture(scope="module")
def plan(placement: Placement) -> Plan:
    return make_plan("tiny", CONFIG, DEPT, placement, CHIPS["v5e"], ROWS)


def test_the_parts_of_memory_are_those_of_the_trees(plan: Plan) -> None:
    parameters, trained = parameter_count(CONFIG), 5 * CONFIG.width + 3 * (32 + CONFIG.width)
    assert (plan.backbone_parameters, plan.trainable_parameters) == (parameters, trained)
    assert plan.memory.weights == 4 * parameters
    # Values and two moments in float32, and a few counters.
    assert 0 < plan.memory.state - 3 * 4 * trained < 100
    assert plan.memory.total == plan.memory.weights + plan.memory.state + plan.memory.rest
    assert plan.memory.fits


def test_the_roofline_is_the_largest_of_three_times(plan: Plan) -> None:
    assert plan.cost is not None
    chip = plan.chip
    seconds = {
        "compute": plan.cost.total_flops / chip.peak("f32"),
        "memory": plan.cost.memory_bytes / chip.bandwidth,
        "network": 0.0,
    }
    assert plan.seconds == pytest.approx(seconds)
    assert plan.roofline_seconds == max(seconds.values()) == seconds[plan.bound]
    assert plan.tokens_per_second == pytest.approx(4 * (32 + 3) / plan.roofline_seconds)


def test_a_plan_as_json_and_as_text(plan: Plan) -> None:
    told = json.loads(json.dumps(plan.to_json(), allow_nan=False))
    assert told["memory"]["fits"] is True
    assert told["rows"] == {"batch": 4, "length": 32, "targets": 3}
    assert told["roofline_seconds"] == plan.roofline_seconds
    text = report(plan)
    assert f"tiny, dept: {plan.backbone_parameters:,} parameters, {plan.trainable_parameters:,} trained" in text
    assert "of 16.00 GiB: fits" in text
    assert f"a step takes {duration(plan.roofline_seconds)} or more, bound by {plan.bound}" in text


def test_full_fine_tuning_trains_float32_copies_of_all(placement: Placement) -> None:
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    plan = make_plan("tiny", config, FullFineTuning(), placement, CHIPS["v5e"], ROWS)
    assert plan.memory.weights == 0
    assert plan.memory.state >= 3 * 4 * parameter_count(config)
    assert plan.trainable_parameters == plan.backbone_parameters == parameter_count(config)


def test_a_gradient_of_weights_costs_products(plan: Plan, placement: Placement) -> None:
    """Full fine-tuning has one more for each weight: three for two. DePT has those of its offsets."""
    full = make_plan("tiny", CONFIG, FullFineTuning(), placement, CHIPS["v5e"], ROWS)
    vanilla = make_plan("tiny", CONFIG, PromptTuning(prompt_length=5), placement, CHIPS["v5e"], ROWS)
    assert full.cost is not None
    assert plan.cost is not None
    assert vanilla.cost is not None
    assert 1.3 < full.cost.total_flops / vanilla.cost.total_flops < 1.6
    offsets = 3 * 2 * 32 * 3 * CONFIG.width  # A @ B, and its two gradients
    assert plan.cost.total_flops - vanilla.cost.total_flops == pytest.approx(offsets, rel=1e-6)


@pytest.mark.parametrize("family", [tiny_llama, tiny_t5])
@pytest.mark.parametrize("method", [DEPT, LoRA(rank=2), FullFineTuning()], ids=lambda method: method.kind)
@pytest.mark.parametrize("scan", [False, True])
def test_abstract_trees_are_those_of_a_run(family: object, method: object, scan: bool) -> None:
    backbone = family()  # type: ignore[operator]
    config = dataclasses.replace(backbone.config, scan_layers=scan)
    model = PromptedModel(config.make(method.resolve(config.width).sites()), method.resolve(config.width))  # type: ignore[attr-defined]
    params = random_params(config)
    trainable, frozen = model.init(
        jax.random.key(0), params, backbone.vocabulary()._replace(embedding=params["token_embedder"]["embedding"])
    )
    abstract_frozen, abstract_trainable = abstract_trees(config, model)
    for abstract, real in ((abstract_frozen, frozen), (abstract_trainable, trainable)):
        shapes = jax.tree.map(lambda leaf: (tuple(leaf.shape), np.dtype(leaf.dtype)), real)
        assert jax.tree.map(lambda leaf: (tuple(leaf.shape), np.dtype(leaf.dtype)), abstract) == shapes


def test_quantised_weights_are_planned_for(placement: Placement) -> None:
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    plain, packed = (
        make_plan("tiny", dataclasses.replace(config, quantize=scheme), DEPT, placement, CHIPS["v5e"], ROWS)
        for scheme in (None, "int4")
    )
    table = config.vocab_size * config.width * 2
    assert packed.memory.weights - table < 0.5 * (plain.memory.weights - table)
    assert packed.backbone_parameters == plain.backbone_parameters
    assert "kernels in int4" in report(packed)
    assert "kernels" not in report(plain)
    config = dataclasses.replace(config, quantize="int8")
    with pytest.raises(UserError, match="quantize 'int8': method 'full' trains the weights themselves"):
        make_plan("tiny", config, FullFineTuning(), placement, CHIPS["v5e"], ROWS)


def test_less_is_kept_with_remat(placement: Placement) -> None:
    config = dataclasses.replace(CONFIG, num_layers=6)
    plans = [
        make_plan("tiny", config, DEPT, placement, CHIPS["v5e"], ROWS, TrainConfig(remat=remat))
        for remat in ("none", "full")
    ]
    assert plans[1].memory.rest < plans[0].memory.rest
    assert plans[0].cost is not None
    assert plans[1].cost is not None
    assert plans[1].cost.total_flops > 1.2 * plans[0].cost.total_flops
    assert "remat full" in report(plans[1])


def test_methods_side_by_side(plan: Plan, placement: Placement) -> None:
    lora = make_plan("tiny", CONFIG, LoRA(rank=2), placement, CHIPS["v5e"], ROWS)
    lines = comparison([plan, lora]).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table] == ["method", ":" + "-" * 5, "dept", "lora"]
    assert len({len(line) for line in table}) == 1
    assert f"{lora.trainable_parameters:,}" in table[-1]


def test_a_step_that_the_compiler_refuses_does_not_fit(plan: Plan) -> None:
    memory = dataclasses.replace(plan.memory, total=40 << 30, limit=16 << 30)
    refused = dataclasses.replace(plan, cost=None, memory=memory)
    assert not refused.memory.fits
    assert math.isnan(refused.roofline_seconds)
    assert "40.00 GiB of 16.00 GiB: does not fit" in report(refused)
    assert refused.to_json()["roofline_seconds"] is None
    assert " no |" in comparison([refused])


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm. Exceeded",
            (20.5, 15.75),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (38.11G) "
            "exceeds available HBM (15.75G).",
            (38.11 + 3, 15.75),
        ),
        ("RESOURCE_EXHAUSTED: out of host memory", None),
    ],
)
def test_what_a_compiler_says_that_refuses(told: str, expected: tuple[float, float] | None) -> None:
    found = refused_bytes(told, 3 << 30)
    assert (None if found is None else tuple(n / 2**30 for n in found)) == (
        None if expected is None else pytest.approx(expected)
    )


def test_nothing_is_allocated() -> None:
    shapes = jax.tree.leaves(parameter_shapes(CONFIG))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in shapes)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (Rows(4, 33, 3), "length 33 is more than the 32 of the method; raise the method's max_length"),
        (
            Rows(4, 32, 600),
            "5 prompt vectors, length 32 and targets of 600 tokens are 637 positions, and 'tiny' has 512",
        ),
    ],
)
def test_what_does_not_fit_is_told_before_compiling(placement: Placement, rows: Rows, told: str) -> None:
    with pytest.raises(UserError, match=told):
        make_plan("tiny", CONFIG, DEPT, placement, CHIPS["v5e"], rows)
