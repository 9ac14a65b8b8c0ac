"""Names of slices: what does not exist is answered in one line, with what does."""

from __future__ import annotations

import sys

import pytest

from deptjax.errors import UserError
from deptjax.planning.topology import tpu_devices


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v5f:4x4", "topology 'v5f:4x4' is of no known chip; there are v4, v5e, v5p, v6e. Did you mean 'v5"),
        ("h100:8", "topology 'h100:8' is of no known chip"),
        ("v5e", "topology 'v5e' does not say 2 sizes; write v5e:4x4, say"),
        ("v5p:4x4", "topology 'v5p:4x4' does not say 3 sizes; write v5p:4x4x4, say"),
        ("v5e:4x", "topology 'v5e:4x' does not say 2 sizes"),
        ("v5e:4x5", "Did you mean 'v5e:4x4'?"),
        ("v6e:32x32", "topology 'v6e:32x32' does not exist; v6e comes as 1x1, 2x2, .*16x16. Did you mean 'v6e:16x16'"),
        ("v5p:4x4x6", "v5p has sizes of 1, 2 and multiples of 4. Did you mean 'v5p:4x4x8'?"),
        ("v4:0x2x2", "Did you mean 'v4:4x2x2'?"),
    ],
)
def test_slices_that_do_not_exist(name: str, told: str) -> None:
    with pytest.raises(UserError, match=told.replace("?", r"\?")):
        tpu_devices(name)


def test_without_the_compiler_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libtpu", None)  # as where it is not installed
    with pytest.raises(UserError, match=r"the compiler for TPUs is not installed; .*pip install 'deptjax\[tpu\]'"):
        tpu_devices("v5e:4x4")
