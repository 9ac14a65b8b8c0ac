"""deptjax's side of `decode.py`: `deptjax.inference.generate` on what a `PromptBank`, or one prompt, gives the rows."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from benchmarks.cases import SIZES
from benchmarks.decode_cases import MIXED, TASKS, Decoder
from benchmarks.jax_side import cheap_params, make_config, make_method
from deptjax.inference.decoding import Decoding
from deptjax.inference.generate import generate
from deptjax.inference.prompt_bank import PromptBank
from deptjax.inference.rows import Rows
from deptjax.methods import Vocabulary, ZeroShot
from deptjax.models.backbone import Backbone
from deptjax.models.prompted import PromptedModel
from deptjax.prompt import Prompt


class NoTokenizer:
    """What `generate` asks of a tokenizer, where no token is an end token."""

    eos_token_id = None
    pad_token_id = 0


class JaxDecoder:
    """A `Runner` whose step decodes a batch."""

    def __init__(self, decoder: Decoder):
        size = SIZES[decoder.model]
        config = make_config(size, scan=False)
        backbone = Backbone(decoder.model, config, cheap_params(config), None)
        method = ZeroShot() if decoder.method == "none" else make_method(decoder.method.removesuffix(MIXED))
        self._model, self._frozen = PromptedModel.build(backbone, method), backbone.params
        vocabulary = Vocabulary(backbone.embedding, None)

        def trainable(seed: int) -> Any:
            return (
                {} if decoder.method == "none" else self._model.init(jax.random.key(seed), self._frozen, vocabulary)[0]
            )

        if decoder.method.endswith(MIXED):  # each row has a task of its own
            prompts = {
                str(seed): Prompt(self._model.method, trainable(seed), backbone.name, backbone.fingerprint, {})
                for seed in range(TASKS)
            }
            bank = PromptBank(backbone, prompts)
            self._model = bank.model
            self._rows = lambda: bank.rows([str(row % TASKS) for row in range(decoder.batch)])
        else:
            shared = Rows.shared(self._model, trainable(0), self._frozen)
            self._rows = lambda: shared
        random = np.random.default_rng(1)
        source = random.integers(3, size.vocab, (decoder.batch, decoder.source)).astype(np.int32)
        self._source, self._mask = jnp.asarray(source), jnp.ones(source.shape, bool)
        self._decoding = Decoding(max_new_tokens=decoder.new_tokens)
        self._decoder = decoder

    def warm(self) -> dict[str, float]:
        """Compiles and decodes once."""
        began = time.perf_counter()
        self.step()
        first = time.perf_counter() - began
        began = time.perf_counter()
        self.step()
        return {"compile_s": max(first - (time.perf_counter() - began), 0.0)}

    def step(self) -> tuple[float, int]:
        """Decodes the batch. Returns 0 and the new tokens of all rows together."""
        decoded = generate(
            self._model, self._frozen, self._rows(), self._source, self._mask, self._decoding, NoTokenizer(), eos_ids=()
        )
        lengths = np.asarray(jax.device_get(decoded).lengths)
        assert np.all(lengths == self._decoder.new_tokens)
        return 0.0, int(lengths.sum())

    def describe(self) -> dict[str, Any]:
        """Returns the versions."""
        return {"versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__}}
