"""A method with an encoder from the command line: trained, evaluated, and its encoder found again."""

from __future__ import annotations

import json
import pathlib

from deptjax.testing import save_hf_folder, tiny_t5
from tests.cli.conftest import Command


def test_an_encoder_is_named_once_and_may_move(deptjax: Command, asked: list[object], tmp_path: pathlib.Path) -> None:
    reader, workdir = tmp_path / "reader", tmp_path / "run"
    save_hf_folder(tiny_t5(), reader)
    at = asked.index("--method")
    lopa = ["--method", "lopa", "--prompt-length", 2, "--rank", 1, "--hidden", 4, "--encoder", reader]
    ended = deptjax(*asked[:at], *lopa, *asked[asked.index("--buckets") :])
    assert ended.status == 0, ended.err
    scores = deptjax("evaluate", "--prompt", workdir / "prompt", "--json").out
    reader.rename(tmp_path / "moved")
    error = deptjax("evaluate", "--prompt", workdir / "prompt").error
    assert f"lopa: encoder: '{reader}': there is no such file or folder" in error
    assert "--encoder" in error
    again = deptjax("evaluate", "--prompt", workdir / "prompt", "--json", "--encoder", tmp_path / "moved")
    assert json.loads(again.out) == json.loads(scores)
    bare = deptjax(*asked, "--workdir", tmp_path / "bare")
    assert bare.status == 0, bare.err
    unused = deptjax("evaluate", "--prompt", tmp_path / "bare" / "prompt", "--encoder", tmp_path / "moved").error
    assert unused.endswith("no prompt here was tuned with an encoder of its own; leave it out")
    gone = deptjax("evaluate", "--prompt", workdir / "prompt", "--encoder", tmp_path / "gone").error
    assert gone.startswith(f"--encoder: '{tmp_path / 'gone'}': there is no such file or folder")
