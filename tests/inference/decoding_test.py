"""The settings of decoding: what is refused, in one line that names the field."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.inference.controls import NEVER, WHEN_FULL, make_controls, row_keys
from deptjax.inference.decoding import Decoding


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected a whole number of at least 1"),
        ({"max_new_tokens": 2.0}, "max_new_tokens is 2.0, expected a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens is True, expected a whole number"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1, expected a whole number of at least 0"),
        ({"min_new_tokens": 33}, "min_new_tokens is 33, above max_new_tokens 32"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_return": 0, "sample": True}, "num_return is 0"),
        ({"num_return": 2}, "num_return is 2, but there are 1 beams; set num_beams or sample"),
        ({"num_return": 4, "num_beams": 3}, "num_return is 4, but there are 3 beams; lower it, or raise num_beams"),
        ({"num_beams": 3, "sample": True}, "sample is true and num_beams 3; sample, or search with beams, not both"),
        ({"length_penalty": math.nan, "num_beams": 2}, "length_penalty is nan, expected a number"),
        ({"length_penalty": 0.5}, "length_penalty is 0.5, but there are no beams; set num_beams, or leave"),
        ({"early_stopping": True}, "early_stopping is True, but there are no beams"),
        ({"early_stopping": "always", "num_beams": 2}, "early_stopping is 'always', expected true, false or 'never'"),
        ({"early_stopping": 1, "num_beams": 2}, "early_stopping is 1, expected true, false or 'never'"),
        ({"sample": "yes"}, "sample is 'yes', expected true or false"),
        ({"temperature": 0, "sample": True}, "temperature is 0, expected a number above 0; greedy is sample=False"),
        ({"temperature": "hot", "sample": True}, "temperature is 'hot', expected a number"),
        ({"temperature": 0.5}, "temperature is 0.5, but nothing is sampled; set sample=True, or leave temperature out"),
        ({"top_k": -1, "sample": True}, "top_k is -1, expected a whole number of at least 0"),
        ({"top_k": 5}, "top_k is 5, but nothing is sampled"),
        ({"top_p": 0.0, "sample": True}, "top_p is 0.0, expected a number above 0 and up to 1"),
        ({"top_p": 1.5, "sample": True}, "top_p is 1.5, expected"),
        ({"seed": -1}, "seed is -1, expected a whole number of at least 0 and at most 4294967295"),
        ({"seed": 2**32}, "seed is 4294967296, expected"),
        ({"stop": "\n"}, r"stop is '\\n', expected a list of texts: write stop=\('\\n',\)"),
        ({"stop": ("a", "")}, "stop holds '', expected texts of at least one character"),
        ({"stop": (3,)}, "stop holds 3, expected texts"),
        ({"stop": ("\ud800",)}, "which is not text"),
    ],
)
def test_a_mistake_is_one_line(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        Decoding(**fields)
    assert "\n" not in str(error.value)


def test_settings_become_arrays() -> None:
    decoding = Decoding(7, num_beams=2, length_penalty=-0.5, early_stopping="never", min_new_tokens=3)
    controls = make_controls(decoding, 3, eos_ids=(5, 9), pad_id=4)
    np.testing.assert_array_equal(controls.limits, [7, 7, 7])
    np.testing.assert_array_equal(controls.minimums, [3, 3, 3])
    np.testing.assert_array_equal(controls.eos_ids, [5, 9, -1, -1])
    assert (controls.early_stopping, controls.length_penalty, controls.pad_id) == (NEVER, -0.5, 4)
    full = make_controls(Decoding(num_beams=2, early_stopping=True), 2, eos_ids=(), pad_id=0, limits=[3, 1])
    assert full.early_stopping == WHEN_FULL
    np.testing.assert_array_equal(full.limits, [3, 1])


def test_a_list_of_stop_strings_is_as_good_and_settings_can_be_keys() -> None:
    assert Decoding(stop=["a", "b"]) == Decoding(stop=("a", "b"))
    assert len({Decoding(stop=["a"]), Decoding(stop=("a",)), Decoding()}) == 2


def test_too_many_end_tokens_are_told() -> None:
    with pytest.raises(UserError, match="5 end tokens are given, expected 4 at most; shorten eos_ids"):
        make_controls(Decoding(), 1, eos_ids=range(5), pad_id=0)


def test_keys_belong_to_rows() -> None:
    keys = row_keys(2**32 - 1, [0, 1, 2**32 - 1])
    assert len({tuple(data) for data in jax.random.key_data(keys).tolist()}) == 3
    assert keys[2] == row_keys(2**32 - 1, [2**32 - 1])[0]
    assert keys[0] != row_keys(0, [0])[0]
