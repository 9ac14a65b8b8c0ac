"""What devices send one another in a training step, by preset of the mesh, against what is expected of each.

    python benchmarks/compare.py --sections collectives
    python benchmarks/collectives.py --json FILE        # in a process that has eight devices, as compare.py starts it

The step is compiled for eight virtual devices of this CPU, and the collectives of the program are counted. Nothing is
run: how long they take depends on the machine, which ones there are does not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
if not __package__:  # run as a script
    sys.path[0] = str(ROOT)

DEVICES = 8
PRESETS = ("data", "fsdp", "tensor")
BATCH, SOURCE, TARGETS, PROMPT = 16, 64, 8, 16
FLOAT = 4  # bytes
SLACK, SMALL = 1.05, 8192  # a share, and bytes, for scalars: losses, norms, softmax statistics
Record = dict[str, Any]


def measure() -> list[Record]:
    """Returns one record a case, from a process of its own with eight devices. Raises `RuntimeError` if it fails."""
    flags = f"--xla_force_host_platform_device_count={DEVICES} --xla_backend_optimization_level=0"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "collectives.json"
        command = [sys.executable, __file__, "--json", str(output)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"counting collectives failed: {done.stderr.strip().splitlines()[-1]}")
        return list(json.loads(output.read_text()))


def expected(config: Any, method: str, preset: str, trainable: int) -> dict[str, float]:
    """Returns the bytes of each kind of collective that a step may have, on one device.

    Where weights are gathered (`fsdp`), each layer's are, forward and backward, and the table once. Where they are
    split (`tensor`), what each half of a layer adds to the stream is summed forward, and backward what each of its
    projections asks of the stream. Gradients are summed over the rows: those of what is trained; of DePT's offset
    (T, D), before it is split into factors; of a causal model's shared prompt, its keys and values in each layer; of a
    tied table once for each use, of T5's position bias once for each layer.
    """
    rows = BATCH if preset == "tensor" else BATCH // DEVICES
    stream, table = rows * config.width * FLOAT, config.vocab_size * config.width * FLOAT
    inner, causal = config.num_heads * config.head_dim, not config.is_encoder_decoder
    prompt = PROMPT if method == "dept" else 0
    gradients: float = trainable * FLOAT
    if method == "dept":
        gradients = (SOURCE + prompt) * config.width * FLOAT
    if causal:
        layers, text = config.num_layers, SOURCE + TARGETS - 1
        kernels = layers * (4 * config.width * inner + 3 * config.width * config.mlp_dim)
        summed = 7 * layers * (text * stream + prompt * config.width * FLOAT) + text * stream
        gradients += 2 * layers * prompt * inner * FLOAT + (2 * table if method == "full" else 0)
        # The prompt's few rows are multiplied with a device's part of the weights, and the products summed.
        partial = 2 * layers * prompt * (3 * inner + 2 * config.mlp_dim) * FLOAT
        looked_up = text * stream
    else:
        encoder, decoder = config.num_encoder_layers, config.num_decoder_layers
        kernels = encoder * (4 * config.width * inner + 2 * config.width * config.mlp_dim)
        kernels += decoder * (8 * config.width * inner + 2 * config.width * config.mlp_dim)
        source = (prompt + SOURCE) * stream
        summed = (6 * encoder + 2 * decoder) * source + 8 * decoder * TARGETS * stream + (SOURCE + TARGETS) * stream
        bias = (encoder * SOURCE**2 + decoder * TARGETS**2) * config.num_heads * FLOAT
        gradients += 2 * table + bias if method == "full" else 0
        partial, looked_up = 0, (SOURCE + TARGETS) * stream
    if preset == "data":
        return {"all-reduce": gradients}
    if preset == "tensor":
        return {"all-reduce": summed}
    gathered = 2 * kernels * FLOAT + table + looked_up
    return {"all-gather": gathered, "all-reduce": gradients + partial, "all-to-all": 2 * looked_up}


def excess(record: Record) -> list[str]:
    """Returns what a case has beyond what is expected, in words."""
    told = []
    for kind, found in record["bytes"].items():
        limit = record["expected"].get(kind, 0.0)
        if found > SLACK * limit + SMALL:
            told.append(f"{kind} of {found / 1e3:,.0f} kB, expected {limit / 1e3:,.0f}")
    return told


def markdown(records: list[Record]) -> str:
    """Returns the table of all cases."""
    lines = [
        "| model | method | mesh | weights kB | collectives of a step: bytes (count), expected bytes | as expected |",
        "|---|---|---|--:|---|---|",
    ]
    for record in records:
        listed = ", ".join(
            f"{kind} {found / 1e3:,.0f} kB ({record['count'][kind]}), {record['expected'].get(kind, 0) / 1e3:,.0f} kB"
            for kind, found in record["bytes"].items()
        )
        cells = (record["model"], record["method"], record["mesh"], f"{record['weights'] / 1e3:,.0f}", listed)
        lines.append(f"| {' | '.join(cells)} | {'; '.join(excess(record)) or 'yes'} |")
    return "\n".join(lines)


def _cases() -> list[Record]:
    """Returns the records; jax has eight devices here."""
    import jax

    from deptjax.methods import DePT, FullFineTuning, LoRA
    from deptjax.models.llama import LlamaConfig
    from deptjax.models.t5 import T5Config
    from deptjax.planning.chips import CHIPS
    from deptjax.planning.plan import Rows, make_plan
    from deptjax.sharding import Placement
    from deptjax.training.config import TrainConfig

    shape: Record = {"vocab_size": 1024, "width": 128, "num_heads": 8, "head_dim": 16, "mlp_dim": 256}
    configs = {
        "LLaMA, 3 layers": LlamaConfig(**shape, num_layers=3, num_kv_heads=8, norm_eps=1e-5, max_positions=512),
        "T5, 3 + 3 layers": T5Config(**shape, num_encoder_layers=3, num_decoder_layers=3),
    }
    methods = {
        "dept": DePT(prompt_length=PROMPT, rank=4, max_length=SOURCE),
        "lora": LoRA(rank=4),
        "full": FullFineTuning(),
    }
    records = []
    for model, unrolled in configs.items():
        config: Any = dataclasses.replace(unrolled, scan_layers=True, tied=True)
        for preset in PRESETS:
            placement = Placement.over(jax.devices(), preset, config=config)
            for name, method in methods.items():
                rows = Rows(BATCH, SOURCE, TARGETS)
                # The chip is only asked for its peaks, and no time is looked at.
                plan = make_plan(model, config, method, placement, CHIPS["v5e"], rows, TrainConfig(dropout=False))
                assert plan.cost is not None
                found: dict[str, float] = {}
                count: dict[str, int] = {}
                for collective in plan.cost.collectives:
                    found[collective.kind] = found.get(collective.kind, 0.0) + collective.bytes
                    count[collective.kind] = count.get(collective.kind, 0) + collective.count
                records.append(
                    {
                        "model": model,
                        "method": name,
                        "mesh": str(placement),
                        "weights": plan.backbone_parameters * FLOAT,
                        "bytes": found,
                        "count": count,
                        "expected": expected(config, name, preset, plan.trainable_parameters),
                    }
                )
    return records


def main() -> None:
    """Writes the records of all cases."""
    parser = argparse.ArgumentParser("collectives.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=pathlib.Path, required=True, metavar="FILE", help="where the records go")
    options = parser.parse_args()
    from deptjax.cli.setup import prepare

    prepare()
    options.json.write_text(json.dumps(_cases()))


if __name__ == "__main__":
    main()
