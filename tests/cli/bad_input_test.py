"""What a user gets wrong ends in one line that names the place and the remedy, and nothing is overwritten."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Callable

import pytest

from deptjax.cli.main import COMMANDS
from deptjax.methods import method_names
from tests.cli.conftest import TEMPLATE, Command, Tuned, write_rows
from tests.cli.folders import save_llama

MANY = "".join(json.dumps({"text": f"film {i}", "label": ["negative", "positive"][i % 2]}) + "\n" for i in range(20))
GOOD = '{"text": "a good film", "label": "positive"}\n'


def with_flag(words: list[object], flag: str, value: object) -> list[object]:
    """Returns the words with another value of a flag."""
    return [value if before == flag else word for before, word in zip([None, *words], words, strict=False)]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "{file}: no such file"),
        ("", "{file} is empty; it must hold at least one row"),
        (GOOD + '{"text": "a bad', "{file}, line 21: broken JSON at column"),
        (GOOD + "[1]\n", "{file}, line 21: a list, not an object"),
        (GOOD + '{"texts": "x", "label": "positive"}\n', "{file}, line 21: no column 'text', which the input template"),
        (GOOD + '{"text": "x"}\n', "{file}, line 21: no column 'label'"),
        (GOOD + '{"text": "x", "label": "positiv"}\n', "{file}, line 21: label 'positiv' is not one of"),
        (GOOD + '{"text": "  ", "label": "positive"}\n', "{file}, line 21: the text of column 'text' is empty"),
        (GOOD + '{"text": null, "label": "positive"}\n', "{file}, line 21: column 'text' is empty (null)"),
        ((GOOD + '{"text": "caf\xe9"}').encode("latin-1"), "{file}, line 2: byte 0xe9 at offset"),
        (GOOD.encode("utf-16"), "is not utf-8 text"),
        (GOOD, "are too few to draw"),
    ],
)
def test_rows(
    deptjax: Command, asked: list[object], tmp_path: pathlib.Path, content: str | bytes | None, told: str
) -> None:
    file = tmp_path / "rows.jsonl"
    if content is not None:
        content = content.replace(GOOD, MANY) if isinstance(content, str) and content != GOOD else content
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    error = deptjax(*with_flag(asked, "--task-file", file)).error
    assert told.format(file=file) in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--input", "no column"], "input template 'no column' names no column; write the column's name in braces"),
        (["--input", "{text"], "is not a template"),
        (["--rank", 0], "dept: rank is 0; it must be at least 1"),
        (["--prompt-length", -1], "dept: prompt_length is -1; it must be at least 1"),
        (["--prompt_length", "many"], "--prompt-length: prompt_length 'many' is not a whole number"),
        (
            ["--max-source-length", 999],
            "max_length 999 is more than the 24 of the method; raise the method's max_length",
        ),
        (["--prompt-lr", 0], "prompt_lr is 0.0; it must be above 0"),
        (["--prompt-lr", "nan"], "--prompt-lr: prompt_lr 'nan' is not a number or none"),
        (["--steps", 0], "steps is 0; it must be at least 1"),
        (["--eval-every", -1], "eval_every is -1; it must be 0 or more"),
        (
            ["--schedule", "liner"],
            "schedule 'liner' is not known; there are linear, cosine, constant. Did you mean 'linear'?",
        ),
        (
            ["--method", "detp"],
            f"unknown method 'detp'; there are: {', '.join(method_names())}. Did you mean 'dept'?",
        ),
        (
            ["--method", "lora"],
            "--prompt-length: method 'lora' has no such field; its fields: --rank, --alpha, --targets.",
        ),
        (
            ["--backbone-lr", 1],
            "--backbone-lr: method 'dept' trains no such parameters; it has --prompt-lr, --low-rank-lr",
        ),
        (["--scaling", "big"], "scaling 'big' is not known; use 'alpha/sqrt(rank)', 'none' or a number"),
        (
            ["--prompt-init", "txt"],
            "prompt_init 'txt' is neither one of text, vocab, labels, random, normal nor a saved prompt",
        ),
        (["--prompt-lenght", 3], "there is no flag --prompt-lenght. Did you mean '--prompt-length'?"),
        (["--prompt", 3], "there is no flag --prompt."),
        (["stray"], "'stray' belongs to no flag"),
        (["--workdir"], "argument --workdir: expected one argument"),
        (["--task", "trec7"], "--task and --task-file both name a task; keep one"),
        (["--metrics", "acuracy"], "metrics: 'acuracy' is not one of accuracy"),
        (["--labels", "positive"], "one label, 'positive', leaves nothing to learn"),
        (["--verbalizers", "good"], "--verbalizers: 'good' is not label=text"),
        (["--encoding", "utf-88"], "encoding 'utf-88' is not known"),
        (["--dev-size", 99], "are too few to draw"),
        (["--dtype", "float31"], "float31"),
        (["--model", "no/such/folder/here"], "no/such/folder/here"),
        (["--tokenizer", "no/such/tokenizer"], "tokenizer 'no/such/tokenizer': there is no such file or folder"),
        (["--gin.load_backbone.tokenizer='packaged:t6'"], "unknown packaged tokenizer 't6'; there are: t5, mt5"),
        (
            ["--labels", "negative,positive", "--verbalizers", "positive=very good", "--loss", "labels"],
            "is 2 tokens (very good)",
        ),
        (["--gin-file", "none.gin"], "--gin-file none.gin: cannot read none.gin: No such file or directory"),
        (["--gin.DePT.ranks=3"], "--gin.DePT.ranks: DePT has no field 'ranks'"),
        (["--gin.Dept.rank=3"], "--gin.Dept.rank: 'Dept' is no name that can be set; there are"),
        (
            ["--gin.prompt_lr=0.3"],
            "--gin.prompt_lr: nothing uses the macro 'prompt_lr'. Did you mean 'TrainConfig.prompt_lr'?",
        ),
        (["--gin.TrainConfig.log_every=many"], "--gin.TrainConfig.log_every: log_every 'many' is not a whole number"),
        (["--gin.TrainConfig.steps=[1"], "--gin.TrainConfig.steps: '[1' is not a value gin can read"),
        (["--gin.TrainConfig.steps"], "--gin.TrainConfig.steps: no value; write --gin.NAME=VALUE"),
        (["--gin.LoRA.rank=2"], "--gin.LoRA.rank is not for the method of this run, 'dept'"),
        (["--gin.TrainConfig.prompt_lr=%rate"], "the macro 'rate' has no value"),
    ],
)
def test_flags(deptjax: Command, asked: list[object], tmp_path: pathlib.Path, words: list[object], told: str) -> None:
    assert told in deptjax(*asked, *words).error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "no workdir; name the run's folder with --workdir DIR"),
        (["--workdir", "x"], "no model; name one with --model"),
        (["--workdir", "x", "--model", "m"], "no task; name one with --task NAME"),
        (["--workdir", "x", "--model", "m", "--task", "trec7"], "no task is named 'trec7'; there are"),
        (["--workdir", "x", "--model", "m", "--task-file", "f.jsonl"], "--task-file: no --input; give the template"),
    ],
)
def test_what_is_missing(deptjax: Command, words: list[object], told: str, monkeypatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert told in deptjax("train", *words).error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("DePT.rank = \n", "{file}, line 1: not gin: "),
        ("train.method = 'dept'\nDePT.rank 3\n", "{file}, line 2: not gin: "),
        ("x = [1,\n", "{file}, line "),
        (
            "train.method = 'dept'\nDePT.rnak = 3\n",
            "{file}, line 2: DePT has no field 'rnak'; it has: prompt_length, rank",
        ),
        ("rate = 3\n", "{file}, line 1: nothing uses the macro 'rate'."),
        ("TrainConfig.prompt_lr = %rate\n", "{file}, line 1: the macro 'rate' has no value"),
        ("rate = %rate\nTrainConfig.prompt_lr = %rate\n", "the macro 'rate' is defined by itself"),
        ("include 'gone.gin'\n", "{file}, line 1: cannot read "),
        ("include 'a.gin'\n", "includes itself"),
        ("import no_such_module\n", "{file}, line 1: cannot import no_such_module"),
        ("TrainConfig.steps = 1.5\n", "{file}, line 1: steps 1.5 is not a whole number"),
        ("big/DePT.rank = 3\n", "{file}, line 1: 'big/DePT.rank' has a scope"),
        ("train.method = @Dept\n", "{file}, line 1: no method is named @Dept. Did you mean 'DePT'?"),
    ],
)
def test_gin_files(deptjax: Command, tmp_path: pathlib.Path, text: str, told: str) -> None:
    file = tmp_path / "a.gin"
    file.write_text(text)
    words = ("--gin-file", file, "--workdir", tmp_path / "run", "--model", "m", "--task-file", "f", "--input", "{x}")
    assert told.format(file=file) in deptjax("train", *words).error


def test_a_workdir_that_is_a_file(deptjax: Command, asked: list[object], tmp_path: pathlib.Path) -> None:
    (tmp_path / "run").write_text("mine")
    assert (
        f"cannot write {tmp_path / 'run'}: {tmp_path / 'run'} is a file; choose another workdir"
        in deptjax(*asked).error
    )
    assert (tmp_path / "run").read_text() == "mine"


def test_a_workdir_of_somebody_else(deptjax: Command, asked: list[object], tmp_path: pathlib.Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    assert "is not empty and holds no run of deptjax; choose another workdir" in deptjax(*asked).error
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_workdir_without_permission(deptjax: Command, asked: list[object], tmp_path: pathlib.Path) -> None:
    # /proc refuses new folders to everybody; a folder without the permission does to all but the administrator.
    assert "cannot write /proc/run: " in deptjax(*with_flag(asked, "--workdir", "/proc/run")).error
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        assert f"no permission to write in {tmp_path}; choose another workdir" in deptjax(*asked).error


def test_a_prompt_of_another_backbone(deptjax: Command, tuned: Tuned, model, tmp_path: pathlib.Path) -> None:
    other = save_llama(tmp_path / "other", seed=1)
    texts = tmp_path / "texts.txt"
    texts.write_text("a good film\n")
    for command, extra in (("predict", [texts]), ("evaluate", [])):
        error = deptjax(command, "--prompt", tuned.prompt, "--model", other, *extra).error
        assert f"{tuned.prompt} was tuned on '{model}', not on '{other}': " in error
        assert "embedding is" in error


def emptied(prompt: pathlib.Path) -> None:
    (prompt / "prompt.safetensors").write_bytes(b"")


def shortened(prompt: pathlib.Path) -> None:
    data = (prompt / "prompt.safetensors").read_bytes()
    (prompt / "prompt.safetensors").write_bytes(data[:-40])


def flipped(prompt: pathlib.Path) -> None:
    data = bytearray((prompt / "prompt.safetensors").read_bytes())
    data[-1] ^= 1
    (prompt / "prompt.safetensors").write_bytes(data)


def without_tensors(prompt: pathlib.Path) -> None:
    (prompt / "prompt.safetensors").unlink()


def broken_card(prompt: pathlib.Path) -> None:
    (prompt / "prompt.json").write_text('{"format": 1,\n"run_id"')


def changed_card(**fields: object) -> Callable[[pathlib.Path], None]:
    def change(prompt: pathlib.Path) -> None:
        card = json.loads((prompt / "prompt.json").read_text())
        card["method"] = {**card["method"], **fields}
        (prompt / "prompt.json").write_text(json.dumps(card))

    return change


def card_of_a_list(prompt: pathlib.Path) -> None:
    (prompt / "prompt.json").write_text("[1, 2]")


def card_without(field: str) -> Callable[[pathlib.Path], None]:
    def change(prompt: pathlib.Path) -> None:
        card = json.loads((prompt / "prompt.json").read_text())
        del card[field]
        (prompt / "prompt.json").write_text(json.dumps(card))

    return change


def card_in_bytes(prompt: pathlib.Path) -> None:
    (prompt / "prompt.json").write_bytes(b"\xff\xfe{}")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (emptied, "prompt.safetensors is damaged"),
        (shortened, "prompt.safetensors is damaged"),
        (without_tensors, "is not a saved prompt: it has no prompt.safetensors"),
        (shutil.rmtree, "is not a saved prompt: it has no prompt.json"),
        (broken_card, "prompt.json is not JSON: line 2"),
        (card_of_a_list, "prompt.json: it holds a list, expected an object; it was not written by deptjax"),
        (card_in_bytes, "prompt.json was not written by deptjax, or is damaged"),
        (card_without("task"), "prompt.json has no field 'task'"),
        (changed_card(prompt_length=7), "and prompt.json do not belong together: one of them was changed or damaged"),
        (flipped, "and prompt.json do not belong together: one of them was changed or damaged"),
        (changed_card(method="none"), "unknown method 'none'"),
        (changed_card(size=3), "method 'dept' has no field 'size'"),
    ],
)
def test_a_damaged_prompt(
    deptjax: Command, tuned: Tuned, tmp_path: pathlib.Path, damage: Callable[[pathlib.Path], None], told: str
) -> None:
    prompt = tmp_path / "prompt"
    shutil.copytree(tuned.prompt, prompt)
    damage(prompt)
    texts = tmp_path / "texts.txt"
    texts.write_text("a good film\n")
    error = deptjax("predict", "--prompt", prompt, texts).error
    assert str(prompt) in error
    assert told in error


def test_other_commands(deptjax: Command) -> None:
    error = deptjax("trian").error
    assert error == f"there is no command 'trian'; there are {', '.join(COMMANDS)}. Did you mean 'train'?"
    assert "search, share, evaluate" in error
    assert "no --prompt; it names a saved prompt" in deptjax("predict").error
    assert "no --prompt; it names a saved prompt" in deptjax("evaluate").error


def test_debug_shows_the_traceback(deptjax: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = deptjax("train", "--debug")
    assert ended.status == 2
    assert "Traceback" in ended.err
    assert "Traceback" not in deptjax("train").err, "one command's flag is not the next one's"
    monkeypatch.setenv("DEPTJAX_DEBUG", "1")
    assert "Traceback" in deptjax("train").err


def test_the_files_in_a_run_are_those_of_the_task(
    deptjax: Command, asked: list[object], tmp_path: pathlib.Path
) -> None:
    """Labels that are no set are told of in one line, and once."""
    write_rows(tmp_path / "rows.jsonl", 24)
    words = [*with_flag(asked, "--task-file", tmp_path / "rows.jsonl"), "--steps", 1, "--eval-every", 0]
    at = words.index("--labels")
    ended = deptjax(*words[:at], *words[at + 2 :])
    assert ended.status == 0
    told = [line for line in ended.err.splitlines() if line.startswith("deptjax: warning: ")]
    assert told == ["deptjax: warning: task 'rows': labels not given, inferred from the rows: negative, positive"]
    assert TEMPLATE.replace(r"\n", "\n") == json.loads((tmp_path / "run" / "config.json").read_text())["task"]["input"]
