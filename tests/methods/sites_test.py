"""Sites: LoRA in the projections it names, and small modules in the other sites, driven by methods made here.

The methods made here are known to no file of the library: that they train proves that a backbone and the training
step need not know what fills a site.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.inference.rows import Rows, extend_rows, start_rows
from deptjax.methods import AttentionSite, DePT, LoRA, Method, ResidualSite, Sites
from deptjax.methods.base import SITE
from deptjax.models.prompted import PromptedModel, merge_trees, site_leaves
from deptjax.typing import Array, Tree
from tests.cases import RATES, backbone_of, make_case, some_batch

GPT2 = {"attention/query", "attention/key", "attention/value", "attention/out", "mlp/up", "mlp/down"}
LLAMA = {"attention/query", "attention/key", "attention/value", "attention/out", "mlp/gate", "mlp/up", "mlp/down"}
ATTENTION = ("encoder/attention", "decoder/self_attention", "decoder/encoder_decoder_attention")
T5 = {f"{place}/{name}" for place in ATTENTION for name in ("query", "key", "value", "out")}
T5 |= {f"{stack}/mlp/{name}" for stack in ("encoder", "decoder") for name in ("wi", "wo")}


def places(trainable: Tree) -> set[str]:
    """Returns the paths, without the numbers of layers, of the projections beside which there are parameters."""
    found = set()
    for path, _ in jax.tree_util.tree_leaves_with_path(trainable["backbone"]):
        keys = [k.key for k in path]
        assert keys[-2] == SITE
        found.add("/".join(k for k in keys[:-2] if not re.fullmatch(r"layers(_\d+)?", k)))
    return found


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize("targets", [r"(query|value)$", r"mlp/", r"", r"^decoder/.*(key|wo)$", r"attention/out$"])
@pytest.mark.parametrize(("family", "projections"), [("gpt2", GPT2), ("llama", LLAMA), ("t5", T5)])
def test_lora_touches_the_projections_it_names(family: str, projections: set[str], targets: str, scan: bool) -> None:
    backbone, method = backbone_of(family, scan), LoRA(rank=2, targets=targets)
    wanted = {p for p in projections if re.search(targets, p)}
    if not wanted:
        with pytest.raises(UserError, match="method 'lora' fills no site of this backbone: check its targets"):
            make_case(backbone, method)
        return
    case = make_case(backbone, method)
    assert places(case.trainable) == wanted
    merged = merge_trees(case.frozen, case.trainable["backbone"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(case.trainable["backbone"]):
        *above, site, name = (k.key for k in path)
        projection = merged
        for key in above:
            projection = projection[key]
        kernel = projection["kernel"].shape
        assert projection[site][name] is leaf
        assert leaf.shape == (*kernel[:-2], *((kernel[-2], 2) if name == "lora_a" else (2, kernel[-1])))
    same_structure = jax.tree.structure(site_leaves(merged)) == jax.tree.structure(case.trainable["backbone"])
    assert same_structure
    assert site_leaves(case.frozen) == {}
    logits = jax.eval_shape(case.model.target_logits, case.trainable, case.frozen, some_batch())
    assert logits.shape == (3, 3, backbone.config.vocab_size)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_lora_is_a_change_of_the_kernels(family: str) -> None:
    """W + alpha / R * A B in the frozen tree does what LoRA beside W does: nothing else in the model is changed."""
    case = make_case(backbone_of(family), LoRA(rank=2, alpha=3.0, targets=""))

    def merged(frozen: Tree, inner: Tree) -> Tree:
        if SITE in inner:
            update = inner[SITE]
            return {**frozen, "kernel": frozen["kernel"] + 3.0 / 2 * update["lora_a"] @ update["lora_b"]}
        return {k: merged(v, inner[k]) if k in inner else v for k, v in frozen.items()}

    plain = backbone_of(family).module()
    batch = some_batch()

    @jax.jit
    def wanted(params: Tree) -> Array:
        def forward(module: Any) -> Array:
            embeds = module.embed(batch["source"])
            return module.head(module.target_states(embeds, batch["source_mask"], None, batch["targets"]))

        return plain.apply({"params": params}, method=forward)

    got = case.logits(case.moved, case.frozen, batch)
    np.testing.assert_allclose(got, wanted(merged(case.frozen, case.moved["backbone"])), rtol=0, atol=1e-4)


def test_layers_start_different() -> None:
    for scan in (False, True):
        layers = make_case(backbone_of("llama", scan), LoRA(rank=2)).trainable["backbone"]
        query = [layers[f"layers_{i}"]["attention"]["query"] for i in range(2)] if not scan else None
        a = layers["layers"]["attention"]["query"][SITE]["lora_a"] if scan else [q[SITE]["lora_a"] for q in query]
        assert not np.array_equal(a[0], a[1])


class Prefix(nn.Module):
    """Trained keys and values, as in prefix tuning."""

    length: int
    num_heads: int
    head_dim: int

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        shape = (self.length, self.num_heads, self.head_dim)
        return self.param("keys", nn.initializers.normal(1.0), shape), self.param(
            "values", nn.initializers.zeros, shape
        )


class Adapter(nn.Module):
    """A bottleneck behind a sub-layer, which starts as the identity."""

    width: int

    @nn.compact
    def __call__(self, y: Array) -> Array:
        hidden = nn.tanh(nn.Dense(3, use_bias=False, name="down")(y))
        return y + nn.Dense(self.width, use_bias=False, kernel_init=nn.initializers.zeros, name="up")(hidden)


class InnerMethod(Method):
    """What the methods of this file share: full-size rates, one group."""

    def group(self, path: tuple[str, ...]) -> str:
        return "backbone"


@dataclasses.dataclass(frozen=True)
class PrefixTuning(InnerMethod):
    kind = "test_prefix"
    length: int = 2

    def sites(self) -> Sites:
        return Sites(attention=self.fill)

    def fill(self, site: AttentionSite, name: str) -> nn.Module | None:
        return Prefix(self.length, site.num_heads, site.head_dim, name=name)


@dataclasses.dataclass(frozen=True)
class Adapters(InnerMethod):
    kind = "test_adapters"
    where: str = ""

    def sites(self) -> Sites:
        return Sites(residual=self.fill)

    def fill(self, site: ResidualSite, name: str) -> nn.Module | None:
        return Adapter(site.width, name=name) if re.search(self.where, site.path) else None


class Everything(DePT):
    """DePT, LoRA, prefixes and adapters at once: each site filled, two streams of rows on a causal backbone."""

    kind = "test_everything"

    def sites(self) -> Sites:
        return Sites(
            input=self, linear=LoRA(rank=2).fill, attention=PrefixTuning().fill, residual=Adapters("attention").fill
        )

    def group(self, path: tuple[str, ...]) -> str:
        return super().group(path) if path[0] == "input" else "backbone"


INNER = {
    "prefix": PrefixTuning(),
    "adapters": Adapters(),
    "everything": Everything(prompt_length=5, rank=3, max_length=13),
}


@pytest.mark.parametrize(
    ("family", "method", "scan"),
    [
        ("gpt2", "everything", True),
        ("llama", "prefix", False),
        ("t5", "prefix", True),
        ("llama", "adapters", True),
        ("t5", "adapters", False),
        ("llama", "everything", True),
        ("t5", "everything", False),
    ],
)
def test_any_module_in_any_site_trains(family: str, method: str, scan: bool) -> None:
    case = make_case(backbone_of(family, scan), INNER[method])
    before = jax.tree.map(np.array, case.frozen)
    state, losses = case.state(), []
    for _ in range(5):
        state, metrics = case.step(state, case.frozen, some_batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, case.frozen), before)
    for path, (a, b) in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: (a, b), state.trainable, case.trainable), is_leaf=lambda x: isinstance(x, tuple)
    ):
        assert np.any(a != b), f"{jax.tree_util.keystr(path)} did not move"


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_an_adapter_that_adds_nothing_changes_nothing(family: str) -> None:
    adapters = make_case(backbone_of(family), Adapters())
    lora = make_case(backbone_of(family), LoRA(rank=2))
    got = adapters.logits(adapters.trainable, adapters.frozen, some_batch())
    np.testing.assert_allclose(got, lora.logits(lora.trainable, lora.frozen, some_batch()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_with_every_site_filled_a_shared_prompt_is_a_prompt_in_each_row(scan: bool) -> None:
    method = INNER["everything"]
    shared = make_case(backbone_of("llama", scan), method)
    copied = make_case(backbone_of("llama", scan), method, share_prompt=False)
    batch = some_batch()
    np.testing.assert_allclose(
        copied.logits(shared.moved, shared.frozen, batch),
        shared.logits(shared.moved, shared.frozen, batch),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize(("family", "scan"), [("gpt2", False), ("llama", True), ("t5", False), ("t5", True)])
def test_with_every_site_filled_decoding_is_teacher_forcing(family: str, scan: bool) -> None:
    """What fills a site acts on cached keys and values as on a whole text."""
    case, batch = make_case(backbone_of(family, scan), INNER["everything"]), some_batch()
    whole = case.logits(case.moved, case.frozen, batch)

    @jax.jit
    def stepwise(rows: Rows) -> Array:
        logits, cache = start_rows(case.model, case.frozen, rows, batch["source"], batch["source_mask"], 3)
        results = [logits]
        for t in range(2):
            tokens = batch["targets"][:, None, t : t + 1]
            logits, cache = extend_rows(case.model, case.frozen, rows, cache, tokens, t)
            results.append(logits[:, 0, 0])
        return jnp.stack(results, axis=1)

    np.testing.assert_allclose(stepwise(case.rows), whole, rtol=1e-4, atol=1e-4)


def test_a_group_without_a_rate_is_an_error() -> None:
    """No parameter of a new method is left without a learning rate by mistake."""
    from deptjax.training.optim import make_optimizer

    case = make_case(backbone_of("llama"), PrefixTuning())
    groups = case.model.method.groups(case.trainable)
    with pytest.raises(ValueError, match="no learning rate for the parameter group"):
        make_optimizer({"prompt": lambda step: RATES["prompt"]}, groups)


def test_a_method_that_fills_nothing_is_refused() -> None:
    backbone = backbone_of("llama")
    model = PromptedModel.build(backbone, Adapters("decoder"))
    with pytest.raises(UserError, match="fills no site of this backbone"):
        model.init(jax.random.key(0), backbone.params, backbone.vocabulary())
