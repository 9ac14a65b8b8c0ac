"""Every method on every backbone, under every preset of a mesh, does on eight devices what it does on one."""

from __future__ import annotations

import numpy as np
import pytest

from tests.sharding.eight import PRESETS, STEPS, cases, train_all
from tests.sharding.process import on_eight


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("eight")
    # Programs this small cost their compiling, so the compiler is told to take it easy.
    easy = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    on_eight(train_all, folder, easy)
    with np.load(folder / "results.npz") as stored:
        return dict(stored)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("family", "method"), [case[:2] for case in cases()])
def test_a_mesh_is_one_device(results: dict[str, np.ndarray], family: str, method: str, preset: str) -> None:
    one, many = f"{family}-{method}-one/", f"{family}-{method}-{preset}/"
    names = [name.removeprefix(one) for name in results if name.startswith(one)]
    assert len(results[f"{one}loss"]) == STEPS
    assert len(names) > 1
    assert np.ptp(results[f"{one}loss"]) > 1e-3  # the losses are not those of a model that stands still
    for name in names:
        np.testing.assert_allclose(results[many + name], results[one + name], rtol=1e-5, atol=1e-5, err_msg=name)
