"""Prefix tuning against numpy written from the paper, and which attention layers it takes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.methods import AttentionSite, PrefixTuning
from deptjax.methods.base import Sites
from deptjax.methods.prefix_tuning import made_prefix, prefix_states
from deptjax.models.causal import Attention, Context
from deptjax.models.layers import extra_segments
from deptjax.models.rope import rope_angles, rope_frequencies, rotate
from tests.cases import backbone_of, make_case, some_batch

B, T, P = 2, 5, 3


def softmax(x: np.ndarray) -> np.ndarray:
    """Returns the softmax over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_an_attention_layer_with_a_prefix_is_the_papers() -> None:
    """`softmax(scale q [K_P; K]^T) [V_P; V]`, the text's own part causal, its positions counted from 0."""
    backbone = backbone_of("llama")
    c = backbone.config
    random = np.random.default_rng(0)
    sites = PrefixTuning(prefix_length=P).sites()
    layer = Attention(c, sites)
    x = random.standard_normal((B, T, c.width)).astype(np.float32)
    rope = rope_angles(jnp.arange(T), rope_frequencies(c))
    hidden = np.where(np.tril(np.ones((T, T), bool)), 0.0, -np.inf)
    context = Context(rope=rope, bias=jnp.maximum(hidden, -1e9)[None, None])
    variables = layer.init(jax.random.key(0), x, None, context, None)
    keys, values = (random.standard_normal((P, c.num_kv_heads, c.head_dim)).astype(np.float32) for _ in range(2))
    variables = {"params": {**variables["params"], "site": {"keys": keys, "values": values}}}
    got = layer.apply(variables, x, None, context, None)[0]

    kernels = {name: np.float64(variables["params"][name]["kernel"]) for name in ("query", "key", "value", "out")}
    heads = {"query": c.num_heads, "key": c.num_kv_heads, "value": c.num_kv_heads}
    q, k, v = (
        np.float64(np.asarray(jnp.asarray((x @ kernels[name]).reshape(B, T, heads[name], c.head_dim))))
        for name in heads
    )
    q, k = (np.float64(rotate(jnp.asarray(a, jnp.float32), rope)) for a in (q, k))
    k, v = (np.concatenate([np.broadcast_to(p, (B, *p.shape)), a], axis=1) for p, a in ((keys, k), (values, v)))
    k, v = (np.repeat(a, c.num_heads // c.num_kv_heads, axis=2) for a in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) * c.head_dim**-0.5
    scores += np.concatenate([np.zeros((T, P)), hidden], axis=1)  # every token sees the whole prefix
    mixed = np.einsum("bnts,bsnh->btnh", softmax(scores), v).reshape(B, T, -1)
    np.testing.assert_allclose(got, mixed @ kernels["out"], rtol=0, atol=1e-5 * np.abs(mixed).max())


def test_every_layer_has_keys_and_values_of_its_own_size() -> None:
    for family in ("llama", "t5"):
        for scan in (False, True):
            case = make_case(backbone_of(family, scan), PrefixTuning(prefix_length=P))
            c = case.backbone.config
            heads = c.num_heads if family == "t5" else c.num_kv_heads
            leaves = jax.tree.leaves(case.trainable)
            assert {leaf.shape[-3:] for leaf in leaves} == {(P, heads, c.head_dim)}
            layers = 2 if family == "llama" else 2 + 2 * 3
            assert sum(leaf.size for leaf in leaves) == layers * 2 * P * heads * c.head_dim
            assert np.std(np.concatenate([np.ravel(leaf) for leaf in leaves])) == pytest.approx(0.02, rel=0.2)


def test_made_keys_and_values_are_a_tanh_between_two_layers() -> None:
    random, (heads, head_dim, hidden) = np.random.default_rng(0), (2, 3, 5)
    shapes = [(P, 7), (7, hidden), (hidden,), (hidden, 2, heads, head_dim), (2, heads, head_dim)]
    vectors, w1, b1, w2, b2 = (random.standard_normal(shape) for shape in shapes)
    flat = np.tanh(vectors @ w1 + b1) @ w2.reshape(hidden, -1) + b2.reshape(-1)
    wanted = flat.reshape(P, 2, heads, head_dim).swapaxes(0, 1)
    vectors, w1, b1, w2, b2 = (jnp.asarray(a, jnp.float32) for a in (vectors, w1, b1, w2, b2))
    got = made_prefix(prefix_states(vectors, w1, b1), w2, b2)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("scan", [False, True])
def test_one_network_makes_the_prefixes_of_all_layers(scan: bool) -> None:
    """Its first half is kept once; every part moves, at rates of its own for vectors and network."""
    method = PrefixTuning(prefix_length=P, hidden=64)
    case = make_case(backbone_of("llama", scan), method)
    c = case.backbone.config
    width = c.num_kv_heads * c.head_dim
    once, own = case.trainable["input"], case.trainable["backbone"]
    assert {name: leaf.shape for name, leaf in once.items()} == {
        "vectors": (P, c.width),
        "w1": (c.width, 64),
        "b1": (64,),
    }
    assert sum(leaf.size for leaf in jax.tree.leaves(own)) == c.num_layers * (64 * 2 * width + 2 * width)
    first = own["layers" if scan else "layers_1"]["attention"]["site"]
    for leaf, fan_in in ((once["w1"], c.width), (once["b1"], c.width), (first["w2"], 64), (first["b2"], 64)):
        assert 0.8 / np.sqrt(fan_in) < np.abs(leaf).max() <= 1 / np.sqrt(fan_in)
    state, losses = case.state(), []
    for _ in range(3):
        state, metrics = case.step(state, case.frozen, some_batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(a != b)), state.trainable, case.trainable)))
    groups = method.groups(case.trainable)
    assert set(jax.tree.leaves(groups)) == method.learning_rates(0.1).keys() == {"prompt", "low_rank"}
    assert groups["input"]["vectors"] == "prompt"


def test_what_is_common_has_the_sum_of_its_gradients() -> None:
    """As if each layer had a copy of the network, all equal."""
    case = make_case(backbone_of("llama"), PrefixTuning(prefix_length=P, hidden=7))

    def loss(once: list) -> jax.Array:
        """Of one network a layer."""
        states = [prefix_states(own["vectors"], own["w1"], own["b1"]) for own in once]
        inner = {name: made(case.moved["backbone"][name], states[i]) for i, name in enumerate(("layers_0", "layers_1"))}
        plain = make_case(case.backbone, PrefixTuning(prefix_length=P))
        logits = plain.model.target_logits({"backbone": inner}, plain.frozen, some_batch())
        return jnp.sum(jax.nn.log_softmax(logits)[..., 4])

    def made(tree: dict, states: jax.Array) -> dict:
        if "w2" not in tree:
            return {name: made(node, states) for name, node in tree.items()}
        return dict(zip(("keys", "values"), made_prefix(states, tree["w2"], tree["b2"]), strict=True))

    apart = jax.jit(jax.grad(loss))([case.moved["input"]] * 2)
    wanted = jax.tree.map(jnp.add, *apart)

    def of_one(once: dict) -> jax.Array:
        logits = case.model.target_logits({**case.moved, "input": once}, case.frozen, some_batch())
        return jnp.sum(jax.nn.log_softmax(logits)[..., 4])

    got = jax.jit(jax.grad(of_one))(case.moved["input"])
    for name, leaf in wanted.items():
        np.testing.assert_allclose(got[name], leaf, rtol=1e-5, atol=1e-5 * np.abs(leaf).max())


@pytest.mark.parametrize(
    ("targets", "taken", "left"),
    [
        ("attention$", ["attention", "encoder/attention", "decoder/encoder_decoder_attention"], []),
        ("^encoder/", ["encoder/attention"], ["decoder/self_attention", "attention"]),
        ("self_attention", ["decoder/self_attention"], ["decoder/encoder_decoder_attention"]),
    ],
)
def test_targets_choose_attention_layers(targets: str, taken: list[str], left: list[str]) -> None:
    method = PrefixTuning(prefix_length=P, targets=targets)
    assert all(method.fill(AttentionSite(path, 2, 4), "site") is not None for path in taken)
    assert all(method.fill(AttentionSite(path, 2, 4), "site") is None for path in left)


def test_an_empty_site_costs_nothing() -> None:
    assert extra_segments(Sites(), "attention", 2, 4, jnp.float32) == []


def test_mistakes() -> None:
    with pytest.raises(UserError, match="prefix_tuning: prefix_length is 0; it must be at least 1"):
        PrefixTuning(prefix_length=0)
    with pytest.raises(UserError, match="prefix_tuning: hidden is 0; it must be at least 1"):
        PrefixTuning(hidden=0)
    with pytest.raises(UserError, match=r"prefix_tuning: targets '\(x' is not a regular expression"):
        PrefixTuning(targets="(x")


@pytest.mark.parametrize("hidden", [None, 7])
def test_targets_that_name_no_attention_layer_are_told(hidden: int | None) -> None:
    """Also where a network would be left that makes nothing."""
    with pytest.raises(UserError, match="method 'prefix_tuning' fills no site of this backbone: check its targets"):
        make_case(backbone_of("llama"), PrefixTuning(prefix_length=P, targets="decoder", hidden=hidden))


def test_one_group_with_a_rate_of_its_own() -> None:
    assert PrefixTuning().groups({"backbone": {"site": {"keys": 0}}}) == {"backbone": {"site": {"keys": "prompt"}}}
    assert PrefixTuning().learning_rates(0.004) == {"prompt": 1e-2}
    assert PrefixTuning().positions_in_front() == 0
    assert PrefixTuning().source_limit() is None
