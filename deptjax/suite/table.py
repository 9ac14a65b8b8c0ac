"""The tables of a suite, as text for Markdown and as rows for the HTML report."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

from deptjax.suite.results import AFTER_OTHERS, AVERAGE, IN_POPULATION, WITH_OTHERS, Numbers

NONE = "–"
_MARKS = {WITH_OTHERS: " †", IN_POPULATION: " ‡"}  # behind a peak that is not of the run alone


@dataclasses.dataclass(frozen=True)
class Entry:
    """A text in a table; `best` of the one that is to stand out in its column."""

    text: str
    best: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """A table: its header, its rows, and how many columns from the left hold words and not numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    words: int = 1


def methods_table(results: Numbers) -> Table:
    """Returns one row a method: the main test metric of each task as mean ± sd, their average, and what it costs."""
    summary = {(entry["task"], entry["method"]): entry for entry in results["summary"]}
    tasks = [task for task in dict.fromkeys(task for task, _ in summary) if task != AVERAGE]
    methods = list(dict.fromkeys(method for _, method in summary))
    columns = [*tasks, *([AVERAGE] if len(tasks) > 1 else [])]
    best = {column: _best(summary.get((column, method)) for method in methods) for column in columns}
    rows = []
    for method in methods:
        whole = summary[AVERAGE if len(tasks) > 1 else tasks[0], method]
        scores = [(column, summary.get((column, method))) for column in columns]
        rows.append(
            (
                Entry(method),
                *(
                    Entry(score_text(entry), _mean(entry) is not None and _mean(entry) == best[column])
                    for column, entry in scores
                ),
                Entry(count_text(whole["trainable_parameters"])),
                Entry(seconds_text(whole["seconds_per_step"])),
                Entry(mib_text(whole["peak_mib"])),
            )
        )
    headed = [f"{task} {metric_of(results, task)}".strip() for task in tasks]
    costs = ("trained parameters", "s/step", "peak MiB")
    return Table("Methods", ("method", *headed, *columns[len(tasks) :], *costs), tuple(rows))


def runs_table(results: Numbers) -> Table:
    """Returns one row a run, with all of its metrics, or the line that says why it has none."""
    header = (
        "task",
        "method",
        "seed",
        "test",
        "dev",
        "best step",
        "trained parameters",
        "s/step",
        "peak MiB",
        "minutes",
    )
    rows = []
    for run in results["runs"]:
        named = (run["task"], run["method"], str(run["seed"]))
        if run["status"] == "done":
            values: tuple[str, ...] = (
                _scores(run["test"]),
                _scores(run["dev"]),
                str(run["best_step"]),
                count_text(run["trainable_parameters"]),
                seconds_text(run["seconds_per_step"]),
                mib_text(run["peak_mib"]) + _MARKS.get(run["peak_of"], ""),
                f"{run['wall_seconds'] / 60:.1f}",
            )
        else:
            told = f"failed: {run['error']}" if run["status"] == "failed" else "not run yet"
            values = (told, *[NONE] * 6)
        rows.append(tuple(map(Entry, (*named, *values))))
    return Table("Runs", header, tuple(rows), words=2)


def notes(results: Numbers) -> list[str]:
    """Returns what must be known to read the tables, a sentence each."""
    told = [
        "Scores are those of the test split times 100, mean ± sample standard deviation over the seeds, of the prompt"
        " that was best on the dev split; s/step is the median over the runs, peak MiB the largest of them."
    ]
    if any(entry["task"] == AVERAGE for entry in results["summary"]):
        told.append("The average is over the tasks, and its deviation over the seeds that are done on all of them.")
    peaks = {run.get("peak_of") for run in results["runs"]}
    if AFTER_OTHERS in peaks:
        told.append(
            "Peaks were taken in one process, run after run; each may hold some of what earlier runs left, up to a"
            " few hundred MiB. With --isolate each run has a process of its own."
        )
    if WITH_OTHERS in peaks:
        told.append("† The peak of the process so far, earlier runs included; with --isolate it is the run's own.")
    if IN_POPULATION in peaks:
        told.append(
            "‡ Trained at once with other seeds: the peak is that of all together, the seconds are a share of theirs."
        )
    missing = sum(run["status"] != "done" for run in results["runs"])
    if missing:
        told.append(f"{missing} of {len(results['runs'])} runs are not done; (n of m) says how many a mean is over.")
    return told


def markdown(results: Numbers) -> str:
    """Returns both tables as a page of Markdown."""
    parts = [f"# {title(results)}", "", _markdown_table(methods_table(results)), ""]
    parts += [f"{note}\n" for note in notes(results)]
    parts += ["## All runs", "", _markdown_table(runs_table(results)), ""]
    return "\n".join(parts)


def methods_markdown(results: Numbers) -> str:
    """Returns the table of the methods alone, for a terminal."""
    return _markdown_table(methods_table(results))


def title(results: Numbers) -> str:
    """Returns the title of a suite's report."""
    model = results["model"].get("name_or_path", "")
    return " ".join(filter(None, ["Suite", results["name"], f"on {model}" if model else ""]))


def metric_of(results: Numbers, task: str) -> str:
    """Returns the name of a task's main test metric, empty where no run of it is done."""
    for entry in results["summary"]:
        if entry["task"] == task and entry["test"]:
            return str(next(iter(entry["test"])))
    return ""


def score_text(entry: Numbers | None) -> str:
    """Returns a summary's score, with `(2 of 3)` behind it where seeds are missing from it."""
    score = None if entry is None else entry["score"]
    if entry is None or score is None or score["mean"] is None:
        return NONE
    asked = entry.get("seeds", score["n"]) if entry["task"] == AVERAGE else entry["of"]
    partial = f" ({score['n']} of {asked})" if score["n"] < asked else ""
    return mean_text(score) + partial


def mean_text(score: Numbers) -> str:
    """Returns a mean and its deviation as `83.6 ± 0.4`."""
    spread = "" if score["sd"] is None else f" ± {100 * score['sd']:.1f}"
    return f"{100 * score['mean']:.1f}{spread}"


def count_text(value: int | None) -> str:
    """Returns a count with separators."""
    return NONE if value is None else f"{value:,}"


def seconds_text(value: float | None) -> str:
    """Returns seconds with three significant digits."""
    return NONE if value is None else f"{value:.3g}"


def mib_text(value: float | None) -> str:
    """Returns MiB without a fraction."""
    return NONE if value is None else f"{value:,.0f}"


def _scores(scores: Numbers) -> str:
    shown = (f"{name} {NONE if value is None else f'{100 * value:.1f}'}" for name, value in scores.items())
    return ", ".join(shown) or NONE


def _mean(entry: Numbers | None) -> float | None:
    return None if entry is None or entry["score"] is None else entry["score"]["mean"]


def _best(entries: Iterable[Numbers | None]) -> float | None:
    """Returns the highest mean, where there are several to choose from."""
    known = [mean for mean in map(_mean, entries) if mean is not None]
    return max(known) if len(known) > 1 else None


def _markdown_table(table: Table) -> str:
    rules = ["---" if i < table.words else "--:" for i in range(len(table.header))]
    lines = [_markdown_row(table.header), _markdown_row(rules)]
    for row in table.rows:
        cells = [_markdown_text(entry.text) for entry in row]
        marked = [f"**{cell}**" if entry.best else cell for entry, cell in zip(row, cells, strict=True)]
        lines.append(_markdown_row(marked))
    return "\n".join(lines)


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown_text(text: str) -> str:
    r"""Returns a text that means itself in a cell of Markdown.

    >>> print(_markdown_text("a|b <i> max_length\n*"))
    a\|b \<i> max_length \*
    """
    return re.sub(r"([\\`*|<\[])", r"\\\1", " ".join(text.split()))
