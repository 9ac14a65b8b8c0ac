"""Every method on every backbone does on eight devices, by the presets of a mesh, what it does on one."""

from __future__ import annotations

import numpy as np
import pytest

from tests.sharding.eight import FAMILIES, PRESETS, STEPS, cases, train_all
from tests.sharding.process import on_eight

CASES = [(family, method, preset) for family, method, presets in cases() for preset in presets]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("eight")
    # Programs this small cost their compiling, so the compiler is told to take it easy.
    easy = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    on_eight(train_all, folder, easy)
    with np.load(folder / "results.npz") as stored:
        return dict(stored)


def test_each_method_and_each_backbone_meets_each_preset() -> None:
    methods = {method for _, method, _ in CASES}
    assert {(family, method) for family, method, _ in CASES} == {(f, m) for f in FAMILIES for m in methods}
    assert {(family, preset) for family, _, preset in CASES} == {(f, p) for f in FAMILIES for p in PRESETS}
    assert {(method, preset) for _, method, preset in CASES} == {(m, p) for m in methods for p in PRESETS}


@pytest.mark.parametrize(("family", "method", "preset"), CASES)
def test_a_mesh_is_one_device(results: dict[str, np.ndarray], family: str, method: str, preset: str) -> None:
    one, many = f"{family}-{method}-one/", f"{family}-{method}-{preset}/"
    names = [name.removeprefix(one) for name in results if name.startswith(one)]
    assert len(results[f"{one}loss"]) == STEPS
    assert len(names) > 1
    assert np.ptp(results[f"{one}loss"]) > 1e-3  # the losses are not those of a model that stands still
    for name in names:
        np.testing.assert_allclose(results[many + name], results[one + name], rtol=1e-5, atol=1e-5, err_msg=name)
