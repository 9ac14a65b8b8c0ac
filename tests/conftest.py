"""Settings of the whole test run; they must be made before the first import of jax."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import os
import pathlib
from collections.abc import Iterator

import pytest

# The same backend, and so the same bits, on every machine.
os.environ["JAX_PLATFORMS"] = "cpu"
# A test that would reach for a model hub must fail at once and not wait for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Most of a run is compiling programs that then run for milliseconds: this makes it three times as fast. With
# JAX_DISABLE_MOST_OPTIMIZATIONS=false programs are compiled as users' are.
EASY = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true").lower() in ("true", "1")
if EASY and importlib.metadata.version("jaxlib").startswith(("0.9.", "0.10.")):  # others abort at a flag they lack
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()

import jax  # noqa: E402


def _cache_folder() -> pathlib.Path:
    """Returns the folder of this user in which compiled programs outlive a test run."""
    if folder := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return pathlib.Path(folder)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "deptjax" / "jax-tests"


jax.config.update("jax_compilation_cache_dir", str(_cache_folder()))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
# (D,) + (B, T, D) must be written as [None, None, :]: a silent broadcast hides a wrong axis.
jax.config.update("jax_numpy_rank_promotion", "raise")

ORACLES = ("torch", "peft")  # not among the extra `tests`; `dev` has them
if importlib.util.find_spec("torch") is None:
    _TESTS = pathlib.Path(__file__).parent
    collect_ignore = [str(file) for file in _TESTS.rglob("*_test.py") if "\nimport torch\n" in file.read_text()]

# Files that take the longest, the longest first: begun last, one of them would keep a single worker busy at the end.
LONGEST = (
    "planning/tpu_test.py",
    "sharding/presets_test.py",
    "hosts/runs_test.py",
    "notebooks_test.py",
    "inference/mixed_kinds_test.py",
    "hosts/stop_test.py",
    "training/resume_test.py",
    "sharding/loading_test.py",
    "benchmarks_methods_test.py",
    "cli/suite_test.py",
    "readme_test.py",
    "cli/predict_test.py",
    "benchmarks_test.py",
    "sharding/runs_test.py",
)

_STATUS = pathlib.Path("/proc/self/status")
_MUCH_MIB = 3072


def _oracle_or_skip() -> Iterator[None]:
    """Skips what imports an oracle that is not installed, as for a Python that has no CPU build of torch."""
    try:
        return (yield)
    except ImportError as error:
        missing = next((name for name in ORACLES if importlib.util.find_spec(name) is None), None)
        if missing is not None and (error.name in ORACLES or "PyTorch" in str(error)):  # the latter of transformers
            pytest.skip(f"{missing}, which this test compares with, is not installed")
        raise


pytest_runtest_setup = pytest.hookimpl(wrapper=True)(_oracle_or_skip)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that take the longest in front."""
    tests = pathlib.Path(__file__).parent
    places = {tests / name: place for place, name in enumerate(LONGEST)}
    assert all(file.is_file() for file in places), "LONGEST names a file that is gone"
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """As for the setup of a test, where fixtures import."""
    return (yield from _oracle_or_skip())


@pytest.fixture(scope="module", autouse=True)
def _programs_are_forgotten_before_they_fill_the_memory() -> Iterator[None]:
    """Compiled programs stay in memory as long as they may be called again: those of a whole run are gigabytes."""
    yield
    if _STATUS.exists():  # Linux
        resident = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmRSS:"))
        if int(resident.split()[1]) / 1024 > _MUCH_MIB:
            jax.clear_caches()
            gc.collect()
