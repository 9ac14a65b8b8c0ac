"""Quantised kernels: the bounds of what rounding costs, and everything that a frozen backbone is used for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.inference.predictor import Predictor
from deptjax.methods import FullFineTuning, LoRA
from deptjax.models.backbone import Backbone
from deptjax.models.prompted import PromptedModel
from deptjax.prompt import Prompt
from deptjax.quantization import (
    SCHEMES,
    dequantize,
    quantize_host,
    quantize_kernel,
    quantize_tree,
    with_kernel,
)
from deptjax.testing import tiny_llama
from deptjax.training.members import member_name
from deptjax.training.population import train_population
from deptjax.training.run import train
from deptjax.typing import Tree
from tests.cases import BACKBONES, METHODS, make_case, some_batch
from tests.reviews import review_prompt, review_rows, review_task

# The 16 values of appendix E of QLoRA (arXiv 2305.14314).
NF4 = np.asarray(
    """
    -1 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
    -0.09105003625154495 0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
    0.44070982933044434 0.5626170039176941 0.7229568362236023 1
    """.split(),
    np.float64,
)


def kernel_of(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def nearest_on_grid(kernel: np.ndarray, scheme: str, tile: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the kernel rounded, in float64, to the nearest multiple of its scale on the grid, and the scales."""
    tiles = kernel.astype(np.float64).reshape(-1, tile, kernel.shape[-1])
    bound, grid = {
        "int8": (127.5, np.arange(-128.0, 128.0)),
        "int4": (7.5, np.arange(-8.0, 8.0)),
        "nf4": (1.0, NF4),
    }[scheme]
    scale = np.abs(tiles).max(1, keepdims=True) / bound
    nearest = grid[np.abs((tiles / scale)[..., None] - grid).argmin(-1)]
    return (nearest * scale).reshape(kernel.shape), scale


@pytest.mark.parametrize(("scheme", "tile"), [("int8", 192), ("int4", 64), ("nf4", 64)])
def test_a_kernel_is_rounded_to_the_nearest_value_of_its_grid(scheme: str, tile: int) -> None:
    kernel = kernel_of(192, 5)
    got = np.asarray(dequantize(quantize_kernel(jnp.asarray(kernel), scheme), jnp.float32))
    nearest, scale = nearest_on_grid(kernel, scheme, tile)
    rounding = {"int8": 1e-6, "int4": 2.0**-8, "nf4": 2.0**-8}[scheme] * np.abs(kernel).max()  # of the scales
    error = np.abs(got - kernel)
    assert (error <= np.abs(nearest - kernel) + rounding).all()  # of two values as near, either may be taken
    step = {"int8": 1.0, "int4": 1.0, "nf4": np.diff(NF4).max()}[scheme]
    assert (error.reshape(-1, tile, 5) <= scale * step / 2 + rounding).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_host_array_gives_the_node_of_a_device_array(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deptjax.quantization._BLOCK", 192 * 3)  # several blocks, the last one narrower
    kernel = kernel_of(192, 7)
    on_device = quantize_kernel(jnp.asarray(kernel), scheme)
    on_host = quantize_host(kernel, scheme)
    assert jax.tree.structure(on_host) == jax.tree.structure(on_device)
    for host, device in zip(jax.tree.leaves(on_host), jax.tree.leaves(on_device), strict=True):
        assert isinstance(host, np.ndarray)
        assert host.dtype == device.dtype
        np.testing.assert_array_equal(host, np.asarray(device))


def test_a_node_has_named_leaves_of_the_kernels_rank() -> None:
    node = quantize_kernel(jnp.ones((2, 128, 3)), "nf4")
    leaves = {path[0].name: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(node)}  # type: ignore[attr-defined]
    assert {name: leaf.shape for name, leaf in leaves.items()} == {"qvalue": (2, 128, 3), "scale": (2, 2, 3)}
    assert quantize_kernel(jnp.ones((128, 3)), "int8").scale.shape == (1, 3)


def test_a_column_of_zeros_stays_one() -> None:
    for scheme in SCHEMES:
        assert not np.asarray(dequantize(quantize_kernel(jnp.zeros((64, 2)), scheme), jnp.float32)).any()


def test_four_bits_take_four_bits() -> None:
    """Of a kernel with tiles of 64: 4 bits and a share of 16 / 64; of 8 bits a scale of 32 for each column."""
    params = {"up": {"kernel": jnp.ones((128, 64))}}
    sizes = {scheme: dataclasses.replace(tiny_llama(), params=params).quantized(scheme).nbytes for scheme in SCHEMES}
    assert sizes == {"int8": 128 * 64 + 4 * 64, "int4": 128 * 64 * 4.25 / 8, "nf4": 128 * 64 * 4.25 / 8}
    on_device = jax.jit(lambda tree: tree).lower(quantize_tree(params, "int4")).compile().memory_analysis()
    assert on_device.argument_size_in_bytes == sizes["int4"]


def test_only_kernels_are_quantised_and_shapes_are_known_beforehand() -> None:
    backbone = tiny_llama(tied=False)
    quantized = backbone.quantized("int8")
    changed = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(quantized.params)
        if leaf.dtype == jnp.int8
    ]
    kernels = [k for k, _ in jax.tree_util.tree_leaves_with_path(backbone.params) if k[-1].key == "kernel"]  # type: ignore[attr-defined]
    assert len(changed) == len(kernels) == 15
    assert quantized.embedding is backbone.embedding
    shapes = jax.eval_shape(functools.partial(quantize_tree, scheme="int8"), backbone.params)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), quantized.params
    )


def test_a_head_of_its_own_has_eight_bits_at_least() -> None:
    params = tiny_llama(tied=False).quantized("nf4").params
    assert params["logits_dense"]["kernel"].qvalue.dtype == jnp.int8
    assert params["layers_0"]["mlp"]["down"]["kernel"].qvalue.dtype == jnp.uint4


def test_the_fingerprint_is_that_of_the_backbone() -> None:
    backbone = tiny_llama()
    assert backbone.quantized("nf4").fingerprint == backbone.fingerprint
    assert backbone.quantized("nf4").config.quantize == "nf4"


# The largest difference of logits whose standard deviation is about 1; random weights, two or five layers.
BOUNDS = {"int8": 0.08, "int4": 1.5, "nf4": 1.2}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", BACKBONES)
def test_logits_are_near_those_of_float32(family: str, scheme: str) -> None:
    backbone = BACKBONES[family](tied=False)
    case = make_case(backbone, METHODS["dept"])
    batch = case.taken(some_batch())
    exact = case.logits(case.moved, backbone.params, batch)
    quantized = case.logits(case.moved, backbone.quantized(scheme).params, batch)
    apart = float(jnp.abs(quantized - exact).max())
    assert 1e-4 < apart < BOUNDS[scheme]


def stacked(params: Tree) -> Tree:
    """Returns a LLaMA's tree in the layout of `scan_layers`."""
    layers = [params[f"layers_{i}"] for i in range(2)]
    rest = {key: value for key, value in params.items() if not key.startswith("layers_")}
    return {**rest, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_layers_that_are_scanned_give_the_same(scheme: str) -> None:
    loop = tiny_llama(tied=False)
    config = dataclasses.replace(loop.config, scan_layers=True)
    scan = dataclasses.replace(loop, config=config, params=stacked(loop.params)).quantized(scheme)
    loop = loop.quantized(scheme)
    jax.tree.map(np.testing.assert_array_equal, scan.params, stacked(loop.params))
    batch = some_batch()
    case = make_case(loop, METHODS["dept"])
    got = make_case(scan, METHODS["dept"]).logits(case.moved, scan.params, batch)
    np.testing.assert_allclose(got, case.logits(case.moved, loop.params, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "name"), [("llama", "dept"), ("gpt2", "prefix_tuning"), ("t5", "lora")])
def test_a_step_trains_the_method_and_leaves_the_weights(family: str, name: str) -> None:
    backbone = BACKBONES[family]().quantized("int4")
    case = make_case(backbone, METHODS[name])
    before = jax.tree.map(np.array, case.frozen)
    state, metrics = case.step(case.state(), case.frozen, some_batch())
    assert np.isfinite(float(metrics["loss"]))
    assert float(metrics["grad_norm"]) > 0
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, case.frozen), before)


def test_the_gradient_is_that_of_the_dequantised_weights() -> None:
    backbone = tiny_llama(scan_layers=True).quantized("nf4")
    wide = jax.tree.map(
        lambda leaf: dequantize(leaf, jnp.float32), backbone.params, is_leaf=lambda leaf: hasattr(leaf, "qvalue")
    )
    case, batch = make_case(backbone, METHODS["lora"]), some_batch()

    def loss(trainable: Tree, frozen: Tree) -> Any:
        return jnp.sum(jax.nn.log_softmax(case.model.target_logits(trainable, frozen, batch))[..., 5])

    got, wanted = (jax.jit(jax.grad(loss))(case.moved, frozen) for frozen in (backbone.params, wide))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, wanted)


def test_what_a_gradient_keeps_of_scanned_layers_is_not_the_wide_kernels() -> None:
    """Temporary memory of a LoRA step's gradient, where the kernels of 8 layers are 33 MB in float32."""
    sizes = {"width": 256, "mlp_dim": 1024, "head_dim": 64, "num_heads": 4, "num_kv_heads": 4}
    backbone = tiny_llama(num_layers=8, scan_layers=True, **sizes)
    model = PromptedModel.build(backbone, LoRA(rank=4))
    trainable, _ = model.init(jax.random.key(0), backbone.params, backbone.vocabulary())
    batch = some_batch()

    def temporary(frozen: Tree) -> int:
        def loss(trainable: Tree, frozen: Tree) -> Any:
            return jnp.sum(model.target_logits(trainable, frozen, batch))

        return jax.jit(jax.grad(loss)).lower(trainable, frozen).compile().memory_analysis().temp_size_in_bytes

    quantized = backbone.quantized("int8")
    assert temporary(quantized.params) < temporary(backbone.params) + 4e6  # of one layer


def test_a_product_may_be_mapped_over_its_kernels() -> None:
    kernels = quantize_kernel(jnp.asarray(kernel_of(3, 64, 5)), "int4")
    x = jnp.asarray(kernel_of(3, 2, 64, seed=1))
    got = jax.vmap(functools.partial(with_kernel, jnp.matmul))(x, kernels)
    np.testing.assert_allclose(got, x @ dequantize(kernels, x.dtype), rtol=1e-5, atol=1e-5)


def test_the_computation_is_in_the_backbones_dtype() -> None:
    node = quantize_kernel(jnp.asarray(kernel_of(64, 5)), "int8")
    assert with_kernel(jnp.matmul, jnp.ones((2, 64), jnp.bfloat16), node).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda backbone: backbone.quantized("int3"),
            r"quantize 'int3' is not one of int8, int4, nf4\. Did you mean 'int8'\?",
        ),
        (lambda backbone: backbone.quantized("int8").quantized("int8"), "quantised already; load it without quantize"),
    ],
)
def test_mistakes_are_one_line(act: Callable[[Backbone], Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        act(tiny_llama())
    assert "\n" not in str(caught.value)


def test_weights_that_are_trained_are_not_quantised(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trains every weight.*--quantize"):
        train(tiny_llama().quantized("int8"), FullFineTuning(), review_task(), tmp_path / "run", steps=1)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def int8() -> Backbone:
    return tiny_llama().quantized("int8")


SMALL: dict[str, Any] = {"steps": 2, "batch_size": 4, "eval_every": 0, "progress": False}


def test_a_run_is_of_its_quantisation_and_its_prompt_is_of_the_backbone(int8: Backbone, tmp_path: Path) -> None:
    run = train(int8, LoRA(rank=2), review_task(), tmp_path, **SMALL)
    assert run.prompt is not None
    text = {"text": "a good film"}
    for backbone in (int8, tiny_llama(), tiny_llama().quantized("nf4")):
        answer = Predictor(backbone, run.prompt, batch_size=2)([text])[0]
        assert answer.text in ("positive", "negative")
    with pytest.raises(UserError, match=r"quantize"):
        train(tiny_llama(), LoRA(rank=2), review_task(), tmp_path, **SMALL)


def test_the_members_of_a_population_are_runs_of_their_own(int8: Backbone, tmp_path: Path) -> None:
    task, method = review_task(), METHODS["lora"]
    members = [{"seed": 3}, {"seed": 5}]
    population = train_population(int8, method, task, tmp_path / "population", members, **SMALL)
    assert population.finished
    for member, folder in zip(members, ("a", "b"), strict=True):
        alone = train(int8, method, task, tmp_path / folder, **SMALL, **member).prompt
        together = Prompt.load(tmp_path / "population" / "members" / member_name(member) / "prompt")
        assert alone is not None
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), together.trainable, alone.trainable
        )


def test_prompts_on_a_quantised_backbone_share_a_batch() -> None:
    """Tuned on the float32 model, served on the quantised one, mixed and alone."""
    backbone = tiny_llama(tied=False)
    case = make_case(backbone, METHODS["dept"])
    one, small = review_prompt(case), backbone.quantized("nf4")
    two = dataclasses.replace(one, trainable=jax.tree.map(lambda leaf: 1.5 * leaf, one.trainable))
    texts = [row["text"] for row in review_rows(4)]
    mixed = Predictor(small, {"one": one, "two": two})(texts, ["one", "two"] * 2)
    for place, (text, prompt) in enumerate(zip(texts, [one, two] * 2, strict=True)):
        (alone,) = Predictor(small, prompt)([text])
        assert mixed[place].scores == pytest.approx(alone.scores, abs=1e-5)
    exact = Predictor(backbone, one)(texts[:1])[0].scores
    assert mixed[0].scores != exact
