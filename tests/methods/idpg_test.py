"""IDPG's generators against numpy, their counts, and their mistakes."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.inference.predictor import Predictor, evaluate
from deptjax.inference.rows import start_rows
from deptjax.methods import IDPG, DeepPromptTuning
from deptjax.methods.base import Texts, input_parameters
from deptjax.methods.idpg import phm_weight
from deptjax.models.bert import Context
from deptjax.models.prompted import PromptedModel
from deptjax.models.sizes import SIZES
from deptjax.training.run import train
from deptjax.training.state import count_parameters
from tests.cases import backbone_of, case_of, make_case, some_batch
from tests.reviews import review_prompt, review_task

B, T, D, H, M, F, N = 3, 5, 12, 8, 2, 4, 4


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def generated(idpg: IDPG, h: np.ndarray) -> tuple[dict, np.ndarray]:
    shapes = jax.eval_shape(lambda: input_parameters(idpg, jax.random.key(0), D))
    params = jax.tree.map(lambda like: jnp.asarray(0.5 * draw(*like.shape)), shapes)
    embeds = jnp.asarray(draw(B, T, D))
    texts = Texts.whole(embeds, jnp.asarray(h))
    prompt, same = idpg.apply({"params": params}, embeds, texts, method="streams")
    np.testing.assert_array_equal(same, embeds)
    return jax.tree.map(np.asarray, params), np.asarray(prompt)


def test_a_sum_of_kronecker_products() -> None:
    a, b = draw(3, 3, 3), draw(3, 2, 5)
    wanted = sum(np.kron(x, y) for x, y in zip(a, b, strict=True))
    np.testing.assert_allclose(phm_weight(jnp.asarray(a), jnp.asarray(b)), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("generator", ["phm", "dense"])
def test_the_prompt_is_the_papers(generator: str) -> None:
    idpg, h = IDPG(prompt_length=M, hidden=F, generator=generator, factors=N, encoder_width=H), draw(B, H)
    params, prompt = generated(idpg, h)

    def weight(name: str) -> np.ndarray:
        own = params[name]
        return own["kernel"] if generator == "dense" else sum(map(np.kron, own["a"], own["b"]))

    hidden = np.tanh(h @ weight("down") + params["bias"])
    wanted = (hidden @ weight("up")).reshape(B, M, D) + params["prompt"]
    np.testing.assert_allclose(prompt, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        # LoPA's authors count 2.89M for theirs, on RoBERTa-large.
        ({"prompt_length": 10, "hidden": 256, "generator": "dense"}, 2_894_080),
        # The factors of the authors' two layers, the bottleneck's bias, and the task's table.
        ({"prompt_length": 5, "hidden": 16}, (4096 + 1024) + 16 + (4096 + 5120) + 5 * 1024),
    ],
)
def test_parameters_are_as_many_as_published(fields: dict, count: int) -> None:
    idpg = IDPG(encoder_width=1024, **fields)
    assert count_parameters(jax.eval_shape(lambda: input_parameters(idpg, jax.random.key(0), 1024))) == count


@pytest.mark.parametrize("fields", [{"generator": "phm"}, {"generator": "dense", "hidden": 64}], ids=["phm", "dense"])
def test_every_layer_costs_its_own_part_of_the_task_alone(fields: dict) -> None:
    """The generator is one: M-IDPG has M D numbers more for each layer but one."""
    config = SIZES["roberta-large"]
    counts = []
    for layers in ("first", "every"):
        method = IDPG(encoder_width=config.width, layers=layers, **fields)
        model = PromptedModel(config.make(method.sites()), method)
        counts.append(count_parameters(model.shapes(config.width)))
    assert config.num_layers == 24
    assert counts[1] - counts[0] == 23 * 5 * 1024


EVERY = "idpg, every"


def test_every_layer_is_the_authors() -> None:
    """Layer by layer on BERT: the state of the first token behind a layer makes what the next one's prompt gets.

    The first layer's gets all of it at the input, in front of positions and of the embeddings' norm.
    """
    case, batch = case_of("bert", EVERY), case_of("bert", EVERY).taken(some_batch())
    m, width, once = 5, case.backbone.width, case.moved["input"]
    bare = case.backbone.module().bind({"params": case.frozen})
    mask = batch["source_mask"]

    def generated(state: Any) -> Any:
        hidden = jnp.tanh(state @ once["down"]["kernel"] + once["bias"][None])
        return (hidden @ once["up"]["kernel"]).reshape(-1, m, width)

    own = [case.moved["backbone"][f"layers_{i}"]["prompt_site"]["prompt"] for i in range(len(bare.layers))]
    prompt = generated(case.read(batch)["encoding"]).astype(jnp.float32) + own[0][None]
    x = jnp.concatenate([prompt, bare.embed(batch["source"])], axis=1)
    x = x + bare.position_embedder(jnp.arange(x.shape[1]), x.dtype)[None]
    x = bare.embedding_norm(x + bare.type_embedder(jnp.zeros((1, 1), jnp.int32)))
    context = Context(jnp.pad(mask, ((0, 0), (m, 0)), constant_values=True), None)
    for i, block in enumerate(bare.layers):
        x, _ = block(x.at[:, :m].add(generated(x[:, m]) + own[i][None]) if i else x, context)
    embeds, mask, prompt, _ = case.model._source(
        case.moved, case.frozen, batch["source"], mask, case.read(batch)["encoding"]
    )
    got = case.model._apply(case.model._variables(case.moved, case.frozen), embeds, mask, prompt, method="encode")
    np.testing.assert_allclose(got, x[:, m:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "scan"), [("llama", True), ("t5", False), ("gpt2", False)])
def test_without_a_generator_every_layer_is_a_deep_prompt(family: str, scan: bool) -> None:
    case = make_case(backbone_of(family, scan), IDPG(prompt_length=M, hidden=6, generator="dense", layers="every"))
    silent = {**case.moved, "input": jax.tree.map(jnp.zeros_like, case.moved["input"])}
    deep = make_case(case.backbone, DeepPromptTuning(prompt_length=M, mode="add", prompt_init="random"))
    plain = {"backbone": case.moved["backbone"]}
    got, wanted = case.logits(silent, case.frozen, some_batch()), deep.logits(plain, deep.frozen, some_batch())
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert np.abs(case.logits(case.moved, case.frozen, some_batch()) - wanted).max() > 1e-2


@pytest.mark.parametrize(("family", "scan"), [("llama", True), ("t5", False)])
def test_decoding_has_the_logits_of_training(family: str, scan: bool) -> None:
    """The first token behind each text, and the second behind the first, of which a cache has the prompt too."""
    case, batch = case_of(family, EVERY, scan), some_batch()
    read = case.read(batch)
    rows = case.rows.replace(encoding=read["encoding"])
    run = jax.jit(start_rows, static_argnums=(0, 5))
    logits, cache = run(case.model, case.frozen, rows, batch["source"], batch["source_mask"], 3)
    wanted = case.logits(case.moved, case.frozen, batch)
    np.testing.assert_allclose(logits, wanted[:, 0], rtol=1e-5, atol=1e-5)
    first = jax.tree.map(lambda leaf: leaf[1], cache)
    extend = jax.jit(case.model.extend)
    again, _ = extend(case.moved, case.frozen, None, first, batch["targets"][1:2, :1], 0)
    np.testing.assert_allclose(again[0, 0], wanted[1, 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_scanned_layers_read_one_generator(family: str) -> None:
    """A copy for each layer would be what fills the memory."""
    case = case_of(family, EVERY, True)
    kernel = case.moved["input"]["up"]["kernel"]
    variables = jax.tree.leaves(case.model._variables(case.moved, case.frozen))
    assert [leaf.shape for leaf in variables if leaf.shape[-2:] == kernel.shape] == [kernel.shape]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_two_tasks_share_a_bank_and_answer_as_alone(family: str) -> None:
    cases = {"one": case_of(family, EVERY)}
    cases["two"] = dataclasses.replace(cases["one"], trainable=jax.tree.map(lambda a: 3 * a, cases["one"].trainable))
    words = {"negative": "bad", "positive": "good"}
    masked = {"input": "{text} . it is {mask} .", "verbalizers": words} if family == "bert" else {}
    prompts = {name: review_prompt(case, max_length=24, **masked) for name, case in cases.items()}
    texts, backbone = ["the film is good", "a dull story"], cases["one"].backbone
    mixed = Predictor(backbone, prompts)([t for t in texts for _ in prompts], list(prompts) * 2)
    for i, prompt in enumerate(prompts.values()):
        for got, wanted in zip(mixed[i::2], Predictor(backbone, prompt)(texts), strict=True):
            assert got.scores == pytest.approx(wanted.scores, abs=1e-5)
    assert mixed[0].scores != pytest.approx(mixed[1].scores, rel=1e-2)


def test_a_run_at_every_layer_drops_out_in_all_of_them(tmp_path: pathlib.Path) -> None:
    """Over scanned layers that are computed again for the gradient; its saved prompt answers as its dev score says."""
    backbone, method = backbone_of("llama", True), IDPG(prompt_length=2, hidden=4, factors=2, layers="every")
    settings = {"steps": 3, "batch_size": 4, "eval_every": 3, "buckets": 1, "progress": False, "remat": "full"}
    run = train(backbone, method, review_task(16, 8), tmp_path / "run", **settings)
    assert run.prompt is not None
    assert run.prompt.trainable["backbone"]["layers"]["prompt_site"].keys() == {"prompt"}
    assert evaluate(backbone, run.prompt, review_task(16, 8), split="dev") == pytest.approx(run.prompt.metrics)
    model = PromptedModel.build(backbone, run.prompt.method)
    batch = case_of("llama", EVERY, True).read(some_batch())

    def logits(key: int) -> jax.Array:
        tuned = jax.tree.map(jnp.asarray, run.prompt.trainable)
        return model.target_logits(tuned, backbone.params, batch, dropout_key=jax.random.key(key))

    assert np.abs(logits(0) - logits(1)).max() > 1e-6


def test_mistakes() -> None:
    with pytest.raises(UserError, match=r"idpg: layers 'all' is not one of first, every"):
        IDPG(layers="all")
    narrow = IDPG(prompt_length=2, generator="dense", encoder_width=24, encoder="reader", layers="every")
    with pytest.raises(UserError, match=r"states of the backbone, of width 32, and encoder 'reader' has 24; take one"):
        input_parameters(narrow, jax.random.key(0), 32)
    with pytest.raises(UserError, match=r"generator 'pmh' is not one of phm, dense. Did you mean 'phm'"):
        IDPG(generator="pmh")
    odd = IDPG(prompt_length=2, hidden=16, encoder_width=24)
    none = IDPG(prompt_length=1, hidden=24, encoder_width=24)
    with pytest.raises(
        UserError, match=r"prompt_length D, 23; give another hidden or prompt_length, or take generator"
    ):
        input_parameters(none.clone(factors=8), jax.random.key(0), 23)
    with pytest.raises(UserError, match="factors 16 does not divide the encoder's width, 24; take factors 2, 4, 8"):
        input_parameters(odd, jax.random.key(0), 32)


def test_at_every_layer_it_is_nothing_for_a_model_that_has_no_site_there() -> None:
    embeds, mask = jnp.zeros((1, T, D)), jnp.ones((1, T), bool)
    with pytest.raises(UserError, match="with layers 'every' it acts inside the model; take layers 'first'"):
        IDPG(layers="every").init(jax.random.key(0), embeds, mask, jnp.zeros((1, D)))
