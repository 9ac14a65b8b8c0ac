"""`deptjax methods`: every method is there, its count is the real one, and a budget is kept and used."""

from __future__ import annotations

import dataclasses
import json

import pytest

from deptjax.cli.methods import described
from deptjax.errors import UserError
from deptjax.methods import DePT, LoPA, method_class, method_from_config, method_names, method_to_config
from deptjax.models.sizes import SIZES, parameter_count
from deptjax.planning.budget import trained_parameters
from tests.cli.conftest import Command

PUBLISHED = {
    "dept": 76_800,
    "prompt_tuning": 76_800,
    "adept": 76_051,
    "accept": 74_880,
    "attempt": 231_936,
    "mpt": 77_668,
}


def test_all_methods_are_listed_with_what_they_train(deptjax: Command) -> None:
    ended = deptjax("methods", "--json")
    assert ended.status == 0, ended.err
    told = json.loads(ended.out)
    assert (told["model"], told["width"]) == ("t5-base", 768)
    found = {one["method"]: one for one in told["methods"]}
    assert sorted(found) == method_names()
    for kind, count in PUBLISHED.items():
        assert found[kind]["parameters"] == count
    assert found["full"]["parameters"] == 222_903_552
    assert found["lora"]["sites"] == ["linear"]
    assert found["lopa"]["by_instance"]
    page = deptjax("methods").out
    for one in told["methods"]:
        assert f"\n{one['method']} " in page
        assert one["formula"] in page
    assert max(map(len, page.splitlines())) <= 120


@pytest.mark.parametrize("model", ["t5-base", "smollm2-135m"])
def test_a_budget_is_kept_and_used(deptjax: Command, model: str) -> None:
    """One size more would be too much."""
    config, budget = SIZES[model], 100 * SIZES[model].width
    told = json.loads(deptjax("methods", "--model", model, "--budget", budget, "--json").out)
    does_not = {"full"} | ({"lora"} if model == "t5-base" else set())  # of rank 1 LoRA has 110,592 there
    assert {one["method"] for one in told["methods"] if one["parameters"] is None} == does_not
    for one in told["methods"]:
        if one["parameters"] is not None:
            typical = method_to_config(method_class(one["method"]).typical())
            chosen, size = {**typical, **one["sizes"]}, one["sizes"][one["free_size"]]
            assert trained_parameters(config, method_from_config(chosen)) == one["parameters"] <= budget
            larger = method_from_config({**chosen, one["free_size"]: size + 1})
            assert trained_parameters(config, larger) > budget


def test_a_tuned_encoder_is_counted() -> None:
    """What makes the vectors: of RoBERTa-large all but the head that fills masks, whose last layer is the embedding."""
    large = SIZES["roberta-large"]
    head = large.width * large.width + 3 * large.width + large.vocab_size
    tuned = LoPA(encoder="roberta-large", encoder_width=large.width, encoder_trainable=True)
    frozen = dataclasses.replace(tuned, encoder_trainable=False)
    assert trained_parameters(large, tuned) - trained_parameters(large, frozen) == parameter_count(large) - head
    with pytest.raises(UserError, match=r"encoder_trainable: the parameters of encoder './mine' are counted"):
        trained_parameters(large, dataclasses.replace(tuned, encoder="./mine"))


def test_mistakes(deptjax: Command) -> None:
    told = deptjax("methods", "--model", "smollm2-135m").out
    assert "offset_part 288" in " ".join(told.split())  # the nearest to its default that divides 576
    odd = described(dataclasses.replace(SIZES["gpt2"], width=756), "idpg")
    assert odd["parameters"] is None
    assert "factors 16 does not divide the encoder's width" in odd["refused"]
    assert "\nprompt_tuning " in told
    assert "is neither a known size" in deptjax("methods", "--model", "t5-bse").error
    assert "--budget" in deptjax("methods", "--budget", "many").error
    assert trained_parameters(SIZES["gpt2"], DePT()) == 76_800
