"""Prompts at every layer: what a block is given, that rows, streams, banks and decoding agree, and where they start."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.inference.predictor import Predictor
from deptjax.methods import DeepPromptTuning, PromptTuning, StreamSite
from deptjax.methods.base import Sites
from deptjax.models.layers import fill_stream
from deptjax.models.prompted import merge_trees
from deptjax.testing import tiny_bert
from deptjax.training.state import count_parameters
from deptjax.typing import Tree
from tests.cases import backbone_of, case_of, make_case, some_batch
from tests.reviews import review_prompt

M, D = 5, 24
ADD = DeepPromptTuning(prompt_length=M, mode="add", prompt_init="vocab")
REPLACE = DeepPromptTuning(prompt_length=M, mode="replace")


@pytest.mark.parametrize("rows", [(), (2,)])
@pytest.mark.parametrize("method", [REPLACE, ADD], ids=["replace", "add"])
def test_a_layers_prompt_replaces_the_streams_or_is_added(method: DeepPromptTuning, rows: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((*rows, M, D)).astype(np.float32)
    own = random.standard_normal((M, D)).astype(np.float32)
    params = {"prompt": own, "adds": 1.0} if method is ADD else {"prompt": own}
    got = method.fill(StreamSite("prompt", D), "site").apply({"params": params}, jnp.asarray(x))
    wanted = x + own if method is ADD else np.broadcast_to(own, x.shape)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
def test_every_layer_is_given_its_own_prompt(family: str) -> None:
    """And where nothing fills the site, nothing is done."""
    backbone = tiny_bert() if family == "bert" else backbone_of(family)
    case = make_case(backbone, REPLACE)
    layers = getattr(backbone.config, "num_encoder_layers", None) or backbone.config.num_layers
    assert count_parameters(case.trainable) == layers * M * backbone.width
    assert "input" not in case.trainable
    stack = case.trainable["backbone"].get("encoder", case.trainable["backbone"])
    limit = np.sqrt(3 / backbone.width)
    for leaf in jax.tree.leaves(stack):
        assert 0.8 * limit < np.abs(leaf).max() <= limit
    assert len(stack) == layers
    x, prompt = jnp.ones((2, 3, D)), jnp.ones((M, D))
    assert fill_stream(Sites(), "prompt", x, prompt, 0, lambda: x[:, 0]) == (x, prompt)


def test_what_replaces_does_not_depend_on_what_was_there() -> None:
    """All that a text learns of the prompt in front is the layers' own: the input's places are empty."""
    case = case_of("llama", "deep_prompt_tuning")
    batch, c = some_batch(), case.backbone.config
    first = case.logits(case.moved, case.frozen, batch)
    for i in range(c.num_layers):
        other = jax.tree.map(jnp.copy, case.moved)
        other["backbone"][f"layers_{i}"]["prompt_site"]["prompt"] += 1.0
        assert np.abs(case.logits(other, case.frozen, batch) - first).max() > 1e-3


def test_a_masked_models_text_sees_the_prompts_of_all_layers() -> None:
    backbone = tiny_bert()
    case = make_case(backbone, REPLACE)
    embeds, mask = jnp.ones((2, 3, backbone.width)), jnp.ones((2, 3), bool)

    def encoded(inner: dict) -> jax.Array:
        variables, prompt = {"params": merge_trees(case.frozen, inner)}, jnp.zeros((M, backbone.width))
        return case.model.module.apply(variables, embeds, mask, prompt, method="encode")

    first = encoded(case.moved["backbone"])
    assert first.shape == embeds.shape
    for name in case.moved["backbone"]:
        other = {**case.moved["backbone"], name: jax.tree.map(lambda p: p + 1.0, case.moved["backbone"][name])}
        assert np.abs(encoded(other) - first).max() > 1e-3


def test_adding_starts_as_prompt_tuning() -> None:
    """And the first layer's vectors are the soft prompt, and no others beside it."""
    for family, scan in (("llama", True), ("t5", False), ("bert", False)):
        backbone = backbone_of(family, scan)
        deep, plain = make_case(backbone, ADD), make_case(backbone, PromptTuning(prompt_length=M, prompt_init="vocab"))
        batch = some_batch()
        assert count_parameters(deep.trainable) == 2 * M * backbone.width
        first = ADD.soft_prompt(deep.trainable, backbone.width)
        np.testing.assert_array_equal(jnp.concatenate([first, jnp.zeros_like(first)]), _stacked(deep.trainable))
        wanted = plain.logits({"input": {"prompt": first}}, plain.frozen, batch)
        np.testing.assert_allclose(deep.logits(deep.trainable, deep.frozen, batch), wanted, rtol=1e-5, atol=1e-5)
        assert np.abs(deep.logits(deep.moved, deep.frozen, batch) - wanted).max() > 1e-2


def _stacked(trainable: Tree) -> jax.Array:
    """The vectors of all layers, one layer behind the other."""
    return jnp.concatenate([leaf.reshape(-1, leaf.shape[-1]) for leaf in jax.tree.leaves(trainable)])


@pytest.mark.parametrize("method", [REPLACE, ADD], ids=["replace", "add"])
def test_shared_prompt_is_a_prompt_in_each_row_scanned_or_not(method: DeepPromptTuning) -> None:
    loop, scan = (make_case(backbone_of("llama", s), method) for s in (False, True))
    copied = make_case(backbone_of("llama"), method, share_prompt=False)
    wanted = loop.logits(loop.moved, loop.frozen, some_batch())
    np.testing.assert_allclose(copied.logits(loop.moved, loop.frozen, some_batch()), wanted, rtol=1e-5, atol=1e-5)

    def stacked(tree: dict) -> dict:
        layers = [tree["layers_0"], tree["layers_1"]]
        rest = {name: node for name, node in tree.items() if not name.startswith("layers_")}
        return {**rest, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}

    moved = {**loop.moved, "backbone": stacked(loop.moved["backbone"])}
    assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, scan.trainable)
    got = scan.logits(moved, stacked(loop.frozen), some_batch())
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "scan", "mode"), [("llama", True, "replace"), ("t5", False, "add")])
def test_two_lengths_share_a_bank_and_write_as_alone(family: str, scan: bool, mode: str) -> None:
    """The fronts are those of every layer; a shorter prompt is padded in front at each of them."""
    backbone, texts = backbone_of(family, scan), ["the film is good", "a dull story"]
    sizes = {"short": 3, "long": 6}
    cases = {n: make_case(backbone, DeepPromptTuning(prompt_length=m, mode=mode)) for n, m in sizes.items()}
    prompts = {name: review_prompt(case) for name, case in cases.items()}
    mixed = Predictor(backbone, prompts)([t for t in texts for _ in prompts], list(prompts) * 2)
    for i, prompt in enumerate(prompts.values()):
        for got, wanted in zip(mixed[i::2], Predictor(backbone, prompt)(texts), strict=True):
            assert got.scores is not None
            assert wanted.scores is not None
            np.testing.assert_allclose(list(got.scores.values()), list(wanted.scores.values()), rtol=1e-5, atol=1e-5)


def test_decoding_has_the_logits_of_training() -> None:
    """The first token behind a text, by the fronts of all layers, and as `target_logits` has it."""
    case = case_of("llama", "deep_prompt_tuning")
    batch = some_batch()
    front = jax.jit(case.model.front)(case.moved, case.frozen)
    start = jax.jit(case.model.start, static_argnums=5)
    got, _ = start(case.moved, case.frozen, front, batch["source"][1], batch["source_mask"][1], 2)
    np.testing.assert_allclose(got, case.logits(case.moved, case.frozen, batch)[1, 0], rtol=1e-5, atol=1e-5)


def test_mistakes_and_groups() -> None:
    with pytest.raises(UserError, match=r"mode 'ad' is not add or replace. Did you mean 'add'"):
        DeepPromptTuning(mode="ad")
    with pytest.raises(UserError, match="deep_prompt_tuning: prompt_length is 0"):
        DeepPromptTuning(prompt_length=0)
    assert REPLACE.learning_rates(0.3) == {"prompt": 1e-2}
    assert ADD.learning_rates(0.3) == {"prompt": 0.3}
    assert REPLACE.positions_in_front() == M
