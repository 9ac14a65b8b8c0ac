"""Folders of BERT, RoBERTa and sentence encoders: what is in them is loaded, and what is not is said to be missing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from deptjax import load_backbone
from deptjax.errors import UserError
from deptjax.models.backbone import Backbone
from deptjax.testing import save_hf_folder, tiny_bert


def change(folder: Path, renamed: Any) -> Path:
    """Gives each tensor of a folder the name that `renamed` returns, or leaves it out for `None`."""
    stored = load_file(folder / "model.safetensors")
    kept = {renamed(name): value for name, value in stored.items() if renamed(name) is not None}
    save_file(kept, folder / "model.safetensors")
    return folder


def same(one: Backbone, other: Backbone) -> None:
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    assert jax.tree.structure(one.params) == jax.tree.structure(other.params)


@pytest.mark.parametrize(
    "fields",
    [{}, {"position_offset": 1, "token_types": 1}, {"tied": False}, {"scan_layers": True}],
    ids=["bert", "roberta", "untied", "scanned"],
)
def test_what_is_written_is_read(fields: dict[str, Any], tmp_path: Path) -> None:
    backbone = tiny_bert(**fields)
    loaded = load_backbone(save_hf_folder(backbone, tmp_path), scan_layers=backbone.config.scan_layers)
    assert loaded.config == backbone.config
    same(loaded, backbone)
    ids = [loaded.tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "good", "<mask>", "</s>")]
    assert loaded.tokenizer("good <mask>")["input_ids"] == ids
    assert loaded.config.mask_token == ids[2]


def test_two_rates_of_dropout_are_read_and_no_part_of_the_fingerprint(tmp_path: Path) -> None:
    backbone = tiny_bert(dropout_rate=0.2, attention_dropout_rate=0.0)
    folder = save_hf_folder(backbone, tmp_path)
    loaded = load_backbone(folder)
    assert (loaded.config.dropout_rate, loaded.config.attention_dropout_rate) == (0.2, 0.0)
    one = load_backbone(folder, dropout_rate=0.3)
    assert (one.config.dropout_rate, one.config.attention_dropout_rate) == (0.3, None)
    assert loaded.fingerprint == one.fingerprint == tiny_bert().fingerprint


def test_blocks_alone_are_an_encoder_and_what_is_missing_is_told(tmp_path: Path) -> None:
    backbone = tiny_bert()

    def bare(name: str) -> str | None:
        return None if name.startswith(("cls.", "bert.pooler.")) else name.removeprefix("bert.")

    loaded = load_backbone(change(save_hf_folder(backbone, tmp_path), bare))
    assert (loaded.config.has_pooler, loaded.config.has_masked_head) == (False, False)
    assert loaded.params.keys() == backbone.params.keys() - {"pooler", "masked_head"}
    tokens, mask = jnp.array([[3, 4, 5]]), jnp.ones((1, 3), bool)

    def encoded(of: Backbone) -> jax.Array:
        def encode(module: Any) -> jax.Array:
            return module.encode(module.embed(tokens), mask)

        return of.module().apply({"params": of.params}, method=encode)

    np.testing.assert_array_equal(encoded(loaded), encoded(backbone))
    with pytest.raises(UserError, match="needs a layer that this model does not have"):
        loaded.module().apply({"params": loaded.params}, encoded(loaded), mask, "pooled", method="pool")


def test_a_part_of_a_head_is_not_a_head(tmp_path: Path) -> None:
    folder = save_hf_folder(tiny_bert(), tmp_path)
    change(folder, lambda name: None if "transform.dense.bias" in name else name)
    with pytest.raises(UserError, match=r"tensor 'cls\.predictions\.transform\.dense\.bias' is missing"):
        load_backbone(folder)


def test_tensors_of_training_and_of_old_files_are_passed_over(tmp_path: Path) -> None:
    backbone = tiny_bert()
    folder = save_hf_folder(backbone, tmp_path)
    stored = load_file(folder / "model.safetensors")
    width = backbone.width
    stored |= {
        "bert.embeddings.position_ids": np.arange(512)[None],
        "cls.seq_relationship.weight": np.ones((2, width), np.float32),
        "cls.seq_relationship.bias": np.ones(2, np.float32),
        "cls.predictions.decoder.weight": stored["bert.embeddings.word_embeddings.weight"].copy(),
        "cls.predictions.decoder.bias": stored["cls.predictions.bias"].copy(),
    }
    save_file(stored, folder / "model.safetensors")
    same(load_backbone(folder), backbone)
    stored["cls.predictions.decoder.bias"] += 1
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"'cls\.predictions\.decoder\.bias' differs from 'cls\.predictions\.bias'"):
        load_backbone(folder)
    stored["classifier.weight"] = np.ones((2, width), np.float32)
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"tensor 'classifier\.weight' is not one that this model has"):
        load_backbone(folder)


def test_the_first_folders_of_sentence_encoders(tmp_path: Path) -> None:
    backbone = tiny_bert()
    save_hf_folder(backbone, tmp_path / "0_Transformer")
    (tmp_path / "modules.json").write_text("[]")
    same(load_backbone(tmp_path), backbone)


def test_a_quantised_load_is_the_load_quantised(tmp_path: Path) -> None:
    backbone = tiny_bert(scan_layers=True)
    loaded = load_backbone(save_hf_folder(backbone, tmp_path), quantize="int8", scan_layers=True)
    same(loaded, dataclasses.replace(backbone).quantized("int8"))
