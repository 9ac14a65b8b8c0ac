"""Starts several hosts: processes on this machine, each with devices of its own, joined by `jax.distributed`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence

import jax

from tests.sharding.process import cpu_devices

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 600  # more than any test needs on a busy machine; nothing may hang
SCRIPT = """
import sys, jax
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
from deptjax.cli.setup import join_hosts, prepare
prepare()
from deptjax.cli.entry import run_command
from tests.hosts import work
def main(words):
    join_hosts({})
    getattr(work, words[0])(*words[1:])
    return 0
sys.exit(run_command(main, sys.argv[2:]))
"""


@dataclasses.dataclass(frozen=True)
class Done:
    """How a process ended."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """What it said on standard error."""
        return [line for line in self.err.splitlines() if line]


def free_port() -> int:
    """Returns a port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def started(
    words: Sequence[str], hosts: int = 2, devices: int = 1, program: Sequence[str] | None = None, **env: str
) -> Iterator[list[subprocess.Popen[str]]]:
    """Yields the hosts' processes; each runs a function of `work` with arguments, or `program` with them.

    In words, `{host}` is the index of a host.
    """
    joined = {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": cpu_devices(devices),
        "DEPTJAX_LOST_SECONDS": "12",
        "DEPTJAX_HOST_TIMEOUT": "120",
        **env,
    }
    if hosts > 1:
        joined |= {"DEPTJAX_COORDINATOR": f"127.0.0.1:{free_port()}", "DEPTJAX_NUM_HOSTS": str(hosts)}
    program = program or [sys.executable, "-c", SCRIPT, str(jax.config.jax_compilation_cache_dir)]
    processes = [
        subprocess.Popen(
            [*program, *(word.replace("{host}", str(host)) for word in words)],
            cwd=ROOT,
            env={**os.environ, **joined, **({"DEPTJAX_HOST_INDEX": str(host)} if hosts > 1 else {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in range(hosts)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def ended(processes: Sequence[subprocess.Popen[str]], seconds: float = SECONDS) -> list[Done]:
    """Returns how the processes ended; raises `subprocess.TimeoutExpired` where one does not."""
    told = [process.communicate(timeout=seconds) for process in processes]
    return [Done(process.returncode, _own(out), err) for process, (out, err) in zip(processes, told, strict=True)]


def _own(out: str) -> str:
    """Returns what a process printed, without what C++ prints when it joins hosts on CPUs."""
    return "".join(line for line in out.splitlines(keepends=True) if not line.startswith("[Gloo]"))


def run_hosts(*words: str, **options: object) -> list[Done]:
    """Returns how hosts ended that ran `words` (see `started`)."""
    with started(words, **options) as processes:  # type: ignore[arg-type]
        return ended(processes)
