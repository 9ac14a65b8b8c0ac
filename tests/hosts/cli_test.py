"""`deptjax train` and `deptjax evaluate` as two hosts run them: the same command, and one of them speaks."""

from __future__ import annotations

import json
import pathlib
import sys

from deptjax.testing import save_hf_folder
from tests.hosts.launcher import run_hosts
from tests.hosts.work import backbone_of
from tests.reviews import review_rows


def test_train_and_evaluate(tmp_path: pathlib.Path) -> None:
    model, rows, run = tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "run"
    save_hf_folder(backbone_of("llama"), model)
    rows.write_text("\n".join(map(json.dumps, review_rows(40))) + "\n")
    hosts = "--num-hosts 2 --host-index {host} --mesh fsdp:2".split()
    asked = f"--model {model} --task-file {rows} --labels negative,positive --method lora --rank 2 --steps 2".split()
    asked += ["--input", "text : {text}\nlabel :", "--batch-size", "4", "--max-source-length", "24"]
    program = [sys.executable, "-m", "deptjax.train"]
    first, second = run_hosts(*asked, "--workdir", str(run), *hosts, program=program)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert first.out.startswith(f"{run / 'prompt'}: step 2, dev/accuracy ")
    assert first.lines[0] == "mesh fsdp:2 (2 devices of 2 hosts)"
    assert (second.out, second.lines) == ("", [])
    assert (run / "config.gin").exists()

    program = [sys.executable, "-m", "deptjax.evaluate"]
    first, second = run_hosts("--prompt", str(run / "prompt"), "--json", *hosts, program=program)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert set(json.loads(first.out)) == {"test/accuracy"}
    assert (second.out, second.lines) == ("", [])

    # The folder is refused by the first host, and the line is that of all.
    other = ["3" if word == "2" and asked[i - 1] == "--rank" else word for i, word in enumerate(asked)]
    program = [sys.executable, "-m", "deptjax.train"]
    ends = run_hosts(*other, "--workdir", str(run), *hosts, program=program)
    assert [end.status for end in ends] == [2, 2], [end.err for end in ends]
    for end in ends:
        assert end.lines[-1].startswith(f"deptjax: error: {run} holds a run with another configuration (")
        assert "rank was 2, is now 3" in end.lines[-1]
