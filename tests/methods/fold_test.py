"""What only training needed is folded away: the same answers from fewer parameters, and a prompt like any other."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.inference.prompt_bank import PromptBank
from deptjax.methods import Method, PrefixTuning, PromptTuning, PTuning, ResidualPromptTuning
from deptjax.prompt import Prompt
from deptjax.training.config import TrainConfig
from deptjax.training.population import train_population
from deptjax.training.run import Run, train
from deptjax.training.state import count_parameters
from deptjax.training.tuning import Tuning
from tests.cases import METHODS, backbone_of, case_of, make_case, some_batch
from tests.reviews import review_prompt, review_task

FOLDED: dict[str, Method] = {
    "residual": ResidualPromptTuning(prompt_length=5, bottleneck=7, prompt_init="vocab"),
    "prefix": PrefixTuning(prefix_length=3, hidden=7),
    "p_tuning": PTuning(prompt_length=5, hidden=7),
    "p_tuning, lstm": PTuning(prompt_length=5, hidden=7, network="lstm"),
    "residual, separate": ResidualPromptTuning(prompt_length=5, bottleneck=7, separate=True, norm=False),
}
FAMILIES = {
    "prefix": "t5",
    "residual": "llama",
    "residual, separate": "t5",
    "p_tuning": "t5",
    "p_tuning, lstm": "llama",
}


@pytest.mark.parametrize("name", FOLDED)
def test_a_folded_method_computes_the_same(name: str) -> None:
    case = make_case(backbone_of(FAMILIES[name], FAMILIES[name] == "t5"), FOLDED[name])
    method, folded = case.model.method.fold(jax.device_get(case.moved))
    assert method != case.model.method
    assert count_parameters(folded) < count_parameters(case.moved)
    plain = make_case(case.backbone, method)
    assert jax.tree.map(np.shape, folded) == jax.tree.map(np.shape, plain.trainable)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(folded))
    wanted = case.logits(case.moved, case.frozen, some_batch())
    got = plain.logits(jax.tree.map(jnp.asarray, folded), plain.frozen, some_batch())
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert method.fold(folded) == (method, folded)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_without_such_parts_is_itself(name: str) -> None:
    case = case_of("llama", name)
    method, trainable = case.model.method.fold(case.trainable)
    assert method is case.model.method
    assert trainable is case.trainable


@pytest.mark.parametrize("name", ["p_tuning", "prefix"])
def test_a_bank_holds_prompts_as_runs_save_them(name: str) -> None:
    """Its room may be named by the method that is tuned, and a prompt that nobody has folded is."""
    case = make_case(backbone_of("llama"), FOLDED[name])
    raw = review_prompt(case)
    method, trainable = case.model.method.fold(raw.trainable)
    saved = dataclasses.replace(raw, method=method, trainable=trainable)
    bank = PromptBank(case.backbone, room=FOLDED[name], capacity=2)
    assert bank.model.method == method
    bank.add("saved", saved)
    bank.add("raw", raw)
    model, rows = bank.take(["saved", "raw"])
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf[0], leaf[1]), rows.trainable)
    assert model.method == method
    if name == "p_tuning":  # which a bank of prompt tuning has room for too
        assert len(PromptBank(case.backbone, {"raw": raw}, room=PromptTuning(prompt_length=5))) == 1


SMALL: dict[str, Any] = {"steps": 2, "batch_size": 4, "eval_every": 2, "buckets": 1, "seed": 0, "progress": False}
METHOD = ResidualPromptTuning(prompt_length=4, bottleneck=5)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(backbone_of("llama"), METHOD, review_task(), tmp_path_factory.mktemp("fold") / "run", **SMALL)


def test_a_run_saves_a_prompt_of_prompt_tuning(run: Run) -> None:
    """It shares a bank with others; what was counted is what was trained."""
    prompt, backbone = run.prompt, backbone_of("llama")
    assert prompt is not None
    assert prompt.method == PromptTuning(prompt_length=4)
    assert prompt.trainable["input"].keys() == {"prompt"}
    assert run.trainable_parameters > 4 * backbone.width
    plain = review_prompt(make_case(backbone, PromptTuning(prompt_length=7, prompt_init="vocab")))
    bank = PromptBank(backbone, {"residual": prompt, "plain": plain})
    assert len(bank) == 2
    again = train(backbone, METHOD, review_task(), run.workdir, **SMALL)  # a finished run is returned as it is
    assert again.prompt is not None
    assert again.prompt.run_id == prompt.run_id


def test_a_run_may_start_from_a_folded_prompt(run: Run) -> None:
    config = TrainConfig(start_from=str(run.workdir / "prompt"), start_parts=("prompt",))
    assert run.prompt is not None
    first, _, _ = Tuning.prepare(backbone_of("llama"), METHOD, review_task(), config).start()
    np.testing.assert_array_equal(first["input"]["prompt"], run.prompt.trainable["input"]["prompt"])
    with pytest.raises(UserError, match=r"has no input/\w+; it has prompt: name in start_parts what to start from"):
        Tuning.prepare(
            backbone_of("llama"), METHOD, review_task(), dataclasses.replace(config, start_parts=None)
        ).start()


def test_members_of_a_population_are_folded_too(run: Run, tmp_path: pathlib.Path) -> None:
    members = [{"seed": 0}, {"seed": 1, "prompt_init": "vocab"}]
    many = train_population(backbone_of("llama"), METHOD, review_task(), tmp_path / "many", members, **SMALL)
    own = Prompt.load(many.workdir / "members" / many.members[0].name / "prompt")
    assert run.prompt is not None
    assert own.method == run.prompt.method
    np.testing.assert_allclose(own.trainable["input"]["prompt"], run.prompt.trainable["input"]["prompt"], atol=1e-5)
