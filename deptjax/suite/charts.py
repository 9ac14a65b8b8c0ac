"""Charts as SVG text: learning curves, and bars with error bars. Colours are classes, so that a page's theme sets them.

What is drawn for the method number i has the class `m{i}`; the page gives these `--ink` (a colour) and `--dash`.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean

Points = Sequence[tuple[float, float]]

WIDTH = 440  # of the view box; at a phone's width the text is still readable
_LINES_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 260, 46, 12, 12, 38
_ROW, _NAME_WIDTH, _VALUE_WIDTH = 34, 104, 92  # of a bar, of the name before it, of the number behind it
_MOST_POINTS = 240  # of a line; more cannot be told apart at this width
_MOST_MARKS = 40


@dataclasses.dataclass(frozen=True)
class Line:
    """The learning curve of one method.

    Attributes:
      name: of the method.
      number: of the method, for its colour.
      seeds: the (step, value) points of each seed.
    """

    name: str
    number: int
    seeds: tuple[Points, ...]

    @property
    def mean(self) -> list[tuple[float, float]]:
        """The mean over the seeds, at the steps that all of them have."""
        by_step = [dict(points) for points in self.seeds]
        common = sorted(set.intersection(*map(set, by_step))) if by_step else []
        return [(step, fmean(of[step] for of in by_step)) for step in common]


@dataclasses.dataclass(frozen=True)
class Bar:
    """A method's bar.

    Attributes:
      name: of the method.
      number: of the method, for its colour.
      value: the bar's length.
      spread: half the length of the error bar, `None` for no error bar.
      text: the value as it is written behind the bar.
      points: the values of single seeds, drawn as dots.
    """

    name: str
    number: int
    value: float
    spread: float | None
    text: str
    points: tuple[float, ...] = ()


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Returns round numbers that enclose `low` and `high`, in equal steps of 1, 2 or 5 times a power of ten.

    >>> nice_ticks(0, 0.93)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    >>> nice_ticks(43, 88)
    [40.0, 50.0, 60.0, 70.0, 80.0, 90.0]
    """
    if not high > low:
        pad = abs(low) / 10 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(times * power for times in (1, 2, 5, 10) if times * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def line_chart(title: str, lines: Sequence[Line], y_text: Callable[[float], str]) -> str:
    """Returns an SVG of learning curves: each seed thin, the mean over the seeds thick. Empty where there is no point.

    Args:
      title: what the chart shows, for those who cannot see it.
      lines: one a method.
      y_text: how a value is written.
    """
    points = [point for line in lines for seed in line.seeds for point in seed]
    if not points:
        return ""
    axes = _Axes.around(points)
    parts = [axes.drawn(y_text)]
    for line in lines:
        mean = line.mean
        # Where the seeds share no step, each of them is all there is to see.
        seeds = line.seeds if len(line.seeds) > 1 or not mean else ()
        drawn = [_path(seed, axes, "seed" if mean else "mean") for seed in seeds]
        drawn += [_path(mean, axes, "mean"), *_marks(line.name, mean, axes, y_text)]
        parts.append(f'<g class="m{line.number}">{"".join(drawn)}</g>')
    return _svg(title, _LINES_HEIGHT, "".join(parts))


@dataclasses.dataclass(frozen=True)
class _Axes:
    """Where steps and values lie in a chart of lines."""

    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    last: float

    @classmethod
    def around(cls, points: Points) -> _Axes:
        steps, values = zip(*points, strict=True)
        last = max(*steps, 1)
        return cls([x for x in nice_ticks(0, last) if x <= last], nice_ticks(min(values), max(values)), last)

    def place(self, step: float, value: float) -> tuple[float, float]:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        bottom = _LINES_HEIGHT - _BOTTOM
        x = _LEFT + (WIDTH - _LEFT - _RIGHT) * step / self.last
        return x, bottom - (bottom - _TOP) * (value - low) / (high - low)

    def drawn(self, y_text: Callable[[float], str]) -> str:
        parts = []
        for value in self.y_ticks:
            y = self.place(0, value)[1]
            parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
            parts.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{_text(y_text(value))}</text>')
        low = _LINES_HEIGHT - _BOTTOM + 17
        for step in self.x_ticks:
            x = self.place(step, self.y_ticks[0])[0]
            parts.append(f'<text x="{x:.1f}" y="{low}" text-anchor="middle">{step:,.10g}</text>')
        middle = (_LEFT + WIDTH - _RIGHT) / 2
        parts.append(f'<text x="{middle}" y="{_LINES_HEIGHT - 4}" text-anchor="middle">step</text>')
        return "".join(parts)


def _path(points: Points, axes: _Axes, kind: str) -> str:
    placed = " ".join(f"{x:.1f},{y:.1f}" for x, y in (axes.place(*point) for point in _thinned(points)))
    return f'<polyline class="{kind}" points="{placed}"/>' if placed else ""


def _marks(name: str, mean: Points, axes: _Axes, y_text: Callable[[float], str]) -> Iterator[str]:
    """Yields a dot on each point of a mean, which tells its numbers; none where they would hide the line."""
    for step, value in mean if len(mean) <= _MOST_MARKS else ():
        x, y = axes.place(step, value)
        told = _text(f"{name}, step {step:,.10g}: {y_text(value)}")
        yield f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{told}</title></circle>'


def _thinned(points: Points) -> Points:
    """Returns at most `_MOST_POINTS` points: means over as many neighbours as that takes, and the last point."""
    size = -(-len(points) // _MOST_POINTS)
    if size <= 1:
        return points
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(fmean(x for x, _ in part), fmean(y for _, y in part)) for part in parts] + [points[-1]]


def bar_chart(title: str, bars: Sequence[Bar]) -> str:
    """Returns an SVG of horizontal bars from 0, with an error bar and the single seeds as dots. Empty without bars."""
    if not bars:
        return ""
    ends = [bar.value + sign * (bar.spread or 0) for bar in bars for sign in (-1, 1)]
    values = [*ends, *(point for bar in bars for point in bar.points)]
    low, high = min(0.0, *values), max(0.0, *values)
    left, width = _NAME_WIDTH, WIDTH - _NAME_WIDTH - _VALUE_WIDTH

    def place(value: float) -> float:
        return left + width * (value - low) / ((high - low) or 1.0)

    parts = []
    for row, bar in enumerate(bars):
        middle = _ROW * row + _ROW / 2
        begin, end = sorted((place(0), place(bar.value)))
        told = f"<title>{_text(f'{bar.name}: {bar.text}')}</title>"
        parts.append(f'<g class="m{bar.number}">')
        parts.append(f'<text class="name" x="{left - 8}" y="{middle + 4}" text-anchor="end">{_text(bar.name)}</text>')
        box = f'x="{begin:.1f}" y="{middle - 9}" width="{max(end - begin, 0.5):.1f}" height="18" rx="2"'
        parts.append(f'<rect class="bar" {box}>{told}</rect>')
        parts += [f'<circle class="one" cx="{place(point):.1f}" cy="{middle}" r="2.4"/>' for point in bar.points]
        if bar.spread is not None:
            parts.append(_error_bar(place(bar.value - bar.spread), place(bar.value + bar.spread), middle))
        at = place(max(bar.value + (bar.spread or 0), 0.0, *bar.points)) + 7
        parts.append(f'<text class="value" x="{at:.1f}" y="{middle + 4}">{_text(bar.text)}</text></g>')
    height = _ROW * len(bars)
    parts.append(f'<line class="axis" x1="{place(0):.1f}" x2="{place(0):.1f}" y1="0" y2="{height}"/>')
    return _svg(title, height, "".join(parts))


def _svg(title: str, height: int, content: str) -> str:
    return (
        f'<svg role="img" aria-label="{_text(title)}" viewBox="0 0 {WIDTH} {height}">'
        f"<title>{_text(title)}</title>{content}</svg>"
    )


def _text(text: str) -> str:
    return html.escape(" ".join(text.split()))


def _error_bar(begin: float, end: float, middle: float) -> str:
    caps = "".join(f"M{x:.1f} {middle - 5}V{middle + 5}" for x in (begin, end))
    return f'<path class="error" d="M{begin:.1f} {middle}H{end:.1f}{caps}"/>'
