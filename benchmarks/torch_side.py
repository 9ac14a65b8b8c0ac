"""torch's side: HF transformers with HF peft, and a minimal DePT; what a user of these libraries runs.

DePT is not in peft: here it is the authors' formula, [P; E + alpha / sqrt(r) A B], in twenty lines and without their
copy of `A B` for every row.
"""

from __future__ import annotations

import contextlib
import functools
import time
from typing import Any

import peft
import torch
import transformers
from torch import nn

from benchmarks.cases import MAX_LENGTH, SIZES, Entrant, Size, dept_rank, vectors

IGNORED = -100  # a label that does not count
ALPHA = 8.0


def make_base(size: Size, dtype: str = "float32", attention: str | None = None) -> Any:
    """Returns HF's model of this size with HF's own random weights, without dropout or cache.

    `attention` is HF's name of an implementation; `None`, or one that HF does not have for the model, is its default.
    """
    torch.manual_seed(0)
    family = _t5 if size.family == "t5" else _llama
    config, auto = family(size)
    if attention is not None:
        with contextlib.suppress(ValueError):  # not for this family: `describe` says what it is instead
            return auto.from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention)
    return auto.from_config(config, dtype=getattr(torch, dtype))


def _t5(size: Size) -> tuple[Any, Any]:
    config = transformers.T5Config(
        vocab_size=size.vocab,
        d_model=size.width,
        d_kv=size.head_dim,
        d_ff=size.mlp,
        num_layers=size.layers,
        num_heads=size.heads,
        dropout_rate=0.0,
        feed_forward_proj="relu",
        tie_word_embeddings=size.tied,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        use_cache=False,
    )
    return config, transformers.AutoModelForSeq2SeqLM


def _llama(size: Size) -> tuple[Any, Any]:
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
        tie_word_embeddings=size.tied,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        use_cache=False,
    )
    return config, transformers.AutoModelForCausalLM


class TorchDePT(nn.Module):
    """A frozen HF model with a prompt P (M, D) in front and a low-rank offset A B on its source embeddings.

    The input of a causal model ends with the one token of its target, which gets no offset.
    """

    def __init__(self, base: Any, length: int, rank: int, causal: bool, max_length: int = MAX_LENGTH):
        super().__init__()
        table = base.get_input_embeddings().weight
        self.base, self.length, self.causal = base.requires_grad_(False), length, causal
        self.scaling = ALPHA / rank**0.5
        # Trained in float32, whatever the frozen weights are.
        self.prompt = nn.Parameter(table[torch.randperm(table.shape[0])[:length]].detach().clone().float())
        self.lora_a = nn.Parameter(torch.empty(max_length, rank).uniform_(-(rank**-0.5), rank**-0.5))
        self.lora_b = nn.Parameter(torch.zeros(rank, table.shape[1]))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Any:
        """Returns HF's output; rows are padded on the right, so column i is row i of A."""
        rows, tokens = input_ids.shape
        embeds = self.base.get_input_embeddings()(input_ids)
        source = tokens - self.causal
        offset = (self.scaling * (self.lora_a[:source] @ self.lora_b)).to(embeds.dtype)
        offset = nn.functional.pad(offset, (0, 0, 0, tokens - source))
        embeds = torch.cat([self.prompt.to(embeds.dtype).expand(rows, -1, -1), embeds + offset], dim=1)
        attention_mask = torch.cat([attention_mask.new_ones(rows, self.length), attention_mask], dim=1)
        if self.causal:
            labels = torch.cat([labels.new_full((rows, self.length), IGNORED), labels], dim=1)
        return self.base(inputs_embeds=embeds, attention_mask=attention_mask, labels=labels)


def make_model(
    method: str, size: Size, dtype: str = "float32", attention: str | None = None, max_length: int = MAX_LENGTH
) -> Any:
    """Returns the model with the method on it; what is not trained does not ask for gradients.

    Frozen weights have `dtype`; what is trained is float32, a whole model too.
    """
    causal = size.family != "t5"
    base = make_base(size, "float32" if method == "full" else dtype, attention)
    if method == "full":
        return base
    if method.startswith("dept"):
        return TorchDePT(base, vectors(method), dept_rank(method, size.width, max_length), causal, max_length)
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
    """A `Runner`: forward, backward, clip at 1.0, fused AdamW.

    On a CPU nothing is compiled, as HF's trainer does by default. Where the weights are wider than the entrant's dtype,
    the forward pass runs under autocast, as HF's trainer does it with `bf16=True`.
    """

    def __init__(self, entrant: Entrant, threads: int):
        torch.set_num_threads(threads)
        if entrant.device == "gpu" and not torch.cuda.is_available():
            raise RuntimeError(f"torch {torch.__version__} sees no GPU; install its CUDA build")
        device = torch.device("cuda" if entrant.device == "gpu" else "cpu")
        if entrant.device == "gpu":
            torch.set_float32_matmul_precision("high")  # TF32, XLA's default for float32 products too
        size, self._dtype = SIZES[entrant.model], getattr(torch, entrant.dtype)
        with device:
            model = make_model(entrant.method, size, entrant.dtype, entrant.attention, entrant.max_length)
        self._model = model.to(device).train()
        base = model.base if isinstance(model, TorchDePT) else model
        self._attention = base.config._attn_implementation
        narrower = base.get_input_embeddings().weight.dtype != self._dtype
        self._autocast: Any = contextlib.nullcontext
        if narrower:
            self._autocast = functools.partial(torch.autocast, device.type, self._dtype)
        self._call = self._model
        if entrant.compiled:
            # Without a GPU only the tracing is tried: generating code for a CPU takes minutes for a tiny model.
            backend = "inductor" if entrant.device == "gpu" else "aot_eager"
            self._call = torch.compile(self._model, backend=backend)
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=1e-4, eps=1e-6, weight_decay=0.0, fused=True)
        self._batch = {name: array.to(device) for name, array in random_batch(entrant, size).items()}
        self._entrant = entrant

    def warm(self) -> dict[str, float]:
        """Takes the first step, which makes the optimiser's state; on a GPU or compiled, more until they are steady.

        Compiling is what the first took longer than the last.
        """
        seconds = []
        for _ in range(1 if self._entrant.device == "cpu" and not self._entrant.compiled else 3):
            began = time.perf_counter()
            self.step()
            seconds.append(time.perf_counter() - began)
        return {"compile_s": max(seconds[0] - seconds[-1], 0.0) if self._entrant.compiled else 0.0}

    def step(self) -> tuple[float, int]:
        """Takes as many steps as the entrant has batches a turn."""
        rows = 0
        for _ in range(self._entrant.batches):
            self._optimizer.zero_grad(set_to_none=True)
            with self._autocast():
                loss = self._call(**self._batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(self._trained, 1.0)
            self._optimizer.step()
            rows += int(self._batch["input_ids"].shape[0])
        if self._entrant.device == "gpu":
            torch.cuda.synchronize()
        return loss.item(), rows

    def describe(self) -> dict[str, Any]:
        """Returns the trainable parameters, the versions, and HF's name of the attention it uses."""
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
        parameters = sum(p.numel() for p in self._trained)
        return {"parameters": parameters, "versions": versions, "attention": self._attention}

    def device_peak_mib(self) -> float:
        """Returns the peak of the device's memory that tensors of this process had, since its start, in MiB."""
        return torch.cuda.max_memory_allocated() / 2**20
