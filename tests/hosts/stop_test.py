"""Hosts that are asked to stop, killed, and started again: nobody hangs, and the run ends as an unbroken one."""

from __future__ import annotations

import pathlib
import signal
import time

import pytest

from tests.hosts import work
from tests.hosts.launcher import run_hosts
from tests.hosts.runs_test import same_run


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("unbroken")
    work.tune_long(str(folder), "data:1")
    return folder


def test_stopped_killed_and_gone_on(unbroken: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A signal to one; then one is killed; then the first, which the others know each other by; then one host alone."""
    folder = str(tmp_path / "run")
    first, second = run_hosts("tune_long", folder, "fsdp:2", "1", str(int(signal.SIGTERM)), "3")
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert first.out.splitlines()[-1] == second.out.splitlines()[-1]
    told, number, step = first.out.splitlines()[-1].split()
    assert (told, number) == ("stopped", "15")
    assert 3 <= int(step) < 16
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name == step] == [step]

    for killed in (1, 0):
        ends = run_hosts("tune_long", folder, "fsdp:2", str(killed), str(int(signal.SIGKILL)), "4")
        struck = float(ends[killed].out.split()[1])
        assert time.time() - struck < 60
        assert ends[killed].status == -signal.SIGKILL
        left = ends[1 - killed]
        assert left.status == 1, left.err
        assert left.lines[-1].startswith(f"deptjax: error: host {killed} was lost at step "), left.err
        assert "; run the same command again on all hosts to go on from step " in left.lines[-1]
        assert len([line for line in left.lines if "deptjax: error" in line]) == 1
        assert "Traceback" not in left.err
        assert "@ " not in left.err  # nor one of C++

    alone = run_hosts("tune_long", folder, "data:1", hosts=1)[0]
    assert (alone.status, alone.out) == (0, "finished 16\n"), alone.err
    assert "the run was on mesh fsdp:2, and goes on on data:1" in alone.err
    same_run(tmp_path / "run", unbroken)


def test_begun_alone_and_gone_on_by_two(unbroken: pathlib.Path, tmp_path: pathlib.Path) -> None:
    alone = run_hosts("tune_long", str(tmp_path), "data:1", "0", str(int(signal.SIGINT)), "5", hosts=1)[0]
    assert (alone.status, alone.out.splitlines()[-1]) == (0, "stopped 2 5"), alone.err
    first, second = run_hosts("tune_long", str(tmp_path), "fsdp:2")
    assert (first.out, second.out) == ("finished 16\n", "finished 16\n"), first.err + second.err
    assert "the run was on mesh data:1, and goes on on fsdp:2" in first.err
    same_run(tmp_path, unbroken)
