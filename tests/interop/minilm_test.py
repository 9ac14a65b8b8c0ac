"""The real all-MiniLM-L6-v2, from its package, against transformers: its vectors, and what they are near to."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax import load_backbone
from deptjax.interop import packaged
from deptjax.models.pooling import l2_normalized

TEXTS = (
    "How far is it from the earth to the moon?",
    "What is the distance between our planet and its satellite?",
    "You have won a prize! Call now to claim it.",
    "Congratulations, a reward is waiting for you: reply today to receive your winnings, and tell nobody of it.",
    "A film",
)


def test_the_packaged_sentence_encoder_is_that_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModel

    backbone = load_backbone("packaged:all-minilm-l6-v2")
    assert backbone.sentence == ("mean", True)
    module = backbone.module()
    tokens = backbone.tokenizer(list(TEXTS), padding=True, return_tensors="np")
    ids, mask = jnp.asarray(tokens["input_ids"]), jnp.asarray(tokens["attention_mask"] > 0)

    def vectors(module: Any) -> tuple[jax.Array, jax.Array]:
        states = module.encode(module.embed(ids), mask)
        return l2_normalized(module.pool(states, mask, "mean")), module.pool(states, mask, "pooled")

    ours, pooled = jax.jit(lambda params: module.apply({"params": params}, method=vectors))(backbone.params)
    with torch.no_grad():
        model = AutoModel.from_pretrained(str(packaged.model("all-minilm-l6-v2"))).eval()
        told = {name: torch.from_numpy(np.array(value)) for name, value in tokens.items()}
        out = model(**told)
        real = told["attention_mask"][..., None]
        mean = (out.last_hidden_state * real).sum(1) / real.sum(1)
        theirs = torch.nn.functional.normalize(mean, dim=1).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    np.testing.assert_allclose(ours @ ours.T, theirs @ theirs.T, atol=1e-4)
    np.testing.assert_allclose(pooled, out.pooler_output.numpy(), atol=1e-4)
    near = np.asarray(ours @ ours.T)
    assert near[0, 1] > 0.6
    assert near[2, 3] > 0.4
    assert max(near[0, 2], near[0, 3], near[1, 2], near[1, 3]) < 0.2
