"""The pages of the methods say what the methods say of themselves, and name files and fields that there are."""

from __future__ import annotations

import pathlib
import re
import shlex

import pytest

from deptjax.cli import flags, settings, share
from deptjax.cli.request import make_parser
from deptjax.methods import method_class, method_names
from deptjax.methods.base import method_fields

ROOT = pathlib.Path(__file__).resolve().parents[2]
SPOT = ROOT / "docs" / "methods" / "spot.md"  # a way to begin the run of any method
PAGES = sorted(set((ROOT / "docs" / "methods").glob("*.md")) - {SPOT})
CONFIGS = sorted((ROOT / "configs" / "methods").glob("*.gin"))
PARTS = ["Where it acts", "When to use it", "What it costs", "Published", "Measured here"]


def test_there_are_pages_of_methods() -> None:
    """Of every method, and a line in the index; all of a model has a line alone."""
    kinds, index = {page.stem for page in PAGES}, (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert kinds == {name for name in method_names() if not method_class(name).tunes_backbone}
    assert kinds <= {config.stem for config in CONFIGS}
    for name in method_names():
        assert f"| {f'[{name}](methods/{name}.md)' if name in kinds else name} |" in index


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_says_what_its_method_does(page: pathlib.Path) -> None:
    text, cls = page.read_text(encoding="utf-8"), method_class(page.stem)
    assert set(re.findall(r"\d{4}\.\d{5}", cls.paper)) <= set(re.findall(r"\d{4}\.\d{5}", text))
    assert f"`{cls.formula}`" in text
    assert [part for part in re.findall(r"^## (.+)$", text, re.MULTILINE) if part in PARTS] == PARTS
    assert re.search(rf"`--method {cls.kind}\b", text)
    assert f"`deptjax.methods.{cls.__name__}`" in text
    for name in re.findall(r"`(configs/[\w/.]+)`", text):
        assert (ROOT / name).is_file(), name
    for field in re.findall(r"`(\w+)=", text):
        assert field in method_fields(cls), field


def test_the_page_of_a_way_to_start_has_the_same_parts_and_a_command_that_is_taken() -> None:
    text = SPOT.read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == PARTS
    (command,) = re.findall(r"`deptjax train ([^`]+)`", text)
    options, _ = make_parser("deptjax train", "", "", "").parse(shlex.split(command))
    assert {"start-from", "few-shot"} <= {name.rpartition(".")[2].replace("_", "-") for name in options}


COMMANDS = [
    (page.stem, words)
    for page in PAGES
    for block in re.findall(r"^```bash\n(.+?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for words in (shlex.split(line) for line in block.replace("\\\n", " ").splitlines())
]


def test_there_are_commands() -> None:
    assert {page for page, _ in COMMANDS} >= {"attempt", "mpt"}


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[page for page, _ in COMMANDS])
def test_a_command_is_taken(page: str, words: list[str]) -> None:
    program, command, *rest = words
    assert program == "deptjax"
    parser = {"train": lambda: make_parser("deptjax train", "", "", ""), "share": share.make_parser}[command]()
    options, _ = parser.parse(rest)
    if command == "train":
        assert settings.make_method(flags.given_by_flags(options, parser)).kind == page


def test_published_scores_are_the_same_on_all_pages() -> None:
    """Of what stands in several tables: a method, its parameters, and scores."""
    found: dict[tuple[str, str], set[str]] = {}
    for page in PAGES:
        published = page.read_text(encoding="utf-8").partition("## Published")[2].partition("\n## ")[0]
        for method, parameters, scores in re.findall(
            r"^\| ([^|]+) \| ([\d.]+[KM]) \| (.+) \|$", published, re.MULTILINE
        ):
            found.setdefault((method, parameters), set()).add(scores)
    assert found["LoRA", "3.8M"] == {"85.3 | 76.5"}
    assert {key: scores for key, scores in found.items() if len(scores) > 1} == {}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_a_config_names_its_method(config: pathlib.Path) -> None:
    text, kind = config.read_text(encoding="utf-8"), config.stem
    cls = method_class(kind)
    assert f'train.method = "{kind}"' in text
    for owner, field in re.findall(r"^(\w+)\.(\w+) =", text, re.MULTILINE):
        assert owner in (cls.__name__, "train", "TrainConfig")
        assert owner != cls.__name__ or field in method_fields(cls)
    wanted = sorted(re.findall(r"^TrainConfig\.(\w+)_lr", text, re.MULTILINE))
    rates = sorted(cls.typical().learning_rates(0.3))
    assert wanted == rates
