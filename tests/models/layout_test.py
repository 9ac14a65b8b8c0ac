"""What was tuned with layers one by one is used with stacked layers, and the other way round."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.inference.prompt_bank import usable_prompt
from deptjax.models.layout import with_layout
from deptjax.prompt import Prompt
from tests.cases import METHODS, backbone_of, case_of, make_case, some_batch

LAYER = 1e-5


def same(got: object, wanted: object) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.mark.parametrize(("family", "method"), [("llama", "lora"), ("t5", "prefix_tuning"), ("gpt2", "full")])
def test_a_prompt_moves_between_layouts(family: str, method: str, tmp_path: pathlib.Path) -> None:
    loop = case_of(family, method)
    config = dataclasses.replace(loop.backbone.config, scan_layers=True)
    params = with_layout(loop.backbone.params, scan_layers=True)
    scanned = make_case(dataclasses.replace(loop.backbone, config=config, params=params), METHODS[method])
    place = loop.prompt().save(tmp_path / "prompt")
    _, there = usable_prompt(scanned.backbone, place, "x")
    assert jax.tree.map(np.shape, there.trainable) == jax.tree.map(np.shape, scanned.trainable)
    got = scanned.logits(there.trainable, scanned.frozen, some_batch())
    np.testing.assert_allclose(got, loop.logits(loop.moved, loop.frozen, some_batch()), rtol=LAYER, atol=LAYER)
    _, back = usable_prompt(loop.backbone, there, "x")
    same(back.trainable, Prompt.load(place).trainable)


def test_layers_are_in_the_order_of_their_numbers() -> None:
    tree = {"encoder": {f"layers_{i}": {"a": np.full(2, i)} for i in (10, 2, 0, 1, *range(3, 10))}, "norm": np.ones(3)}
    stacked = with_layout(tree, scan_layers=True)
    np.testing.assert_array_equal(stacked["encoder"]["layers"]["a"][:, 0], np.arange(11))
    same(with_layout(stacked, scan_layers=True), stacked)
    same(with_layout(stacked, scan_layers=False), tree)


def test_what_cannot_be_stacked_stays_and_is_refused_by_its_name() -> None:
    case = case_of("llama", "lora")
    tree = jax.device_get(case.moved)
    tree["backbone"]["layers_1"]["attention"]["query"]["site"]["lora_a"] = np.zeros((24, 2), np.float32)
    broken = dataclasses.replace(case.prompt(), trainable=tree)
    with pytest.raises(UserError, match=r"tensor 'backbone/layers/attention/query/site/lora_a' is missing"):
        usable_prompt(backbone_of("llama", scan=True), broken, "x")
    del tree["backbone"]["layers_1"]
    with pytest.raises(UserError, match=r"has shape \(1, 24, 3\), expected \(2, 24, 3\)"):
        usable_prompt(backbone_of("llama", scan=True), broken, "x")
