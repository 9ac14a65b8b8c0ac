"""BERT and RoBERTa against torch's goldens; prompts, pooling, sites and the masked head."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from deptjax.errors import UserError
from deptjax.interop.convert import fill_tree
from deptjax.interop.huggingface import read_config
from deptjax.interop.names import with_parts
from deptjax.interop.safetensors import SafetensorsFolder
from deptjax.models.bert import BertConfig
from deptjax.models.pooling import l2_normalized, pool
from deptjax.models.prompted import site_leaves
from deptjax.typing import Array
from tests.goldens.make_bert_goldens import FOLDER, VARIANTS, make, make_model, run, scalar_weights
from tests.models import support
from tests.models.parity_test import assert_close

CONFIG = BertConfig(
    vocab_size=37, width=18, num_layers=2, num_heads=3, mlp_dim=19, max_positions=16, position_offset=2, mask_token=36
)
LENGTHS, M = (11, 4, 7), 5


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
    """Returns the stored arrays of a variant."""
    with np.load(FOLDER / f"{name}.npz") as stored:
        return dict(stored)


def write_folder(name: str, folder: Path, renamed: Any = lambda name: name) -> Path:
    """Writes a golden's model as its publishers would, and returns the folder."""
    stored = golden(name)
    weights = {k.removeprefix("weight:"): value for k, value in stored.items() if k.startswith("weight:")}
    save_file({renamed(k): value for k, value in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(str(stored["config"]))
    return folder


def ours(folder: Path, scan_layers: bool, data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns what the goldens have, computed here for the model in a folder."""
    source = SafetensorsFolder(folder)
    config = dataclasses.replace(with_parts(read_config(folder), source.names()), scan_layers=scan_layers)
    params = fill_tree(config, source, scan_layers=scan_layers, dtype="float32")
    mask = jnp.asarray(data["source_mask"])

    def results(module: Any, embeds: Array) -> dict[str, Array]:
        states = module.encode(embeds, mask)
        found = {"states": states}
        if config.has_pooler:
            found["pooled"] = module.pool(states, mask, "pooled")
        if config.has_masked_head:
            found["logits"] = module.head(module.masked_head(states))
        return found

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def scalar(embeds: Array) -> Any:
        found = config.make().apply({"params": params}, embeds, method=results)
        last = found.get("logits", found["states"])
        return jnp.sum(last * scalar_weights(last.shape) * mask[..., None]), found

    embeds = config.make().apply({"params": params}, jnp.asarray(data["source"]), method="embed")
    (_, found), gradient = scalar(embeds)
    return {**found, "gradient": gradient}


def check(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float = 1e-4) -> None:
    """Asserts that both have the same arrays, equal where the text is."""
    kinds = {"states", "pooled", "logits", "gradient"}
    assert kinds & got.keys() == kinds & wanted.keys()
    mask = golden("bert_roberta")["source_mask"]
    for name in kinds & got.keys():
        each = (slice(None) if name == "pooled" else mask,)
        assert_close(np.asarray(got[name])[each], wanted[name][each], tolerance)


# Both heads behind scanned layers; what differs between the variants is outside of their layers.
LAYOUTS = [*((name, False) for name in VARIANTS), ("bert_pretraining", True), ("bert_codebert", True)]


@pytest.mark.parametrize(
    ("name", "scan_layers"), LAYOUTS, ids=lambda value: {True: "scanned", False: "loop"}.get(value, value)
)
def test_states_logits_and_gradients_are_those_of_torch(name: str, scan_layers: bool, tmp_path: Path) -> None:
    stored = golden(name)
    got = ours(write_folder(name, tmp_path), scan_layers, stored)
    check(got, stored)
    assert not np.asarray(got["gradient"])[~stored["source_mask"]].any()
    assert ("logits" in got, "pooled" in got) == {
        "bert_pretraining": (True, True),
        "bert_minilm": (False, True),
        "bert_roberta": (True, False),
        "bert_codebert": (False, True),
    }[name]


def test_the_first_names_of_the_norms_are_read(tmp_path: Path) -> None:
    def old(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    stored = golden("bert_pretraining")
    check(ours(write_folder("bert_pretraining", tmp_path, old), False, stored), stored)


@pytest.mark.parametrize("name", VARIANTS)
def test_torch_still_gives_the_goldens(name: str) -> None:
    pytest.importorskip("torch")
    stored, made = golden(name), make(name)
    assert stored.keys() == made.keys()
    check(made, stored, 1e-5)
    for key in stored.keys() - {"states", "pooled", "logits", "gradient"}:
        np.testing.assert_array_equal(made[key], stored[key])


@pytest.mark.parametrize("name", ["bert_pretraining", "bert_roberta"])
def test_a_folder_that_transformers_saved_gives_the_same(name: str, tmp_path: Path) -> None:
    """The config as transformers 5 writes it, against the live model with other weights."""
    pytest.importorskip("torch")
    model = make_model(VARIANTS[name], seed=71)
    model.save_pretrained(tmp_path)
    check(ours(tmp_path, False, golden(name)), run(model, golden(name)))


def inputs(prompt: str = "shared", seed: int = 3) -> tuple[Array, Array, Array | None, Array]:
    """Returns source (3, 11, D), its mask, a prompt of 5 and token ids (3, 11) with a mask token in each row."""
    rng = np.random.default_rng(seed)
    rows, longest = len(LENGTHS), max(LENGTHS)
    mask = np.arange(longest)[None] < np.array(LENGTHS)[:, None]
    tokens = np.where(mask, rng.integers(1, 36, mask.shape), 0)
    tokens[np.arange(rows), np.array(LENGTHS) - 3] = CONFIG.mask_token
    shape = {"none": None, "shared": (M, CONFIG.width), "rows": (rows, M, CONFIG.width)}[prompt]
    vectors = None if shape is None else jnp.asarray(rng.standard_normal(shape), jnp.float32)
    source = jnp.asarray(rng.standard_normal((*mask.shape, CONFIG.width)), jnp.float32)
    return source, jnp.asarray(mask), vectors, jnp.asarray(tokens, jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def states_of(module: Any, params: Any, source: Array, mask: Array, prompt: Any, tokens: Array) -> Array:
    """Returns `target_states`."""
    variables = {"params": params}
    return module.apply(variables, source, mask, prompt, tokens[:, :1], tokens=tokens, method="target_states")


@functools.partial(jax.jit, static_argnums=0)
def start_of(module: Any, params: Any, source: Array, mask: Array, prompt: Any, tokens: Array, length: Any) -> Any:
    """Returns what `start` does behind the last `length` vectors of a prompt."""
    variables = {"params": params}
    front = module.apply(variables, prompt, length, method="front")
    return module.apply(variables, source, mask, front, 4, tokens=tokens, method="start")


@pytest.mark.parametrize(("kind", "scan"), [("shared", False), ("rows", True)])
def test_a_prompt_takes_the_first_positions_and_the_text_the_next(kind: str, scan: bool) -> None:
    module = dataclasses.replace(CONFIG, scan_layers=scan).make()
    params, (source, mask, prompt, _) = support.random_params(module), inputs(kind)
    encode = jax.jit(lambda *args: module.apply({"params": params}, *args, method="encode"))
    got = encode(source, mask, prompt)
    assert got.shape == source.shape
    own, length = prompt if kind == "shared" else prompt[1], LENGTHS[1]
    whole = jnp.concatenate([own, source[1, :length]])[None]
    alone = encode(whole, jnp.ones(whole.shape[:2], bool), None)
    np.testing.assert_allclose(got[1, :length], alone[0, M:], atol=1e-5)


def test_what_is_read_is_the_state_at_the_mask() -> None:
    module = CONFIG.make()
    params, (source, mask, prompt, tokens) = support.random_params(module), inputs()
    states = states_of(module, params, source, mask, prompt, tokens)
    assert states.shape == (3, 1, CONFIG.width)

    def by_hand(module: Any) -> Array:
        every = module.masked_head(module.encode(source, mask, prompt))
        return every[jnp.arange(3), jnp.array(LENGTHS) - 3]

    wanted = jax.jit(lambda: module.apply({"params": params}, method=by_hand))()
    np.testing.assert_allclose(states[:, 0], wanted, atol=1e-5)
    state, cache = start_of(module, params, source, mask, prompt, tokens, None)
    np.testing.assert_allclose(state, wanted, atol=1e-5)
    assert not jax.tree.leaves(cache)


def test_of_a_padded_prompt_the_real_vectors_take_the_first_positions() -> None:
    module = CONFIG.make()
    params, (source, mask, prompt, tokens) = support.random_params(module), inputs()
    padded = jnp.concatenate([jnp.full((3, CONFIG.width), 7.0), prompt])
    state, _ = start_of(module, params, source, mask, padded, tokens, jnp.int32(M))
    np.testing.assert_allclose(state, states_of(module, params, source, mask, prompt, tokens)[:, 0], atol=1e-5)


def test_padding_beyond_the_last_position_changes_nothing() -> None:
    module = CONFIG.make()
    params, (source, mask, prompt, tokens) = support.random_params(module), inputs()
    assert max(LENGTHS) + M == CONFIG.max_positions
    wide = jnp.pad(source, ((0, 0), (0, 9), (0, 0))), jnp.pad(mask, ((0, 0), (0, 9)))
    long = states_of(module, params, *wide, prompt, jnp.pad(tokens, ((0, 0), (0, 9))))
    np.testing.assert_allclose(long, states_of(module, params, source, mask, prompt, tokens), atol=1e-5)


def test_logits_over_some_tokens_are_those_of_all() -> None:
    for tied in (True, False):
        module = dataclasses.replace(CONFIG, tied=tied).make()
        params, ids = support.random_params(module), jnp.array([5, 0, 36])
        states = states_of(module, params, *inputs())
        every, some = (module.apply({"params": params}, states, *v, method="head") for v in ((), (ids,)))
        assert (every.shape, every.dtype) == ((3, 1, 37), jnp.float32)
        np.testing.assert_allclose(some, every[..., ids], atol=1e-6)


def test_poolings() -> None:
    module = CONFIG.make()
    params, (states, mask, _, _) = support.random_params(module), inputs()
    mean = np.stack([np.mean(states[i, :n], axis=0) for i, n in enumerate(LENGTHS)])
    np.testing.assert_allclose(pool(states, mask, "mean"), mean, atol=1e-6)
    np.testing.assert_array_equal(pool(states, mask, "first"), states[:, 0])
    last = np.stack([states[i, n - 1] for i, n in enumerate(LENGTHS)])
    np.testing.assert_array_equal(pool(states, mask, "last"), last)
    dense = jax.tree.map(np.asarray, params["pooler"])
    pooled = module.apply({"params": params}, states, mask, "pooled", method="pool")
    wanted = np.tanh(np.asarray(states[:, 0]) @ dense["kernel"] + dense["bias"])
    np.testing.assert_allclose(pooled, wanted, atol=1e-6)
    for pooling in ("first", "mean", "last"):  # padded on the left, the same
        left = pool(states[:, ::-1], mask[:, ::-1], {"first": "last", "last": "first"}.get(pooling, pooling))
        np.testing.assert_allclose(left, pool(states, mask, pooling), atol=1e-6)
    unit = l2_normalized(jnp.asarray(mean))
    np.testing.assert_allclose(unit, mean / np.linalg.norm(mean, axis=-1, keepdims=True), atol=1e-6)
    assert not np.any(l2_normalized(jnp.zeros((1, 3))))


PLACES = {
    "linear": [f"attention/{p}" for p in ("query", "key", "value", "out")] + ["mlp/up", "mlp/down"],
    "attention": ["attention"],
    "residual": ["attention", "mlp"],
}


@pytest.mark.parametrize("kind", PLACES)
def test_filled_sites_act(kind: str) -> None:
    seen: list[Any] = []
    filled, args = CONFIG.make(support.fill(kind, seen=seen)), inputs()
    params = support.random_params(filled, 5)
    assert {site.path for site in seen} == set(PLACES[kind])
    assert support.without_sites(support.shapes(filled)) == support.shapes(CONFIG.make())
    end = "_site/" if kind == "residual" else "/site/"
    places = [f"layers_{i}/{place}{end}" for place in PLACES[kind] for i in range(CONFIG.num_layers)]
    assert {path.rsplit("/", 1)[0] + "/" for path in support.flat_shapes(site_leaves(params))} == set(places)
    base = states_of(filled, support.sites_scaled(params, lambda _: 0.0), *args)
    plain = states_of(CONFIG.make(), support.without_sites(params), *args)
    # A key of zeros still takes its share of the weights.
    assert np.allclose(base, plain, atol=1e-5) == (kind != "attention")
    for place in places:
        one = states_of(filled, support.sites_scaled(params, lambda path, place=place: float(place in path)), *args)
        assert np.abs(np.asarray(one - base)).max() > 1e-2, place


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_dropout_acts_in_training_alone_and_follows_its_key(scan: bool) -> None:
    source, mask, prompt, tokens = inputs()
    module = dataclasses.replace(CONFIG, scan_layers=scan, dropout_rate=0.3).make()
    params = support.random_params(module)

    @jax.jit
    def dropped(key: Array) -> Array:
        return module.apply({"params": params}, source, mask, prompt, False, method="encode", rngs={"dropout": key})

    one, again, other = (dropped(jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-2
    plain = dataclasses.replace(CONFIG, scan_layers=scan, dropout_rate=0.0).make()
    np.testing.assert_array_equal(*(states_of(m, params, source, mask, prompt, tokens) for m in (module, plain)))


def test_attention_may_drop_at_a_rate_of_its_own() -> None:
    """Alone, it changes what the text is; at 0 it draws nothing, whatever the others do."""
    source, mask, prompt, _ = inputs()
    params, rates = support.random_params(CONFIG.make()), {"dropout_rate": 0.0, "attention_dropout_rate": 0.3}

    def dropped(rates: dict[str, float], key: int = 1) -> Array:
        module, rngs = dataclasses.replace(CONFIG, **rates).make(), {"dropout": jax.random.key(key)}
        return module.apply({"params": params}, source, mask, prompt, False, method="encode", rngs=rngs)

    plain = dropped({"dropout_rate": 0.0})
    bare = CONFIG.make().apply({"params": params}, source, mask, prompt, method="encode")
    np.testing.assert_allclose(bare, plain, rtol=1e-5, atol=1e-5)
    assert np.abs(dropped(rates) - plain).max() > 1e-2
    assert np.abs(dropped(rates, key=2) - dropped(rates)).max() > 1e-2
    both, other = {"dropout_rate": 0.3}, {"dropout_rate": 0.3, "attention_dropout_rate": 0.0}
    assert np.abs(dropped(both) - dropped(other)).max() > 1e-2
    np.testing.assert_array_equal(dropped({**both, "attention_dropout_rate": 0.3}), dropped(both))


def test_bfloat16_stays_bfloat16() -> None:
    module = dataclasses.replace(CONFIG, dtype="bfloat16").make()
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), support.shapes(module))
    source, mask, prompt, _ = inputs()
    source, prompt = source.astype(jnp.bfloat16), prompt.astype(jnp.bfloat16)

    def pooled(params: Any) -> Array:
        states = module.apply({"params": params}, source, mask, prompt, method="encode")
        return module.apply({"params": params}, states, mask, "pooled", method="pool")

    assert jax.eval_shape(pooled, params).dtype == jnp.bfloat16


def test_tree() -> None:
    config = dataclasses.replace(CONFIG, num_layers=1)
    expected: dict[str, tuple[int, ...]] = {
        "token_embedder/embedding": (37, 18),
        "position_embedder/embedding": (18, 18),
        "type_embedder/embedding": (2, 18),
        "layers_0/mlp/up/kernel": (18, 19),
        "layers_0/mlp/up/bias": (19,),
        "layers_0/mlp/down/kernel": (19, 18),
        "layers_0/mlp/down/bias": (18,),
    }
    for at in ("embedding_norm", "layers_0/post_attention_norm", "layers_0/post_mlp_norm"):
        expected |= {f"{at}/scale": (18,), f"{at}/bias": (18,)}
    for name in ("query", "key", "value", "out"):
        expected |= {f"layers_0/attention/{name}/kernel": (18, 18), f"layers_0/attention/{name}/bias": (18,)}
    pooler = {"pooler/kernel": (18, 18), "pooler/bias": (18,)}
    head = {f"masked_head/{name}": (18,) for name in ("dense/bias", "norm/scale", "norm/bias")}
    head |= {"masked_head/dense/kernel": (18, 18), "masked_head/bias": (37,)}
    assert support.flat_shapes(support.shapes(config.make())) == {**expected, **pooler, **head}
    bare = dataclasses.replace(config, has_pooler=False, has_masked_head=False)
    assert support.flat_shapes(support.shapes(bare.make())) == expected
    untied = support.flat_shapes(support.shapes(dataclasses.replace(config, tied=False).make()))
    assert untied == {**expected, **pooler, **head, "logits_dense/kernel": (18, 37)}


def test_what_a_checkpoint_lacks_is_told() -> None:
    source, mask, prompt, tokens = inputs()
    bare = dataclasses.replace(CONFIG, has_pooler=False, has_masked_head=False).make()
    params = support.random_params(bare)
    with pytest.raises(UserError, match="no masked-language-modelling head and is an encoder alone"):
        states_of(bare, params, source, mask, prompt, tokens)
    with pytest.raises(UserError, match="pooling 'pooled' needs a layer that this model does not have"):
        bare.apply({"params": params}, source, mask, "pooled", method="pool")
    with pytest.raises(UserError, match=r"pooling 'means' is not known; use one of: .*Did you mean 'mean'"):
        pool(source, mask, "means")
    without = dataclasses.replace(CONFIG, mask_token=None).make()
    with pytest.raises(UserError, match="the tokenizer has no mask token"):
        states_of(without, support.random_params(without), source, mask, prompt, tokens)
    with pytest.raises(UserError, match="a masked model fills one place and writes no text"):
        CONFIG.make().apply({"params": {}}, (), tokens, 0, method="extend")


def test_a_config_that_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="num_heads 4 does not divide width 18"):
        dataclasses.replace(CONFIG, num_heads=4)
    with pytest.raises(UserError, match=r"activation 'gelu_now' is not known.*Did you mean 'gelu_new'"):
        dataclasses.replace(CONFIG, activation="gelu_now")
