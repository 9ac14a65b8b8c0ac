"""From the results of `gpu.py` to Markdown: the table, the aims with what came of them, and what failed."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.cases import TITLES
from benchmarks.report import Aim, aim_line

# What stands in the docs while there are no results.
NOT_RUN = (
    "Not run yet: no accelerator was at hand. The command is known to work from end to end on a CPU, on tiny models,\n"
    "both sides and its checks included; there are no numbers of a GPU."
)
LARGE, AT_TOKENS = "llama2-7b", 16384  # the model and the source tokens a step of the aim of utilisation
UTILISATION, FASTER = 0.5, 1.3
Record = dict[str, Any]

_HEAD = (
    "| model, rows x source | method | side | trainable | s/step | tokens/s | utilisation | peak MiB | compiling, s "
    "| tokens/s, by torch's best |\n"
    "|---|---|---|--:|--:|--:|--:|--:|--:|--:|"
)


def markdown(results: Record) -> str:
    """Returns the conditions, the table and the aims."""
    contests = list(results["contests"].values())
    parts = [_conditions(results)]
    if contests:
        parts.append("\n".join([_HEAD, *(line for contest in contests for line in _lines(contest))]))
    parts += [f"Not measured: {failure}." for failure in failures(results)]
    if not results["settings"]["quick"]:
        parts.append("\n".join(map(aim_line, aims(contests))))
    return "\n\n".join(parts)


def failures(results: Record) -> list[str]:
    """Returns a line for each entrant that failed for another reason than too little memory."""
    return [
        f"{contest['title']}: {entrant['error']}"
        for contest in results["contests"].values()
        for entrant in contest["entrants"]
        if "error" in entrant and not entrant.get("out_of_memory")
    ]


def seconds(entrant: Record) -> float | None:
    """Returns the median seconds of a step, or `None` of an entrant that failed."""
    return None if "error" in entrant else statistics.median(entrant["seconds"])


def tokens(spec: Record) -> int:
    """Returns the source and target tokens of a step; prompt vectors are none.

    >>> tokens({"batch": 4, "source": 256, "target": 8})
    1056
    """
    return int(spec["batch"] * (spec["source"] + spec["target"]))


def utilisation(contest: Record, entrant: Record) -> float | None:
    """Returns the share of the device's measured rate of products that the operations of the method make up.

    These are those of `deptjax.flops`, on whichever side: what a side computes beside them is not counted for it.
    """
    took = seconds(entrant)
    if took is None or contest["flops"] is None:
        return None
    return float(contest["flops"] / took / contest["rate"])


def lead(contest: Record) -> float | None:
    """Returns the tokens a second of deptjax's first entrant by those of torch's faster one; `None` without either."""
    ours = next(seconds(e) for e in contest["entrants"] if e["spec"]["side"] == "deptjax")
    theirs = [took for e in contest["entrants"] if e["spec"]["side"] == "torch" and (took := seconds(e)) is not None]
    return min(theirs) / ours if theirs and ours is not None else None


def aims(contests: list[Record]) -> list[Aim]:
    """Returns both aims, each with the worst of the rows it is about."""
    large = [
        value
        for contest in contests
        for first in contest["entrants"][:1]
        if first["spec"]["model"] == LARGE and first["spec"]["batch"] * first["spec"]["source"] == AT_TOKENS
        if (value := utilisation(contest, first)) is not None
    ]
    leads = [value for contest in contests if (value := lead(contest)) is not None]
    return [
        Aim(
            f"{LARGE}, {AT_TOKENS:,} source tokens a step: at least {UTILISATION:.0%} utilisation in every row",
            min(large, default=None),
            UTILISATION,
            False,
        ),
        Aim(
            f"at least {FASTER} times the tokens/s of torch, the faster of eager and compiled, in every row with both",
            min(leads, default=None),
            FASTER,
            False,
        ),
    ]


def _conditions(results: Record) -> str:
    machine, device = results["machine"], results["device"] or {"kind": "no device", "memory_mib": 0, "driver": None}
    named = {"Python": machine["python"], **dict(sorted(results["versions"].items()))}
    versions = ", ".join(f"{name} {version}" for name, version in named.items())
    rates = [contest["rate"] for contest in results["contests"].values() if "rate" in contest]
    rate = f" Products of square bf16 matrices ran at {statistics.median(rates) / 1e12:,.4g} TFLOP/s." if rates else ""
    driver = f", driver {device['driver']}" if device["driver"] else ""
    memory = f", {device['memory_mib'] / 1024:,.0f} GiB for arrays" if device["memory_mib"] else ""
    missing = f" torch's side was not measured: {results['no_torch']}." if results["no_torch"] else ""
    warning = "**A smoke test on tiny models: these numbers mean nothing.** " if results["settings"]["quick"] else ""
    return (
        f"{warning}Measured {machine['date']} on {device['kind']}{memory}{driver}; {versions}. bf16 frozen weights and "
        "computation, float32 trained parameters and AdamW, random weights, dropout 0; medians. Utilisation is the "
        f"operations of the method's step by formula over the rate of products measured in the same run.{rate}{missing}"
    )


def _lines(contest: Record) -> list[str]:
    first = contest["entrants"][0]
    by = lead(contest)
    shown = "" if by is None else f"{by:.2f}"
    return [_line(contest, entrant, shown if entrant is first else "") for entrant in contest["entrants"]]


def _line(contest: Record, entrant: Record, by: str) -> str:
    spec, took = entrant["spec"], seconds(entrant)
    cells = [f"{spec['model']}, {spec['batch']} x {spec['source']}", TITLES[spec["method"]], _side(contest, entrant)]
    if took is None:
        reason = "out of memory" if entrant.get("out_of_memory") else "failed"
        return "| " + " | ".join([*cells, *[""] * 1, f"**{reason}**", *[""] * 4, by]) + " |"
    used = utilisation(contest, entrant)
    cells += [
        f"{entrant['parameters']:,}",
        f"{took:.4f}",
        f"{tokens(spec) / took:,.0f}",
        "" if used is None else f"{used:.0%}",
        f"{entrant['peak_mib']:,.0f}",
        f"{entrant['compile_s']:.0f}" if entrant["compile_s"] else "",
        by,
    ]
    return "| " + " | ".join(cells) + " |"


def _side(contest: Record, entrant: Record) -> str:
    """Returns the side, how it is computed, and whether it was on the card without the others of its contest."""
    spec = entrant["spec"]
    kinds = [entrant["attention"]] if "attention" in entrant else []
    if spec["side"] == "torch":
        kinds.insert(0, "compiled" if spec["compiled"] else "eager")
    if spec["remat"] != "none":
        kinds.append(f"remat {spec['remat']}")
    if entrant.get("together") == 1 < len(contest["entrants"]):
        kinds.append("alone")
    return f"{spec['side']} ({', '.join(kinds)})" if kinds else str(spec["side"])
