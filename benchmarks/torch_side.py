"""torch's side: HF transformers with HF peft, and a minimal DePT; what a user of these libraries runs.

DePT is not in peft: here it is the authors' formula, [P; E + alpha / sqrt(r) A B], in twenty lines and without their
copy of `A B` for every row.
"""

from __future__ import annotations

from typing import Any

import peft
import torch
import transformers
from torch import nn

from benchmarks.cases import MAX_LENGTH, SIZES, Entrant, Size, dept_rank, vectors

IGNORED = -100  # a label that does not count
ALPHA = 8.0


def make_base(size: Size) -> Any:
    """Returns HF's model of this size with HF's own random weights, float32, without dropout or cache."""
    torch.manual_seed(0)
    if size.family == "t5":
        config = transformers.T5Config(
            vocab_size=size.vocab,
            d_model=size.width,
            d_kv=size.head_dim,
            d_ff=size.mlp,
            num_layers=size.layers,
            num_heads=size.heads,
            dropout_rate=0.0,
            feed_forward_proj="relu",
            tie_word_embeddings=True,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
            use_cache=False,
        )
        return transformers.T5ForConditionalGeneration(config).float()
    config = transformers.LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).float()


class TorchDePT(nn.Module):
    """A frozen HF model with a prompt P (M, D) in front and a low-rank offset A B on its source embeddings.

    The input of a causal model ends with the one token of its target, which gets no offset.
    """

    def __init__(self, base: Any, length: int, rank: int, causal: bool):
        super().__init__()
        table = base.get_input_embeddings().weight
        self.base, self.length, self.causal = base.requires_grad_(False), length, causal
        self.scaling = ALPHA / rank**0.5
        self.prompt = nn.Parameter(table[torch.randperm(table.shape[0])[:length]].detach().clone())
        self.lora_a = nn.Parameter(torch.empty(MAX_LENGTH, rank).uniform_(-(rank**-0.5), rank**-0.5))
        self.lora_b = nn.Parameter(torch.zeros(rank, table.shape[1]))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Any:
        """Returns HF's output; rows are padded on the right, so column i is row i of A."""
        rows, tokens = input_ids.shape
        embeds = self.base.get_input_embeddings()(input_ids)
        source = tokens - self.causal
        offset = self.scaling * (self.lora_a[:source] @ self.lora_b)
        offset = nn.functional.pad(offset, (0, 0, 0, tokens - source))
        embeds = torch.cat([self.prompt.expand(rows, -1, -1), embeds + offset], dim=1)
        attention_mask = torch.cat([attention_mask.new_ones(rows, self.length), attention_mask], dim=1)
        if self.causal:
            labels = torch.cat([labels.new_full((rows, self.length), IGNORED), labels], dim=1)
        return self.base(inputs_embeds=embeds, attention_mask=attention_mask, labels=labels)


def make_model(method: str, size: Size) -> Any:
    """Returns the model with the method on it; what is not trained does not ask for gradients."""
    base, causal = make_base(size), size.family != "t5"
    if method == "full":
        return base
    if method.startswith("dept"):
        return TorchDePT(base, vectors(method), dept_rank(method, size.width), causal)
    task = "CAUSAL_LM" if causal else "SEQ_2_SEQ_LM"
    if method.startswith("lora"):
        targets = ["q_proj", "v_proj"] if causal else ["q", "v"]
        rank = int(method.removeprefix("lora"))
        config = peft.LoraConfig(task_type=task, r=rank, lora_alpha=16, lora_dropout=0.0, target_modules=targets)
        return peft.get_peft_model(base, config)
    # One submodule: the prompt stands in the encoder alone, as in the papers.
    only_encoder = {} if causal else {"num_transformer_submodules": 1}
    config = peft.PromptTuningConfig(
        task_type=task, num_virtual_tokens=vectors(method), prompt_tuning_init="RANDOM", **only_encoder
    )
    return peft.get_peft_model(base, config)


def random_batch(entrant: Entrant, size: Size) -> dict[str, torch.Tensor]:
    """Returns one batch without padding, as HF's models take it.

    Causal models get the target behind the source, and no label but there.
    """
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(3, size.vocab, (entrant.batch, entrant.source), generator=generator)
    labels = torch.randint(3, size.vocab, (entrant.batch, entrant.target), generator=generator)
    if size.family != "t5":
        labels = torch.cat([torch.full_like(source, IGNORED), labels], dim=1)
        source = torch.cat([source, labels[:, entrant.source :]], dim=1)
    return {"input_ids": source, "attention_mask": torch.ones_like(source), "labels": labels}


class TorchRunner:
    """A `Runner`: forward, backward, clip at 1.0, fused AdamW; no compilation, as HF's trainer does by default."""

    def __init__(self, entrant: Entrant, threads: int):
        torch.set_num_threads(threads)
        size = SIZES[entrant.model]
        self._model = make_model(entrant.method, size).train()
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=1e-4, eps=1e-6, weight_decay=0.0, fused=True)
        self._batch = random_batch(entrant, size)

    def warm(self) -> dict[str, float]:
        """Takes the first step, which makes the optimiser's state."""
        self.step()
        return {"compile_s": 0.0}

    def step(self) -> tuple[float, int]:
        """Takes a step."""
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._model(**self._batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        return loss.item(), int(self._batch["input_ids"].shape[0])

    def describe(self) -> dict[str, Any]:
        """Returns the trainable parameters and the versions."""
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
        return {"parameters": sum(p.numel() for p in self._trained), "versions": versions}
