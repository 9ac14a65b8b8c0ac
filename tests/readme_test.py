"""What the README and ARCHITECTURE say can be done is done here, and what they name exists.

Every Python block runs, and every `deptjax ...` command of the shell blocks, one after the other in a temporary folder
in which the named model is a tiny one, a local folder called `t5-base`, and the named data files are there. Numbers of
steps are cut. A gin run keeps its config and gets that model and those rows by flags, which go before a config.
"""

from __future__ import annotations

import ast
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import deptjax
from deptjax.cli.main import main
from deptjax.testing import tiny_t5
from tests.tiny_folders import save_tiny

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = ("README.md", "ARCHITECTURE.md")
ALL_PAGES = (
    *PAGES,
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/README.md",
    *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md")),
)
# A path from the root: a folder, or a file of a kind that is kept in the repository; none with a <placeholder>.
PATH = r"\b((?:configs|deptjax|tests|notebooks|benchmarks)/(?:\w+/)*(?:\w+\.(?:py|gin|md|ipynb)\b|\w+(?![\w.<{*/])))"
QUESTIONS = {"person": "Who painted the story {} ?", "number": "How many scenes is {} ?", "place": "Where is the {} ?"}
THINGS = "one two three four five red green blue happy sad bright dull film plot actor ending".split()


def blocks(page: str, language: str) -> list[str]:
    """Returns the fenced blocks of a page that are in a language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    """Returns the commands of a page's shell blocks, continued lines joined, comments and blank lines left out."""
    joined = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def docstring_blocks() -> list[str]:
    """Returns the Python blocks of the package's own docstring."""
    return re.findall(r"```python\n(.*?)```", deptjax.__doc__ or "", re.DOTALL)


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The current folder of a reader who has followed the page: a model, rows, and texts to answer."""
    rows = [{"question": text.format(thing), "label": label} for thing in THINGS for label, text in QUESTIONS.items()]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "new_questions.txt").write_text("Who is the actor ?\nWhere is the plot ?\n")
    mixed = [{"task": task, "question": "Where is the plot ?"} for task in ("questions", "films")]
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, mixed)) + "\n")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    words = " ".join([*(row["question"] for row in rows), *QUESTIONS, "Type Classify text as or ham spam"])
    save_tiny(tiny_t5, tmp_path / "t5-base", words)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_has_blocks_of_both_kinds() -> None:
    assert len(blocks("README.md", "python")) >= 3
    assert sum(command.strip().startswith("deptjax ") for command in commands("README.md")) >= 4


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run_in_their_order(page: str, folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for number, block in enumerate(blocks(page, "python"), 1):
        exec(compile(fewer_steps(block), f"{page}, block {number}", "exec"), names)
    if page == "README.md":
        printed = capsys.readouterr().out.splitlines()
        score, label, last = [line for line in printed if line]
        assert 0 <= ast.literal_eval(score)["test/accuracy"] <= 1
        assert label in QUESTIONS
        assert last.split()[0] in QUESTIONS
        assert names["new_embeds"].shape == (2, 17, 64)  # type: ignore[attr-defined]
        assert (folder / "runs" / "questions" / "prompt" / "prompt.safetensors").is_file()


def test_the_example_of_the_package_runs(folder: pathlib.Path) -> None:
    (block,) = docstring_blocks()
    names: dict[str, object] = {"deptjax": deptjax}
    exec(compile(with_few_steps_given(block), "deptjax.__doc__", "exec"), names)
    assert names["run"].finished  # type: ignore[attr-defined]


def test_the_commands_of_the_readme_run(folder: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    ran = []
    for command in commands("README.md"):
        if " | deptjax " in command:
            status, out = piped(command)
        elif command.startswith("deptjax "):
            if "films=runs/sst2/prompt" in command:  # of another run, which the page does not show
                shutil.copytree(folder / "runs/own/prompt", folder / "runs/sst2/prompt")
            capfd.readouterr()
            status = main(words_of(command))
            out = capfd.readouterr().out
        else:
            continue
        assert status == 0, command
        ran.append(command.split("deptjax ")[1].split()[0])
        if "| deptjax predict" in command:
            assert json.loads(out)["prediction"] in QUESTIONS
        if ran[-1] == "evaluate":
            assert "test/accuracy" in out
    assert {"train", "search", "suite", "evaluate", "predict"} <= set(ran)
    mixed = [json.loads(line) for line in (folder / "mixed_answers.jsonl").read_text().splitlines()]
    assert [answer["task"] for answer in mixed] == ["questions", "films"]
    assert all(answer["prediction"] in QUESTIONS for answer in mixed)
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 2
    assert all(answer["scores"][answer["prediction"]] == max(answer["scores"].values()) for answer in answers)


def words_of(command: str) -> list[str]:
    """Returns the words behind `deptjax`, with few steps, and for a gin run with the model and rows that are here."""
    words = shlex.split(command, comments=True)[1:]
    if words[0] in ("train", "search", "suite"):
        words += ["--steps", "2", "--quiet"]
    if words[0] == "suite":
        words[words.index("--suite") : words.index("--suite") + 2] = ["--tasks", "questions"]
        words += ["--model", "t5-base", "--gin.FileSource.train=questions.jsonl", "--gin.Task.input='{question} Type:'"]
        words += ["--seeds", "0", "--rank", "2"]
    if "--gin-file" in words:
        words += ["--model", "t5-base", "--task-file", "questions.jsonl", "--labels", ",".join(QUESTIONS)]
        words += ["--input", r"{question}\nType:"]
    return words


def piped(command: str) -> tuple[int, str]:
    """Runs a command with a pipe in a shell, the console command being this interpreter's."""
    shell = command.replace("deptjax predict", f"{shlex.quote(sys.executable)} -m deptjax.predict")
    ended = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    return ended.returncode, ended.stdout


def fewer_steps(block: str) -> str:
    """Returns a block with its numbers of steps cut."""
    return re.sub(r"\bsteps=[\d_]+", "steps=2", block)


def with_few_steps_given(block: str) -> str:
    """Returns a block that gives no number of steps with a small one, and on few rows."""
    return re.sub(r"(workdir=[^)]*)\)", r"\1, steps=1, batch_size=4, eval_every=0, max_length=64)", block)


@pytest.mark.parametrize("page", ALL_PAGES)
def test_links_lead_to_files(page: str) -> None:
    here = (ROOT / page).parent
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        assert (here / file).exists() if file else True, f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", (here / file if file else ROOT / page).read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL_PAGES)
def test_paths_targets_and_extras_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^)make ([a-z]+)\b", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page}: make {target}"
    for name in re.findall(PATH, re.sub(r"https?://\S+", "", text)):
        assert (ROOT / name).exists(), f"{page}: {name}"
    extras = set(re.findall(r'^    "(\w+)": ', (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"gpu", "tpu", "dev"} <= extras
    for name in re.findall(r'pip install -e "\.\[(\w+)\]"', text):
        assert name in extras, f"{page}: extra {name}"


def test_the_places_to_be_filled_are_there_once() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("quickstart", "compare", "decode"):
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        assert text.count(begin) == text.count(end) == 1
        assert text.index(begin) < text.index(end)
