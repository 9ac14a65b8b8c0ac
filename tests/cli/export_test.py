"""`deptjax export` and `deptjax import`: prompts to other formats and back, and embeddings for a server."""

from __future__ import annotations

import base64
import io
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch

from deptjax.interop.load import load_backbone
from deptjax.prompt import Prompt
from tests.cli.conftest import Command, Tuned

TEXTS = ["the film was good", "the plot was very very bad"]


@pytest.fixture
def soft(tuned: Tuned, model: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A prompt of prompt tuning: that of the finished run, without its offsets."""
    prompt = Prompt.load(tuned.prompt)
    vectors = {"input": {"prompt": prompt.trainable["input"]["prompt"]}}
    config = {"method": "prompt_tuning", "prompt_length": 3, "prompt_init": "random"}
    made = Prompt.build(config, vectors, load_backbone(model))
    import dataclasses

    return dataclasses.replace(made, task=prompt.task, settings=prompt.settings).save(tmp_path / "soft")


@pytest.mark.parametrize(("format", "name"), [("dept", "x"), ("npz", "x.npz"), ("safetensors", "x.safetensors")])
def test_out_and_in_again(
    format: str, name: str, deptjax: Command, tuned: Tuned, model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / name
    ended = deptjax("export", "--prompt", tuned.prompt, "--format", format, "--output", out)
    assert (ended.status, ended.out) == (0, f"{out}\n"), ended.err
    words = ["import", "--from", out, "--model", model, "--output", tmp_path / "back"]
    ended = deptjax(*words, "--input", r"{text}\nlabel :", "--labels", "negative,positive", "--task-name", "films")
    assert ended.status == 0, ended.err
    assert ended.out == f"{tmp_path / 'back'}: dept of {3 * 24 + 2 * (24 + 24):,} numbers, for task 'films'\n"
    before, after = Prompt.load(tuned.prompt), Prompt.load(tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, after.trainable, before.trainable)
    assert (after.task["input"], after.task["metrics"]) == ("{text}\nlabel :", ["accuracy"])
    lines = [
        deptjax("predict", "--prompt", prompt, "--scores", tmp_path / "texts.txt").out
        for prompt in (tuned.prompt, tmp_path / "back")
        if (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    ]
    assert lines[0] == lines[1]
    assert len(lines[0].splitlines()) == 2


def test_peft_reads_the_folder(deptjax: Command, soft: pathlib.Path, tmp_path: pathlib.Path) -> None:
    ended = deptjax("export", "--prompt", soft, "--format", "peft", "--output", tmp_path / "adapter")
    assert ended.status == 0, ended.err
    assert sorted(f.name for f in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again = deptjax("export", "--prompt", soft, "--format", "peft", "--output", tmp_path / "adapter")
    assert (
        again.error
        == f"{tmp_path / 'adapter'} exists; name another folder, or overwrite it (overwrite=True, --overwrite)"
    )
    ended = deptjax("export", "--prompt", soft, "--format", "peft", "--output", tmp_path / "adapter", "--overwrite")
    assert ended.status == 0, ended.err


def test_an_import_without_a_task_answers_any_text(
    deptjax: Command, soft: pathlib.Path, model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    np.save(tmp_path / "vectors.npy", Prompt.load(soft).trainable["input"]["prompt"])
    words = ["import", "--from", tmp_path / "vectors.npy", "--model", model, "--output", tmp_path / "prompt"]
    assert deptjax(*words).status == 0
    task = Prompt.load(tmp_path / "prompt").task
    assert (task["name"], task["input"], task["labels"]) == ("vectors", "{text}", [])
    assert deptjax(*words).error == f"--output {tmp_path / 'prompt'} exists; name another folder, or add --overwrite"
    assert deptjax(*words, "--overwrite", "--task", "movie_sentiment").status == 0
    assert Prompt.load(tmp_path / "prompt").task["name"] == "movie_sentiment"
    (tmp_path / "prompt" / "notes").write_text("mine")
    assert "holds 'notes', which is no part of a prompt" in deptjax(*words, "--overwrite").error


def tensors(lines: str) -> list[torch.Tensor]:
    """Returns what a server would decode."""
    coded = [json.loads(line)["prompt_embeds"] for line in lines.splitlines()]
    return [torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True) for text in coded]


def test_embeds_are_lines_that_a_server_takes(deptjax: Command, tuned: Tuned, tmp_path: pathlib.Path) -> None:
    words = ["export", "--prompt", tuned.prompt, "--format", "embeds"]
    given = deptjax(*words, "--text", TEXTS[0], "--text", TEXTS[1])
    assert given.status == 0, given.err
    lines = [json.loads(line) for line in given.out.splitlines()]
    assert [line["text"] for line in lines] == [f"{text}\nlabel :" for text in TEXTS]
    assert [line["shape"] for line in lines] == [[3 + 6, 24], [3 + 8, 24]]
    assert {line["dtype"] for line in lines} == {"float32"}
    assert [list(tensor.shape) for tensor in tensors(given.out)] == [[9, 24], [11, 24]]
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    for file in ("texts.txt", "rows.jsonl"):
        assert deptjax(*words, tmp_path / file).out == given.out
    assert deptjax(*words, tmp_path / "texts.txt", "--output", tmp_path / "out.jsonl").out == ""
    assert (tmp_path / "out.jsonl").read_text() == given.out


def test_embeds_as_arrays(deptjax: Command, tuned: Tuned, tmp_path: pathlib.Path) -> None:
    from safetensors.numpy import load_file

    words = ["export", "--prompt", tuned.prompt, "--format", "embeds", "--text", TEXTS[0]]
    wanted = [tensor.numpy() for tensor in tensors(deptjax(*words, "--text", TEXTS[1]).out)]
    for ending in ("safetensors", "npz"):
        out = tmp_path / f"x.{ending}"
        assert deptjax(*words, "--text", TEXTS[1], "--output", out).status == 0
        arrays = load_file(out) if ending == "safetensors" else dict(np.load(out))
        assert list(arrays) == ["text_1", "text_2"]
        for got, want in zip(arrays.values(), wanted, strict=True):
            np.testing.assert_array_equal(got, want)
    assert deptjax(*words, "--output", tmp_path / "x.npy").status == 0
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), wanted[0])
    out = tmp_path / "y.npy"
    assert (
        "an .npy file holds one array, and there are 2 texts; use .npz"
        in deptjax(*words, "--text", TEXTS[1], "--output", out).error
    )
    assert "x.npy exists; name another file" in deptjax(*words, "--output", tmp_path / "x.npy").error
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.npy", "x.npz", "x.safetensors"]


def test_mistakes_are_one_line(deptjax: Command, tuned: Tuned, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    export = ["export", "--prompt", tuned.prompt]
    for words, told in [
        ([*export], "no --format; it names the format to write: peft, dept, npz, safetensors, npy, embeds"),
        ([*export, "--format", "peft"], "no --output; it names where to write"),
        ([*export, "--format", "pefd"], "argument --format: invalid choice: 'pefd'"),
        (
            [*export, "--format", "peft", "--output", tmp_path / "x"],
            "peft has no method 'dept'; it takes prompt_tuning",
        ),
        ([*export, "--format", "npz", "--output", tmp_path / "x"], "must end in .npz"),
        ([*export, "--format", "npz", "--output", tmp_path / "x.npz", "--text", "a"], "is for --format embeds"),
        ([*export, "--format", "embeds", "--text", "a", "b.txt"], "--text and b.txt both give texts; keep one"),
        ([*export, "--format", "embeds", "--text", " "], "--text is empty; give a text"),
        ([*export, "--format", "embeds", tmp_path / "no.txt"], "no.txt: no such file"),
        (["export", "--format", "npy"], "no --prompt"),
        (["import", "--model", model, "--output", tmp_path / "x"], "no --from"),
        (["import", "--from", tmp_path, "--output", tmp_path / "x"], "no --model"),
        (
            ["import", "--from", tmp_path, "--model", model, "--output", tmp_path / "x"],
            "holds neither prompt.json nor adapter_config.json",
        ),
        (["exprot"], "there is no command 'exprot'; there are train, search, "),
    ]:
        assert told in deptjax(*words).error
    assert not (tmp_path / "x").exists()


def test_modules_and_help(deptjax: Command) -> None:
    for command, module in (("export", "export"), ("import", "import_")):
        ended = subprocess.run(
            [sys.executable, "-m", f"deptjax.{module}", "--version"], capture_output=True, text=True, check=False
        )
        assert (ended.returncode, ended.stdout.split()[0]) == (0, "deptjax")
        with pytest.raises(SystemExit) as raised:
            deptjax(command, "--help")
        assert raised.value.code == 0
