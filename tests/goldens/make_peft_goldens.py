"""Makes the goldens of the adapter formats: folders that HF peft trained and wrote, and the logits that it computes.

    python tests/goldens/make_peft_goldens.py [NAME ...]      writes NAME.npz beside this file; needs torch and peft

The frozen models are those of `make_goldens.py`, their weights in the files named there. Each file holds the adapter's
files as peft wrote them (`file:NAME`, uint8), and the batch and `logits` (B, U, V) as there. Adapters are trained for a
few steps of AdamW at a high rate, so that nothing is at its special first value.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.goldens.make_goldens import FOLDER, VARIANTS, batch, make_model

STEPS = 3


class Adapter(NamedTuple):
    """A golden: the frozen model's variant, the name of peft's config class, its fields."""

    variant: str
    config: str
    fields: dict[str, Any]
    safetensors: bool = True


ADAPTERS: dict[str, Adapter] = {
    "peft_prompt_llama": Adapter("llama_gqa", "PromptTuningConfig", {"num_virtual_tokens": 5}),
    "peft_prompt_t5": Adapter(
        "t5_v1_0", "PromptTuningConfig", {"num_virtual_tokens": 4, "num_transformer_submodules": 1}, safetensors=False
    ),
    "peft_prompt_t5_default": Adapter("t5_v1_1", "PromptTuningConfig", {"num_virtual_tokens": 3}),
    "peft_p_tuning_llama": Adapter(
        "llama_tied", "PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 7}
    ),
    "peft_lora_llama": Adapter(
        "llama_gqa", "LoraConfig", {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]}
    ),
    "peft_lora_llama_patterns": Adapter(
        "llama_mqa",
        "LoraConfig",
        {
            "r": 2,
            "lora_alpha": 5,
            "target_modules": r"model\.layers\.\d+\.(self_attn\.[qko]_proj|mlp\.down_proj)",
            "rank_pattern": {"o_proj": 4, r"layers\.1\.mlp\.down_proj": 1},
            "alpha_pattern": {r"^model\.layers\.[02]\.self_attn\.k_proj": 9},
            "init_lora_weights": "gaussian",
        },
    ),
    "peft_lora_llama_layers": Adapter(
        "llama_mqa",
        "LoraConfig",
        {"r": 2, "use_rslora": True, "target_modules": ["up_proj", "gate_proj"], "layers_to_transform": [0, 2]},
        safetensors=False,
    ),
    "peft_prefix_llama": Adapter("llama_gqa", "PrefixTuningConfig", {"num_virtual_tokens": 4}),
    "peft_prefix_llama_scaled": Adapter("llama_rope_llama3", "PrefixTuningConfig", {"num_virtual_tokens": 3}),
    "peft_prefix_mistral_projected": Adapter(
        "mistral",
        "PrefixTuningConfig",
        {"num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 6},
        safetensors=False,
    ),
    "peft_lora_t5": Adapter("t5_v1_1", "LoraConfig", {"r": 2, "lora_alpha": 3, "target_modules": ["q", "v", "wo"]}),
    "peft_lora_gpt2": Adapter(
        "gpt2_untied",
        "LoraConfig",
        {"r": 2, "lora_alpha": 3, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    ),
}


def folder_of(name: str, folder: Path) -> tuple[Any, np.ndarray]:
    """Trains an adapter, writes it to `folder`, and returns torch's model and the logits (B, U, V)."""
    import peft
    import torch

    golden = ADAPTERS[name]
    fields, seed = VARIANTS[golden.variant], list(VARIANTS).index(golden.variant)
    torch.manual_seed(len(name))
    task_type = "SEQ_2_SEQ_LM" if "d_model" in fields else "CAUSAL_LM"
    config = getattr(peft, golden.config)(task_type=task_type, **golden.fields)
    model = peft.get_peft_model(make_model(fields, seed), config)
    data = data_of(golden.variant)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(STEPS):
        loss = torch.nn.functional.cross_entropy(
            logits_of(model, data).reshape(-1, fields["vocab_size"]),
            torch.from_numpy(data["targets"]).long().reshape(-1),
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    model.save_pretrained(folder, safe_serialization=golden.safetensors)
    with torch.no_grad():
        return model, logits_of(model, data).numpy()


def data_of(variant: str) -> dict[str, np.ndarray]:
    """Returns the batch of a variant's adapters."""
    return batch(VARIANTS[variant]["vocab_size"], 200 + list(VARIANTS).index(variant))


def logits_of(model: Any, data: dict[str, np.ndarray]) -> Any:
    """Returns the logits (B, U, V) of a peft model that predict each target."""
    import torch

    source, mask = torch.from_numpy(data["source"]).long(), torch.from_numpy(data["source_mask"]).long()
    targets = torch.from_numpy(data["targets"]).long()
    rows, count = targets.shape
    if model.config.is_encoder_decoder:
        start = torch.full((rows, 1), model.config.decoder_start_token_id)
        shifted = torch.cat([start, targets[:, :-1]], dim=1)
        return model(input_ids=source, attention_mask=mask, decoder_input_ids=shifted).logits
    lengths, width = mask.sum(1), source.shape[1]
    joined = torch.zeros((rows, width + count), dtype=torch.long)
    for row, length in enumerate(lengths.tolist()):
        joined[row, :length] = source[row, :length]
        joined[row, length : length + count] = targets[row]
    real = (torch.arange(width + count) < (lengths + count)[:, None]).long()
    every = model(input_ids=joined, attention_mask=real, use_cache=False).logits
    front = every.shape[1] - joined.shape[1]  # of a soft prompt
    predicting = front + lengths[:, None] - 1 + torch.arange(count)
    return every[torch.arange(rows)[:, None], predicting]


def make(name: str) -> dict[str, np.ndarray]:
    """Returns the arrays of one golden."""
    with tempfile.TemporaryDirectory() as place:
        _, logits = folder_of(name, Path(place))
        files = {f"file:{path.name}": path.read_bytes() for path in sorted(Path(place).glob("adapter_*"))}
    arrays = {key: np.frombuffer(data, np.uint8) for key, data in files.items()}
    return {**arrays, **data_of(ADAPTERS[name].variant), "logits": logits}


def main(names: list[str], maker: Callable[[str], dict[str, np.ndarray]] = make) -> None:
    """Writes the goldens of these names."""
    for name in names:
        np.savez_compressed(FOLDER / f"{name}.npz", **maker(name))
        print(f"{name}.npz", (FOLDER / f"{name}.npz").stat().st_size)


if __name__ == "__main__":
    main(sys.argv[1:] or list(ADAPTERS))
