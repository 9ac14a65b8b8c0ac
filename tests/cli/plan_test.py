"""`deptjax plan` as a user runs it, on the devices at hand."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from deptjax.testing import save_hf_folder, tiny_bert
from tests.cli.conftest import Command
from tests.sharding.process import cpu_devices

SMALL = ("--batch", 4, "--length", 24, "--max-length", 24, "--target-length", 2)


def test_a_plan_of_a_folder(deptjax: Command, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "plan.json"
    ended = deptjax("plan", "--model", model, *SMALL, "--prompt_length=3", "--rank=2", "--json", file)
    assert ended.status == 0, ended.err
    assert ended.err.splitlines()[0] == "compiling dept on tiny, 1 x cpu"
    assert re.fullmatch(r"compiled dept on tiny, 1 x cpu: \d+\.\d s", ended.err.splitlines()[-1])
    told = json.loads(file.read_text())
    assert told["trainable_parameters"] == 3 * 24 + 2 * (24 + 24)
    assert told["dtype"] == "float32"
    assert told["chip"]["measured"] is True
    assert f"{told['backbone_parameters']:,} parameters, 168 trained" in ended.out
    assert "a batch of 4 rows of 24 + 2 tokens" in ended.out
    assert re.search(r"total +[\d.]+ \wiB of [\d.]+ GiB: fits", ended.out)
    assert re.search(r"a step takes [\d.]+ \w+ or more, bound by (compute|memory)", ended.out)


def test_a_model_that_fills_masks_has_one_target(deptjax: Command, tmp_path: pathlib.Path) -> None:
    folder, file = save_hf_folder(tiny_bert(), tmp_path / "bert"), tmp_path / "plan.json"
    ended = deptjax("plan", "--model", folder, *SMALL[:-1], 9, "--prompt_length=3", "--rank=2", "--json", file)
    assert ended.status == 0, ended.err
    assert "a batch of 4 rows of 24 + 1 tokens" in ended.out
    assert json.loads(file.read_text())["trainable_parameters"] == 3 * 24 + 2 * (24 + 24)


def test_methods_in_one_table_over_a_mesh(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """In a process of its own: the number of devices is settled when jax starts."""
    file = tmp_path / "plans.json"
    words = ["plan", "--model", model, "--batch", 4, "--length", 24, "--target-length", 2, "--prompt-length", 3]
    words += ["--compare", "prompt_tuning,full", "--mesh", "data:2,fsdp:2", "--json", file, "--quiet"]
    env = {**os.environ, "XLA_FLAGS": cpu_devices(4)}
    program = "import sys; from deptjax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, *map(str, words)]
    run = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert run.returncode == 0, run.stderr
    assert "compiling" not in run.stderr
    assert "4 x cpu (data:2,fsdp:2), its speed measured here" in run.stdout
    prompts, full = json.loads(file.read_text())
    assert [line.split("|")[1].strip() for line in run.stdout.splitlines()[-2:]] == ["prompt_tuning", "full"]
    assert prompts["memory"]["weights"] < 0.6 * 4 * prompts["backbone_parameters"]  # in two, but for what is small
    assert full["memory"]["weights"] == 0
    over = {axis for collective in prompts["cost"]["collectives"] for axis in collective["axes"]}
    assert over == {"data", "fsdp"}
    assert prompts["chip"]["interconnect"] > 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--model", "llama2_7"), r"--model 'llama2_7' is neither .* Did you mean 'llama2-7b'\?"),
        ((), r"no --model; it names a size, such as llama2-7b, or a folder with config\.json"),
        (("--model", "gpt2", "--topology", "v5e:4x5"), r"topology 'v5e:4x5' does not exist.*Did you mean 'v5e:4x4'\?"),
        (("--model", "gpt2", "--mesh", "fsdp:3"), r"mesh fsdp:3 is of 3 devices, and the number of devices is 1"),
        (("--model", "gpt2", "--length", "300"), r"length 300 is more than the 256 of the method; raise the method's"),
        (("--model", "gpt2", "--method", "deppt"), r"unknown method 'deppt'.*Did you mean 'dept'\?"),
        (("--model", "gpt2", "--compare", "dept,lra"), r"unknown method 'lra'.*Did you mean 'lora'\?"),
        (("--model", "gpt2", "--compare", "dept", "--method", "lora"), r"--method and --compare both say"),
        (("--model", "gpt2", "--compare", "lora,full", "--prompt-length", "4"), r"--prompt-length: none of lora, full"),
        (("--model", "gpt2", "--dtype", "bf16"), r"--dtype 'bf16' is not one of .* Did you mean 'bfloat16'\?"),
        (("--model", "gpt2", "--remat", "ful"), r"remat 'ful' is not known.*Did you mean 'full'\?"),
        (("--model", "gpt2", "--attention", "flsh"), r"attention 'flsh' is not known.*Did you mean 'flash'\?"),
        (("--model", "gpt2", "--attention", "flash"), r"attention 'flash' needs a TPU, and jax runs on cpu here"),
        (("--model", "gpt2", "--batch", "0"), r"--batch is 0; it must be at least 1"),
        (("--model", "gpt2", "--json", "."), r"--json \.: not a file in a folder that exists"),
        (("--model", "gpt2", "--topolgy", "v5e:4x4"), r"there is no flag --topolgy\. Did you mean '--topology'\?"),
    ],
)
def test_mistakes_are_one_line(deptjax: Command, words: tuple[str, ...], told: str) -> None:
    assert re.search(told, deptjax("plan", *words).error)
