"""What a training step takes before there is hardware: compiled for a topology, counted, held against the chips' peaks.

from deptjax.planning import CHIPS, Rows, make_plan, report, tpu_devices

chip, devices = tpu_devices("v5e:4x4")
config = dataclasses.replace(SIZES["llama2-7b"], dtype="bfloat16", scan_layers=True)
placement = Placement.over(devices, mesh="fsdp:16", config=config)
print(report(make_plan("llama2-7b", config, DePT(), placement, CHIPS[chip], Rows(64, 256, 8))))
"""

from __future__ import annotations

from deptjax.planning.chips import CHIPS, Chip, measure
from deptjax.planning.count import Collective, Cost, count
from deptjax.planning.plan import Memory, Plan, Rows, check_rows, make_plan
from deptjax.planning.table import comparison, report
from deptjax.planning.topology import tpu_devices

__all__ = [
    "CHIPS",
    "Chip",
    "Collective",
    "Cost",
    "Memory",
    "Plan",
    "Rows",
    "check_rows",
    "comparison",
    "count",
    "make_plan",
    "measure",
    "report",
    "tpu_devices",
]
