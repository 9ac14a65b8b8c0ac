"""Checkpoints of DePT's authors: read with their scaling, written as their fork of peft writes them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from deptjax.errors import UserError
from deptjax.interop.prompts import export_prompt, load_prompt
from deptjax.methods import DePT
from deptjax.testing import tiny_llama, tiny_t5
from tests.cases import METHODS, make_case, some_batch

M, X, R, D = 5, 13, 3, 23
NAMES = ("prompt_embeddings", "prompt_encoder.lora_embedding_A", "prompt_encoder.lora_embedding_B")
# Every field of a checkpoint that the authors published, in their order.
FIELDS = (
    "base_model_name_or_path bias hidden_size inference_mode init_lora_weights load_lora_embedding_B"
    " load_lora_embeddings lora_alpha max_length num_attention_heads num_layers num_transformer_submodules"
    " num_virtual_tokens peft_type prompt_tuning_init prompt_tuning_init_text r revision save_lora_embeddings task_type"
    " token_dim tokenizer_name_or_path"
).split()


def tensors() -> dict[str, torch.Tensor]:
    """Returns the tensors of a small checkpoint."""
    random = np.random.default_rng(0)
    shapes = ((M, D), (X, R), (R, D))
    return {
        name: torch.from_numpy(random.standard_normal(shape).astype(np.float32))
        for name, shape in zip(NAMES, shapes, strict=True)
    }


def write(folder: Path, stored: dict[str, torch.Tensor], **fields: Any) -> Path:
    """Writes a checkpoint as the fork's `save_pretrained` does; a field is left out with `...`."""
    config = {
        "base_model_name_or_path": "t5-base",
        "bias": "none",
        "hidden_size": D,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 8,
        "max_length": X,
        "num_attention_heads": 12,
        "num_layers": 12,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": M,
        "peft_type": "PROMPT_TUNING_LORA",
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "Classify this text is postive or not:",
        "r": R,
        "revision": None,
        "task_type": "SEQ_2_SEQ_LM",
        "token_dim": D,
        "tokenizer_name_or_path": "t5-base",
        **fields,
    }
    folder.mkdir(parents=True, exist_ok=True)
    config = {field: value for field, value in config.items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.save(stored, folder / "adapter_model.bin")
    return folder


@pytest.mark.parametrize(("fields", "alpha"), [({}, 8), ({"lora_alpha": 20}, 20), ({"lora_alpha": ...}, 8)])
def test_the_input_is_the_authors(fields: dict[str, Any], alpha: float, tmp_path: Path) -> None:
    """Their forward: `word_embeddings(ids) += lora_alpha / sqrt(r) * A @ B`, the prompt in front."""
    stored = tensors()
    prompt = load_prompt(write(tmp_path / "cola", stored, **fields), tiny_t5())
    assert prompt.settings == {"max_length": X, "evaluation": "auto"}
    embeds = torch.from_numpy(np.random.default_rng(1).standard_normal((2, X, D)).astype(np.float32))
    p, a, b = stored.values()
    wanted = torch.cat([p.expand(2, -1, -1), embeds + alpha / R**0.5 * (a @ b)], dim=1)
    got, _ = prompt.method.apply({"params": prompt.trainable["input"]}, embeds.numpy(), np.ones((2, X), bool))
    np.testing.assert_allclose(got, wanted.numpy(), rtol=0, atol=1e-6 * float(wanted.abs().max()))


def test_without_its_low_rank_pair_it_is_prompt_tuning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored = tensors()
    with caplog.at_level(logging.WARNING, "deptjax"):
        prompt = load_prompt(write(tmp_path / "wic", {NAMES[0]: stored[NAMES[0]]}), tiny_t5())
    assert "holds no low-rank pair" in caplog.text
    assert prompt.method_config["method"] == "prompt_tuning"
    np.testing.assert_array_equal(prompt.trainable["input"]["prompt"], stored[NAMES[0]].numpy())


@pytest.mark.parametrize("scaling", ["alpha/sqrt(rank)", "none", 0.7])
def test_what_is_written_is_whole_and_comes_back(scaling: str | float, tmp_path: Path) -> None:
    method = DePT(prompt_length=M, rank=R, max_length=X, prompt_init="vocab", scaling=scaling)
    case = make_case(tiny_t5(), method)
    prompt = case.prompt()
    folder = export_prompt(prompt, case.backbone, tmp_path / "dept", "dept")
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.bin"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert sorted(config) == FIELDS
    assert config["peft_type"] == "PROMPT_TUNING_LORA"
    loaded = torch.load(folder / "adapter_model.bin", weights_only=True)
    assert {name: tuple(t.shape) for name, t in loaded.items()} == dict(zip(NAMES, ((M, D), (X, R), (R, D))))
    assert {t.dtype for t in loaded.values()} == {torch.float32}
    wanted = {"alpha/sqrt(rank)": 8 / R**0.5, "none": 1.0}.get(scaling, scaling)
    assert config["lora_alpha"] / R**0.5 == pytest.approx(wanted, rel=1e-12)
    again = load_prompt(folder, case.backbone)
    jax.tree.map(np.testing.assert_array_equal, again.trainable, prompt.trainable)
    back = make_case(case.backbone, again.method)
    np.testing.assert_allclose(
        back.logits(case.moved, case.frozen, some_batch()),
        case.logits(case.moved, case.frozen, some_batch()),
        rtol=1e-6,
        atol=1e-5,
    )


def test_other_methods_are_refused(tmp_path: Path) -> None:
    for name in ("prompt_tuning", "lora"):
        case = make_case(tiny_llama(), METHODS[name])
        with pytest.raises(UserError, match=f"holds a prompt with a low-rank pair, not '{name}'; use peft"):
            export_prompt(case.prompt(), case.backbone, tmp_path / "x", "dept")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"r": 4}, r"'prompt_encoder.lora_embedding_A' has shape \(13, 3\), expected \(13, 4\)"),
        ({"max_length": 256}, r"'prompt_encoder.lora_embedding_A' has shape \(13, 3\), expected \(256, 3\)"),
        ({"num_virtual_tokens": 6}, r"'prompt_embeddings' has shape \(5, 23\), expected \(6, 23\)"),
        ({"r": ...}, "'r' is null: expected a whole number"),
        ({"num_transformer_submodules": 2}, "'num_transformer_submodules' is 2: expected 1"),
        ({"bias": "all"}, "'bias' is \"all\": trained biases"),
        ({"offset_of_targets": True}, "'offset_of_targets' is true: this field is not known here"),
    ],
)
def test_mistakes_name_the_field_or_tensor(fields: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told) as raised:
        load_prompt(write(tmp_path / "x", tensors(), **fields), tiny_t5())
    assert "\n" not in str(raised.value)
    stored = tensors()
    del stored[NAMES[2]]
    with pytest.raises(UserError, match=r"tensor 'prompt_encoder.lora_embedding_B' is missing"):
        load_prompt(write(tmp_path / "y", stored), tiny_t5())
