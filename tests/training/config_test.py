"""The settings of a run: default learning rates from the backbone, schedules by group, mistakes."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.methods import DePT, FullFineTuning, LoRA, PromptTuning
from deptjax.models.backbone import Backbone
from deptjax.testing import tiny_llama, tiny_t5
from deptjax.training.config import TrainConfig


def scaled(backbone: Backbone, rms: float) -> Backbone:
    """Returns the backbone with an embedding table of this root mean square."""
    table = backbone.embedding * (rms / math.sqrt(float((np.asarray(backbone.embedding, np.float64) ** 2).mean())))
    params = {**backbone.params, "token_embedder": {"embedding": jax.numpy.asarray(table)}}
    return dataclasses.replace(backbone, params=params)


@pytest.mark.parametrize("rms", [1.0001, 1.7, 23.0])
def test_t5_with_large_embeddings_has_exactly_the_authors_rates(rms: float) -> None:
    backbone = scaled(tiny_t5(), rms)
    assert backbone.prompt_lr == 0.3
    assert DePT().learning_rates(backbone.prompt_lr) == {"prompt": 0.3, "low_rank": 5e-3}
    assert PromptTuning().learning_rates(backbone.prompt_lr) == {"prompt": 0.3}


def test_llama_with_small_embeddings_has_small_rates() -> None:
    rates = DePT().learning_rates(scaled(tiny_llama(), 0.1356).prompt_lr)
    assert rates == pytest.approx({"prompt": 0.0041, "low_rank": 0.005}, rel=0.02)


def test_rates_grow_with_the_embeddings_up_to_a_cap() -> None:
    for backbone, cap in ((tiny_llama(), 0.03), (tiny_t5(), 0.3)):
        of = {rms: scaled(backbone, rms).prompt_lr for rms in (0.01, 0.1, 0.2, 1.0, 9.0)}
        assert of[0.2] == pytest.approx(2 * of[0.1], rel=1e-5)
        assert of[0.1] == pytest.approx(0.1 * cap, rel=1e-5)
        assert of[9.0] == cap
        assert DePT().learning_rates(of[0.01])["low_rank"] == pytest.approx(min(5e-3, 1.25 * of[0.01]))


def test_a_users_rate_takes_the_place_of_its_groups_own() -> None:
    defaults = DePT().learning_rates(0.3)
    assert TrainConfig().learning_rates(defaults) == defaults
    assert TrainConfig(low_rank_lr=0.1).learning_rates(defaults) == {"prompt": 0.3, "low_rank": 0.1}
    assert TrainConfig(prompt_lr=0.5, backbone_lr=1.0).learning_rates(defaults) == {"prompt": 0.5, "low_rank": 5e-3}
    assert TrainConfig(backbone_lr=1e-4).learning_rates(FullFineTuning().learning_rates(0.3)) == {"backbone": 1e-4}
    assert TrainConfig(prompt_lr=9.0).learning_rates(LoRA().learning_rates(0.3)) == LoRA().learning_rates(0.3)


def test_schedules_of_each_group() -> None:
    config = TrainConfig(
        steps=10, warmup_steps=0, schedule="constant", prompt_schedule="linear", low_rank_warmup_steps=4
    )
    schedules = config.schedules({"prompt": 1.0, "low_rank": 0.1})
    prompt, low_rank = ([float(schedules[g](s)) for s in range(5)] for g in ("prompt", "low_rank"))
    np.testing.assert_allclose(prompt, [1, 0.9, 0.8, 0.7, 0.6], atol=1e-6)
    np.testing.assert_allclose(low_rank, [0.025, 0.05, 0.075, 0.1, 0.1], atol=1e-6)


def test_default_warmup_is_six_percent_of_a_short_run() -> None:
    schedule = TrainConfig(steps=100, schedule="constant").schedules({"prompt": 6.0})["prompt"]
    np.testing.assert_allclose([float(schedule(s)) for s in range(7)], [1, 2, 3, 4, 5, 6, 6], rtol=1e-6)


def test_a_warmup_of_zero_is_none_at_all() -> None:
    schedule = TrainConfig(steps=100, warmup_steps=9, prompt_warmup_steps=0).schedules({"prompt": 1.0})["prompt"]
    assert float(schedule(0)) == 1.0


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("steps", 0, "steps is 0; it must be at least 1"),
        ("batch_size", -1, "batch_size is -1; it must be at least 1"),
        ("accumulate", 0, "accumulate is 0"),
        ("log_every", 0, "log_every is 0"),
        ("checkpoint_every", 0, "checkpoint_every is 0"),
        ("eval_every", -1, "eval_every is -1"),
        ("warmup_steps", -1, "warmup_steps is -1"),
        ("max_length", 0, "max_length is 0"),
        ("prompt_lr", 0.0, "prompt_lr is 0.0; it must be above 0"),
        ("prompt_lr", math.inf, "prompt_lr is inf; it must be above 0, and finite"),
        ("low_rank_lr", -1.0, "low_rank_lr is -1.0"),
        ("clip_norm", math.nan, "clip_norm is nan"),
        ("seed", -1, "seed is -1"),
        ("schedule", "linaer", r"schedule 'linaer' is not known; .* Did you mean 'linear'\?"),
        ("prompt_schedule", "cosin", r"prompt_schedule 'cosin' is not known; .* Did you mean 'cosine'\?"),
        ("loss", "label", r"loss 'label' is not known; .* Did you mean 'labels'\?"),
        ("evaluation", "greedy", "evaluation 'greedy' is not known; there are auto, labels, generate"),
        ("on_too_long", "trim", "on_too_long 'trim' is not known; there are cut, error"),
    ],
)
def test_mistakes_name_the_field(field: str, value: object, told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        TrainConfig.from_settings({field: value})
    assert "\n" not in str(caught.value)


def test_unknown_setting() -> None:
    with pytest.raises(UserError, match=r"there is no setting 'promt_lr'. Did you mean 'prompt_lr'\?"):
        TrainConfig.from_settings({"promt_lr": 0.3})


def test_what_changes_only_how_a_run_is_computed_is_no_part_of_its_identity() -> None:
    assert TrainConfig(remat="full").identity() == TrainConfig().identity()
    assert TrainConfig(steps=7).identity()["steps"] == 7
