"""A backbone that is written as a Hugging Face folder is read back as it was."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import pytest

import deptjax
from deptjax.models.backbone import Backbone
from deptjax.models.rope import RopeScaling
from deptjax.testing import save_hf_folder, tiny_gpt2, tiny_llama, tiny_t5

LLAMA3 = RopeScaling("llama3", 8.0, 1.5, 3.5, 64)
BACKBONES = {
    "gpt2": tiny_gpt2(),
    "gpt2 untied, scanned": tiny_gpt2(1, tied=False, activation="gelu", dropout_rate=0.0, scan_layers=True),
    "llama": tiny_llama(),
    "llama untied, rope by the rule of Llama 3.1": tiny_llama(1, tied=False, rope_theta=500.0, rope_scaling=LLAMA3),
    "llama, linear rope, scanned": tiny_llama(2, rope_scaling=RopeScaling("linear", 2.0), scan_layers=True),
    "t5 1.0": tiny_t5(),
    "t5 1.1": tiny_t5(1, gated=True, activation="gelu_new", tied=False),
    "t5 scanned": tiny_t5(2, scan_layers=True),
}


@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
def test_a_saved_folder_is_read_back_as_it_was(backbone: Backbone, tmp_path: pathlib.Path) -> None:
    folder = save_hf_folder(backbone, tmp_path / "model")
    loaded = deptjax.load_backbone(folder, scan_layers=backbone.config.scan_layers)
    assert loaded.config == backbone.config
    assert loaded.fingerprint == backbone.fingerprint
    assert jax.tree.structure(loaded.params) == jax.tree.structure(backbone.params)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, backbone.params)
    text = "the film was very good ."
    assert loaded.tokenizer.encode(text) == backbone.tokenizer.encode(text)


def test_a_gate_that_the_format_has_no_name_for_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="exact GELU"):
        save_hf_folder(tiny_t5(gated=True, activation="gelu"), tmp_path)
