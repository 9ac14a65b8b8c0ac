"""The matrix products of a program: what a chip's peak rate is quoted in, and what a training step mostly is.

They are read from the jaxpr, without what nobody uses. XLA's own analysis counts the body of a loop once, however often
it runs; here a scan's counts as often.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.interpreters.partial_eval import dce_jaxpr


class Product(NamedTuple):
    """A `dot_general`: the shapes of its operands and its result, its operations, and how often it is computed."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    result: tuple[int, ...]
    flops: int
    times: int


def products(function: Callable[..., Any], *args: Any) -> list[Product]:
    """Returns the matrix products that `function(*args)` computes; the arguments may be `ShapeDtypeStruct`s.

    The body of a `while` counts once, since nothing says how often it runs, and so does each branch of a `cond`.
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    used, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return list(_walk(used, 1))


def product_flops(function: Callable[..., Any], *args: Any) -> int:
    """Returns the operations of all matrix products of `function(*args)`: 2 for a multiplication and its addition."""
    return sum(product.flops * product.times for product in products(function, *args))


def _walk(jaxpr: Any, times: int) -> Iterator[Product]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            left, right = (variable.aval.shape for variable in equation.invars)
            result = equation.outvars[0].aval.shape
            (contracted, _), _ = equation.params["dimension_numbers"]
            flops = 2 * math.prod(result) * math.prod(left[axis] for axis in contracted)
            yield Product(left, right, result, flops, times)
        inner_times = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for inner in _inside(equation):
            yield from _walk(inner, inner_times)


def _inside(equation: Any) -> Iterator[Any]:
    """Yields the jaxprs among the parameters of an equation."""
    values = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr)
    for value in filter(_is_jaxpr, values):
        yield getattr(value, "jaxpr", value)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
