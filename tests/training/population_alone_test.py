"""A member ends where it would have ended alone, whatever is trained and however: each case against `train` itself."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from deptjax.data.sources import MemorySource
from deptjax.data.tasks import Task
from deptjax.methods import DePT, LoRA
from deptjax.prompt import Prompt
from deptjax.training.population import train_population
from deptjax.training.run import train
from tests.cases import backbone_of
from tests.reviews import review_rows, review_task


def echo_task(name: str, words: int) -> Task:
    """Returns a task of free text: the first words of a review, up to so many."""
    splits = [review_rows(24, seed=seed) for seed in (4, 5, 6)]
    for rows in splits:
        for i, row in enumerate(rows):
            row["label"] = " ".join(row["text"].split()[: 1 + i % words])
    return Task(name, MemorySource(*splits), "text : {text}\nlabel :", labels=(), max_target_length=24)


DEPT = DePT(prompt_length=6, rank=4, max_length=32)
REVIEWS, SHORT, LONG = review_task(), echo_task("short", 2), echo_task("long", 5)
SMALL = {"steps": 3, "batch_size": 4, "eval_every": 3, "log_every": 1, "progress": False, "dropout": False}
CASES: dict[str, tuple[str, Any, list[dict[str, Any]], dict[str, Any]]] = {
    "t5-dept-dropout-accumulated-clipped": (
        "t5",
        DEPT,
        [{"task": REVIEWS, "seed": 0}, {"task": REVIEWS, "seed": 1, "prompt_lr": 0.05, "low_rank_lr": 0.01}],
        {
            "dropout": True,
            "buckets": 1,  # so that the same numbers are dropped
            "accumulate": 2,
            "clip_norm": 0.01,
            "weight_decay": 0.1,
            "warmup_steps": 2,
            "schedule": "cosine",
            "low_rank_schedule": "constant",
        },
    ),
    # Sources and targets beside longer ones.
    "llama-lora-two-tasks-of-free-text": (
        "llama",
        LoRA(rank=2),
        [{"task": LONG, "seed": 0}, {"task": SHORT, "seed": 1}],
        {"buckets": 2},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_member_ends_as_if_it_had_been_alone(name: str, tmp_path: pathlib.Path) -> None:
    family, method, members, own = CASES[name]
    settings = {**SMALL, **own}
    population = train_population(backbone_of(family), method, None, tmp_path / "population", members, **settings)
    member, asked = population.members[1], dict(members[1])
    alone = train(backbone_of(family), method, asked.pop("task"), tmp_path / "alone", **settings, **asked)
    folder = population.workdir / "members" / member.name
    prompt = Prompt.load(folder / "prompt")
    assert alone.prompt is not None
    assert prompt.metrics == alone.prompt.metrics
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max()),
        prompt.trainable,
        alone.prompt.trainable,
    )
    logs = ((place / "metrics.jsonl").read_text().splitlines() for place in (folder, alone.workdir))
    for together, apart in zip(*logs, strict=True):
        a, b = json.loads(together), json.loads(apart)
        for key in set(b) - {"examples_per_second", "data_wait_seconds"}:
            assert a[key] == pytest.approx(b[key], rel=1e-5), key
