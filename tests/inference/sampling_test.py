"""Sampling: the filtered distributions are those of torch's warpers, draws follow them, and a row's are its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.inference.controls import Decoded
from deptjax.inference.decode import decode, filter_logits
from deptjax.inference.decoding import Decoding
from tests.cases import padded, rows_of
from tests.inference.torch_oracle import controls_of, tuned

SETTINGS = [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.8), (0.5, 20, 0.6), (2.0, 1, 1.0), (1.0, 500, 0.01), (1, 3, 0.999)]
ROWS, ROOM = rows_of((5, 2, 7)), 8


def probabilities(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Returns the distribution that is drawn from, the settings traced."""
    run = jax.jit(lambda x, t, k, p: jax.nn.softmax(filter_logits(x / t, k, p), axis=-1))
    return np.asarray(run(jnp.asarray(logits), temperature, top_k, top_p))


def torchs(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Returns the distribution after transformers' warpers, in `generate`'s order."""
    import torch
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores: Any = torch.tensor(logits)
    warpers: list[Any] = [TemperatureLogitsWarper(float(temperature))] if temperature != 1 else []
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    for warper in warpers:
        scores = warper(None, scores)
    return scores.softmax(dim=-1).numpy()


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_distributions_are_those_of_torchs_warpers(temperature: float, top_k: int, top_p: float) -> None:
    logits = (3 * np.random.default_rng(0).standard_normal((11, 97))).astype(np.float32)
    logits[3, :40] = -np.inf  # held back
    got, wanted = (f(logits, temperature, top_k, top_p) for f in (probabilities, torchs))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(got > 0, wanted > 0)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_ties_are_treated_as_torch_does(temperature: float, top_k: int, top_p: float) -> None:
    """All that tie with the k-th stay; where top_p cuts through a tie, the higher ids stay."""
    logits = np.random.default_rng(1).integers(-3, 3, (13, 16)).astype(np.float32)
    got, wanted = (f(logits, temperature, top_k, top_p) for f in (probabilities, torchs))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)


def sampled(decoding: Decoding, rows: list[np.ndarray] = ROWS, length: int = 8, **more: Any) -> Decoded:
    case = tuned("llama", "dept")
    source, mask = padded(rows, length)
    controls = controls_of(decoding, len(rows), (), **more)
    how = {"max_new": ROOM, "texts": decoding.num_return, "sample": True}
    return jax.tree.map(np.asarray, decode(case.model, case.frozen, case.rows, source, mask, controls, **how))


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(3.0, 0, 1.0), (2.0, 6, 1.0), (9.0, 20, 0.7)])
def test_draws_follow_the_distribution(temperature: float, top_k: int, top_p: float) -> None:
    """Pearson's chi-square of 4096 first tokens, below the value that one draw in a thousand exceeds."""
    from scipy.stats import chi2

    draws, case = 4096, tuned("llama", "dept")
    source, mask = padded(ROWS[:1], 8)
    batch = {"source": source, "source_mask": mask, "targets": jnp.zeros((1, 1), jnp.int32)}
    logits = np.asarray(case.logits(case.moved, case.frozen, batch))[:, 0]
    expected = draws * torchs(logits, temperature, top_k, top_p)[0]
    decoding = Decoding(1, sample=True, num_return=draws, temperature=temperature, top_k=top_k, top_p=top_p, seed=5)
    tokens = sampled(decoding, ROWS[:1]).tokens[0, :, 0]
    counts = np.bincount(tokens, minlength=len(expected))
    assert not counts[expected == 0].any()
    often = expected >= 5  # the others count as one
    seen, wanted = (np.append(a[often], a[~often & (expected > 0)].sum()) for a in (counts, expected))
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    assert len(wanted) > 3
    assert ((seen - wanted) ** 2 / wanted).sum() < chi2.ppf(0.999, len(wanted) - 1)


def test_a_row_does_not_depend_on_its_batch() -> None:
    """Neither on the rows beside it, nor on padding, nor on how many samples are drawn."""
    decoding = Decoding(ROOM, sample=True, temperature=2.0, num_return=2, seed=3)
    whole = sampled(decoding, numbers=[10, 11, 12])
    again = sampled(decoding, numbers=[10, 11, 12])
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    for i in range(3):
        alone = sampled(decoding, ROWS[i : i + 1], length=11, numbers=[10 + i])
        np.testing.assert_array_equal(alone.tokens[0], whole.tokens[i])
    turned = sampled(decoding, ROWS[::-1], numbers=[12, 11, 10])
    np.testing.assert_array_equal(turned.tokens[::-1], whole.tokens)
    one = sampled(Decoding(ROOM, sample=True, temperature=2.0, seed=3), numbers=[10, 11, 12])
    np.testing.assert_array_equal(one.tokens[:, 0], whole.tokens[:, 0])


def test_samples_differ_by_seed_row_step_and_text() -> None:
    """Equal rows under a nearly even distribution: what is drawn twice is drawn with the same key."""
    rows = [ROWS[0]] * 3
    decoding = Decoding(ROOM, sample=True, temperature=1e6, num_return=2)
    first = sampled(decoding, rows).tokens
    other = sampled(Decoding(ROOM, sample=True, temperature=1e6, num_return=2, seed=1), rows).tokens
    texts = [tuple(text) for tokens in (first, other) for text in tokens.reshape(-1, ROOM)]
    assert len(set(texts)) == 12
    assert min(len(set(text)) for text in texts) > 1
