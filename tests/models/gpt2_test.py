"""GPT-2: steps as at once, positions that a prompt takes, the shared prompt, dropout, every site, real sizes."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deptjax
from deptjax.errors import UserError
from deptjax.models.gpt2 import GPT2Config
from deptjax.testing import save_hf_folder, tiny_gpt2
from deptjax.typing import Array
from tests.models import support
from tests.reviews import review_task

CONFIG = GPT2Config(vocab_size=37, width=18, num_layers=2, num_heads=3, mlp_dim=19, max_positions=24)
LENGTHS = (11, 4, 1)
M, U = 5, 6


def inputs(prompt: str = "shared", seed: int = 1) -> tuple[Array, Array, Any, Array]:
    """Returns source (3, 11, D), mask, prompt of 5 and targets (3, 6)."""
    rng = np.random.default_rng(seed)
    rows, longest = len(LENGTHS), max(LENGTHS)
    source = rng.standard_normal((rows, longest, CONFIG.width))
    mask = np.arange(longest)[None] < np.array(LENGTHS)[:, None]
    shape = {"none": None, "shared": (M, CONFIG.width), "rows": (rows, M, CONFIG.width)}[prompt]
    vectors = None if shape is None else jnp.asarray(rng.standard_normal(shape), jnp.float32)
    ids = rng.integers(1, CONFIG.vocab_size, (rows, U))
    return jnp.asarray(source, jnp.float32), jnp.asarray(mask), vectors, jnp.asarray(ids, jnp.int32)


def by_hand(params: dict[str, Any], x: np.ndarray) -> np.ndarray:
    """Returns the final states (S, D) of one embedded text, in float64, from the formulas alone."""
    params = jax.tree.map(np.float64, params)
    size, heads = len(x), CONFIG.num_heads

    def norm(at: dict[str, Any], x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        return at["scale"] * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + CONFIG.norm_eps) + at["bias"]

    def linear(at: dict[str, Any], x: np.ndarray) -> np.ndarray:
        return x @ at["kernel"] + at["bias"]

    x = x + params["position_embedder"]["embedding"][:size]
    for i in range(CONFIG.num_layers):
        layer = params[f"layers_{i}"]
        y, attention = norm(layer["pre_attention_norm"], x), layer["attention"]
        q, k, v = (linear(attention[n], y).reshape(size, heads, -1) for n in ("query", "key", "value"))
        scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(q.shape[-1])
        weights = np.exp(np.where(np.tril(np.ones((size, size), bool)), scores, -np.inf))
        mixed = np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), v)
        x = x + linear(attention["out"], mixed.reshape(size, -1))
        y = linear(layer["mlp"]["up"], norm(layer["pre_mlp_norm"], x))
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x + linear(layer["mlp"]["down"], y)
    return norm(params["final_norm"], x)


def test_states_are_those_of_the_formulas_with_the_prompt_at_the_first_positions() -> None:
    module = CONFIG.make()
    params, (source, mask, prompt, targets) = support.random_params(module), inputs()
    ours = support.states_of(module)(params, source, mask, prompt, targets)
    table = np.asarray(params["token_embedder"]["embedding"])
    for row, length in enumerate(LENGTHS):
        whole = np.concatenate([prompt, source[row, :length], table[targets[row, :-1]]])
        np.testing.assert_allclose(ours[row], by_hand(params, whole)[M + length - 1 :], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("prompt", "scan"), [("none", False), ("shared", False), ("rows", False), ("shared", True)])
def test_steps_give_what_all_at_once_gives(prompt: str, scan: bool) -> None:
    module = dataclasses.replace(CONFIG, scan_layers=scan).make(support.fill())
    params, args = support.random_params(module), inputs(prompt)
    whole = support.states_of(module)(params, *args)
    np.testing.assert_allclose(support.stepwise(module, params, *args), whole, atol=1e-5)


def test_a_shared_prompt_is_a_copy_in_front_of_each_row_with_every_site_filled() -> None:
    module = CONFIG.make(support.fill())
    params, (source, mask, prompt, targets) = support.random_params(module), inputs()
    weights = np.random.default_rng(4).standard_normal((len(LENGTHS), U, CONFIG.width)).astype(np.float32)

    def loss(prompt: Array, copies: bool) -> tuple[Array, Array]:
        given = jnp.broadcast_to(prompt, (len(LENGTHS), *prompt.shape)) if copies else prompt
        states = module.apply({"params": params}, source, mask, given, targets, method="target_states")
        return jnp.sum(states * weights) / states.size, states

    graded = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    ((_, states), grad), ((_, copied), copied_grad) = graded(prompt, False), graded(prompt, True)
    np.testing.assert_allclose(copied, states, atol=1e-5)
    np.testing.assert_allclose(copied_grad, grad, atol=1e-5)
    assert float(jnp.abs(grad).max()) > 1e-3


def test_scan_computes_what_unrolled_layers_compute() -> None:
    unrolled, scanned = (dataclasses.replace(CONFIG, scan_layers=s).make(support.fill()) for s in (False, True))
    params, args = support.random_params(unrolled), inputs()
    stacked = support.stack_layers(params)
    assert support.flat_shapes(stacked) == support.flat_shapes(support.shapes(scanned))
    expected = support.states_of(unrolled)(params, *args)
    np.testing.assert_allclose(support.states_of(scanned)(stacked, *args), expected, atol=1e-5)


def test_of_a_padded_prompt_the_real_vectors_take_the_first_positions() -> None:
    module = CONFIG.make()
    params, (source, mask, prompt, _) = support.random_params(module), inputs()
    padded = jnp.concatenate([jnp.full((3, CONFIG.width), 7.0), prompt])

    @jax.jit
    def first(prompt: Array, length: Any) -> Array:
        front = module.apply({"params": params}, prompt, length, method="front")
        row = source[:1, : LENGTHS[0]], mask[:1, : LENGTHS[0]]
        return module.apply({"params": params}, *row, front, 2, method="start")[0]

    np.testing.assert_allclose(first(padded, jnp.int32(M)), first(prompt, None), atol=1e-5)


def test_padding_beyond_the_last_position_changes_nothing() -> None:
    """Prompt, text and targets fill the model's positions; the bucket's padding has none."""
    module = CONFIG.make()
    params, (source, mask, prompt, targets) = support.random_params(module), inputs()
    assert CONFIG.max_positions < M + 20 + U
    wide = jnp.pad(source, ((0, 0), (0, 9), (0, 0))), jnp.pad(mask, ((0, 0), (0, 9)))
    short = support.states_of(module)(params, source, mask, prompt, targets)
    long = support.states_of(module)(params, *wide, prompt, targets)
    assert np.isfinite(long).all()
    np.testing.assert_allclose(long, short, atol=1e-5)
    np.testing.assert_allclose(support.stepwise(module, params, *wide, prompt, targets), short, atol=1e-5)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_dropout_acts_in_training_alone_and_follows_its_key(scan: bool) -> None:
    args = inputs()
    module = dataclasses.replace(CONFIG, scan_layers=scan, dropout_rate=0.3).make()
    params = support.random_params(module)

    @jax.jit
    def dropped(key: Array) -> Array:
        rngs = {"dropout": key}
        return module.apply({"params": params}, *args, False, method="target_states", rngs=rngs)

    one, again, other = (dropped(jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-2
    plain = dataclasses.replace(CONFIG, scan_layers=scan, dropout_rate=0.0).make()
    np.testing.assert_array_equal(support.states_of(module)(params, *args), support.states_of(plain)(params, *args))


PLACES = {
    "linear": [f"attention/{p}" for p in ("query", "key", "value", "out")] + ["mlp/up", "mlp/down"],
    "attention": ["attention"],
    "residual": ["attention", "mlp"],
}


@pytest.mark.parametrize("kind", PLACES)
def test_filled_sites_act(kind: str) -> None:
    support.check_filled_sites_act(CONFIG, kind, PLACES[kind], inputs())


def test_bfloat16_stays_bfloat16() -> None:
    module = dataclasses.replace(CONFIG, dtype="bfloat16").make()
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), support.shapes(module))
    source, mask, vectors, targets = inputs()
    source, vectors = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (source, vectors))
    assert jax.eval_shape(support.states_of(module), params, source, mask, vectors, targets).dtype == jnp.bfloat16
    tokens = jax.eval_shape(lambda p: support.greedy(module, p, source, mask, vectors, 3), params)
    assert (tokens.shape, tokens.dtype) == ((3, 3), jnp.int32)


def test_tree() -> None:
    config = dataclasses.replace(CONFIG, num_layers=1)
    expected: dict[str, tuple[int, ...]] = {
        "token_embedder/embedding": (37, 18),
        "position_embedder/embedding": (24, 18),
        "layers_0/mlp/up/kernel": (18, 19),
        "layers_0/mlp/up/bias": (19,),
        "layers_0/mlp/down/kernel": (19, 18),
        "layers_0/mlp/down/bias": (18,),
    }
    for at in ("layers_0/pre_attention_norm", "layers_0/pre_mlp_norm", "final_norm"):
        expected |= {f"{at}/scale": (18,), f"{at}/bias": (18,)}
    for name in ("query", "key", "value", "out"):
        expected |= {f"layers_0/attention/{name}/kernel": (18, 18), f"layers_0/attention/{name}/bias": (18,)}
    assert support.flat_shapes(support.shapes(config.make())) == expected
    untied = support.flat_shapes(support.shapes(dataclasses.replace(config, tied=False).make()))
    assert untied == {**expected, "logits_dense/kernel": (18, 37)}


def test_a_config_that_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="num_heads 4 does not divide width 18"):
        dataclasses.replace(CONFIG, num_heads=4)
    with pytest.raises(UserError, match=r"activation 'gelu_now' is not known.*Did you mean 'gelu_new'"):
        dataclasses.replace(CONFIG, activation="gelu_now")


def test_a_tokenizer_without_padding_trains_and_answers(tmp_path: pathlib.Path) -> None:
    """GPT-2's has an end token and no other."""
    backbone = tiny_gpt2(scan_layers=True)
    backbone.tokenizer.pad_token = None
    loaded = deptjax.load_backbone(save_hf_folder(backbone, tmp_path / "model"), scan_layers=True)
    assert loaded.tokenizer.pad_token is None
    method = deptjax.DePT(prompt_length=4, rank=2, max_length=16)
    run = deptjax.train(loaded, method, review_task(), workdir=tmp_path / "run", steps=2, buckets=1)
    predict = deptjax.Predictor(loaded, run.prompt)
    short, longer = (predict([text])[0] for text in ("good", "the plot was very bad"))
    assert [answer.scores for answer in predict(["good", "the plot was very bad"])] == [
        pytest.approx(answer.scores, abs=1e-5) for answer in (short, longer)
    ]
