"""LLaMA: against torch, against formulas, in steps as at once, the shared prompt, every site filled, real sizes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.models.llama import LlamaConfig
from deptjax.models.rope import RopeScaling
from deptjax.typing import Array, Tree
from tests.models import support

CONFIG = LlamaConfig(
    vocab_size=37,
    width=18,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=19,
    norm_eps=1e-5,
    max_positions=256,
)
LLAMA3 = RopeScaling("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=32)
VARIANTS = {
    "grouped": CONFIG,
    "multi-head": dataclasses.replace(CONFIG, num_kv_heads=6, rope_theta=500.0),
    "multi-query, tied": dataclasses.replace(CONFIG, num_kv_heads=1, tied=True),
    "llama3 scaling": dataclasses.replace(CONFIG, rope_scaling=LLAMA3, norm_eps=1e-6),
    "linear scaling": dataclasses.replace(CONFIG, rope_scaling=RopeScaling("linear", 3.0)),
}
LENGTHS = (11, 4, 1)
M = 5


def inputs(seed: int = 1, prompt: str = "shared", targets: int = 6) -> tuple[Array, Array, Any, Array]:
    """Returns source (3, 11, D), mask, prompt of 5 and targets."""
    rng = np.random.default_rng(seed)
    rows, longest = len(LENGTHS), max(LENGTHS)
    source = rng.standard_normal((rows, longest, CONFIG.width))
    mask = np.arange(longest)[None] < np.array(LENGTHS)[:, None]
    shape = {"none": None, "shared": (M, CONFIG.width), "rows": (rows, M, CONFIG.width)}[prompt]
    vectors = None if shape is None else jnp.asarray(rng.standard_normal(shape), jnp.float32)
    ids = rng.integers(1, CONFIG.vocab_size, (rows, targets))
    return jnp.asarray(source, jnp.float32), jnp.asarray(mask), vectors, jnp.asarray(ids, jnp.int32)


def torch_model(config: LlamaConfig, seed: int) -> Any:
    """Returns transformers' Llama with random weights on which everything matters."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope.update({"rope_type": config.rope_scaling.kind, "factor": config.rope_scaling.factor})
        if config.rope_scaling.kind == "llama3":
            rope["low_freq_factor"] = config.rope_scaling.low_freq_factor
            rope["high_freq_factor"] = config.rope_scaling.high_freq_factor
            rope["original_max_position_embeddings"] = config.rope_scaling.original_max_positions
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.mlp_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_positions,
            rms_norm_eps=config.norm_eps,
            rope_parameters=rope,
            tie_word_embeddings=config.tied,
        )
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(
                1 + 0.2 * noise if "norm" in key else noise * (1 if "embed" in key else value.shape[-1] ** -0.5)
            )
    return model


def from_torch(model: Any, config: LlamaConfig) -> Tree:
    """Returns the tree of a transformers model, written down here by hand and not by the library's converter."""
    weights = {k.removeprefix("model."): v.detach().numpy() for k, v in model.state_dict().items()}
    tree: Tree = {
        "token_embedder": {"embedding": weights["embed_tokens.weight"]},
        "final_norm": {"scale": weights["norm.weight"]},
    }
    if not config.tied:
        tree["logits_dense"] = {"kernel": weights["lm_head.weight"].T}
    for i in range(config.num_layers):
        at = f"layers.{i}"
        names = {"query": "q", "key": "k", "value": "v", "out": "o"}
        tree[f"layers_{i}"] = {
            "pre_attention_norm": {"scale": weights[f"{at}.input_layernorm.weight"]},
            "attention": {a: {"kernel": weights[f"{at}.self_attn.{b}_proj.weight"].T} for a, b in names.items()},
            "pre_mlp_norm": {"scale": weights[f"{at}.post_attention_layernorm.weight"]},
            "mlp": {a: {"kernel": weights[f"{at}.mlp.{a}_proj.weight"].T} for a in ("gate", "up", "down")},
        }
    return tree


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_transformers(name: str) -> None:
    torch = pytest.importorskip("torch")
    config = VARIANTS[name]
    model = torch_model(config, 3)
    params = jax.tree.map(jnp.asarray, from_torch(model, config))
    source, mask, prompt, targets = inputs(targets=40)  # so that slow rotary frequencies count
    theirs = []
    with torch.no_grad():
        for row, length in enumerate(LENGTHS):  # one at a time, without any padding
            parts = [torch.tensor(np.asarray(prompt)), torch.tensor(np.asarray(source[row, :length]))]
            parts.append(model.model.embed_tokens(torch.tensor(np.asarray(targets[row, :-1]))))
            logits = model(inputs_embeds=torch.cat(parts)[None]).logits.numpy()[0]
            theirs.append(logits[M + length - 1 :])
    module = config.make()
    states = support.states_of(module)(params, source, mask, prompt, targets)
    ours = module.apply({"params": params}, states, method="head")
    assert np.abs(theirs).max() > 0.3
    np.testing.assert_allclose(ours, np.stack(theirs), atol=1e-4)


@pytest.mark.parametrize("prompt", ["none", "shared", "rows"])
def test_steps_give_what_all_at_once_gives(prompt: str) -> None:
    module = CONFIG.make()
    params, args = support.random_params(module), inputs(prompt=prompt)
    np.testing.assert_allclose(
        support.stepwise(module, params, *args), support.states_of(module)(params, *args), atol=1e-5
    )


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
@pytest.mark.parametrize("prompt", ["none", "shared"])
def test_the_cache_is_carried_by_a_while_loop(prompt: str, scan: bool) -> None:
    module = dataclasses.replace(CONFIG, scan_layers=scan).make()
    params, (source, mask, vectors, _) = support.random_params(module, 2), inputs(2, prompt)
    tokens = support.greedy(module, params, source, mask, vectors, 5)
    assert len(np.unique(tokens)) > 2
    np.testing.assert_array_equal(tokens, support.greedy_again(module, params, source, mask, vectors, 5))


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
@pytest.mark.parametrize("prompt", ["none", "shared", "rows"])
def test_bfloat16_stays_bfloat16(prompt: str, scan: bool) -> None:
    module = dataclasses.replace(CONFIG, scan_layers=scan, dtype="bfloat16", rope_scaling=LLAMA3).make()
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), support.shapes(module))
    source, mask, vectors, targets = inputs(prompt=prompt)
    source, vectors = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (source, vectors))
    states = jax.eval_shape(support.states_of(module), params, source, mask, vectors, targets)
    assert states.dtype == jnp.bfloat16
    # The loop would refuse a cache whose dtype changes.
    tokens = jax.eval_shape(lambda p: support.greedy(module, p, source, mask, vectors, 3), params)
    assert (tokens.shape, tokens.dtype) == ((3, 3), jnp.int32)


def test_a_shared_prompt_is_exactly_a_copy_in_front_of_each_row() -> None:
    module = CONFIG.make()
    params, (source, mask, prompt, targets) = support.random_params(module), inputs()
    weights = jax.random.normal(jax.random.key(0), (*targets.shape, CONFIG.width))

    def shared(source: Array, prompt: Array) -> Array:
        return module.apply({"params": params}, source, mask, prompt, targets, method="target_states")

    def copied(source: Array, prompt: Array) -> Array:
        return shared(source, jnp.broadcast_to(prompt, (3, *prompt.shape)))

    def joined(source: Array, prompt: Array) -> Array:
        both = jnp.concatenate([jnp.broadcast_to(prompt, (3, *prompt.shape)), source], axis=1)
        real = jnp.concatenate([jnp.ones((3, M), bool), mask], axis=1)
        return module.apply({"params": params}, both, real, None, targets, method="target_states")

    def both(states: Any) -> Any:
        def loss(source: Array, prompt: Array) -> tuple[Array, Array]:
            result = states(source, prompt)
            return jnp.sum(result * weights) / result.size, result

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))

    (_, states), grads = both(shared)(source, prompt)
    assert min(float(jnp.abs(g).max()) for g in grads) > 1e-3
    for other in (copied, joined):
        (_, other_states), other_grads = both(other)(source, prompt)
        np.testing.assert_allclose(states, other_states, atol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, other_grads)


def test_scan_computes_what_unrolled_layers_compute() -> None:
    unrolled = CONFIG.make(support.fill())
    scanned = dataclasses.replace(CONFIG, scan_layers=True).make(support.fill())
    params, args = support.random_params(unrolled), inputs()
    stacked = support.stack_layers(params)
    assert support.flat_shapes(stacked) == support.flat_shapes(support.shapes(scanned))
    expected = support.states_of(unrolled)(params, *args)
    np.testing.assert_allclose(support.states_of(scanned)(stacked, *args), expected, atol=1e-5)
    np.testing.assert_allclose(support.stepwise(scanned, stacked, *args), expected, atol=1e-5)


@pytest.mark.parametrize("prompt", ["none", "shared"])
def test_padding_to_a_longer_bucket_changes_nothing(prompt: str) -> None:
    module = CONFIG.make()
    params, (source, mask, vectors, targets) = support.random_params(module), inputs(prompt=prompt)
    states = support.states_of(module)
    short = states(params, source, mask, vectors, targets)
    wide = jnp.pad(source, ((0, 0), (0, 9), (0, 0)), constant_values=7.0), jnp.pad(mask, ((0, 0), (0, 9)))
    longer = jnp.pad(targets, ((0, 0), (0, 5)))
    np.testing.assert_allclose(states(params, *wide, vectors, longer)[:, :6], short, atol=1e-5)
    alone = states(params, source[1:2, :4], mask[1:2, :4], vectors, targets[1:2])
    np.testing.assert_allclose(short[1:2], alone, atol=1e-5)
    steps = support.stepwise(module, params, *wide, vectors, targets)
    np.testing.assert_allclose(steps, short, atol=1e-5)


def test_one_target_needs_no_text_behind_the_source() -> None:
    module = CONFIG.make()
    params, (source, mask, prompt, targets) = support.random_params(module), inputs()
    first = support.states_of(module)(params, source, mask, prompt, targets[:, :1])
    np.testing.assert_allclose(
        first, support.states_of(module)(params, source, mask, prompt, targets)[:, :1], atol=1e-5
    )


def test_head_over_some_of_the_vocabulary() -> None:
    ids = jnp.array([5, 0, 36])
    for config in (CONFIG, VARIANTS["multi-query, tied"]):
        module = config.make()
        params = support.random_params(module)
        states = jax.random.normal(jax.random.key(0), (2, 3, config.width))
        full = module.apply({"params": params}, states, method="head")
        some = module.apply({"params": params}, states, ids, method="head")
        assert full.shape == (2, 3, 37)
        np.testing.assert_allclose(some, full[..., ids], atol=1e-6)


PLACES = {
    "linear": [f"attention/{p}" for p in ("query", "key", "value", "out")]
    + [f"mlp/{p}" for p in ("gate", "up", "down")],
    "attention": ["attention"],
    "residual": ["attention", "mlp"],
}


@pytest.mark.parametrize("kind", PLACES)
def test_filled_sites_act(kind: str) -> None:
    support.check_filled_sites_act(CONFIG, kind, PLACES[kind], inputs())


def test_filled_sites_treat_a_shared_prompt_as_a_copy_in_front_of_each_row() -> None:
    module = CONFIG.make(support.fill())
    params, (source, mask, prompt, targets) = support.random_params(module), inputs()
    states = support.states_of(module)
    rows = jnp.broadcast_to(prompt, (3, *prompt.shape))
    np.testing.assert_allclose(
        states(params, source, mask, prompt, targets), states(params, source, mask, rows, targets), atol=1e-5
    )


def test_tree_of_llama_7b() -> None:
    config = LlamaConfig(
        vocab_size=32000,
        width=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        mlp_dim=11008,
        norm_eps=1e-6,
        max_positions=2048,
    )
    expected: dict[str, tuple[int, ...]] = {
        "token_embedder/embedding": (32000, 4096),
        "final_norm/scale": (4096,),
        "logits_dense/kernel": (4096, 32000),
    }
    for at in (f"layers_{i}" for i in range(32)):
        expected |= {f"{at}/{norm}/scale": (4096,) for norm in ("pre_attention_norm", "pre_mlp_norm")}
        expected |= {f"{at}/attention/{p}/kernel": (4096, 4096) for p in ("query", "key", "value", "out")}
        expected |= {f"{at}/mlp/{p}/kernel": (4096, 11008) for p in ("gate", "up")}
        expected[f"{at}/mlp/down/kernel"] = (11008, 4096)
    ours = support.flat_shapes(support.shapes(config.make()))
    assert ours == expected
    assert sum(math.prod(shape) for shape in ours.values()) == 6_738_415_616


def test_grouped_queries_have_smaller_keys_and_a_tied_head_has_no_kernel() -> None:
    tree = support.flat_shapes(support.shapes(dataclasses.replace(CONFIG, tied=True).make()))
    assert tree["layers_1/attention/query/kernel"] == (18, 24)
    assert tree["layers_1/attention/key/kernel"] == tree["layers_0/attention/value/kernel"] == (18, 8)
    assert not any("logits_dense" in path for path in tree)
