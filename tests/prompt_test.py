"""Saved prompts: written whole or not at all, read back bit for bit, and refused with a reason."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.methods import DePT, FullFineTuning, LoRA
from deptjax.prompt import Prompt, recover_folder, replace_folder
from deptjax.testing import tiny_llama
from tests.cases import backbone_of

RANDOM = np.random.default_rng(0)


def some_prompt(scale: float = 1.0) -> Prompt:
    backbone = backbone_of("llama")
    shapes = {"prompt": (3, 24), "lora_a": (7, 2), "lora_b": (2, 24)}
    values = {name: (scale * np.ones(shape) / 3).astype(np.float32) for name, shape in shapes.items()}
    return Prompt(
        method=DePT(prompt_length=3, rank=2, max_length=7),
        trainable={"input": values},
        backbone=backbone.name,
        fingerprint=backbone.fingerprint,
        task={"name": "reviews", "input": "{text}", "labels": ["a", "é\n"]},
        metrics={"dev/accuracy": 0.1 + 0.2},
        settings={"max_length": 7},
    )


def assert_same(got: Prompt, wanted: Prompt) -> None:
    assert jax.tree.structure(got.trainable) == jax.tree.structure(wanted.trainable)
    for a, b in zip(jax.tree.leaves(got.trainable), jax.tree.leaves(wanted.trainable), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    for field in ("method", "backbone", "fingerprint", "task", "metrics", "settings"):
        assert getattr(got, field) == getattr(wanted, field)


def test_round_trip(tmp_path: pathlib.Path) -> None:
    wanted = some_prompt()
    folder = wanted.save(tmp_path / "a" / "prompt")
    assert {p.name for p in folder.iterdir()} == {"prompt.safetensors", "prompt.json"}
    assert_same(Prompt.load(folder), wanted)
    assert wanted.size() == 4 * (3 * 24 + (7 + 24) * 2)
    card = json.loads((folder / "prompt.json").read_text())
    assert card["format"] == 1
    assert {"deptjax", "jax", "flax"} <= set(card["versions"])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_round_trip_of_nested_trees_and_small_types(tmp_path: pathlib.Path, dtype: type) -> None:
    leaf = RANDOM.standard_normal((5, 3)).astype(dtype)
    tree = {"backbone": {"layers_0": {"attention": {"query": {"site": {"lora_a": leaf, "lora_b": leaf.T}}}}}}
    wanted = dataclasses.replace(some_prompt(), method=LoRA(rank=3), trainable=tree)
    assert_same(Prompt.load(wanted.save(tmp_path / "prompt")), wanted)


def test_run_id_depends_on_the_parameters_and_the_configuration(tmp_path: pathlib.Path) -> None:
    def run_id(prompt: Prompt) -> str:
        return Prompt.load(prompt.save(tmp_path / "prompt")).run_id

    first = run_id(some_prompt())
    assert len(first) == 12
    assert int(first, 16) >= 0
    assert run_id(some_prompt()) == first
    changed = [
        some_prompt(scale=1.0001),
        dataclasses.replace(some_prompt(), method=DePT(prompt_length=3, rank=2, max_length=7, alpha=4.0)),
        dataclasses.replace(some_prompt(), settings={"max_length": 6}),
        dataclasses.replace(some_prompt(), task={"name": "other"}),
    ]
    assert len({first, *map(run_id, changed)}) == 5
    # A prompt that was loaded, changed, and saved again has an identity of its own.
    loaded = Prompt.load(some_prompt().save(tmp_path / "prompt"))
    assert run_id(loaded) == first
    assert run_id(dataclasses.replace(loaded, trainable=some_prompt(2.0).trainable)) != first


def test_save_replaces_and_leaves_nothing_beside(tmp_path: pathlib.Path) -> None:
    some_prompt(1).save(tmp_path / "prompt")
    some_prompt(2).save(tmp_path / "prompt")
    assert_same(Prompt.load(tmp_path / "prompt"), some_prompt(2))
    assert [p.name for p in tmp_path.iterdir()] == ["prompt"]


def test_nothing_but_a_prompt_is_replaced(tmp_path: pathlib.Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds 'thesis.tex', which is no part of a prompt; name another folder"):
        some_prompt().save(tmp_path / "models")
    with pytest.raises(UserError, match=r"thesis.tex is a file; name a folder"):
        some_prompt().save(tmp_path / "models" / "thesis.tex")
    assert (tmp_path / "models" / "thesis.tex").read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["models"]
    (tmp_path / "empty").mkdir()
    assert_same(Prompt.load(some_prompt().save(tmp_path / "empty")), some_prompt())


def test_cut_off_between_the_two_renames_the_old_one_comes_back(tmp_path: pathlib.Path) -> None:
    folder, aside = tmp_path / "prompt", tmp_path / ".prompt.old"
    some_prompt(1).save(folder)
    some_prompt(2).save(tmp_path / ".prompt.1.new")
    os.replace(folder, aside)  # where a crash may leave it
    assert_same(Prompt.load(folder), some_prompt(1))
    assert aside.exists()  # a reader moves nothing: the run may be between the two renames at this moment
    os.replace(tmp_path / ".prompt.1.new", tmp_path / "kept")
    (tmp_path / ".prompt.2.new").mkdir()  # what a save leaves that is killed
    recover_folder(folder)
    assert_same(Prompt.load(folder), some_prompt(1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept", "prompt"]
    os.replace(tmp_path / "kept", tmp_path / ".prompt.1.new")
    replace_folder(tmp_path / ".prompt.1.new", folder)
    assert_same(Prompt.load(folder), some_prompt(2))
    assert [p.name for p in tmp_path.iterdir()] == ["prompt"]


def test_an_old_one_left_beside_a_new_one_is_not_brought_back(tmp_path: pathlib.Path) -> None:
    some_prompt(2).save(tmp_path / "prompt")
    some_prompt(1).save(tmp_path / ".prompt.old")
    assert_same(Prompt.load(tmp_path / "prompt"), some_prompt(2))
    some_prompt(3).save(tmp_path / "prompt")
    assert_same(Prompt.load(tmp_path / "prompt"), some_prompt(3))
    assert [p.name for p in tmp_path.iterdir()] == ["prompt"]


def test_missing_and_damaged_files_are_told(tmp_path: pathlib.Path) -> None:
    def told(folder: pathlib.Path) -> str:
        with pytest.raises(UserError) as caught:
            Prompt.load(folder)
        assert "\n" not in str(caught.value)
        assert str(folder) in str(caught.value)
        return str(caught.value)

    assert "is not a saved prompt" in told(tmp_path / "nothing")
    folder = some_prompt().save(tmp_path / "prompt")
    tensors, card = (folder / name for name in ("prompt.safetensors", "prompt.json"))
    good, text = tensors.read_bytes(), card.read_text()
    tensors.write_bytes(good[:-5])
    told(folder)
    tensors.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert "do not belong together" in told(folder)
    tensors.write_bytes(good)
    card.write_text(text[:-9])
    assert "is not JSON" in told(folder)
    for broken in ({}, [], {**json.loads(text), "method": {"method": "dtep"}}, {**json.loads(text), "method": {}}):
        card.write_text(json.dumps(broken))
        told(folder)
    card.unlink()
    assert "it has no prompt.json" in told(folder)


def test_the_backbone_must_be_the_one_it_was_tuned_on() -> None:
    prompt = some_prompt()
    prompt.check_backbone(backbone_of("llama"))
    prompt.check_backbone(backbone_of("llama", scan=True))  # the same function, computed in another way
    with pytest.raises(UserError, match="this prompt was tuned on 'tiny-llama', not on 'tiny-llama': embedding is"):
        prompt.check_backbone(tiny_llama(seed=1))
    with pytest.raises(
        UserError, match=r"runs/x was tuned on 'tiny-llama', not on 'tiny-t5': .*family is t5, not llama"
    ):
        prompt.check_backbone(backbone_of("t5"), "runs/x")


def test_a_whole_backbone_is_saved_when_it_was_tuned(tmp_path: pathlib.Path) -> None:
    backbone = backbone_of("t5")
    tree = jax.tree.map(np.asarray, {"backbone": backbone.params})
    wanted = dataclasses.replace(some_prompt(), method=FullFineTuning(), trainable=tree)
    assert_same(Prompt.load(wanted.save(tmp_path / "prompt")), wanted)
