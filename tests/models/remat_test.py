"""Rematerialisation: the same numbers, and less that is kept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.methods import PromptTuning
from deptjax.models.remat import REMAT
from deptjax.testing import tiny_llama, tiny_t5
from deptjax.training.step import make_loss
from deptjax.typing import Tree
from tests.cases import METHODS, Case, backbone_of, batch_of, make_case, rows_of, some_batch

FORMULA = 1e-6
# Each method on one family, each family with one method more: the policy is the blocks', which know no method.
CASES = [("gpt2", method, True, "full") for method in METHODS]
CASES += [("llama", "dept", True, "dots"), ("t5", "dept", True, "dots"), ("t5", "lora", False, "full")]
QUICK = {"xla_backend_optimization_level": 0}  # these programs run once


def case_of(family: str, method: str, scan: bool, remat: str) -> Case:
    backbone = backbone_of(family, scan)
    config = dataclasses.replace(backbone.config, remat=remat)
    return make_case(dataclasses.replace(backbone, config=config), METHODS[method])


def gradient(case: Case) -> tuple[jax.Array, Tree]:
    """Returns the loss and its gradient, with the backbone's dropout on where it has any."""
    step = jax.jit(jax.value_and_grad(make_loss(case.model, dropout=True)), compiler_options=QUICK)
    result: tuple[jax.Array, Tree] = step(case.moved, case.frozen, some_batch(), jax.random.key(2))
    return result


@pytest.mark.parametrize(("family", "method", "scan", "remat"), CASES)
def test_loss_and_gradient_are_those_of_none(family: str, method: str, scan: bool, remat: str) -> None:
    loss, wanted = gradient(case_of(family, method, scan, "none"))
    again, got = gradient(case_of(family, method, scan, remat))
    np.testing.assert_allclose(again, loss, rtol=FORMULA)
    norm = math.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(wanted)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=FORMULA * norm), got, wanted)


def deep(family: str, scan: bool, remat: str) -> Case:
    """Returns prompt tuning on a model of six layers."""
    if family == "t5":
        depth = {"num_encoder_layers": 6, "num_decoder_layers": 6}
        return make_case(tiny_t5(scan_layers=scan, remat=remat, **depth), PromptTuning(prompt_length=5))
    return make_case(tiny_llama(scan_layers=scan, remat=remat, num_layers=6), PromptTuning(prompt_length=5))


def long_batch() -> dict[str, jax.Array]:
    return batch_of(rows_of((64,) * 8), rows_of((8,) * 8, 1), 64, 8)


def loss_of(case: Case) -> Callable[[Tree], Any]:
    loss = make_loss(case.model)
    return lambda trainable: loss(trainable, case.frozen, long_batch(), None)


def kept_bytes(case: Case) -> int:
    """Returns the size of all that the forward pass leaves for the backward pass: the leaves of a vjp."""
    kept = jax.eval_shape(lambda trainable: jax.vjp(loss_of(case), trainable)[1], case.trainable)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_less_is_kept_from_policy_to_policy(family: str, scan: bool) -> None:
    nothing, dots, full = (kept_bytes(deep(family, scan, remat)) for remat in REMAT)
    assert full < 0.7 * dots < 0.7 * 0.8 * nothing


def test_the_compiled_gradient_needs_less_from_policy_to_policy() -> None:
    def temporaries(remat: str) -> int:
        case = deep("llama", True, remat)
        lowered = jax.jit(jax.grad(loss_of(case))).lower(case.trainable)
        return int(lowered.compile(QUICK).memory_analysis().temp_size_in_bytes)

    nothing, dots, full = map(temporaries, REMAT)
    assert full < 0.7 * dots < 0.7 * 0.7 * nothing
