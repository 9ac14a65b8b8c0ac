"""The registry of methods, their configs, and the two small ones: prompt tuning and full fine-tuning."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.methods import (
    DePT,
    FullFineTuning,
    LoRA,
    PromptTuning,
    ZeroShot,
    method_class,
    method_from_config,
    method_names,
    method_to_config,
)
from deptjax.methods.base import input_parameters

B, T, M, D = 2, 3, 5, 7


@pytest.mark.parametrize(
    "method",
    [
        DePT(prompt_length=7, rank=3, scaling=0.5, prompt_init="vocab"),
        DePT(rank=None, budget=None),
        PromptTuning(prompt_length=11, prompt_text="a film"),
        LoRA(rank=3, alpha=2.0, targets="mlp/"),
        FullFineTuning(),
    ],
)
def test_config_survives_json(method: object) -> None:
    config = method_to_config(method)
    assert config["method"] in method_names()
    again = method_from_config(json.loads(json.dumps(config)))
    assert again == method
    assert method_to_config(again) == config


def test_config_has_every_field_a_user_may_set() -> None:
    assert set(method_to_config(PromptTuning())) == {"method", "prompt_length", "prompt_init", "prompt_text"}
    assert set(method_to_config(LoRA())) == {"method", "rank", "alpha", "targets"}
    assert set(method_to_config(FullFineTuning())) == {"method"}


def test_mistakes_name_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown method 'detp'; there are: .*dept.*Did you mean 'dept'\?"):
        method_class("detp")
    with pytest.raises(UserError, match=r"method 'dept' has no field 'prompt_lenght'.*Did you mean 'prompt_length'\?"):
        method_from_config({"method": "dept", "prompt_lenght": 3})


def sizes() -> list[tuple[str, str]]:
    """Returns each field of each method that is a whole number."""
    fields = [(kind, field) for kind in method_names() for field in dataclasses.fields(method_class(kind))]
    whole = [(kind, field.name) for kind, field in fields if str(field.type) in ("int", "int | None")]
    return [(kind, name) for kind, name in whole if name != "budget"]  # it decides another size, which is looked at


@pytest.mark.parametrize(("kind", "name"), sizes())
def test_a_size_is_a_whole_number_of_at_least_1(kind: str, name: str) -> None:
    typical = method_to_config(method_class(kind).typical())
    for value, told in ((0, "must be at least 1"), (-3, "must be at least 1"), (2.5, "whole"), ("4", "whole")):
        with pytest.raises(UserError, match=f"^{kind}: {name} is {value!r}; it {told}" if told[0] == "m" else told):
            method_from_config({**typical, name: value})


WRONG = {"bool": "no", "float": "1", "str": 3}


@pytest.mark.parametrize("kind", method_names())
def test_a_field_is_of_its_type(kind: str) -> None:
    typical = method_to_config(method_class(kind).typical())
    looked_at = 0
    for field in dataclasses.fields(method_class(kind)):
        if field.name in typical and (first := str(field.type).split(" | ")[0]) in WRONG:
            value = (3,) if field.name == "scaling" else WRONG[first]  # which may be a text or a number
            with pytest.raises(UserError, match=f"^{kind}: {field.name} is ") as told:
                method_from_config({**typical, field.name: value})
            assert "\n" not in str(told.value)
            looked_at += 1
    assert looked_at or kind in ("full", "zero_shot")


def test_numbers_of_numpy_and_paths_become_plain() -> None:
    method = DePT(prompt_length=np.int64(20), rank=np.int32(3), alpha=np.float64(2), prompt_init=pathlib.Path("a/b"))  # type: ignore[arg-type]
    config = json.loads(json.dumps(method_to_config(method)))
    assert config == method_to_config(DePT(prompt_length=20, rank=3, alpha=2.0, prompt_init=str(pathlib.Path("a/b"))))
    assert json.dumps(method_to_config(LoRA(rank=np.int64(3)))) == json.dumps(method_to_config(LoRA(rank=3)))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"lora: targets is \['query'\]; it must be a text"):
        LoRA(targets=["query"])  # type: ignore[arg-type]


def test_every_method_of_a_prompt_has_its_length_checked() -> None:
    assert {kind for kind, name in sizes() if name == "prompt_length"} == {
        kind for kind in method_names() if "prompt_length" in method_to_config(method_class(kind).typical())
    }


def test_prompt_tuning_is_the_prompt_in_front() -> None:
    random = np.random.default_rng(0)
    prompt, embeds = (random.standard_normal(s).astype(np.float32) for s in ((M, D), (B, T, D)))
    mask = np.asarray([[True, True, False], [False, True, True]])
    got, got_mask = PromptTuning(prompt_length=M).apply({"params": {"prompt": prompt}}, embeds, jnp.asarray(mask))
    wanted = np.stack([np.concatenate([prompt, row]) for row in embeds])
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(got_mask, np.concatenate([np.ones((B, M), bool), mask], axis=1))


def test_prompt_tuning_in_its_group() -> None:
    assert PromptTuning().groups({"input": {"prompt": 0}}) == {"input": {"prompt": "prompt"}}
    assert PromptTuning().learning_rates(0.3) == {"prompt": 0.3}
    assert PromptTuning().source_limit() is None
    with pytest.raises(UserError, match="prompt_tuning: prompt_length is 0"):
        PromptTuning(prompt_length=0)


def test_vanilla_prompt_of_t5_base_has_76_800_parameters() -> None:
    shapes = jax.eval_shape(lambda: input_parameters(PromptTuning(), jax.random.key(0), 768))
    assert {name: leaf.shape for name, leaf in shapes.items()} == {"prompt": (100, 768)}


def test_full_fine_tuning_and_none_at_all() -> None:
    tree = {"backbone": {"final_norm": {"scale": 0}}}
    assert FullFineTuning().groups(tree) == {"backbone": {"final_norm": {"scale": "backbone"}}}
    assert set(FullFineTuning().learning_rates(0.3)) == {"backbone"}
    for method in (FullFineTuning(), ZeroShot()):
        sites = method.sites()
        assert [sites.input, sites.linear, sites.attention, sites.residual] == [None] * 4
    assert FullFineTuning.tunes_backbone
    assert not ZeroShot.tunes_backbone
    assert "zero_shot" not in method_names()
