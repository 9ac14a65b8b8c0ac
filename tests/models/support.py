"""What the tests of the backbones share: parameters without an initialiser, fills for every site, decoding in steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from deptjax.methods.base import AttentionSite, LinearSite, ResidualSite, Sites
from deptjax.models.prompted import site_leaves
from deptjax.typing import Array, Tree

EXTRA = 3  # keys that `AttentionFill` adds


class LinearFill(nn.Module):
    """Adds `x @ matrix`; nothing while the matrix is zero."""

    features_out: int

    @nn.compact
    def __call__(self, x: Array, y: Array) -> Array:
        return y + x @ self.param("matrix", nn.initializers.zeros, (x.shape[-1], self.features_out)).astype(x.dtype)


class AttentionFill(nn.Module):
    """Extra keys and values."""

    num_heads: int
    head_dim: int

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        shape = (EXTRA, self.num_heads, self.head_dim)
        return self.param("keys", nn.initializers.zeros, shape), self.param("values", nn.initializers.zeros, shape)


class ResidualFill(nn.Module):
    """Adds `y @ matrix`; nothing while the matrix is zero."""

    @nn.compact
    def __call__(self, y: Array) -> Array:
        return y + y @ self.param("matrix", nn.initializers.zeros, (y.shape[-1], y.shape[-1])).astype(y.dtype)


def fill(*kinds: str, seen: list[Any] | None = None) -> Sites:
    """Returns sites with every place of these kinds filled; each site that asks is appended to `seen`."""

    def note(site: Any) -> None:
        if seen is not None:
            seen.append(site)

    def linear(site: LinearSite, name: str) -> nn.Module:
        note(site)
        return LinearFill(site.features_out, name=name)

    def attention(site: AttentionSite, name: str) -> nn.Module:
        note(site)
        return AttentionFill(site.num_heads, site.head_dim, name=name)

    def residual(site: ResidualSite, name: str) -> nn.Module:
        note(site)
        return ResidualFill(name=name)

    fills: dict[str, Any] = {"linear": linear, "attention": attention, "residual": residual}
    return Sites(**{kind: fills[kind] for kind in kinds or fills})


def shapes(module: nn.Module) -> Tree:
    """Returns the module's parameter tree as shapes and dtypes; nothing is allocated."""
    return jax.eval_shape(lambda: module.init(jax.random.key(0), method="init_pass")["params"])


def flat_shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each leaf by its path, `a/b/c`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(k.key for k in path): leaf.shape for path, leaf in leaves}


def random_params(module: nn.Module, seed: int = 0) -> Tree:
    """Returns random parameters on which everything matters: norms that are not 1, fills that are not 0."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> Array:
        noise = rng.standard_normal(leaf.shape)
        if path[-1].key == "scale":
            return jnp.asarray(1 + 0.2 * noise, jnp.float32)
        if path[-1].key == "bias":
            return jnp.asarray(0.3 * noise, jnp.float32)
        scale = leaf.shape[-2] ** -0.5 if path[-1].key in ("kernel", "matrix") else 1.0
        return jnp.asarray(scale * noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes(module))


def stack_layers(params: Tree) -> Tree:
    """Returns the tree with `layers_0, layers_1, ...` stacked on axis 0 under `layers`, at any depth."""
    if not isinstance(params, dict):
        return params
    names = sorted((k for k in params if k.startswith("layers_")), key=lambda k: int(k.split("_")[1]))
    rest = {k: stack_layers(v) for k, v in params.items() if k not in names}
    if not names:
        return rest
    return {**rest, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[n] for n in names))}


def without_sites(params: Tree) -> Tree:
    """Returns the tree without the parameters of what fills the sites."""
    if not isinstance(params, dict):
        return params
    return {k: without_sites(v) for k, v in params.items() if k != "site" and not k.endswith("_site")}


def sites_scaled(params: Tree, factor: Callable[[str], float]) -> Tree:
    """Returns the tree with each fill's parameters multiplied by `factor(path)`."""
    kept = flat_shapes(site_leaves(params))

    def scale(path: Any, leaf: Array) -> Array:
        name = "/".join(k.key for k in path)
        return leaf * factor(name) if name in kept else leaf

    return jax.tree_util.tree_map_with_path(scale, params)


def states_of(module: nn.Module) -> Callable[..., Array]:
    """Returns the compiled `(params, source, mask, prompt, targets) -> states` of `target_states`."""
    return jax.jit(lambda params, *args: module.apply({"params": params}, *args, method="target_states"))


def by_rows(module: nn.Module, prompt: Any, max_new: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns `start(params, source, mask)` and `extend(params, cache, tokens, t)`: of one row, mapped over a batch.

    A prompt (B, M, D) gives each row its own front; one of (M, D) all rows the same.
    """
    apart = None if prompt is None or prompt.ndim == 2 else 0

    def front_of(params: Tree, own: Any) -> Any:
        return None if own is None else module.apply({"params": params}, own, method="front")

    def start(params: Tree, source: Array, mask: Array) -> Any:
        def one(row: Array, real: Array, own: Any) -> Any:
            front = front_of(params, own)
            state, cache = module.apply({"params": params}, row[None], real[None], front, max_new, method="start")
            return state[0], cache

        return jax.vmap(one, (0, 0, apart))(source, mask, prompt)

    def extend(params: Tree, cache: Any, tokens: Array, t: Any) -> Any:
        def one(cache: Any, tokens: Array, own: Any) -> Any:
            front = front_of(params, own)
            states, cache = module.apply({"params": params}, cache, tokens[None], t, front, method="extend")
            return states[0], cache

        return jax.vmap(one, (0, 0, apart))(cache, tokens, prompt)

    return start, extend


def stepwise(module: nn.Module, params: Tree, source: Array, mask: Array, prompt: Any, targets: Array) -> Array:
    """Returns what `target_states` should: from `start`, then `extend` by one, by several, and by one token."""
    length = targets.shape[1]
    start, extend = (jax.jit(f) for f in by_rows(module, prompt, length))
    state, cache = start(params, source, mask)
    states = [state[:, None]]
    for t, size in ((0, 1), (1, length - 3), (length - 2, 1)):
        before = jax.tree.map(lambda a: (a.shape, a.dtype), cache)
        some, cache = extend(params, cache, targets[:, t : t + size], t)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), cache) == before
        states.append(some)
    return jnp.concatenate(states, axis=1)


def greedy(module: nn.Module, params: Tree, source: Array, mask: Array, prompt: Any, steps: int) -> Array:
    """Returns (B, steps) greedy tokens; the cache is carried by a `lax.while_loop`."""

    def run(params: Tree) -> Array:
        start, extend = by_rows(module, prompt, steps)

        def head(state: Array) -> Array:
            return jnp.argmax(module.apply({"params": params}, state, method="head"), axis=-1).astype(jnp.int32)

        def body(carry: Any) -> Any:
            t, tokens, token, cache = carry
            tokens = tokens.at[:, t].set(token)
            states, cache = extend(params, cache, token[:, None], t)
            return t + 1, tokens, head(states[:, 0]), cache

        state, cache = start(params, source, mask)
        tokens = jnp.zeros((source.shape[0], steps), jnp.int32)
        return jax.lax.while_loop(lambda carry: carry[0] < steps, body, (0, tokens, head(state), cache))[1]

    return jax.jit(run)(params)


def greedy_again(module: nn.Module, params: Tree, source: Array, mask: Array, prompt: Any, steps: int) -> Array:
    """Returns what `greedy` should, the whole past computed again at each step."""
    tokens = jnp.zeros((source.shape[0], steps), jnp.int32)
    states = states_of(module)
    for t in range(steps):
        logits = module.apply({"params": params}, states(params, source, mask, prompt, tokens)[:, t], method="head")
        tokens = tokens.at[:, t].set(jnp.argmax(logits, axis=-1).astype(jnp.int32))
    return tokens


def check_site_acts(
    unfilled: nn.Module, filled: nn.Module, kind: str, places: list[str], args: tuple[Any, ...]
) -> None:
    """Checks one kind of site: empty at zero, felt in every place, and the same in steps as at once."""
    params = random_params(filled, 5)
    states = states_of(filled)
    quiet = sites_scaled(params, lambda _: 0.0)
    plain = states_of(unfilled)(without_sites(params), *args)
    base = states(quiet, *args)
    if kind == "attention":  # a key of zeros still takes its share of the weights
        assert not np.allclose(base, plain, atol=1e-2)
    else:
        np.testing.assert_allclose(base, plain, atol=1e-5)
    for place in places:
        one = states(sites_scaled(params, lambda path, place=place: float(place in path)), *args)
        assert np.abs(np.asarray(one - base)).max() > 1e-2, place
    np.testing.assert_allclose(stepwise(filled, params, *args), states(params, *args), atol=1e-5)


def check_filled_sites_act(config: Any, kind: str, places: list[str], args: tuple[Any, ...]) -> None:
    """Asserts that the sites of a causal backbone are at `places` of each layer, and that what fills them acts."""
    seen: list[Any] = []
    filled = config.make(fill(kind, seen=seen))
    tree = shapes(filled)
    assert {site.path for site in seen} == set(places)
    assert without_sites(tree) == shapes(config.make())
    end = "_site/" if kind == "residual" else "/site/"
    expected = [f"layers_{i}/{place}{end}" for place in places for i in range(config.num_layers)]
    assert {path.rsplit("/", 1)[0] + "/" for path in flat_shapes(site_leaves(tree))} == set(expected)
    check_site_acts(config.make(), filled, kind, expected, args)
