"""Rows of a batch that have little in common: broken prompts beside whole ones, two labels beside many, any dtype."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from deptjax.inference.answers import Answer
from deptjax.inference.decoding import Decoding
from deptjax.inference.predictor import Predictor
from deptjax.methods import DePT
from deptjax.prompt import Prompt
from deptjax.testing import WORDS, tiny_llama, tiny_t5
from tests.cases import Case, backbone_of, case_of, make_case
from tests.reviews import review_prompt
from tests.sharding.process import cpu_devices

# Of one length, so that each way of answering is one program.
TEXTS = [f"the film is {word} and {other}" for word in ("good", "very", "dull") for other in ("sad", "happy")]
DEPT = DePT(prompt_length=3, rank=2, max_length=13, prompt_init="vocab")
MANY = {"labels": tuple(f"{a} {b}" for a in WORDS[:11] for b in WORDS[:11]), "target": "{label}"}  # share first tokens
THREE = {"labels": ("very good", "very bad", "very good story")}
FREE = {"labels": (), "target": "the film is {label}", "max_target_length": 4}


@functools.cache
def trained(family: str, method: DePT) -> Case:
    return make_case(backbone_of(family), method)


def prompt_of(family: str, method: DePT = DEPT, **fields: object) -> Prompt:
    return review_prompt(trained(family, method), method.max_length, **fields)


def no_numbers(task: str) -> str:
    """Returns what the user is told of such a prompt."""
    return f"task '{task}': the scores are not finite, so its answers mean nothing; tune it again"


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_prompt_that_computes_no_numbers_touches_no_other_row(family: str, caplog: pytest.LogCaptureFixture) -> None:
    """Its vectors are finite, and too large for anything behind them to be. It is told of, once."""
    whole = {"labels": prompt_of(family), "free": prompt_of(family, **FREE)}

    def broken(prompt: Prompt) -> Prompt:
        return dataclasses.replace(prompt, trainable=jax.tree.map(lambda a: np.full_like(a, 3e38), prompt.trainable))

    predict = Predictor(
        backbone_of(family), {**whole, **{f"bad {k}": broken(p) for k, p in whole.items()}}, batch_size=4
    )
    pairs = [*TEXTS[:2], *TEXTS[:2], *TEXTS[:4]]
    for name in whole:
        alone = predict(pairs, name)
        mixed = predict(pairs, [name] * 4 + [f"bad {name}"] * 4)
        assert mixed[:4] == alone[:4]
        if name != "free":
            assert all(np.isnan(list(answer.scores.values())).all() for answer in mixed[4:] if answer.scores)
    beams = Decoding(max_new_tokens=3, num_beams=2)
    generated = predict.generate(pairs, ["free"] * 4 + ["bad free"] * 4, beams)
    assert generated[:4] == predict.generate(pairs, "free", beams)[:4]
    assert caplog.messages == [no_numbers("bad labels"), no_numbers("bad free")]
    predict.add("bad labels", broken(whole["labels"]))  # a new prompt is told of anew, also by `score`
    predict.score(TEXTS[:2], ["good"], ["labels", "bad labels"])
    assert caplog.messages[2:] == [no_numbers("bad labels")]


def test_many_labels_beside_two() -> None:
    """Labels share their first tokens, and one is the beginning of another."""
    prompts = {name: prompt_of("llama", **fields) for name, fields in (("many", MANY), ("three", THREE), ("two", {}))}
    predict = Predictor(backbone_of("llama"), prompts, batch_size=4)
    mixed = predict(TEXTS[:4] * 3, [name for name in prompts for _ in range(4)])
    for at, name in enumerate(prompts):
        alone = Predictor(backbone_of("llama"), prompts[name], batch_size=4)(TEXTS[:4])
        for answer, one in zip(mixed[at * 4 : at * 4 + 4], alone, strict=True):
            assert answer.text == one.text
            assert answer.scores == pytest.approx(one.scores, abs=1e-5)
    assert len(mixed[0].scores or ()) == 121
    for text, answer in zip(TEXTS, mixed[4:8], strict=False):
        (likely,) = predict.score([text], THREE["labels"], "three")
        shares = np.exp(list(likely.values()))
        np.testing.assert_allclose(list((answer.scores or {}).values()), shares / shares.sum(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_lengths_from_one_token_to_hundreds_and_batches_of_one(family: str) -> None:
    long = DePT(prompt_length=5, rank=2, max_length=200, prompt_init="vocab")
    prompts = {"short": prompt_of(family, input="{text}"), "long": prompt_of(family, long, input="{text}")}
    texts = ["good", " ".join(["the film is good"] * 40), "bad story", "a " * 12 + "fine"]
    names = ["short", "long", "long", "short"]
    one_by_one, together = (Predictor(backbone_of(family), prompts, batch_size=size)(texts, names) for size in (1, 4))
    for one, answer in zip(one_by_one, together, strict=True):
        assert answer.scores == pytest.approx(one.scores, abs=1e-5)


def test_any_iterable_and_numpys_texts() -> None:
    predict = Predictor(backbone_of("llama"), {"a": prompt_of("llama"), "b": prompt_of("llama", **FREE)})
    wanted = predict(TEXTS, [*"ababab"])
    assert predict((text for text in TEXTS), iter("ababab")) == wanted
    assert predict(np.asarray(TEXTS), np.asarray([*"ababab"])) == wanted
    assert predict(tuple({"text": text} for text in TEXTS), np.asarray([*"ababab"], object)) == wanted
    assert predict.score(iter(TEXTS[:2]), iter(["good"]), np.str_("a")) == predict.score(TEXTS[:2], ["good"], "a")
    assert predict([], []) == predict.generate(iter(()), "a") == predict.score((), ["good"], "a") == []


@pytest.mark.parametrize(("family", "scan"), [("llama", True), ("t5", False)])
def test_a_bfloat16_backbone_answers_as_the_float32_one_does(family: str, scan: bool) -> None:
    """Labels, label sequences, text and beams. bfloat16 has 8 bits: probabilities agree to a few hundredths."""
    make = {"llama": tiny_llama, "t5": tiny_t5}[family]
    single = make(scan_layers=scan)
    params = jax.tree.map(lambda a: a.astype("bfloat16"), single.params)
    narrow = dataclasses.replace(make(scan_layers=scan, dtype="bfloat16"), params=params)
    small = dataclasses.replace(DEPT, prompt_length=2)
    prompts = {"two": prompt_of(family), "small": prompt_of(family, small), "three": prompt_of(family, **THREE)}
    names = [name for name in prompts for _ in TEXTS]
    predict = Predictor(narrow, {**prompts, "free": prompt_of(family, **FREE)}, batch_size=8)
    differences = [
        abs(answer.scores[label] - one.scores[label])
        for answer, one in zip(predict(TEXTS * 3, names), Predictor(single, prompts, 8)(TEXTS * 3, names), strict=True)
        if answer.scores and one.scores
        for label in one.scores
    ]
    assert len(differences) == 6 * (2 + 2 + 3)
    assert np.mean(differences) < 0.05
    written = [answer.candidates[0] for answer in predict(TEXTS, "free")]
    assert all(0 < len(one.tokens) <= 4 and np.isfinite(one.score) for one in written)
    beams = predict.generate(TEXTS, "two", Decoding(max_new_tokens=4, num_beams=3, num_return=2))
    assert all(np.isfinite(one.score) for candidates in beams for one in candidates)


SCRIPT = """
import sys, jax
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
from tests.inference import mixed_batch_test
mixed_batch_test.answers_on_other_devices()
"""


def answers_on_other_devices() -> None:
    """Asks backbones that lie on a mesh of two devices, and on the one that is not the default."""
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    assert jax.device_count() == 2
    mesh = NamedSharding(Mesh(np.asarray(jax.devices()), ("data",)), PartitionSpec())
    for family in ("llama", "t5"):
        others = {name: review_prompt(case_of(family, name)) for name in ("lora", "prompt_tuning")}
        prompts = {"two": prompt_of(family), **others}
        wanted: list[Answer] = []
        for place in (jax.devices()[0], jax.devices()[1], mesh):
            backbone = dataclasses.replace(
                backbone_of(family), params=jax.device_put(backbone_of(family).params, place)
            )
            found = Predictor(backbone, prompts, batch_size=4)(TEXTS[:4], ["two", "lora", "prompt_tuning", "lora"])
            wanted = wanted or found
            for answer, one in zip(found, wanted, strict=True):
                assert answer.text == one.text
                assert answer.scores == pytest.approx(one.scores, abs=1e-5)


def test_backbones_on_a_mesh_and_on_another_device_than_the_default() -> None:
    root = pathlib.Path(__file__).parents[2]
    env = {
        **os.environ,
        "PYTHONPATH": str(root),
        "XLA_FLAGS": cpu_devices(2),
    }
    command = [sys.executable, "-c", SCRIPT, jax.config.jax_compilation_cache_dir]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
