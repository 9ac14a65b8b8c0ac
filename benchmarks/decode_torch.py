"""torch's side of `decode.py`: HF's `generate`, with peft's prompt, or with DePT's embeddings given as inputs."""

from __future__ import annotations

from typing import Any

import peft
import torch
import transformers

from benchmarks.cases import SIZES, dept_rank, vectors
from benchmarks.decode_cases import Decoder
from benchmarks.torch_side import TorchDePT, make_base, make_model


class TorchDecoder:
    """A `Runner` whose step decodes a batch, greedily and with the key/value cache."""

    def __init__(self, decoder: Decoder, threads: int):
        torch.set_num_threads(threads)
        size = SIZES[decoder.model]
        generator = torch.Generator().manual_seed(1)
        source = torch.randint(3, size.vocab, (decoder.batch, decoder.source), generator=generator)
        mask = torch.ones_like(source)
        inputs: dict[str, torch.Tensor] = {"input_ids": source, "attention_mask": mask}
        if decoder.method == "none":
            model = make_base(size)
        elif decoder.method.startswith("dept"):
            dept = TorchDePT(make_base(size), vectors(decoder.method), dept_rank(decoder.method, size.width), False)
            model = dept.base
            with torch.no_grad():  # once, in favour of this side: a server would do it for each request
                embeds = model.get_input_embeddings()(source)
                embeds = embeds + dept.scaling * (dept.lora_a[: decoder.source] @ dept.lora_b)
                embeds = torch.cat([dept.prompt.expand(decoder.batch, -1, -1), embeds], dim=1)
            inputs = {"inputs_embeds": embeds, "attention_mask": torch.ones(embeds.shape[:2], dtype=mask.dtype)}
        else:
            model = make_model(decoder.method, size)
        self._model, self._inputs, self._decoder = model.eval(), inputs, decoder
        # Without an end token the lengths are equal on both sides.
        self._model.generation_config.eos_token_id = None

    def warm(self) -> dict[str, float]:
        """Decodes once."""
        self.step()
        return {"compile_s": 0.0}

    def step(self) -> tuple[float, int]:
        """Decodes the batch. Returns 0 and the new tokens of all rows together."""
        with torch.no_grad():
            tokens = self._model.generate(
                **self._inputs,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                max_new_tokens=self._decoder.new_tokens,
                min_new_tokens=self._decoder.new_tokens,
            )
        new = tokens.shape[1] - {True: 1, False: 0}[SIZES[self._decoder.model].family == "t5"]
        if "input_ids" in self._inputs and SIZES[self._decoder.model].family != "t5":
            new -= self._inputs["input_ids"].shape[1]
        assert new == self._decoder.new_tokens, (tokens.shape, new)
        return 0.0, self._decoder.batch * new

    def describe(self) -> dict[str, Any]:
        """Returns the versions."""
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
        return {"versions": versions}
