"""Settings of the whole test run; they must be made before the first import of jax."""

from __future__ import annotations

import os
import pathlib

# The same backend, and so the same bits, on every machine.
os.environ["JAX_PLATFORMS"] = "cpu"
# A test that would reach for a model hub must fail at once and not wait for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax


def _cache_folder() -> pathlib.Path:
    """Returns the folder of this user in which compiled programs outlive a test run."""
    if folder := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return pathlib.Path(folder)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "deptjax" / "jax-tests"


jax.config.update("jax_compilation_cache_dir", str(_cache_folder()))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
# (D,) + (B, T, D) must be written as [None, None, :]: a silent broadcast hides a wrong axis.
jax.config.update("jax_numpy_rank_promotion", "raise")
