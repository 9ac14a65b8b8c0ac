"""The bindings of T5X's gin files that matter are read, in every way of writing them; nothing else is."""

from __future__ import annotations

from typing import Any

import pytest

from deptjax.errors import UserError
from deptjax.interop.t5x_gin import mlp_settings, t5_settings

# As T5X's own files and gin's operative config have them.
MODEL = """
from __gin__ import dynamic_registration
from t5x.examples.t5 import network
DROPOUT_RATE = %gin.REQUIRED
# network.T5Config.dropout_rate = 0.9
network.Transformer.config = @network.T5Config()
network.T5Config:
  vocab_size = 32128  # vocab size rounded to a multiple of 128
  mlp_activations = ('gelu', 'linear')
  dropout_rate = %DROPOUT_RATE

  logits_via_embedding = False
models.Other:
  dropout_rate = 0.7
"""


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (MODEL, {"mlp_activations": ("gelu", "linear"), "logits_via_embedding": False}),
        (MODEL + "DROPOUT_RATE = 0.0\n", {"mlp_activations": ("gelu", "linear"), "dropout_rate": 0.0}),
        ("scope/t5x.examples.t5.network.T5Config.dropout_rate = 0.2", {"dropout_rate": 0.2}),
        ("A = %B\nB = 0.3\nT5Config.dropout_rate = %config.A", {"dropout_rate": 0.3}),
        ("A = %A\nT5Config.dropout_rate = %A", {}),
        ("MyT5Config.dropout_rate = 0.2\ndropout_rate = 0.1", {}),
        ("", {}),
    ],
)
def test_settings_of_the_model(text: str, wanted: dict[str, Any]) -> None:
    found = t5_settings(text, "model.gin")
    assert {name: found.get(name) for name in wanted} == wanted
    assert wanted or not found


def test_a_required_macro_is_no_value() -> None:
    assert "dropout_rate" not in t5_settings(MODEL, "model.gin")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(("relu",), ("relu", False)), ("relu", ("relu", False)), (("swish", "linear"), ("silu", True))],
)
def test_activations(given: Any, wanted: tuple[str, bool]) -> None:
    assert mlp_settings(given, "x") == wanted


@pytest.mark.parametrize("given", [("linear", "gelu"), ("gelu", "relu"), (), ("geglu",), 3])
def test_activations_that_are_not_implemented_are_refused(given: Any) -> None:
    with pytest.raises(UserError, match=r"model\.gin: 'mlp_activations' is .* expected one of relu, gelu, silu, swish"):
        mlp_settings(given, "model.gin")
