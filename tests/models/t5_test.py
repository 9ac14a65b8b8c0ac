"""T5: against torch, against formulas, in steps as at once, with every site filled, and at real sizes."""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.models import relative_positions, t5
from deptjax.models.prompted import site_leaves
from deptjax.models.t5 import T5Config
from deptjax.typing import Array, Tree
from tests.models import support

CONFIG = T5Config(
    vocab_size=37,
    width=14,
    num_encoder_layers=1,
    num_decoder_layers=2,
    num_heads=3,
    head_dim=5,
    mlp_dim=19,
    relative_buckets=8,
    relative_max_distance=20,
)
V1_1 = dataclasses.replace(CONFIG, gated=True, activation="gelu_new", tied=False)
VARIANTS = {
    "v1.0": CONFIG,
    "v1.1": V1_1,
    "gated-silu": dataclasses.replace(CONFIG, gated=True, activation="silu", tied=True),
    "gelu": dataclasses.replace(CONFIG, activation="gelu", tied=False, relative_buckets=32, relative_max_distance=128),
}
LENGTHS = (11, 4, 1)
PROJECTIONS = ("query", "key", "value", "out")


def inputs(seed: int = 1, prompt: str = "shared", targets: int = 6) -> tuple[Array, Array, Any, Array]:
    """Returns source (3, 11, D), mask, prompt of 4 and targets."""
    rng = np.random.default_rng(seed)
    rows, longest = len(LENGTHS), max(LENGTHS)
    source = rng.standard_normal((rows, longest, CONFIG.width))
    mask = np.arange(longest)[None] < np.array(LENGTHS)[:, None]
    shape = {"none": None, "shared": (4, CONFIG.width), "rows": (rows, 4, CONFIG.width)}[prompt]
    vectors = None if shape is None else jnp.asarray(rng.standard_normal(shape), jnp.float32)
    ids = rng.integers(1, CONFIG.vocab_size, (rows, targets))
    return jnp.asarray(source, jnp.float32), jnp.asarray(mask), vectors, jnp.asarray(ids, jnp.int32)


def torch_model(config: T5Config, seed: int) -> Any:
    """Returns transformers' T5 with random weights on which everything matters."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    name = {"gelu_new": "gelu"}.get(config.activation, config.activation) if config.gated else config.activation
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=config.vocab_size,
            d_model=config.width,
            d_kv=config.head_dim,
            d_ff=config.mlp_dim,
            num_layers=config.num_encoder_layers,
            num_decoder_layers=config.num_decoder_layers,
            num_heads=config.num_heads,
            relative_attention_num_buckets=config.relative_buckets,
            relative_attention_max_distance=config.relative_max_distance,
            feed_forward_proj=f"gated-{name}" if config.gated else name,
            tie_word_embeddings=config.tied,
            decoder_start_token_id=config.decoder_start_token,
        )
    ).eval()
    if not config.tied:  # transformers ties what no checkpoint unties
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            plain = key == "shared.weight" or "relative_attention_bias" in key
            value.copy_(1 + 0.2 * noise if "layer_norm" in key else noise * (1 if plain else value.shape[-1] ** -0.5))
    return model


def from_torch(model: Any, config: T5Config) -> Tree:
    """Returns the tree of a transformers model, written down here by hand and not by the library's converter."""
    weights = {k: v.detach().numpy() for k, v in model.state_dict().items()}

    def attention(prefix: str) -> Tree:
        names = {"query": "q", "key": "k", "value": "v", "out": "o"}
        return {ours: {"kernel": weights[f"{prefix}.{theirs}.weight"].T} for ours, theirs in names.items()}

    def mlp(prefix: str) -> Tree:
        names = ("wi_0", "wi_1", "wo") if config.gated else ("wi", "wo")
        return {name: {"kernel": weights[f"{prefix}.DenseReluDense.{name}.weight"].T} for name in names}

    def norm(name: str) -> Tree:
        return {"scale": weights[f"{name}.weight"]}

    def bias(stack: str) -> Tree:
        table = weights[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        return {"rel_embedding": table.T}

    encoder = {"relpos_bias": bias("encoder"), "encoder_norm": norm("encoder.final_layer_norm")}
    for i in range(config.num_encoder_layers):
        at = f"encoder.block.{i}.layer"
        encoder[f"layers_{i}"] = {
            "pre_attention_layer_norm": norm(f"{at}.0.layer_norm"),
            "attention": attention(f"{at}.0.SelfAttention"),
            "pre_mlp_layer_norm": norm(f"{at}.1.layer_norm"),
            "mlp": mlp(f"{at}.1"),
        }
    decoder = {"relpos_bias": bias("decoder"), "decoder_norm": norm("decoder.final_layer_norm")}
    for i in range(config.num_decoder_layers):
        at = f"decoder.block.{i}.layer"
        decoder[f"layers_{i}"] = {
            "pre_self_attention_layer_norm": norm(f"{at}.0.layer_norm"),
            "self_attention": attention(f"{at}.0.SelfAttention"),
            "pre_cross_attention_layer_norm": norm(f"{at}.1.layer_norm"),
            "encoder_decoder_attention": attention(f"{at}.1.EncDecAttention"),
            "pre_mlp_layer_norm": norm(f"{at}.2.layer_norm"),
            "mlp": mlp(f"{at}.2"),
        }
    if not config.tied:
        decoder["logits_dense"] = {"kernel": weights["lm_head.weight"].T}
    return {"token_embedder": {"embedding": weights["shared.weight"]}, "encoder": encoder, "decoder": decoder}


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_transformers(name: str, scan: bool) -> None:
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(VARIANTS[name], num_encoder_layers=3)
    model = torch_model(config, 3)
    params = jax.tree.map(jnp.asarray, from_torch(model, config))
    rng = np.random.default_rng(4)
    length = 50  # so that far buckets are used
    tokens, targets = rng.integers(2, 37, (3, length)), rng.integers(2, 37, (3, 7))
    mask = np.arange(length)[None] < np.array([[length], [23], [1]])
    prompt = rng.standard_normal((4, config.width)).astype(np.float32)
    with torch.no_grad():
        embeds = model.shared(torch.tensor(tokens))
        front = torch.tensor(prompt)[None].expand(3, -1, -1)
        theirs = model(
            inputs_embeds=torch.cat([front, embeds], dim=1),
            attention_mask=torch.cat([torch.ones(3, 4), torch.tensor(mask)], dim=1),
            labels=torch.tensor(targets),
        ).logits.numpy()

    def logits(module: Any) -> Array:
        states = module.target_states(module.embed(jnp.asarray(tokens)), jnp.asarray(mask), prompt, targets)
        return module.head(states)

    module = dataclasses.replace(config, scan_layers=scan).make()
    params = support.stack_layers(params) if scan else params
    ours = jax.jit(lambda p: module.apply({"params": p}, method=logits))(params)
    assert np.abs(theirs).max() > 0.3
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_head_over_some_of_the_vocabulary() -> None:
    ids = jnp.array([5, 0, 36])
    for config in (CONFIG, V1_1):
        module = config.make()
        params = support.random_params(module)
        states = jax.random.normal(jax.random.key(0), (2, 3, config.width))
        full = module.apply({"params": params}, states, method="head")
        some = module.apply({"params": params}, states, ids, method="head")
        assert full.shape == (2, 3, 37)
        np.testing.assert_allclose(some, full[..., ids], atol=1e-6)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (8, 20), (12, 50), (64, 128), (32, 256)])
def test_buckets_are_those_of_t5x(buckets: int, far: int, bidirectional: bool) -> None:
    offsets = np.arange(-400, 401)
    count, base, distance = buckets, np.zeros_like(offsets), -offsets
    if bidirectional:
        count //= 2
        base = (distance < 0) * count
        distance = np.abs(distance)
    else:
        distance = np.maximum(distance, 0)
    exact = count // 2
    ratio = np.maximum(distance, 1).astype(np.float32) / exact + np.finfo(np.float32).eps
    large = exact + (np.log(ratio) / math.log(far / exact) * (count - exact)).astype(np.int32)
    expected = base + np.where(distance < exact, distance, np.minimum(large, count - 1))
    ours = relative_positions.relative_position_bucket(jnp.asarray(offsets), bidirectional, buckets, far)
    np.testing.assert_array_equal(ours, expected)
    if not bidirectional:
        assert set(np.asarray(ours)) == set(range(buckets))  # every bucket is in use


@pytest.mark.parametrize("prompt", ["none", "shared", "rows"])
def test_steps_give_what_all_at_once_gives(prompt: str) -> None:
    module = V1_1.make()
    params, args = support.random_params(module), inputs(prompt=prompt)
    np.testing.assert_allclose(
        support.stepwise(module, params, *args), support.states_of(module)(params, *args), atol=1e-5
    )


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_the_cache_is_carried_by_a_while_loop(scan: bool) -> None:
    module = dataclasses.replace(V1_1, scan_layers=scan).make()
    params, (source, mask, prompt, _) = support.random_params(module, 2), inputs(2)
    tokens = support.greedy(module, params, source, mask, prompt, 5)
    assert len(np.unique(tokens)) > 2
    np.testing.assert_array_equal(tokens, support.greedy_again(module, params, source, mask, prompt, 5))


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_bfloat16_stays_bfloat16(scan: bool) -> None:
    module = dataclasses.replace(CONFIG, scan_layers=scan, dtype="bfloat16").make()
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), support.shapes(module))
    source, mask, prompt, targets = inputs()
    source, prompt = source.astype(jnp.bfloat16), prompt.astype(jnp.bfloat16)
    states = jax.eval_shape(support.states_of(module), params, source, mask, prompt, targets)
    assert states.dtype == jnp.bfloat16
    # The loop would refuse a cache whose dtype changes.
    tokens = jax.eval_shape(lambda p: support.greedy(module, p, source, mask, prompt, 3), params)
    assert (tokens.shape, tokens.dtype) == ((3, 3), jnp.int32)


def test_a_shared_prompt_is_a_copy_in_front_of_each_row() -> None:
    module = CONFIG.make()
    params, (source, mask, prompt, targets) = support.random_params(module), inputs()
    states = support.states_of(module)
    rows = jnp.broadcast_to(prompt, (3, *prompt.shape))
    joined = jnp.concatenate([rows, source], axis=1), jnp.concatenate([jnp.ones((3, 4), bool), mask], axis=1)
    shared = states(params, source, mask, prompt, targets)
    np.testing.assert_array_equal(shared, states(params, source, mask, rows, targets))
    np.testing.assert_array_equal(shared, states(params, *joined, None, targets))
    assert np.abs(np.asarray(shared - states(params, source, mask, None, targets))).max() > 0.1


def test_scan_computes_what_unrolled_layers_compute() -> None:
    unrolled = V1_1.make(support.fill())
    scanned = dataclasses.replace(V1_1, scan_layers=True).make(support.fill())
    params, args = support.random_params(unrolled), inputs()
    stacked = support.stack_layers(params)
    assert support.flat_shapes(stacked) == support.flat_shapes(support.shapes(scanned))
    expected = support.states_of(unrolled)(params, *args)
    np.testing.assert_allclose(support.states_of(scanned)(stacked, *args), expected, atol=1e-5)
    np.testing.assert_allclose(support.stepwise(scanned, stacked, *args), expected, atol=1e-5)


def test_padding_to_a_longer_bucket_changes_nothing() -> None:
    module = CONFIG.make()
    params, (source, mask, prompt, targets) = support.random_params(module), inputs()
    states = support.states_of(module)
    short = states(params, source, mask, prompt, targets)
    wide = jnp.pad(source, ((0, 0), (0, 9), (0, 0)), constant_values=7.0), jnp.pad(mask, ((0, 0), (0, 9)))
    longer = jnp.pad(targets, ((0, 0), (0, 5)))
    np.testing.assert_allclose(states(params, *wide, prompt, longer)[:, :6], short, atol=1e-5)
    alone = states(params, source[1:2, :4], mask[1:2, :4], prompt, targets[1:2])
    np.testing.assert_allclose(short[1:2], alone, atol=1e-5)


def test_a_target_is_predicted_from_those_before_it_alone() -> None:
    module = CONFIG.make()
    params, (source, mask, prompt, targets) = support.random_params(module), inputs()
    states = support.states_of(module)
    before = states(params, source, mask, prompt, targets)
    after = states(params, source, mask, prompt, targets.at[:, 3].set((targets[:, 3] + 1) % 37))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.abs(np.asarray(before - after))[:, 4:].max(axis=(1, 2)).min() > 1e-3


def _random_shapes(jaxpr: Any) -> list[tuple[int, ...]]:
    """Returns the shapes of all random draws of a program, those of inner programs included."""
    found: list[tuple[int, ...]] = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "random_bits":
            found.append(eqn.outvars[0].aval.shape)
        for value in eqn.params.values():
            if hasattr(value, "jaxpr"):
                found += _random_shapes(value.jaxpr)
    return found


def test_dropout_is_where_t5_has_it() -> None:
    module = CONFIG.make()
    params, (source, mask, prompt, targets) = support.random_params(module), inputs()

    def run(deterministic: bool) -> Any:
        def states(key: Array) -> Array:
            args = (source, mask, prompt, targets, deterministic)
            return module.apply({"params": params}, *args, method="target_states", rngs={"dropout": key})

        return jax.make_jaxpr(states)(jax.random.key(0)).jaxpr

    assert not _random_shapes(run(True))
    read, write, heads = 15, 6, CONFIG.num_heads
    expected = collections.Counter(
        {
            (3, read, 14): 2 + 2,  # input and output of the encoder, the two sub-layers of its layer
            (3, heads, read, read): 1,
            (3, read, 19): 1,
            (3, write, 14): 2 + 2 * 3,  # of the decoder, and three sub-layers in each of its two layers
            (3, heads, write, write): 2,
            (3, heads, write, read): 2,
            (3, write, 19): 2,
        }
    )
    assert collections.Counter(_random_shapes(run(False))) == expected


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_dropout_is_decided_by_its_key(scan: bool) -> None:
    config = dataclasses.replace(CONFIG, scan_layers=scan)
    params, args = support.random_params(config.make()), inputs()

    def train(config: T5Config) -> Any:
        """Returns the compiled states with dropout on, given the rngs."""
        module = config.make()
        return jax.jit(
            lambda params, rngs: module.apply({"params": params}, *args, False, method="target_states", rngs=rngs)
        )

    dropped, plain = train(config), support.states_of(config.make())(params, *args)
    first = dropped(params, {"dropout": jax.random.key(1)})
    np.testing.assert_array_equal(first, dropped(params, {"dropout": jax.random.key(1)}))
    assert not np.allclose(first, dropped(params, {"dropout": jax.random.key(2)}), atol=1e-2)
    assert not np.allclose(first, plain, atol=1e-2)
    undropped = train(dataclasses.replace(config, dropout_rate=0.0))(params, {})
    np.testing.assert_allclose(undropped, plain, atol=1e-5)


def test_gradients_of_the_bias_tables_and_of_the_prompt_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch")
    config = VARIANTS["v1.1"]
    model = torch_model(config, 5)
    params = jax.tree.map(jnp.asarray, from_torch(model, config))
    rng = np.random.default_rng(6)
    tokens, targets = rng.integers(2, 37, (3, 11)), rng.integers(2, 37, (3, 5))
    mask = np.arange(11)[None] < np.array([[11], [6], [2]])
    prompt = rng.standard_normal((4, config.width)).astype(np.float32)
    toward = rng.standard_normal((3, 5, 37)).astype(np.float32)
    front = torch.tensor(prompt, requires_grad=True)
    logits = model(
        inputs_embeds=torch.cat([front[None].expand(3, -1, -1), model.shared(torch.tensor(tokens))], dim=1),
        attention_mask=torch.cat([torch.ones(3, 4), torch.tensor(mask)], dim=1),
        labels=torch.tensor(targets),
    ).logits
    (logits * torch.tensor(toward)).sum().backward()

    def loss(params: Tree, prompt: Array) -> Array:
        def logits(module: Any) -> Array:
            source = module.embed(jnp.asarray(tokens))
            return module.head(module.target_states(source, jnp.asarray(mask), prompt, jnp.asarray(targets)))

        return jnp.vdot(config.make().apply({"params": params}, method=logits), toward)

    ours, ours_prompt = jax.jit(jax.grad(loss, (0, 1)))(params, jnp.asarray(prompt))
    for stack in ("encoder", "decoder"):
        table = getattr(model, stack).block[0].layer[0].SelfAttention.relative_attention_bias.weight.grad.numpy().T
        scale = np.abs(table).max()
        assert scale > 1e-2
        np.testing.assert_allclose(ours[stack]["relpos_bias"]["rel_embedding"] / scale, table / scale, atol=1e-4)
    scale = np.abs(front.grad.numpy()).max()
    np.testing.assert_allclose(ours_prompt / scale, front.grad.numpy() / scale, atol=1e-4)


LINEAR = [f"encoder/attention/{p}" for p in PROJECTIONS]
LINEAR += [f"decoder/{a}/{p}" for a in ("self_attention", "encoder_decoder_attention") for p in PROJECTIONS]
LINEAR += [f"{stack}/mlp/{p}" for stack in ("encoder", "decoder") for p in ("wi_0", "wi_1", "wo")]
ATTENTION = ["encoder/attention", "decoder/self_attention", "decoder/encoder_decoder_attention"]
PLACES = {"linear": LINEAR, "attention": ATTENTION, "residual": [*ATTENTION, "encoder/mlp", "decoder/mlp"]}


def in_layer(place: str, i: int, kind: str) -> str:
    """Returns the path in the tree of what fills a place in layer i."""
    stack, rest = place.split("/", 1)
    return f"{stack}/layers_{i}/{rest}_site/" if kind == "residual" else f"{stack}/layers_{i}/{rest}/site/"


@pytest.mark.parametrize("kind", PLACES)
def test_filled_sites_act(kind: str) -> None:
    seen: list[Any] = []
    filled = V1_1.make(support.fill(kind, seen=seen))
    tree = support.shapes(filled)
    assert {site.path for site in seen} == set(PLACES[kind])
    assert support.without_sites(tree) == support.shapes(V1_1.make())
    depth = {"encoder": V1_1.num_encoder_layers, "decoder": V1_1.num_decoder_layers}
    expected = [in_layer(place, i, kind) for place in PLACES[kind] for i in range(depth[place.split("/")[0]])]
    assert {path.rsplit("/", 1)[0] + "/" for path in support.flat_shapes(site_leaves(tree))} == set(expected)
    support.check_site_acts(V1_1.make(), filled, kind, expected, inputs())


def test_extra_keys_have_no_position_bias() -> None:
    rng = np.random.default_rng(0)
    module = t5.Attention(CONFIG, "encoder/attention", support.fill("attention"))
    x, bias = rng.standard_normal((2, 7, 14)), rng.standard_normal((1, 3, 7, 7))
    shape = {"query": (14, 15), "key": (14, 15), "value": (14, 15), "out": (15, 14)}
    w = {name: rng.standard_normal(s) * 0.3 for name, s in shape.items()}
    extra = {name: rng.standard_normal((3, 3, 5)) for name in ("keys", "values")}
    params = {**{name: {"kernel": value} for name, value in w.items()}, "site": extra}
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    x32, bias32 = jnp.asarray(x, jnp.float32), jnp.asarray(bias, jnp.float32)
    ours, _ = module.apply({"params": params}, x32, x32, bias32, True)

    q, k, v = ((x @ w[name]).reshape(2, 7, 3, 5) for name in ("query", "key", "value"))
    scores = np.concatenate(
        [np.einsum("btnh,snh->bnts", q, extra["keys"]), np.einsum("btnh,bsnh->bnts", q, k) + bias], axis=-1
    )
    weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    mixed = np.einsum("bnts,snh->btnh", weights[..., :3], extra["values"])
    mixed += np.einsum("bnts,bsnh->btnh", weights[..., 3:], v)
    np.testing.assert_allclose(ours, mixed.reshape(2, 7, 15) @ w["out"], atol=1e-5)


def test_tree_of_t5_3b() -> None:
    config = T5Config(
        vocab_size=32128,
        width=1024,
        num_encoder_layers=24,
        num_decoder_layers=24,
        num_heads=32,
        head_dim=128,
        mlp_dim=16384,
    )
    expected: dict[str, tuple[int, ...]] = {"token_embedder/embedding": (32128, 1024)}
    for stack, attentions in (("encoder", ["attention"]), ("decoder", ["self_attention", "encoder_decoder_attention"])):
        expected[f"{stack}/relpos_bias/rel_embedding"] = (32, 32)
        expected[f"{stack}/{stack}_norm/scale"] = (1024,)
        for at in (f"{stack}/layers_{i}" for i in range(24)):
            for attention in attentions:
                norm = attention.replace("encoder_decoder", "cross")
                expected[f"{at}/pre_{norm}_layer_norm/scale"] = (1024,)
                expected |= {f"{at}/{attention}/{p}/kernel": (1024, 4096) for p in ("query", "key", "value")}
                expected[f"{at}/{attention}/out/kernel"] = (4096, 1024)
            expected[f"{at}/pre_mlp_layer_norm/scale"] = (1024,)
            expected |= {f"{at}/mlp/wi/kernel": (1024, 16384), f"{at}/mlp/wo/kernel": (16384, 1024)}
    ours = support.flat_shapes(support.shapes(config.make()))
    assert ours == expected
    assert sum(math.prod(shape) for shape in ours.values()) == 2_851_598_336


def test_gated_tree_has_two_input_kernels_and_a_head() -> None:
    tree = support.flat_shapes(support.shapes(V1_1.make()))
    assert tree["decoder/logits_dense/kernel"] == (14, 37)
    assert tree["encoder/layers_0/mlp/wi_0/kernel"] == tree["decoder/layers_1/mlp/wi_1/kernel"] == (14, 19)
    assert not any("/wi/" in path for path in tree)


def test_config_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"activation 'gelu_nwe' is not known.*Did you mean 'gelu_new'"):
        dataclasses.replace(CONFIG, activation="gelu_nwe")
    with pytest.raises(UserError, match="relative_max_distance 16"):
        dataclasses.replace(CONFIG, relative_buckets=32, relative_max_distance=16)
