"""A population: each member ends where it would have ended alone; members diverge, are cut, are resumed."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import signal
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.data.sources import MemorySource
from deptjax.data.tasks import Task
from deptjax.errors import UserError
from deptjax.inference.predictor import Predictor
from deptjax.methods import DePT, LoPA, PromptTuning
from deptjax.prompt import Prompt
from deptjax.training.members import grid
from deptjax.training.optim import make_optimizer
from deptjax.training.population import Population, train_population
from deptjax.training.population_loop import member_of, stack_batches, stack_states, stack_where
from deptjax.training.run import train
from deptjax.training.state import TrainState
from deptjax.training.step import Traits, make_loss, make_population_step, make_update
from tests.cases import RATES, backbone_of, batch_of, case_of, rows_of
from tests.reviews import review_rows, review_task

METHOD = DePT(prompt_length=6, rank=4, max_length=32)
SMALL: dict[str, Any] = {"steps": 6, "batch_size": 4, "eval_every": 3, "buckets": 1, "log_every": 2, "progress": False}


STEPS = [("llama", "dept"), ("llama", "lora"), ("llama", "prefix_tuning"), ("llama", "full"), ("t5", "dept")]


@pytest.mark.parametrize(("family", "method"), STEPS)
def test_a_step_of_a_population_is_each_members_own_step(family: str, method: str) -> None:
    """Three members: other parameters, other rates, other batches; one of them is not to change."""
    case = case_of(family, method)
    groups = case.model.method.groups(case.trainable)
    used = sorted(set(jax.tree.leaves(groups)))

    def optimizer(rates: dict[str, Any]) -> Any:
        return make_optimizer({name: (lambda step, rate=rates[name]: rate) for name in used}, groups)

    @jax.jit
    def alone(state: TrainState, batch: Any, rates: dict[str, Any]) -> Any:
        return make_update(make_loss(case.model), optimizer(rates))(state, case.frozen, batch)

    peaks = [{name: jnp.float32(RATES[name] * by) for name in used} for by in (1.0, 0.3, 2.0)]
    starts, keys = [case.trainable, case.moved, case.moved], jax.random.split(jax.random.key(9), 3)
    states = [TrainState.create(s, optimizer(p), k) for s, p, k in zip(starts, peaks, keys, strict=True)]
    batches = [batch_of(rows_of((7, 3, 5), seed), rows_of((2, 3, 1), seed + 9), 7, 3) for seed in range(3)]
    rates = {name: jnp.stack([own[name] for own in peaks]) for name in used}
    traits = Traits(rates, None, None, jnp.array([True, True, False]))
    step = make_population_step(case.model, optimizer)
    stacked, together = stack_states(states), {k: jnp.stack([batch[k] for batch in batches]) for k in batches[0]}
    for _ in range(2):
        stacked, metrics = step(stacked, case.frozen, together, traits)
    assert int(stacked.step) == 2
    for number in range(2):
        state = states[number]
        for _ in range(2):
            state, wanted = alone(state, batches[number], peaks[number])
        np.testing.assert_allclose(metrics["loss"][number], wanted["loss"], rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"][number], wanted["grad_norm"], rtol=1e-4)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
            member_of(stacked.trainable, number),
            state.trainable,
        )
    jax.tree.map(np.testing.assert_array_equal, member_of(stacked.trainable, 2), case.moved)


def lines(folder: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def length_task() -> Task:
    """A task of three labels, where `review_task` has two: how long a review is."""
    rows = [review_rows(30, seed=seed) for seed in (4, 5, 6)]
    for split in rows:
        for row in split:
            words = len(row["text"].split())
            row["label"] = "one" if words < 5 else "two" if words < 9 else "three"
    labels = ("one", "two", "three")
    return Task("lengths", MemorySource(*rows), "text : {text}\nlabel :", labels=labels)


REVIEWS, LENGTHS = review_task(), length_task()
MIXED: list[dict[str, Any]] = [
    {"task": REVIEWS, "prompt_lr": 0.05, "seed": 0},
    {"task": REVIEWS, "prompt_lr": 3e38, "seed": 0},
    {"task": LENGTHS, "prompt_lr": 0.02, "seed": 3},
    {"task": LENGTHS, "prompt_lr": 0.1, "seed": 4},
]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Population:
    return train_population(backbone_of("llama"), METHOD, None, tmp_path_factory.mktemp("mixed"), MIXED, **SMALL)


@pytest.mark.parametrize("number", [0, 2])
def test_a_member_ends_as_if_it_had_been_alone(mixed: Population, tmp_path: pathlib.Path, number: int) -> None:
    """Beside members of another task, with other labels, and beside one that diverges."""
    own = {name: value for name, value in MIXED[number].items() if name != "task"}
    alone = train(backbone_of("llama"), METHOD, MIXED[number]["task"], tmp_path, **SMALL, **own)
    folder = mixed.workdir / "members" / mixed.members[number].name
    prompt = Prompt.load(folder / "prompt")
    assert alone.prompt is not None
    assert prompt.metrics == alone.prompt.metrics
    assert prompt.method == alone.prompt.method
    assert prompt.task == alone.prompt.task
    for name, value in alone.prompt.trainable["input"].items():
        np.testing.assert_allclose(prompt.trainable["input"][name], value, rtol=1e-5, atol=1e-6)
    ours, theirs = (lines(at) for at in (folder, alone.workdir))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for name in set(a) & set(b):
            assert a[name] == pytest.approx(b[name], rel=1e-4)
    assert json.loads((folder / "config.json").read_text()) == json.loads((tmp_path / "config.json").read_text())


def test_one_that_diverges_is_frozen_out_and_said_so(mixed: Population) -> None:
    ended = [member.ended for member in mixed.members]
    assert ended == ["finished", "diverged", "finished", "finished"]
    lost = mixed.members[1]
    assert lost.step < 6
    table = (mixed.workdir / "members.md").read_text()
    assert f"diverged at {lost.step}" in table
    assert json.loads((mixed.workdir / "members.json").read_text()) == [dataclasses.asdict(m) for m in mixed.members]


def test_the_best_of_each_task_is_kept(mixed: Population) -> None:
    assert set(mixed.prompts) == {"reviews", "lengths"}
    for task, prompt in mixed.prompts.items():
        saved = Prompt.load(mixed.workdir / "prompts" / task)
        assert saved.metrics == prompt.metrics
        scores = [member.score for member in mixed.members if member.task == task and member.score is not None]
        assert saved.metrics["dev/accuracy"] == max(scores)
        jax.tree.map(np.testing.assert_array_equal, saved.trainable, prompt.trainable)
    predict = Predictor(backbone_of("llama"), mixed.prompts)
    assert {answer.text for answer in predict(["a good film"], "reviews")} <= {"positive", "negative"}


def test_a_finished_population_is_returned_as_it_is(mixed: Population) -> None:
    again = train_population(backbone_of("llama"), METHOD, None, mixed.workdir, MIXED, **SMALL)
    assert again.members == mixed.members
    assert again.seconds_per_step == mixed.seconds_per_step
    assert again.finished


def test_a_members_folder_is_a_run_that_has_ended(mixed: Population) -> None:
    for number in (0, 1):
        folder = mixed.workdir / "members" / mixed.members[number].name
        before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}
        own = {name: value for name, value in MIXED[number].items() if name != "task"}
        if mixed.members[number].ended == "finished":
            run = train(backbone_of("llama"), METHOD, MIXED[number]["task"], folder, **SMALL, **own)
            assert (run.finished, run.step) == (True, 6)
            assert run.prompt is not None
            assert run.prompt.metrics == mixed.members[number].metrics
        else:
            with pytest.raises(UserError, match=r"ended early \(diverged\)"):
                train(backbone_of("llama"), METHOD, MIXED[number]["task"], folder, **SMALL, **own)
        assert {file: file.read_bytes() for file in before} == before


HALVED = grid(prompt_lr=[0.01, 0.1], seed=[0, 1])


def halved(folder: pathlib.Path) -> Population:
    settings = {**SMALL, "steps": 16, "eval_every": 8, "checkpoint_every": 5}
    return train_population(backbone_of("llama"), METHOD, review_task(), folder, HALVED, halving=2, **settings)


def test_halving_cuts_and_goes_on_after_a_signal(tmp_path: pathlib.Path) -> None:
    unbroken = halved(tmp_path / "a")
    assert sorted((member.ended, member.step) for member in unbroken.members) == [
        ("cut", 4),
        ("cut", 4),
        ("cut", 8),
        ("finished", 16),
    ]
    best = max(unbroken.members, key=lambda member: member.score or 0)
    (prompt,) = unbroken.prompts.values()
    assert prompt.metrics["dev/accuracy"] == best.score
    assert Prompt.load(unbroken.workdir / "prompt").metrics == prompt.metrics

    def stop() -> None:
        while not (log.exists() and '"step": 6' in log.read_text()) and not done.wait(0.001):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    done = threading.Event()
    logs = [tmp_path / "b" / "members" / member.name / "metrics.jsonl" for member in unbroken.members]
    log = logs[[member.ended for member in unbroken.members].index("finished")]
    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    broken = halved(tmp_path / "b")
    thread.join(timeout=60)
    assert not broken.finished
    assert broken.signal == signal.SIGTERM
    assert 6 <= broken.step < 16
    assert not (tmp_path / "b" / "result.json").exists()
    whole = halved(tmp_path / "b")
    assert whole.finished
    assert whole.members == unbroken.members
    for member in unbroken.members:
        places = [tmp_path / name / "members" / member.name for name in ("a", "b")]
        assert len({(place / "prompt" / "prompt.safetensors").read_bytes() for place in places}) == 1
        assert len({(place / "metrics.jsonl").read_text() for place in places}) == 1


def test_stacks_of_members() -> None:
    states = [TrainState.create({"a": jnp.full(3, i)}, optimizer_of_a(), jax.random.key(i)) for i in range(4)]
    stacked = stack_where(stack_states(states), [1, 3])
    assert stacked.step.shape == ()
    np.testing.assert_array_equal(stacked.trainable["a"], [[1, 1, 1], [3, 3, 3]])
    assert jax.random.key_data(stacked.key).tolist() == [jax.random.key_data(states[i].key).tolist() for i in (1, 3)]
    short = {"source": np.ones((2, 3), np.int32), "label": np.arange(2)}
    long = {"source": np.ones((2, 5), np.int32), "label": np.arange(2) + 5}
    batch = stack_batches([short, long])
    np.testing.assert_array_equal(batch["source"][0], [[1, 1, 1, 0, 0]] * 2)
    np.testing.assert_array_equal(batch["label"], [[0, 1], [5, 6]])


def optimizer_of_a() -> Any:
    return make_optimizer({"prompt": lambda step: 0.1}, {"a": "prompt"})


def test_a_method_is_given_and_not_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="method is a str; give one with its sizes"):
        train_population(backbone_of("llama"), "dept", review_task(), tmp_path, [{"seed": 0}])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("members", "settings", "told"),
    [
        ([{"prompt_length": 6}, {"prompt_length": 7}], {}, "member 'prompt_length=7' has prompt_length 7, not 6"),
        ([{"alpha": 8.0}, {"alpha": 4.0}], {}, "member 'alpha=4' has a method that computes something else"),
        ([{"seed": 0}], {"halving": 1}, "halving is 1"),
        ([{"seed": 0}], {"halving": 2, "eval_every": 0}, "halving compares members on the dev split"),
        ([{"backbone_lr": 0.1}], {}, "backbone_lr: method 'dept' trains no such parameters"),
        ([{"prompt_lr": -1.0}], {}, "prompt_lr is -1.0"),
    ],
)
def test_populations_that_cannot_be(
    tmp_path: pathlib.Path, members: list[dict[str, Any]], settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        train_population(
            backbone_of("llama"), METHOD, review_task(), tmp_path / "run", members, **{**SMALL, **settings}
        )
    assert not (tmp_path / "run").exists()


def test_members_drop_out_alike(tmp_path: pathlib.Path) -> None:
    """One program trains them all, with one rate; saved, they may be stacked whatever it was."""
    members = [{"encoding_dropout": 0.1}, {"encoding_dropout": 0.5}]
    lopa = LoPA(prompt_length=2, rank=1, hidden=4)
    with pytest.raises(UserError, match=r"member .encoding_dropout=0\.5. has encoding_dropout 0\.5, not 0\.1"):
        train_population(backbone_of("llama"), lopa, review_task(), tmp_path / "run", members, **SMALL)
    assert not (tmp_path / "run").exists()


def test_losses_of_two_kinds_are_told_apart(tmp_path: pathlib.Path) -> None:
    long = dataclasses.replace(LENGTHS, name="long", verbalizers={"one": "one film"})
    members = [{"task": REVIEWS}, {"task": long}]
    with pytest.raises(UserError, match="the loss of task 'reviews' and that of 'long' differ"):
        train_population(backbone_of("llama"), METHOD, None, tmp_path / "run", members, **SMALL)


def test_a_task_without_dev_rows_beside_one_that_has_some(tmp_path: pathlib.Path) -> None:
    """Each task's members are evaluated, or not, as they would be alone."""
    blind = dataclasses.replace(REVIEWS, name="blind", source=MemorySource(review_rows(30), dev_size=0))
    members = [{"task": REVIEWS}, {"task": blind}]
    population = train_population(backbone_of("llama"), METHOD, None, tmp_path / "both", members, **SMALL)
    seen, unseen = population.members
    assert seen.score is not None
    assert (unseen.score, unseen.best_step) == (None, SMALL["steps"])
    for number, task in enumerate((REVIEWS, blind)):
        alone = train(backbone_of("llama"), METHOD, task, tmp_path / task.name, **SMALL).prompt
        assert alone is not None
        kept = Prompt.load(population.place(task.name))
        assert kept.metrics == alone.metrics == population.members[number].metrics
        for name, value in alone.trainable["input"].items():
            np.testing.assert_allclose(kept.trainable["input"][name], value, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="halving compares members on the dev split"):
        train_population(backbone_of("llama"), METHOD, None, tmp_path / "run", members, halving=2, **SMALL)


def test_what_was_good_before_all_diverged_is_kept(tmp_path: pathlib.Path) -> None:
    members = grid(prompt_lr=[2e38, 3e38])
    settings = {**SMALL, "steps": 30, "eval_every": 1}
    asked = (backbone_of("llama"), PromptTuning(prompt_length=4), review_task(), tmp_path, members)
    population = train_population(*asked, **settings)
    assert [member.ended for member in population.members] == ["diverged", "diverged"]
    assert population.finished
    assert population.step < 30
    assert Prompt.load(population.place("reviews")).metrics == population.prompts["reviews"].metrics
    assert population.prompts["reviews"].metrics["dev/accuracy"] == max(m.score or 0 for m in population.members)
    assert train_population(*asked, **settings).members == population.members


def test_all_diverge(tmp_path: pathlib.Path) -> None:
    members = grid(prompt_lr=[2e38, 3e38])
    method = PromptTuning(prompt_length=4)
    with pytest.raises(UserError, match="the loss of every member is not a finite number"):
        train_population(
            backbone_of("llama"), method, review_task(), tmp_path, members, **{**SMALL, "steps": 30, "eval_every": 30}
        )
