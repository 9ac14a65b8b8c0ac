"""Runs a function of a test module on eight devices, which are made of one CPU in a process of its own.

python -m tests.sharding.process MODULE FUNCTION FOLDER CACHE
"""

from __future__ import annotations

import importlib
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import jax

ROOT = pathlib.Path(__file__).parents[2]


def cpu_devices(count: int) -> str:
    """Returns the XLA flags of a process whose CPU is `count` devices, beside those of this process."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}".strip()


def on_eight(function: Callable[[pathlib.Path], None], folder: pathlib.Path, flags: str = "") -> None:
    """Calls `function(folder)` in a process with eight devices, and raises with its last words where it fails.

    `flags` are further ones of XLA.
    """
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{cpu_devices(8)} {flags}",
    }
    module = pathlib.Path(sys.modules[function.__module__].__file__ or "").relative_to(ROOT).with_suffix("")
    names = [".".join(module.parts), function.__name__, str(folder), str(jax.config.jax_compilation_cache_dir)]
    command = [sys.executable, "-m", "tests.sharding.process", *names]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", sys.argv[4])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    assert jax.device_count() == 8
    getattr(importlib.import_module(sys.argv[1]), sys.argv[2])(pathlib.Path(sys.argv[3]))
