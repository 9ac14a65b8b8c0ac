"""From raw results to Markdown: the tables, the aims with what came of them, and the README's part of it."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from benchmarks import collectives
from benchmarks.cases import TITLES

QUIET = 0.1  # share of the machine that others may use before the table says so
Record = dict[str, Any]

_HEADS = {
    "train": "Training step, long sources",
    "short": "Training step, short sources",
    "shared": "Causal model, short texts: one prompt a batch, or a copy in every row",
    "buckets": "Real texts: padded to a few lengths, or all to 256",
}


@dataclasses.dataclass(frozen=True)
class Aim:
    """Something the project set out to reach. `value` is `None` when it was not measured."""

    text: str
    value: float | None
    limit: float
    at_most: bool

    @property
    def met(self) -> bool | None:
        """Whether it was reached, by the unrounded number; `None` when it was not measured."""
        if self.value is None:
            return None
        return self.value <= self.limit if self.at_most else self.value >= self.limit


def median_seconds(record: Record) -> float:
    """Returns the median seconds of an entrant's steps."""
    return statistics.median(record["seconds"])


def pair_ratio(one: Record, other: Record) -> float:
    """Returns the median over the rounds of the seconds of `one` by those of `other` in the same round.

    >>> pair_ratio({"seconds": [1.0, 2.0, 9.0]}, {"seconds": [2.0, 4.0, 6.0]})
    0.5
    """
    return statistics.median(a / b for a, b in zip(one["seconds"], other["seconds"], strict=True))


def rows_a_second(record: Record) -> float:
    """Returns examples a second over all timed steps."""
    return record["rows"] / sum(record["seconds"])


def busy_share(results: Record) -> float:
    """Returns the share of the machine that other work used during all timed steps, weighted by their seconds."""
    entrants = [e for contest in results["contests"].values() for e in contest.get("entrants", ())]
    pairs = [pair for e in entrants for pair in zip(e["others"], e["seconds"], strict=True)]
    return sum(share * seconds for share, seconds in pairs) / (sum(seconds for _, seconds in pairs) or 1.0)


def find(results: Record, section: str, model: str, **spec: Any) -> tuple[Record, Record] | None:
    """Returns the contest's record and the first entrant with these fields in its spec, or `None`.

    Failed contests have no entrants.
    """
    for contest in results["contests"].values():
        if contest["section"] != section:
            continue
        for entrant in contest.get("entrants", ()):
            if entrant["spec"]["model"] == model and all(entrant["spec"][k] == v for k, v in spec.items()):
                return contest, entrant
    return None


def _slowest_row(results: Record, model: str) -> Aim:
    """Returns the aim of being no slower than torch in any row of long sources, by the row where it is slowest."""
    ratios = []
    for method in ("pt100", "dept20", "dept40", "dept60", "lora8", "full"):
        ours, theirs = (find(results, "train", model, side=side, method=method) for side in ("deptjax", "torch"))
        if ours and theirs:
            ratios.append(pair_ratio(ours[1], theirs[1]))
    return Aim(f"{model}, source 256: no row slower than torch", max(ratios, default=None), 1.0, True)


def aims(results: Record) -> list[Aim]:
    """Returns all aims with what was measured."""
    found = [_slowest_row(results, model) for model in ("t5-small", "t5-base", "smollm2-135m")]
    for section, source, limit in (("train", 256, 0.78), ("short", 64, 0.6)):
        for model in ("t5-small", "t5-base"):
            dept = find(results, section, model, side="deptjax", method="dept20")
            prompt = find(results, section, model, side="deptjax", method="pt100")
            text = f"{model}, source {source}: a DePT m=20 step takes at most {limit} of prompt tuning's"
            value = pair_ratio(dept[1], prompt[1]) if dept and prompt and dept[0] is prompt[0] else None
            found.append(Aim(text, value, limit, True))
    ours = find(results, "shared", "smollm2-135m", side="deptjax", method="pt100", share_prompt=True)
    theirs = find(results, "shared", "smollm2-135m", side="torch", method="pt100")
    value = pair_ratio(theirs[1], ours[1]) if ours and theirs else None
    found.append(
        Aim("SmolLM2 size, short texts: prompt tuning at least 4 times as fast as torch peft", value, 4, False)
    )
    for text in ("trec6", "sms_spam"):
        bucketed = find(results, "buckets", "t5-small", text=text, padding="buckets")
        padded = find(results, "buckets", "t5-small", text=text, padding="max")
        value = rows_a_second(bucketed[1]) / rows_a_second(padded[1]) if bucketed and padded else None
        found.append(Aim(f"{text}: at least 3 times the examples a second of padding all to 256", value, 3, False))
    return found


def markdown(results: Record) -> str:
    """Returns the tables of all sections that were measured, the aims and the conditions."""
    parts = [_conditions(results)]
    for section, head in _HEADS.items():
        contests = [c for c in results["contests"].values() if c["section"] == section]
        if not contests:
            continue
        measured = [contest for contest in contests if "error" not in contest]
        lines = _bucket_lines(measured) if section == "buckets" else _step_lines(measured)
        errors = [f"Not measured: {c['title']} ({c['error']})." for c in contests if "error" in c]
        parts += [f"### {head}", *(["\n".join(lines)] if measured else []), *errors]
    if results.get("collectives"):
        parts += ["### Collectives on eight virtual devices", collectives.markdown(results["collectives"])]
    if not results["settings"]["quick"] and results["contests"]:
        parts += ["### Aims", "\n".join(map(aim_line, aims(results)))]
    return "\n\n".join(parts)


def _conditions(results: Record) -> str:
    machine, settings = results["machine"], results["settings"]
    named = {"Python": machine["python"], **dict(sorted(results["versions"].items()))}
    versions = ", ".join(f"{name} {version}" for name, version in named.items())
    compiled = [
        entrant["compile_s"] / entrant.get("programs", 1)
        for contest in results["contests"].values()
        for entrant in contest.get("entrants", ())
        if entrant["compile_s"]
    ]
    took = (
        f" Compiling a step took {min(compiled):.0f} to {max(compiled):.0f} s and is in no number." if compiled else ""
    )
    others = busy_share(results)
    noise = f" Other work took {others:.0%} of the machine meanwhile: the numbers are noisy." if others > QUIET else ""
    warning = "**A smoke test on tiny models: these numbers mean nothing.** " if settings["quick"] else ""
    return (
        f"{warning}Measured {machine['date']} on {machine['cpu']}, {settings['threads']} threads, float32, random "
        f"weights, dropout 0, AdamW; {versions}. Both sides take their steps in turn. Time "
        f"ratios are medians over the rounds: below 1, deptjax is faster.{took}{noise}"
    )


def _step_lines(contests: list[Record]) -> list[str]:
    lines = [
        "| model, batch x source | method | trainable | deptjax s/step | torch s/step | time, deptjax / torch "
        "| source tokens/s, deptjax (torch) | peak MiB, deptjax (torch) |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for contest in contests:
        entrants = contest["entrants"]
        for ours in entrants:
            if ours["spec"]["side"] != "deptjax":
                continue
            theirs = next(
                e for e in entrants if e["spec"]["side"] == "torch" and e["spec"]["method"] == ours["spec"]["method"]
            )
            lines.append(_step_line(ours, theirs))
    return lines


def _step_line(ours: Record, theirs: Record) -> str:
    spec = ours["spec"]
    tokens = spec["batch"] * spec["source"]
    title = TITLES[spec["method"]]
    if contest_kind(spec):
        title += f", {contest_kind(spec)}"
    cells = (
        f"{spec['model']}, {spec['batch']} x {spec['source']}",
        title,
        f"{ours['parameters']:,}",
        f"{median_seconds(ours):.3f}",
        f"{median_seconds(theirs):.3f}",
        f"{pair_ratio(ours, theirs):.2f}",
        f"{tokens / median_seconds(ours):,.0f} ({tokens / median_seconds(theirs):,.0f})",
        f"{ours['peak_mib']:,.0f} ({theirs['peak_mib']:,.0f})",
    )
    return "| " + " | ".join(cells) + " |"


def contest_kind(spec: Record) -> str:
    """Returns what is special about an entrant's way of computing, or an empty string."""
    return "" if spec["share_prompt"] else "a copy in every row"


def _bucket_lines(contests: list[Record]) -> list[str]:
    lines = [
        "| texts, model, batch | method | lengths compiled | examples/s, buckets | examples/s, all to 256 | times |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for contest in contests:
        bucketed, padded = contest["entrants"]
        spec = bucketed["spec"]
        fast, slow = rows_a_second(bucketed), rows_a_second(padded)
        cells = (
            f"{spec['text']}, {spec['model']}, {spec['batch']}",
            TITLES[spec["method"]],
            f"{bucketed['programs']}",
            f"{fast:.1f}",
            f"{slow:.1f}",
            f"{fast / slow:.1f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def aim_line(aim: Aim) -> str:
    """Returns the line of a list that says what became of an aim."""
    verdict = {True: "met", False: "**not met**", None: "not measured"}[aim.met]
    return f"- {aim.text}: {verdict}" + ("." if aim.value is None else f" ({aim.value:.2f}).")
