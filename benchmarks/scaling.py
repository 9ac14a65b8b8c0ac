"""What training takes on slices of TPUs that were not there: compiled, counted, written down, drawn.

    python benchmarks/scaling.py               compile what scaling.json lacks (hours on a small machine), then draw
    python benchmarks/scaling.py --table       the tables of docs/scaling.md and the plot, of what is there

Each case is a call of `deptjax.planning.make_plan`: the real training step, compiled by the real compiler of the chip.
Nothing is run, so nothing here is a measurement of speed. `benchmarks/scaling.json` grows case by case: a run that is
stopped goes on where it was. Needs the extras `tpu` and `plot`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
if not __package__:  # run as a script
    sys.path[0] = str(HERE.parent)

from benchmarks.command import Benchmark, load, save, say  # noqa: E402
from deptjax.methods import method_from_config  # noqa: E402
from deptjax.models.sizes import SIZES  # noqa: E402
from deptjax.planning import CHIPS, Rows, make_plan, tpu_devices  # noqa: E402
from deptjax.planning.table import duration, markdown, size  # noqa: E402
from deptjax.sharding import Placement  # noqa: E402
from deptjax.training.config import TrainConfig  # noqa: E402

PLOT = HERE.parent / "docs" / "scaling.svg"
LENGTH, TARGETS = 256, 8
ROWS_PER_CHIP = {"v5e": 4, "v5p": 16}
FEWER_ROWS = {"llama2-70b": 4}  # of the models of which so many rows' activations fill a chip

METHODS: dict[str, dict[str, Any]] = {
    "DePT, m=20": {"method": "dept", "prompt_length": 20},
    "DePT, m=40": {"method": "dept", "prompt_length": 40},
    "PT, 100": {"method": "prompt_tuning", "prompt_length": 100},
    "LoRA, r=8": {"method": "lora", "rank": 8},
    "full": {"method": "full"},
}
T5_SIZES = ("t5-small", "t5-base", "t5-large", "t5-3b", "t5-11b")
PROMPTS = ("DePT, m=20", "DePT, m=40", "PT, 100")
ONE, FLAT, CUBE = "v5p:1x1x1", "v5e:4x4", "v5p:4x4x4"
SLICES = {"v5e:4x4": "fsdp:16", "v5e:8x8": "data:4,fsdp:16", "v5e:16x16": "data:16,fsdp:16"}
MESHES = {ONE: "data:1", **SLICES, CUBE: "fsdp:64"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One compilation: a model, a slice, a method by its name in `METHODS`, and whether rows share the prompt."""

    model: str
    topology: str
    method: str
    share_prompt: bool = True

    @property
    def key(self) -> str:
        """The name of the case in the file of results."""
        own = "" if self.share_prompt else ", a prompt a row"
        return f"{self.model} | {self.topology} | {self.method}{own}"


PARTS: dict[str, list[Case]] = {
    "Methods, LLaMA-2-7B on 16 chips": [Case("llama2-7b", FLAT, name) for name in METHODS],
    "Weak scaling, LLaMA-2-7B": [Case("llama2-7b", topology, "DePT, m=40") for topology in SLICES],
    "Methods, T5-3B on 16 chips": [Case("t5-3b", FLAT, name) for name in METHODS],
    "Growth, T5 on one chip": [Case(model, ONE, name) for model in T5_SIZES for name in PROMPTS],
    "Methods, Llama-2-70B on 64 chips": [Case("llama2-70b", CUBE, name) for name in METHODS],
    "A prompt that rows share, and one a row, LLaMA-2-7B on one chip": [
        Case("llama2-7b", ONE, name, shared) for shared in (True, False) for name in PROMPTS
    ],
}


def cases() -> list[Case]:
    """Returns all cases, each once."""
    return list(dict.fromkeys(case for part in PARTS.values() for case in part))


def compiled(case: Case) -> dict[str, Any]:
    """Returns the plan of a case, plain."""
    chip, devices = tpu_devices(case.topology)
    config = dataclasses.replace(SIZES[case.model], dtype="bfloat16", scan_layers=True)
    placement = Placement.over(devices, mesh=MESHES[case.topology], config=config)
    rows = Rows(FEWER_ROWS.get(case.model, ROWS_PER_CHIP[chip]) * len(devices), LENGTH, TARGETS)
    train = TrainConfig(share_prompt=case.share_prompt)
    method = method_from_config(METHODS[case.method])
    plan = make_plan(case.model, config, method, placement, CHIPS[chip], rows, train)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu", "flax")}
    return {**dataclasses.asdict(case), "versions": versions, "plan": plan.to_json()}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Compiles the cases that have no result, and writes each down when it is done. Returns all, by their key."""
    results = load(options.output) if options.output.exists() else {}
    missing = [case for case in cases() if case.key not in results]
    for number, case in enumerate(missing, 1):
        results[case.key] = compiled(case)
        save(options.output, results)
        say(f"[{number}/{len(missing)}] {case.key}: {results[case.key]['plan']['compile_seconds']:.0f} s")
    return results


def table(found: Iterable[dict[str, Any]]) -> str:
    """Returns a Markdown table of results, a row each."""
    head = ["model", "slice", "method", "weights", "trained + optimiser", "rest", "total", "TFLOP", "HBM", "sent"]
    lines = [[*head, "step", "bound by", "tokens/s/chip"]]
    for result in found:
        plan = result["plan"]
        memory, cost = plan["memory"], plan["cost"]
        own = "" if result["share_prompt"] else ", a prompt a row"
        line = [result["model"], result["topology"], result["method"] + own]
        line += [size(memory[part]) for part in ("weights", "state", "rest")]
        line.append(f"{size(memory['total'])}{'' if memory['fits'] else ' (does not fit)'}")
        if cost is None:
            line += ["-"] * 6
        else:
            sent = sum(collective["sent_bytes"] for collective in cost["collectives"])
            line += [f"{sum(cost['flops'].values()) / 1e12:.3g}", size(cost["memory_bytes"]), size(sent)]
            line += [duration(plan["roofline_seconds"]), plan["bound"], f"{plan['tokens_per_second_per_chip']:,.0f}"]
        lines.append(line)
    return markdown(lines)


def savings(results: dict[str, Any]) -> dict[str, list[tuple[str, int, dict[str, float]]]]:
    """Returns for each DePT, by growing model, what it takes of prompt tuning's: FLOPs, bytes of activations, time."""
    curves: dict[str, list[tuple[str, int, dict[str, float]]]] = {}
    for name in PROMPTS[:2]:
        for model in T5_SIZES:
            plans = [results[key]["plan"] for m in (name, PROMPTS[2]) if (key := Case(model, ONE, m).key) in results]
            if len(plans) == 2 and all(plan["cost"] for plan in plans):  # what does not fit is not compiled
                own, vanilla = map(quantities, plans)
                shares = {what: own[what] / vanilla[what] for what in own}
                curves.setdefault(name, []).append((model, plans[0]["backbone_parameters"], shares))
    return curves


def quantities(plan: dict[str, Any]) -> dict[str, float]:
    """Returns what the methods are compared by."""
    return {
        "FLOPs": sum(plan["cost"]["flops"].values()),
        "activations": plan["memory"]["rest"],
        "roofline time": plan["roofline_seconds"],
    }


def draw(results: dict[str, Any]) -> None:
    """Draws the saving of DePT over prompt tuning by the size of the model."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "scaling"  # the same file from the same numbers
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.6), sharey=True, layout="constrained")
    colours = {"DePT, m=20": "#0b6e99", "DePT, m=40": "#d9730d"}
    for name, points in savings(results).items():
        for axis, what in zip(axes, ("FLOPs", "activations", "roofline time")):
            values = [100 * (1 - shares[what]) for _, _, shares in points]
            axis.plot([count for _, count, _ in points], values, "o-", color=colours[name], label=name)
    for axis, what in zip(axes, ("FLOPs a step", "activations, bytes a chip", "roofline time a step")):
        axis.set_xscale("log")
        axis.set_title(f"saved of {what}", fontsize=10)
        axis.set_xlabel("parameters of the backbone (T5)")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("% less than prompt tuning, 100 vectors")
    axes[0].legend(frameon=False)
    figure.savefig(PLOT, metadata={"Date": None})


def tables(results: dict[str, Any]) -> str:
    """Returns the tables of docs/scaling.md."""
    parts = [
        f"## {title}\n\n{table(results[case.key] for case in part if case.key in results)}"
        for title, part in PARTS.items()
        if any(case.key in results for case in part)
    ]
    lines = [["model", "parameters", "method", "FLOPs", "activations", "roofline time"]]
    for name, points in savings(results).items():
        for model, count, shares in points:
            shown = [f"{100 * (1 - share):.1f} %" for share in shares.values()]
            lines.append([model, f"{count:,}", name, *shown])
    missing = sum(case.key not in results for case in cases())
    told = [f"{missing} cases of `benchmarks/scaling.py` have not been compiled yet."] if missing else []
    plot = "![What DePT saves of prompt tuning, by the size of the model](scaling.svg)"
    saved = "## Saved against prompt tuning\n\n" + markdown(lines)
    return "\n\n".join([*told, *parts, saved, plot])


SCALING = Benchmark("scaling", measure, tables)


def main() -> int:
    """Compiles what is missing, unless `--table` is given, prints the tables and draws the plot."""
    options = SCALING.parser(__doc__).parse_args()
    status = SCALING.run(options)
    if not status:
        draw(load(options.output))
    return status


if __name__ == "__main__":
    sys.exit(main())
