"""Makes the goldens of the BERT family: tiny random torch models, their states, pooled vectors, logits and gradients.

    python tests/goldens/make_bert_goldens.py   writes one .npz a variant beside this file; needs torch and transformers

Each file holds the model's `config.json` as its publishers write it (`config`), every weight under its stored name
(`weight:NAME`), a batch padded on the right (`source`, `source_mask`), float32 `states` (B, T, D) of the last layer,
and, where the variant has the layers, `pooled` (B, D) and `logits` (B, T, V); `gradient` (B, T, D) is that of the
scalar below with respect to the embeddings of the source.

    scalar = sum over real tokens of  (the logits, or else the states) * cos(0.7 * running index)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))  # run as a script

from tests.goldens.make_goldens import scalar_weights  # noqa: E402

_BERT = {
    "architectures": ["BertForPreTraining"],
    "model_type": "bert",
    "attention_probs_dropout_prob": 0.1,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 37,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 40,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "transformers_version": "4.6.0.dev0",
    "type_vocab_size": 2,
    "use_cache": True,
    "vocab_size": 53,
}
_ROBERTA = {
    **_BERT,
    "architectures": ["RobertaForMaskedLM"],
    "model_type": "roberta",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 42,
    "pad_token_id": 1,
    "type_vocab_size": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "bert_pretraining": _BERT,  # blocks, pooler and both heads
    "bert_minilm": {**_BERT, "architectures": ["BertModel"], "num_hidden_layers": 3, "num_attention_heads": 4},
    "bert_roberta": _ROBERTA,
    "bert_codebert": {**_ROBERTA, "architectures": ["RobertaModel"], "num_attention_heads": 2, "output_past": True},
}


def batch(vocab_size: int, seed: int) -> dict[str, np.ndarray]:
    """Returns three rows padded on the right, up to 17 tokens."""
    random = np.random.default_rng(seed)
    mask = np.arange(17) < np.array([17, 9, 2])[:, None]
    source = np.where(mask, random.integers(3, vocab_size, mask.shape), 0)
    return {"source": source.astype(np.int32), "source_mask": mask}


def make_model(fields: dict[str, Any], seed: int) -> Any:
    """Returns the torch model of a config, in evaluation mode, every weight drawn by numpy."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(fields)))
    config._attn_implementation = "eager"
    (architecture,) = fields["architectures"]
    model = getattr(transformers, architecture)(config).eval()
    random = np.random.default_rng(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            values = random.standard_normal(tuple(weight.shape)).astype(np.float32)
            if "LayerNorm.weight" in name or "layer_norm.weight" in name:
                values = 1 + 0.2 * values
            elif name.endswith("bias"):
                values = 0.3 * values
            elif "embeddings" not in name:
                values = values / np.sqrt(np.float32(weight.shape[1]))
            weight.copy_(torch.from_numpy(values))
    return model


def weights_of(model: Any) -> dict[str, np.ndarray]:
    """Returns the weights as a file stores them: without second names of a shared one."""
    return {name: weight.detach().numpy() for name, weight in model.named_parameters()}


def run(model: Any, data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns states, pooled vectors and logits, those that there are, and the gradient of the scalar, by torch."""
    import torch

    embeds = model.get_input_embeddings()(torch.from_numpy(data["source"]).long()).detach().requires_grad_(True)
    told = {"inputs_embeds": embeds, "attention_mask": torch.from_numpy(data["source_mask"]).long()}
    base = model.base_model(**told)
    result = {"states": base.last_hidden_state}
    if getattr(base, "pooler_output", None) is not None:
        result["pooled"] = base.pooler_output
    if model is not model.base_model:
        out = model(**told)
        result["logits"] = out.prediction_logits if hasattr(out, "prediction_logits") else out.logits
    last = result.get("logits", result["states"])
    weights = scalar_weights(tuple(last.shape)) * data["source_mask"][..., None]
    (last * torch.from_numpy(weights)).sum().backward()
    return {name: value.detach().numpy() for name, value in result.items()} | {"gradient": embeds.grad.numpy()}


def make(name: str) -> dict[str, np.ndarray]:
    """Returns the arrays of one variant's golden, computed by torch."""
    seed = 500 + list(VARIANTS).index(name)
    fields = VARIANTS[name]
    model, data = make_model(fields, seed), batch(fields["vocab_size"], 100 + seed)
    weights = {f"weight:{key}": value for key, value in weights_of(model).items()}
    return {"config": np.array(json.dumps(fields)), **weights, **data, **run(model, data)}


if __name__ == "__main__":
    for variant in VARIANTS:
        np.savez_compressed(FOLDER / f"{variant}.npz", **make(variant))
        print(f"{variant}.npz", (FOLDER / f"{variant}.npz").stat().st_size)
