"""A prompt that tasks share: its loss, its tasks' own parts, teachers that stay, a target that starts from it."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.inference.predictor import Predictor, evaluate
from deptjax.methods import MPT, LoRA, PromptTuning
from deptjax.models.prompted import PromptedModel
from deptjax.prompt import Prompt
from deptjax.training.run import Run, train
from deptjax.training.shared import InTurn, distilled, make_shared_loss, of_task, train_shared
from tests.cases import backbone_of, case_of, some_batch
from tests.reviews import review_task

LENGTH = 5
SMALL: dict[str, Any] = {"steps": 4, "batch_size": 4, "eval_every": 2, "checkpoint_every": 2, "buckets": 1}
SMALL |= {"log_every": 2, "progress": False}
TASKS = [dataclasses.replace(review_task(), name=name) for name in ("films", "books")]


def teacher(factor: float = 1.0) -> Prompt:
    prompt = case_of("llama", "prompt_tuning").prompt()
    return dataclasses.replace(prompt, trainable=jax.tree.map(lambda leaf: factor * leaf, prompt.trainable))


TEACHERS = {"films": teacher(), "books": teacher(-1.0)}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_shared(backbone_of("llama"), TASKS, TEACHERS, tmp_path_factory.mktemp("shared") / "run", **SMALL)


def test_what_teachers_say_is_the_papers() -> None:
    random = np.random.default_rng(0)
    logits, taught = (random.standard_normal((2, 3, 7)).astype(np.float32) for _ in range(2))
    states, theirs = (random.standard_normal((2, 3, 5)).astype(np.float32) for _ in range(2))
    counts = np.array([[1, 1, 0], [1, 0, 0]], np.float32)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (logits, taught))
    wanted = ((q * np.log(q / p)).sum(-1) + ((states - theirs) ** 2).mean(-1))[counts > 0].mean()
    got = distilled(*map(jnp.asarray, (logits, states, taught, theirs, counts)))
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_a_batch_moves_what_is_shared_and_its_own_task() -> None:
    backbone = backbone_of("llama")
    model, plain = (PromptedModel.build(backbone, method) for method in (MPT(LENGTH), PromptTuning(LENGTH)))
    prompts = np.stack([TEACHERS[task.name].trainable["input"]["prompt"] for task in TASKS])
    own = {"prompt": prompts[0], "u": np.ones((2, LENGTH)), "v": np.ones((2, 24)), "teachers": prompts}
    trainable = {"input": {name: jnp.asarray(leaf, jnp.float32) for name, leaf in own.items()}}
    batch = {**some_batch(), "task": jnp.full(3, 1)}
    losses = {d: make_shared_loss(model, plain, d, dropout=False) for d in (0.0, 1.0)}
    grads = jax.jit(jax.grad(losses[1.0]))(trainable, backbone.params, batch, None)["input"]
    for name in ("u", "v"):
        assert not np.any(grads[name][0])
        assert np.any(grads[name][1])
    assert np.any(grads["prompt"])
    assert not np.any(grads["teachers"])
    # The first task's parts are its teacher, which has nothing to say then.
    alike = {**batch, "task": jnp.full(3, 0)}
    values = [float(jax.jit(loss)(trainable, backbone.params, alike, None)) for loss in losses.values()]
    assert values[0] == pytest.approx(values[1], abs=1e-5)


def test_streams_take_turns_and_go_on_where_they_were() -> None:
    class Count:
        def __init__(self, start: int) -> None:
            self.at = start

        def __next__(self) -> dict[str, Any]:
            self.at += 1
            return {"label": np.array([self.at])}

        def get_state(self) -> int:
            return self.at

        def set_state(self, state: int) -> None:
            self.at = state

    def drawn(batches: InTurn, count: int) -> list[tuple[int, int]]:
        found = [next(batches) for _ in range(count)]
        return [(int(batch["task"][0]), int(batch["label"][0])) for batch in found]

    one: Any = [Count(0), Count(10)]
    batches = InTurn(one)
    assert drawn(batches, 3) == [(0, 1), (1, 11), (0, 2)]
    state = batches.get_state()
    rest = drawn(batches, 3)
    again = InTurn([Count(0), Count(0)])  # type: ignore[list-item]
    again.set_state(state)
    assert drawn(again, 3) == rest


def test_it_leaves_a_start_and_each_tasks_prompt(shared: Run) -> None:
    assert shared.finished
    assert shared.trainable_parameters == LENGTH * 24 + 2 * (LENGTH + 24)
    start = Prompt.load(shared.workdir / "prompt")
    assert isinstance(start.method, MPT)
    assert {name: leaf.shape for name, leaf in start.trainable["input"].items()} == {
        "prompt": (LENGTH, 24),
        "u": (LENGTH,),
        "v": (24,),
    }
    assert set(start.metrics) == {"dev/mean", "dev/films/accuracy", "dev/books/accuracy"}
    for task in TASKS:
        own = Prompt.load(shared.workdir / "prompts" / task.name)
        assert isinstance(own.method, PromptTuning)
        assert own.metrics == {"dev/accuracy": start.metrics[f"dev/{task.name}/accuracy"]}
        assert evaluate(backbone_of("llama"), own, task, split="dev") == pytest.approx(own.metrics)


def test_a_killed_run_goes_on_bit_for_bit(shared: Run, tmp_path: pathlib.Path) -> None:
    shutil.copytree(shared.workdir, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    again = train_shared(backbone_of("llama"), TASKS, TEACHERS, tmp_path / "run", **SMALL)
    assert again.prompt is not None
    assert shared.prompt is not None
    jax.tree.map(np.testing.assert_array_equal, again.prompt.trainable, shared.prompt.trainable)


def test_a_target_task_starts_from_it(shared: Run, tmp_path: pathlib.Path) -> None:
    start = Prompt.load(shared.workdir / "prompt").trainable["input"]
    settings = {**SMALL, "steps": 1, "eval_every": 0, "prompt_lr": 1e-12, "low_rank_lr": 1e-12}
    run = train(
        backbone_of("llama"),
        MPT(LENGTH),
        review_task(),
        tmp_path / "run",
        start_from=str(shared.workdir / "prompt"),
        **settings,
    )
    assert run.prompt is not None
    wanted = start["prompt"] * np.outer(start["u"], start["v"])
    np.testing.assert_allclose(run.prompt.trainable["input"]["prompt"], wanted, rtol=1e-5, atol=1e-6)
    plain, place = PromptTuning(LENGTH), str(shared.workdir / "prompt")  # another method has what the parts make
    del settings["low_rank_lr"]
    other = train(backbone_of("llama"), plain, review_task(), tmp_path / "other", start_from=place, **settings)
    assert other.prompt is not None
    np.testing.assert_allclose(other.prompt.trainable["input"]["prompt"], wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="is shared by tasks, for runs to start from"):
        Predictor(backbone_of("llama"), shared.workdir / "prompt")
    assert of_task({"input": {"prompt": 1, "u": [2, 3], "v": [4, 5]}}, 1) == {"input": {"prompt": 1, "u": 3, "v": 5}}


def test_mistakes(tmp_path: pathlib.Path) -> None:
    def told(tasks: Any = TASKS, teachers: Any = TEACHERS, **fields: Any) -> str:
        with pytest.raises(UserError) as caught:
            train_shared(backbone_of("llama"), tasks, teachers, tmp_path / "run", **{**SMALL, **fields})
        assert not (tmp_path / "run").exists()
        return str(caught.value)

    assert "give two or more with different names" in told(tasks=TASKS[:1])
    assert "teachers are for films; give one for each of films, books" in told(teachers={"films": teacher()})
    assert "has 5 vectors, and the shared prompt (prompt_length) 4" in told(method=MPT(4))
    lora = case_of("llama", "lora").prompt()
    assert "is of method 'lora', and a teacher is a soft prompt and nothing else" in told(
        teachers={**TEACHERS, "books": lora}
    )
    assert "distill is -1; it must be 0 or more" in told(distill=-1)
    assert "distill is 'x'; it must be 0 or more" in told(distill="x")
    assert "method is PromptTuning; train_shared tunes an MPT" in told(method=PromptTuning(5))
    assert "method is LoRA; train_shared tunes an MPT" in told(method=LoRA())
    assert "method is a str; give one with its sizes" in told(method="mpt")
    assert "loss is 'labels'; what teachers say is of the whole vocabulary" in told(loss="labels")
    names = {"films": teacher(), "../books": teacher()}
    books = dataclasses.replace(TASKS[1], name="../books")
    assert "task '../books' cannot name a folder" in told([TASKS[0], books], names)
