"""How fast a device multiplies square matrices: what the FLOPs of a step are held against."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

CHAIN = 20  # products of a timed turn, each of the result of the one before: none can be left out


@dataclasses.dataclass(frozen=True)
class Products:
    """What a worker multiplies: `products` times a turn, one behind the other, matrices of `width` x `width`."""

    device: str = "gpu"
    width: int = 8192
    dtype: str = "bfloat16"
    products: int = CHAIN
    side: str = "deptjax"
    model: str = "matrices"

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"products of {self.width} x {self.width} {self.dtype}"

    @property
    def flops(self) -> float:
        """Floating-point operations of a turn: 2 n^3 a product."""
        return 2.0 * self.width**3 * self.products


def check_device(device: str) -> None:
    """Raises `RuntimeError` when jax does not compute on a device, `cpu` or `gpu`, that was asked for.

    Where jax has no plugin for a platform that it was told to use, it goes on with the next one.
    """
    import jax

    found = jax.devices()[0].platform
    if found != device:
        raise RuntimeError(f"jax {jax.__version__} has no {device} here, only {found}")


class MatmulRunner:
    """A `Runner` whose step is a turn of products, by XLA."""

    def __init__(self, products: Products):
        import jax
        import jax.numpy as jnp

        check_device(products.device)
        self._jax, shape = jax, (products.width, products.width)
        one, other = jax.random.split(jax.random.key(0))

        @jax.jit
        def turn(x: Any, kernel: Any) -> Any:
            # Kernels of variance 1 / n keep the numbers at the size they begin with. A loop, so that nothing is fused.
            return jax.lax.fori_loop(0, products.products, lambda _, x: x @ kernel, x)

        self._turn = turn
        self._x = jax.random.normal(one, shape, products.dtype)
        scale = jnp.asarray(products.width**-0.5, products.dtype)
        self._kernel = jax.random.normal(other, shape, products.dtype) * scale
        self._products = products

    def warm(self) -> dict[str, float]:
        """Compiles, and takes turns until the clocks of the device have risen."""
        began = time.perf_counter()
        self.step()
        compiled = time.perf_counter() - began
        for _ in range(3):
            self.step()
        return {"compile_s": compiled}

    def step(self) -> tuple[float, int]:
        """Takes a turn. Returns 0 and how many products it was."""
        self._jax.block_until_ready(self._turn(self._x, self._kernel))
        return 0.0, self._products.products

    def describe(self) -> dict[str, Any]:
        """Returns what the device is: its kind, its memory in MiB (0 where it does not say), the platform's version."""
        device = self._jax.devices()[0]
        statistics = device.memory_stats() or {}
        return {
            "kind": device.device_kind,
            "memory_mib": statistics.get("bytes_limit", 0) / 2**20,
            "platform": " ".join(str(device.client.platform_version).split()),
        }
