"""Makes the goldens of the parity tests: tiny random torch models, their logits and the gradients of their inputs.

    python tests/goldens/make_goldens.py        writes one .npz a variant beside this file; needs torch and transformers

Each file holds the model's `config.json` as its publishers write it (`config`), every weight under its stored name
(`weight:NAME`), a padded batch (`source`, `source_mask`, `targets`, `target_mask`), float32 `logits` (B, U, V) that
predict each target, and `gradient` (B, T, D): of the scalar below with respect to the embeddings of the source.

    scalar = sum over real targets of  logits * cos(0.7 * running index)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).resolve().parent

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
_T5 = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "vocab_size": 59,
    "d_model": 23,
    "d_kv": 5,
    "d_ff": 31,
    "num_layers": 2,
    "num_heads": 3,
    "relative_attention_num_buckets": 32,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "is_encoder_decoder": True,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "vocab_size": 53,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 64,
    "n_ctx": 64,
    "layer_norm_epsilon": 1e-5,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "resid_pdrop": 0.1,
    "initializer_range": 0.02,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}
VARIANTS: dict[str, dict[str, Any]] = {
    # Llama 1 as first published: neither key-value heads nor anything of the rotary embedding in the file.
    "llama_mha": _LLAMA,
    "llama_gqa": {**_LLAMA, "num_key_value_heads": 3, "rope_theta": 500000.0, "rope_scaling": None, "mlp_bias": False},
    "llama_mqa": {**_LLAMA, "num_key_value_heads": 1, "num_hidden_layers": 3, "pretraining_tp": 1},
    "llama_tied": {
        **_LLAMA,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_theta": 100000.0,
        "is_llama_config": True,
        "rope_interleaved": False,
    },
    "llama_rope_llama3": {
        **_LLAMA,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "llama_rope_linear": {**_LLAMA, "num_key_value_heads": 6, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "mistral": {
        **_LLAMA,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "num_key_value_heads": 2,
        "head_dim": 10,
        "sliding_window": None,
    },
    "t5_v1_0": {**_T5, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20},
    "t5_v1_1": {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "t5_gelu": {**_T5, "feed_forward_proj": "gelu", "num_decoder_layers": 1},
    "mt5": {
        **_T5,
        "architectures": ["MT5ForConditionalGeneration"],
        "model_type": "mt5",
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "tokenizer_class": "T5Tokenizer",
    },
    "byt5": {
        **_T5,
        "num_layers": 3,
        "num_decoder_layers": 1,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "tokenizer_class": "ByT5Tokenizer",
    },
    "gpt2": _GPT2,
    "gpt2_untied": {
        **_GPT2,
        "activation_function": "gelu",
        "n_inner": 31,
        "n_layer": 3,
        "n_head": 2,
        "tie_word_embeddings": False,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
    },
}


def scalar_weights(shape: tuple[int, ...]) -> np.ndarray:
    """Returns the fixed weights of the scalar, float32, of the shape of the logits."""
    return np.cos(0.7 * np.arange(np.prod(shape))).reshape(shape).astype(np.float32)


def batch(vocab_size: int, seed: int) -> dict[str, np.ndarray]:
    """Returns a batch of three rows padded on the right, source up to 29 tokens and targets up to 7."""
    random = np.random.default_rng(seed)
    rows, source_lengths, target_lengths = 3, np.array([29, 11, 2]), np.array([4, 7, 1])
    source_mask = np.arange(29) < source_lengths[:, None]
    target_mask = np.arange(7) < target_lengths[:, None]
    source = np.where(source_mask, random.integers(3, vocab_size, (rows, 29)), 0)
    targets = np.where(target_mask, random.integers(3, vocab_size, (rows, 7)), 0)
    return {
        "source": source.astype(np.int32),
        "source_mask": source_mask,
        "targets": targets.astype(np.int32),
        "target_mask": target_mask,
    }


def make_model(fields: dict[str, Any], seed: int) -> Any:
    """Returns the torch model of a config, in evaluation mode, every weight drawn by numpy."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = AutoConfig.for_model(**json.loads(json.dumps(fields)))
    auto = AutoModelForSeq2SeqLM if "d_model" in fields else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").eval()
    if fields.get("tie_word_embeddings") is False:
        # transformers 5 ties T5's head when it builds a model, whatever the config says; released weights are untied.
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    random = np.random.default_rng(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            values = random.standard_normal(tuple(weight.shape)).astype(np.float32)
            if "norm" in name or (".ln_" in name and name.endswith("weight")):
                values = 1 + 0.2 * values
            elif name.endswith("bias"):
                values = 0.3 * values
            elif "c_" in name:  # GPT-2's kernels are (in, out)
                values = values / np.sqrt(np.float32(weight.shape[0]))
            elif not any(table in name for table in ("embed", "shared", "relative", ".wte", ".wpe")):
                values = values / np.sqrt(np.float32(weight.shape[1]))
            weight.copy_(torch.from_numpy(values))
    return model


def weights_of(model: Any) -> dict[str, np.ndarray]:
    """Returns the weights as a file stores them: without second names of a shared one."""
    return {name: weight.detach().numpy() for name, weight in model.named_parameters()}


def run(model: Any, data: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns logits (B, U, V) and the gradient of the scalar (B, T, D), by torch."""
    forward = _run_t5 if model.config.is_encoder_decoder else _run_causal
    return forward(model, data)


def _run_t5(model: Any, data: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    import torch

    embeds = model.get_input_embeddings()(torch.from_numpy(data["source"]).long()).detach().requires_grad_(True)
    start = np.full((len(data["targets"]), 1), model.config.decoder_start_token_id, np.int32)
    shifted = np.concatenate([start, data["targets"][:, :-1]], axis=1)
    logits = model(
        inputs_embeds=embeds,
        attention_mask=torch.from_numpy(data["source_mask"]).long(),
        decoder_input_ids=torch.from_numpy(shifted).long(),
    ).logits
    _scalar(logits, data).backward()
    return logits.detach().numpy(), embeds.grad.numpy()


def _run_causal(model: Any, data: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    import torch

    # Targets follow the real source at once: row b's are at lengths[b], lengths[b] + 1, ...
    lengths, (rows, width) = data["source_mask"].sum(1), data["source"].shape
    count = data["targets"].shape[1]
    joined = np.zeros((rows, width + count), np.int64)
    for row, length in enumerate(lengths):
        joined[row, :length] = data["source"][row, :length]
        joined[row, length : length + count] = data["targets"][row]
    embeds = model.get_input_embeddings()(torch.from_numpy(joined)).detach().requires_grad_(True)
    mask = torch.from_numpy(
        (np.arange(width + count) < (lengths + data["target_mask"].sum(1))[:, None]).astype(np.int64)
    )
    positions = torch.arange(width + count)[None].expand(rows, -1)
    every = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False).logits
    predicting = torch.from_numpy(lengths[:, None] - 1 + np.arange(count))
    logits = every[torch.arange(rows)[:, None], predicting]
    _scalar(logits, data).backward()
    return logits.detach().numpy(), embeds.grad[:, :width].numpy() * data["source_mask"][..., None]


def _scalar(logits: Any, data: dict[str, np.ndarray]) -> Any:
    import torch

    weights = scalar_weights(tuple(logits.shape)) * data["target_mask"][..., None]
    return (logits * torch.from_numpy(weights)).sum()


def make(name: str) -> dict[str, np.ndarray]:
    """Returns the arrays of one variant's golden, computed by torch."""
    seed = list(VARIANTS).index(name)
    fields = VARIANTS[name]
    model, data = make_model(fields, seed), batch(fields["vocab_size"], 100 + seed)
    logits, gradient = run(model, data)
    weights = {f"weight:{key}": value for key, value in weights_of(model).items()}
    return {"config": np.array(json.dumps(fields)), **weights, **data, "logits": logits, "gradient": gradient}


if __name__ == "__main__":
    for variant in VARIANTS:
        np.savez_compressed(FOLDER / f"{variant}.npz", **make(variant))
        print(f"{variant}.npz", (FOLDER / f"{variant}.npz").stat().st_size)
