"""What entry points set up: programs that were compiled once are found again by the next process."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

from tests.cli.train_test import environment

# A tiny model's programs compile in about the time below which none is kept; so that the clock of a busy machine does
# not decide what is kept, every program is.
CODE = (
    "import sys; from deptjax.cli import main, setup; setup.SMALLEST_PROGRAM_SECONDS = 0.0;"
    "sys.exit(main.main(sys.argv[1:]))"
)


def compiled(cache: pathlib.Path) -> set[str]:
    """Returns the names of the programs that are kept."""
    return {file.name for file in (cache / "compiled").glob("*-cache")}


def test_a_second_run_compiles_nothing_that_the_first_has_compiled(
    asked: list[object], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("DEPTJAX_CACHE", str(cache))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    found = []
    for name in ("first", "second"):
        words = [*map(str, asked), "--steps", "1", "--eval-every", "0", "--workdir", str(tmp_path / name)]
        ended = subprocess.run(
            [sys.executable, "-c", CODE, *words], env=environment(), capture_output=True, text=True, timeout=240
        )
        assert ended.returncode == 0, ended.stderr
        found.append(compiled(cache))
    assert any("step" in name for name in found[0]), found[0]
    assert found[1] == found[0]
    prompts = [(tmp_path / name / "prompt" / "prompt.safetensors").read_bytes() for name in ("first", "second")]
    assert prompts[0] == prompts[1]  # a program from the disk computes what the compiled one did
