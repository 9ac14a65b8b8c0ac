"""The report: its drawings as text, what strangers' texts may do in it, and how it looks in a real browser."""

from __future__ import annotations

import html.parser
import os
import pathlib
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import Any

import pytest

from deptjax.suite.charts import WIDTH, Bar, Line, bar_chart, line_chart, nice_ticks
from deptjax.suite.report import report
from tests.suite.browser import NAMES, Browser, opened, program
from tests.suite.made_up import failed, results_of, run

METHODS = ("dept", "prompt_tuning", "prefix_tuning", "lora", "full")
TASKS = ("trec6", "sms_spam", "a_task_with_a_rather_long_name_2.1")


def whole_suite() -> dict[str, Any]:
    """Returns the results of five methods on three tasks with three seeds, one run failed and one not begun."""
    runs = [
        run(task, method, seed, 0.4 + 0.1 * METHODS.index(method) + 0.03 * seed - 0.05 * TASKS.index(task))
        for task in TASKS
        for method in METHODS
        for seed in (0, 1, 2)
    ]
    runs[7] = failed("trec6", "prefix_tuning", 1, "the loss is not a finite number at step 12; " * 3)
    runs[-1] = {"task": TASKS[-1], "method": "full", "seed": 2, "status": "missing"}
    return results_of(runs, name="packaged")


def drawn(svg: str) -> list[ET.Element]:
    return list(ET.fromstring(svg).iter())


def of_class(svg: str, name: str) -> list[ET.Element]:
    return [element for element in drawn(svg) if element.get("class") == name]


def test_a_mean_is_over_the_steps_that_all_seeds_have() -> None:
    line = Line("lora", 0, ([(10, 0.2), (20, 0.4), (30, 0.6)], [(10, 0.4), (20, 0.8)]))
    assert line.mean == [(10, pytest.approx(0.3)), (20, pytest.approx(0.6))]


def test_learning_curves() -> None:
    lines = [Line("dept", 0, ([(10, 0.0), (20, 1.0)], [(10, 0.0), (20, 0.5)])), Line("lora", 3, ([(20, 0.25)],))]
    svg = line_chart("accuracy over the steps", lines, "{:g}".format)
    assert [len(of_class(svg, kind)) for kind in ("seed", "mean", "mark")] == [2, 2, 3]
    dept, lora = (element for element in drawn(svg) if element.tag == "g")
    assert (dept.get("class"), lora.get("class")) == ("m0", "m3")
    first, last = (tuple(map(float, at.split(","))) for at in of_class(svg, "mean")[0].get("points", "").split())
    assert first[0] < last[0] == pytest.approx(WIDTH - 12)  # the last step is at the right end
    assert last[1] < first[1]  # and more is higher
    assert "dept, step 20: 0.75" in svg
    assert drawn(svg)[0].get("aria-label") == "accuracy over the steps"
    assert line_chart("nothing", [Line("dept", 0, ())], str) == ""


def test_a_long_curve_is_thinned_and_ends_where_it_ends() -> None:
    seed = [(float(step), step / 30_000) for step in range(1, 30_001)]
    (mean,) = of_class(line_chart("loss", [Line("dept", 0, (seed,))], str), "mean")
    points = mean.get("points", "").split()
    assert len(points) <= 241
    assert float(points[-1].split(",")[0]) == pytest.approx(WIDTH - 12)


def test_bars_begin_at_zero() -> None:
    bars = [
        Bar("a", 0, 0.5, 0.1, "50.0 ± 10.0", (0.4, 0.6)),
        Bar("b", 1, 0.25, None, "25.0"),
        Bar("c", 2, -0.25, 0, ""),
    ]
    a, b, c = (element for element in of_class(bar_chart("scores", bars), "bar"))
    assert float(a.get("width", 0)) == pytest.approx(2 * float(b.get("width", 0)), abs=0.2)
    assert a.get("x") == b.get("x") != c.get("x")
    assert float(c.get("x", 0)) + float(c.get("width", 0)) == pytest.approx(float(a.get("x", 0)), abs=0.2)
    assert len(of_class(bar_chart("scores", bars), "error")) == 2
    assert bar_chart("nothing", []) == ""


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.831, 0.8312), (-0.3, 0.9), (5, 5), (0, 0), (0, 30_000), (2, 1e9)])
def test_ticks_are_few_round_and_enclose(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 8
    assert len(set(ticks)) == len(ticks)


EVIL = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"


class Tags(html.parser.HTMLParser):
    """Collects the names of tags and attributes, and the texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_texts_of_strangers_stay_texts() -> None:
    runs = [run(EVIL, EVIL, 0, 0.5, device=EVIL), run(EVIL, "lora", 0, 0.5), failed("films", EVIL, 1, EVIL)]
    runs[0]["test"] = runs[0]["dev"] = {EVIL: 0.5}
    page = Tags(report(results_of(runs, name=EVIL, command=EVIL, model={"name_or_path": EVIL})))
    assert not page.tags & {"script", "img", "iframe", "object"}
    assert not {name for name in page.attributes if name.startswith("on")}
    assert sum(EVIL in text for text in page.texts) >= 6


def test_a_suite_without_a_run_that_is_done_has_a_report() -> None:
    missing = {"task": "films", "method": "dept", "seed": 0, "status": "missing"}
    page = report(results_of([missing]))
    assert "0 of 1 run done" in page
    assert "not run yet" in page


def test_nothing_is_fetched_from_elsewhere() -> None:
    page = report(whole_suite())
    assert not re.findall(r"""(?:src|href|action)=["'](?!data:,)""", page)
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser; where none is installed the tests are passed over, unless they are required."""
    found = program()
    if found is None:
        told = f"no browser ({', '.join(NAMES)}) is on the PATH; on Debian: apt-get install chromium"
        assert os.environ.get("DEPTJAX_BROWSER_TESTS") != "required", told
        pytest.skip(told)
    with opened(found, tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The report of a whole suite, in a file."""
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(report(whole_suite()))
    return file


# What lies outside of the page's width, but for what is inside a region that scrolls by itself.
OUTSIDE = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll table')).filter(e => {
  const box = e.getBoundingClientRect(); return box.width && (box.right > innerWidth + 0.5 || box.left < -0.5);
}).map(e => e.outerHTML.slice(0, 80))"""
CHARTS = """[...document.querySelectorAll('figure svg')].map(e => {
  const box = e.getBoundingClientRect();
  const ink = [...e.querySelectorAll('.bar, .mean')].map(m => m.getBoundingClientRect());
  return {width: box.width, height: box.height, drawn: ink.filter(b => b.width > 1 && b.height > 0.4).length,
          text: Math.min(...[...e.querySelectorAll('text')].map(t => t.getBoundingClientRect().height)),
          spilled: [...e.querySelectorAll('text')].filter(t => {
            const b = t.getBoundingClientRect(); return b.left < box.left - 1 || b.right > box.right + 1;
          }).map(t => t.textContent)};
})"""
CONTRAST = """(() => {
  const probe = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const light = colour => {
    probe.fillStyle = colour; probe.fillRect(0, 0, 1, 1);
    const parts = [...probe.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const against = colour => {
    const [low, high] = [light(colour), paper].sort((a, b) => a - b); return (high + 0.05) / (low + 0.05);
  };
  return {paper, text: against(getComputedStyle(document.body).color),
          soft: against(getComputedStyle(document.querySelector('.notes')).color),
          lines: [...document.querySelectorAll('.legend .mean')].map(e => against(getComputedStyle(e).stroke))};
})()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_in_a_browser(browser: Browser, page: pathlib.Path, tmp_path: pathlib.Path, width: int, dark: bool) -> None:
    browser.open(page, width, dark=dark)
    assert browser.value("document.title") == "Suite packaged on tiny"
    assert browser.value("innerWidth") == width
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value(OUTSIDE) == []

    charts = browser.value(CHARTS)
    assert len(charts) == 4 + 6 + 2  # scores with the average; dev and loss of each task; seconds and memory
    for chart in charts:
        assert chart["width"] >= 300
        assert chart["height"] >= 100
        assert chart["drawn"] == len(METHODS)
        assert chart["text"] >= 10  # pixels
        assert chart["spilled"] == []

    contrast = browser.value(CONTRAST)
    assert (contrast["paper"] < 0.05) == dark
    assert min(contrast["text"], contrast["soft"]) >= 4.5  # WCAG 2.2, for text
    assert len(contrast["lines"]) == len(METHODS)
    assert min(contrast["lines"]) >= 3  # and for graphics

    requests = [told["request"]["url"] for told in browser.told("Network.requestWillBeSent")]
    assert [url for url in requests if not url.startswith("data:")] == [page.absolute().as_uri()]
    assert browser.told("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded") == []
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000


def test_a_region_that_scrolls_holds_the_wide_tables(browser: Browser, page: pathlib.Path) -> None:
    browser.open(page, 400)
    sizes = browser.value(
        "[...document.querySelectorAll('.scroll')].map(e => [e.clientWidth, e.scrollWidth, e.tabIndex])"
    )
    assert len(sizes) == 2
    assert all(shown < 400 < whole and focus == 0 for shown, whole, focus in sizes)


def test_a_script_in_a_text_does_not_run(browser: Browser, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "evil.html"
    file.write_text(report(results_of([run(EVIL, EVIL, 0, 0.5)], name=EVIL)))
    browser.open(file, 800)
    assert browser.value("document.scripts.length") == 0
    assert browser.value("document.images.length") == 0
    assert EVIL in browser.value("document.querySelector('h1').textContent")
    assert browser.told("Page.javascriptDialogOpening") == []
