"""Steps of published models, compiled by the real TPU compiler for slices that are not there: they compile, and fit.

Needs libtpu, which the extra `tpu` brings; a machine without it has nothing to run these with. A case takes a minute or
two of one core.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re

import pytest

from deptjax.flops import BatchShape, step_flops
from deptjax.methods import DePT, FullFineTuning
from deptjax.models.sizes import SIZES
from deptjax.planning import CHIPS, Plan, Rows, make_plan, tpu_devices
from deptjax.sharding import Placement
from deptjax.training.config import TrainConfig
from tests.cli.conftest import Command, deptjax, quiet_afterwards  # noqa: F401  fixtures

pytestmark = [
    pytest.mark.tpu_compiler,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[tpu]'"),
]


def planned(
    name: str, topology: str, mesh: str, rows: Rows, method: object = None, remat: str = "none", **changes: object
) -> Plan:
    """Returns the plan of a bfloat16 model, its layers scanned."""
    chip, devices = tpu_devices(topology)
    config = dataclasses.replace(SIZES[name], **{"dtype": "bfloat16", "scan_layers": True, **changes})
    placement = Placement.over(devices, mesh=mesh, config=config)
    return make_plan(name, config, method or DePT(), placement, CHIPS[chip], rows, TrainConfig(remat=remat))


@pytest.mark.parametrize(
    ("name", "topology", "mesh", "rows"),
    [
        ("t5-3b", "v5e:4x4", "fsdp:16", Rows(64, 256, 8)),
        ("llama2-7b", "v5e:4x4", "fsdp:16", Rows(64, 256, 8)),
        ("llama2-7b", "v5e:16x16", "data:16,fsdp:16", Rows(1024, 256, 8)),
        ("llama2-70b", "v5p:4x4x4", "fsdp:64", Rows(256, 256, 8)),
    ],
)
def test_it_compiles_and_fits(name: str, topology: str, mesh: str, rows: Rows) -> None:
    plan = planned(name, topology, mesh, rows)
    assert plan.memory.fits
    assert plan.cost is not None
    assert plan.cost.unknown_loops == 0
    fsdp = plan.mesh["fsdp"]
    assert plan.memory.weights < 1.02 * 2 * plan.backbone_parameters / fsdp  # bfloat16, but for norms in one part each
    # Every device has every weight once forward and once backward, and its own part of them already.
    gathered = sum(c.sent_bytes for c in plan.cost.collectives if c.axes == ("fsdp",))
    assert gathered > 2 * 0.9 * 2 * plan.backbone_parameters * (fsdp - 1) / fsdp * 0.9
    wanted = step_flops(SIZES[name], DePT(), BatchShape(rows.batch, rows.length, rows.targets)).total
    assert plan.cost.total_flops == pytest.approx(wanted / plan.devices, rel=0.05)


@pytest.mark.parametrize("scan", [True, False])
def test_the_difference_of_two_depths_is_that_of_their_layers(scan: bool) -> None:
    rows = Rows(8, 128, 4)
    method = DePT(prompt_length=8, rank=4, max_length=128)
    counted, wanted = {}, {}
    for layers in (2, 4):
        config = dataclasses.replace(SIZES["smollm2-360m"], num_layers=layers)
        plan = planned("smollm2-360m", "v5e:1x1", "data", rows, method, num_layers=layers, scan_layers=scan)
        assert plan.cost is not None
        counted[layers] = plan.cost.total_flops
        wanted[layers] = step_flops(config, method, BatchShape(*rows)).total
    assert counted[4] - counted[2] == pytest.approx(wanted[4] - wanted[2], rel=0.02)


def test_a_step_that_does_not_fit_is_told_with_the_compilers_own_numbers() -> None:
    plan = planned("smollm2-1.7b", "v5e:1x1", "data", Rows(8, 256, 8), FullFineTuning())
    assert plan.cost is None
    assert not plan.memory.fits
    assert plan.memory.total > 3 * 4 * plan.backbone_parameters
    assert 15 * 2**30 < plan.memory.limit <= 16 * 2**30


def test_the_command_prints_a_plan(deptjax: Command) -> None:  # noqa: F811
    words = ("--model", "smollm2_135m", "--topology", "v6e:2x2", "--mesh", "fsdp", "--batch", 8, "--length", 64)
    ended = deptjax("plan", *words, "--prompt-length", 8, "--max-length", 64)
    assert ended.status == 0, ended.err
    assert "4 x v6e (fsdp:4), bfloat16; a batch of 8 rows of 64 + 8 tokens" in ended.out
    assert re.search(r"of 32\.00 GiB: fits", ended.out)
    assert re.search(r"all-gather over fsdp \(4\)", ended.out)


def test_a_batch_that_does_not_divide_is_told_before_compiling(deptjax: Command) -> None:  # noqa: F811
    words = ("--model", "gpt2", "--topology", "v5e:4x4", "--mesh", "fsdp:16", "--batch", 24)
    assert re.search("batch_size 24 does not divide among the 16 parts", deptjax("plan", *words).error)
