"""The table of chips, and the measuring of the one at hand."""

from __future__ import annotations

import pytest

from deptjax.planning.chips import CHIPS, Chip, measure


@pytest.mark.parametrize("name", sorted(CHIPS))
def test_the_figures_are_of_the_right_order(name: str) -> None:
    """A slip of a unit or a digit would be outside: published chips differ by less than ten times in everything."""
    chip = CHIPS[name]
    assert chip.name == name
    assert not chip.measured
    assert 16e9 <= chip.memory_bytes <= 200e9
    assert 1e14 <= chip.peak("bf16") < 3e15
    assert chip.peak("f32") <= chip.peak("bf16") <= chip.peak("s8") <= 2.01 * chip.peak("bf16")
    assert 5e11 <= chip.bandwidth <= 1e13
    assert chip.interconnect is not None
    assert 1e11 <= chip.interconnect <= chip.bandwidth
    assert (
        100 < chip.peak("bf16") / chip.bandwidth < 700
    )  # FLOPs a byte at which products are no longer bound by memory


def test_a_dtype_without_a_figure_has_float32s() -> None:
    chip = Chip("x", 1.0, {"f32": 2.0, "bf16": 4.0}, 1.0, None)
    assert (chip.peak("f16"), chip.peak("bf16"), chip.peak("f64"), chip.peak("s8")) == (4.0, 4.0, 2.0, 2.0)


def test_the_machine_at_hand_is_measured() -> None:
    chip = measure()
    assert chip.measured
    assert chip.name == "cpu"
    assert 1e8 < chip.bandwidth < 1e13
    assert 1e8 < chip.peak("f32") < 1e15
    assert 1e8 < chip.memory_bytes < 1e14
    assert chip.interconnect is None  # there is one device
