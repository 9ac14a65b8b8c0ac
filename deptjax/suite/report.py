"""The report of a suite: one HTML file that needs nothing beside it, no script and no network; and the other files."""

from __future__ import annotations

import html
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from deptjax.checkpoint import disk_errors
from deptjax.suite.charts import Bar, Line, bar_chart, line_chart
from deptjax.suite.folder import SuiteFolder
from deptjax.suite.results import AVERAGE, Numbers, main_score, read_results
from deptjax.suite.style import METHOD_COLOURS, STYLE
from deptjax.suite.table import (
    Table,
    markdown,
    mean_text,
    methods_table,
    metric_of,
    mib_text,
    notes,
    runs_table,
    seconds_text,
    title,
)
from deptjax.training.folder import write_json, write_text

# Whatever the texts in the report say: nothing is fetched, and nothing runs.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_results(workdir: str | pathlib.Path) -> Numbers:
    """Writes `results.json`, `results.md` and `report.html` of a suite, each in one piece, and returns its results.

    Raises `UserError` for a folder that holds no suite or cannot be written.
    """
    folder = SuiteFolder(workdir)
    results = read_results(workdir)
    with disk_errors(folder.path):
        write_json(folder.results, results)
        write_text(folder.table, markdown(results))
        write_text(folder.report, report(results))
    return results


def report(results: Numbers) -> str:
    """Returns the report of a suite as HTML."""
    numbers = {method: i % METHOD_COLOURS for i, method in enumerate(_names(results, "method"))}
    sections = [
        _header(results),
        _section(
            "Scores", _table(methods_table(results)), *(_notes(results)), _charts(_score_charts(results, numbers))
        ),
        _section("Learning curves", _legend(numbers), _charts(_curves(results, numbers), "charts curves")),
        _section("Cost", _charts(_cost_charts(results, numbers))),
        _section("All runs", _table(runs_table(results))),
        _settings(results),
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{_text(title(results))}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n'
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def _header(results: Numbers) -> str:
    runs = results["runs"]
    done = sum(run["status"] == "done" for run in runs)
    tasks, methods, seeds = (len(_names(results, name)) for name in ("task", "method", "seed"))
    devices = ", ".join(dict.fromkeys(run["device"] for run in runs if run["status"] == "done"))
    asked = ", ".join((_count(tasks, "task"), _count(methods, "method"), _count(seeds, "seed")))
    told = f"{asked}: {done} of {_count(len(runs), 'run')} done"
    failed = [f"{run['task']}, {run['method']}, seed {run['seed']}: {run['error']}" for run in runs if "error" in run]
    lines = [
        f"<h1>{_text(title(results))}</h1>",
        f'<p class="soft">{_text(told)}{_text(f" on {devices}") * bool(devices)}</p>',
    ]
    lines += [f'<p class="failed">Failed: {_text(line)}</p>' for line in failed]
    return "\n".join(lines)


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _section(heading: str, *parts: str) -> str:
    content = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{_text(heading)}</h2>\n{content or '<p>Nothing yet.</p>'}\n</section>"


def _notes(results: Numbers) -> list[str]:
    return [f'<p class="notes">{_text(note)}</p>' for note in notes(results)]


def _charts(figures: Iterator[tuple[str, str, str]], kind: str = "charts") -> str:
    """Returns (title, what is shown, SVG) as figures, those without a drawing left out."""
    drawn = [
        f"<figure><figcaption><b>{_text(name)}</b> {_text(told)}</figcaption>{svg}</figure>"
        for name, told, svg in figures
        if svg
    ]
    return f'<div class="{kind}">{"".join(drawn)}</div>' if drawn else ""


def _score_charts(results: Numbers, numbers: dict[str, int]) -> Iterator[tuple[str, str, str]]:
    tasks = list(dict.fromkeys(entry["task"] for entry in results["summary"]))
    for task in sorted(tasks, key=lambda task: task != AVERAGE):
        metric = metric_of(results, task) if task != AVERAGE else "of the tasks' main metrics"
        bars = []
        for entry in results["summary"]:
            score = entry["score"]
            if entry["task"] != task or score is None or score["mean"] is None:
                continue
            method = entry["method"]
            cells = [run for run in results["runs"] if (run["task"], run["method"]) == (task, method)]
            points = tuple(score for score in map(main_score, cells) if score is not None)
            bars.append(Bar(method, numbers[method], score["mean"], score["sd"], mean_text(score), points))
        yield task, f"{metric}, test", bar_chart(f"{task}: {metric} on the test split, one bar a method", bars)


def _curves(results: Numbers, numbers: dict[str, int]) -> Iterator[tuple[str, str, str]]:
    for task in _names(results, "task"):
        metric = metric_of(results, task)
        for name, told, shown in (
            (f"dev/{metric}", f"{metric}, dev", _percent),
            ("loss", "loss, training", "{:.3g}".format),
        ):
            lines = [
                Line(method, number, tuple(_seed_curves(results, task, method, name)))
                for method, number in numbers.items()
            ]
            yield task, told, line_chart(f"{task}: {told} over the steps, one line a method", lines, shown)


def _seed_curves(results: Numbers, task: str, method: str, name: str) -> Iterator[Sequence[tuple[float, float]]]:
    for run in results["runs"]:
        curve = run.get("curve", {}).get(name)
        if (run["task"], run["method"]) == (task, method) and curve:
            yield [(step, value) for step, value in curve]


def _percent(value: float) -> str:
    return f"{100 * value:.4g}"


def _cost_charts(results: Numbers, numbers: dict[str, int]) -> Iterator[tuple[str, str, str]]:
    whole = {entry["method"]: entry for entry in results["summary"]}  # the last of a method is that over all tasks
    costs: tuple[tuple[str, str, str, Callable[[Any], str]], ...] = (
        ("Seconds per step", "median over the runs", "seconds_per_step", seconds_text),
        ("Peak memory", "MiB, the largest of the runs", "peak_mib", mib_text),
    )
    for name, told, key, shown in costs:
        bars = [
            Bar(method, numbers[method], entry[key], None, shown(entry[key]))
            for method, entry in whole.items()
            if entry[key] is not None
        ]
        yield name, told, bar_chart(f"{name}, {told}, one bar a method", bars)


def _legend(numbers: dict[str, int]) -> str:
    line = '<svg viewBox="0 0 34 10" aria-hidden="true"><path class="mean" d="M0 5H34"/></svg>'
    items = [f'<li class="m{number}">{line}{_text(method)}</li>' for method, number in numbers.items()]
    return f'<ul class="legend">{"".join(items)}<li>thin: single seeds; thick: their mean</li></ul>'


def _table(table: Table) -> str:
    kinds = ["word" if i < table.words else "" for i in range(len(table.header))]
    head = "".join(f'<th scope="col" class="{kind}">{_text(name)}</th>' for name, kind in zip(table.header, kinds))
    rows = []
    for first, *rest in table.rows:
        cells = [f'<th scope="row" class="word">{_text(first.text)}</th>']
        for entry, kind in zip(rest, kinds[1:], strict=True):
            told = "told" if len(entry.text) > 40 else ""  # a sentence, not a number
            classes = " ".join(filter(None, (kind, told, "best" if entry.best else "")))
            cells.append(f'<td class="{classes}">{_text(entry.text)}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    # A region that scrolls must be reachable by keyboard.
    return (
        f'<div class="scroll" role="region" aria-label="{_text(table.title)}" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{chr(10).join(rows)}</tbody></table></div>"
    )


def _settings(results: Numbers) -> str:
    parts = [f"<pre>{_text(results['command'])}</pre>"] if results["command"] else []
    parts.append(f"<details><summary>model</summary>{_json(results['model'])}</details>")
    parts += [
        f"<details><summary>{_text(name)}</summary>{_json(recipe)}</details>"
        for name, recipe in results["recipes"].items()
    ]
    return _section("Command and settings", *parts)


def _json(value: Any) -> str:
    return f"<pre>{_text(json.dumps(value, indent=2, ensure_ascii=False))}</pre>"


def _names(results: Numbers, field: str) -> list[Any]:
    return list(dict.fromkeys(run[field] for run in results["runs"]))


def _text(text: str) -> str:
    return html.escape(text)
