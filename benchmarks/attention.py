"""All ways of computing attention that this machine has, against the plain formula in float32: values and gradients.

`python -m benchmarks.attention` raises where one is wrong and prints how far each is off. On an NVIDIA GPU this is the
check of cuDNN, on a TPU that of the Pallas kernel compiled for it. Tests run these cases with that kernel interpreted.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deptjax.models.attention import KV, Segment, attend
from deptjax.models.fused_attention import platform
from deptjax.typing import Array

KERNELS = {"cuda": "cudnn", "tpu": "flash"}


@dataclasses.dataclass(frozen=True)
class Case:
    """Attention of one layer: how many rows, heads and positions, and which of its parts there are."""

    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    width: int = 16
    queries: int = 24
    keys: int = 24
    prompt: int = 0  # positions that all rows share, in front
    causal: bool = False
    biased: bool = False  # a number for each head, query and key, the same in all rows
    padded: bool = False  # rows of unlike lengths

    def arrays(self, seed: int = 0) -> dict[str, Any]:
        """Returns random float32 arrays: what gradients are taken of, and `toward`, the gradient of the result."""
        random = np.random.default_rng(seed)

        def normal(*shape: int) -> Array:
            return jnp.asarray(random.standard_normal(shape), jnp.float32)

        queries = (self.batch, self.queries, self.heads, self.width)
        own, shared = (self.batch, self.kv_heads, self.keys, self.width), (self.kv_heads, self.prompt, self.width)
        arrays = {"query": normal(*queries), "keys": normal(*own), "values": normal(*own), "toward": normal(*queries)}
        if self.prompt:
            arrays |= {"prompt_keys": normal(*shared), "prompt_values": normal(*shared)}
        if self.biased:
            arrays["bias"] = normal(1, self.heads, self.queries, self.keys)
        return arrays

    def segments(self, arrays: dict[str, Any]) -> list[Segment]:
        """Returns the segments attended to."""
        lengths = self.keys - 5 * jnp.arange(self.batch)
        mask = jnp.arange(self.keys)[None] < jnp.maximum(lengths, 1)[:, None] if self.padded else None
        own = Segment(KV(arrays["keys"], arrays["values"]), arrays.get("bias"), mask, self.causal)
        return [Segment(KV(arrays["prompt_keys"], arrays["prompt_values"])), own] if self.prompt else [own]

    def results(self, implementation: str, dtype: Any) -> dict[str, Array]:
        """Returns the result and the gradients of all arrays, computed in a dtype and returned in float32."""
        given = {name: a if name == "bias" else a.astype(dtype) for name, a in self.arrays().items()}
        toward = given.pop("toward")

        def mixed(arrays: dict[str, Any]) -> Array:
            scale = self.width**-0.5
            return attend(arrays["query"], self.segments(arrays), scale, implementation=implementation)

        def both(arrays: dict[str, Any]) -> dict[str, Array]:
            result, backward = jax.vjp(mixed, arrays)
            return {"result": result, **backward(toward)[0]}

        return jax.tree.map(lambda a: a.astype(jnp.float32), jax.jit(both)(given))


def cases(scale: int = 1) -> dict[str, Case]:
    """Returns what each backbone asks of attention, `scale` times as long."""
    length, prompt = 24 * scale, 7 * scale
    base = Case(queries=length, keys=length)
    grouped = dataclasses.replace(base, heads=6, kv_heads=2, causal=True)
    return {
        "multi-head": base,
        "cross": dataclasses.replace(base, queries=length // 2, keys=length + 3, padded=True),
        "causal": dataclasses.replace(base, causal=True),
        "causal behind a prompt": dataclasses.replace(base, causal=True, prompt=prompt),
        "grouped": grouped,
        "grouped behind a prompt": dataclasses.replace(grouped, prompt=prompt),
        "position bias": dataclasses.replace(base, biased=True),
        "position bias, padded": dataclasses.replace(base, biased=True, padded=True),
        "position bias behind keys of a method": dataclasses.replace(base, biased=True, padded=True, prompt=prompt),
        "position bias, causal": dataclasses.replace(base, biased=True, causal=True),
    }


def check_attention(scale: int = 16, width: int = 64) -> dict[str, dict[str, float]]:
    """Returns, by implementation and case, the greatest error in bfloat16 of results and gradients.

    The error of an array is a share of its greatest value, against `xla` in float32 with exact products. The
    implementations are `xla` and this machine's kernel, if it has one. Raises `AssertionError` above 2 %: bfloat16 has
    8 bits, and the weights are rounded to it.
    """
    found: dict[str, dict[str, float]] = {}
    for name, case in cases(scale).items():
        case = dataclasses.replace(case, width=width)
        with jax.default_matmul_precision("highest"):
            exact = case.results("xla", jnp.float32)
        for implementation in ["xla", *filter(None, [KERNELS.get(platform())])]:
            ours = case.results(implementation, jnp.bfloat16)
            errors = {k: float(jnp.abs(ours[k] - a).max() / jnp.abs(a).max()) for k, a in exact.items()}
            worst = max(errors, key=lambda k: errors[k])
            assert errors[worst] < 0.02, f"{implementation}, {name}: {worst} is off by {errors[worst]:.1%}"
            found.setdefault(implementation, {})[name] = round(errors[worst], 5)
    return found


if __name__ == "__main__":
    print(json.dumps({"platform": platform(), "greatest errors": check_attention()}, indent=2))
