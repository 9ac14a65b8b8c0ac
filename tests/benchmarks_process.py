"""Benchmarks run as a user runs them, and the tables that stand in the docs."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import jax

from benchmarks.command import Benchmark

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run_benchmark(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a benchmark in a process of its own, with the tests' cache of compiled programs."""
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    command = [sys.executable, f"benchmarks/{name}.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def table_in(page: pathlib.Path, benchmark: Benchmark) -> str:
    """Returns what a page has between a benchmark's markers."""
    begin, end = benchmark.markers
    return page.read_text().split(begin)[1].split(end)[0].strip()
