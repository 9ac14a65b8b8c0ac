"""What bad input gets from a predictor that serves: one line that names the thing, and the same answers afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from deptjax.errors import UserError
from deptjax.inference.decoding import Decoding
from deptjax.inference.predictor import Predictor, evaluate
from deptjax.inference.prompt_bank import PromptBank
from deptjax.interop.prompts import export_prompt
from deptjax.methods import DePT
from deptjax.prompt import Prompt
from deptjax.testing import tiny_llama
from tests.cases import backbone_of, case_of, make_case
from tests.reviews import review_prompt, review_rows, review_task

TEXTS = [row["text"] for row in review_rows(3, seed=5)]
Change = Callable[[dict[str, Any]], object]


def prompt_of(method: str, **fields: object) -> Prompt:
    return review_prompt(case_of("llama", method), **fields)


@pytest.fixture(scope="module")
def predict() -> Predictor:
    """A predictor that serves two tasks, for all tests: each must leave it as it was."""
    text = prompt_of("dept", labels=(), target="the film is {label}", max_target_length=3)
    return Predictor(backbone_of("llama"), {"reviews": prompt_of("dept"), "words": text}, batch_size=4)


@pytest.fixture(scope="module")
def wanted(predict: Predictor) -> list[Any]:
    """Its answers before anything went wrong."""
    return predict(TEXTS, "reviews") + predict(TEXTS, "words")


@pytest.fixture(autouse=True)
def still_serves(predict: Predictor, wanted: list[Any]) -> Iterator[None]:
    """Holds every test to it: the same answers, tasks and places, and no call that is still counted."""
    yield
    assert predict.tasks == ["reviews", "words"]
    assert predict(TEXTS, "reviews") + predict(TEXTS, "words") == wanted
    for served in predict._served.tasks.values():
        assert not served.calls
        assert isinstance(served.bank, PromptBank)
        assert len(served.bank) == 2


@contextlib.contextmanager
def told(*parts: str) -> Iterator[None]:
    """Expects a `UserError` of one line that holds these texts."""
    with pytest.raises(UserError) as caught:
        yield
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert part in line


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return prompt_of("dept").save(tmp_path / "prompt")


def resaved(folder: pathlib.Path, **fields: Any) -> pathlib.Path:
    """Returns the folder with other fields, and a run_id that agrees with them."""
    return dataclasses.replace(Prompt.load(folder), **fields).save(folder)


def test_a_truncated_file(predict: Predictor, folder: pathlib.Path) -> None:
    tensors = folder / "prompt.safetensors"
    whole = tensors.read_bytes()
    for size in (0, 7, 100, len(whole) - 1):
        tensors.write_bytes(whole[:size])
        with told(str(tensors), "damaged"):
            predict.add("new", folder)
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with told(str(tensors), "do not belong together"):
        predict.add("reviews", folder)


def test_a_foreign_file(predict: Predictor, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (folder / "prompt.safetensors").write_bytes(b"PK\x03\x04 this is a zip, say" * 9)
    with told("prompt.safetensors is damaged"):
        predict.add("new", folder)
    for name, text, part in (
        ("x.txt", "hello", "x.txt: files that end in '.txt' are not read"),
        ("x.npz", "hello", "x.npz"),
        ("x.safetensors", "hello", "x.safetensors"),
        ("x.pt", "hello", "x.pt"),
    ):
        (tmp_path / name).write_text(text)
        with told(part):
            predict.add("new", tmp_path / name)


CARDS = {
    "hello": "prompt.json is not JSON: line 1",
    "": "prompt.json is not JSON: line 1",
    "[" * 100_000: "prompt.json",
    "\udcff": "prompt.json",
    "[]": "prompt.json: it holds a list, expected an object",
    "3": "prompt.json: it holds a int, expected an object",
    "{}": "prompt.json has no field 'run_id'",
}


@pytest.mark.parametrize("card", CARDS)
def test_json_that_is_no_card(predict: Predictor, folder: pathlib.Path, card: str) -> None:
    (folder / "prompt.json").write_bytes(card.encode(errors="surrogateescape"))
    with told(CARDS[card]):
        predict.add("new", folder)


FIELDS: list[tuple[str, object, str]] = [
    ("method", "dept", "field method is a str, expected an object"),
    ("method", {"method": "detp"}, "unknown method 'detp'; there are: "),
    ("method", {}, "has no field 'method'"),
    ("task", None, "field task is a NoneType, expected an object"),
    ("settings", [13], "field settings is a list, expected an object"),
    ("metrics", 1.0, "field metrics is a float, expected an object"),
    ("run_id", 7, "field run_id is a int, expected a text"),
    ("backbone", "tiny-llama", "field backbone is a str, expected an object"),
    ("backbone", {"name": "x"}, "has no field 'fingerprint'"),
    ("backbone", {"name": 3, "fingerprint": {}}, "field backbone name is a int, expected a text"),
    ("backbone", {"name": "x", "fingerprint": []}, "field backbone fingerprint is a list, expected an object"),
    ("run_id", "0" * 12, "do not belong together"),
]


@pytest.mark.parametrize(("field", "value", "part"), FIELDS)
def test_wrong_types_in_the_card(
    predict: Predictor, folder: pathlib.Path, field: str, value: object, part: str
) -> None:
    card = json.loads((folder / "prompt.json").read_text())
    (folder / "prompt.json").write_text(json.dumps({**card, field: value}))
    with told(str(folder), part):
        predict.add("new", folder)


@pytest.mark.parametrize("field", ["run_id", "method", "backbone", "task", "settings", "metrics"])
def test_a_field_missing_in_the_card(predict: Predictor, folder: pathlib.Path, field: str) -> None:
    card = json.loads((folder / "prompt.json").read_text())
    del card[field]
    (folder / "prompt.json").write_text(json.dumps(card))
    with told(str(folder), f"has no field '{field}'"):
        predict.add("new", folder)


SETTINGS: list[tuple[dict[str, object], str]] = [
    ({}, "max_length is missing from its settings, expected a whole number of at least 1"),
    ({"max_length": "13"}, "max_length is '13' in its settings"),
    ({"max_length": 0}, "max_length is 0 in its settings"),
    ({"max_length": True}, "max_length is True in its settings"),
    ({"max_length": 14}, "max_length is 14 in its settings, and its method takes 13 tokens at most"),
    ({"max_length": 13, "evaluation": "lables"}, "evaluation is 'lables' in its settings, expected one of auto,"),
    ({"max_length": 13, "evaluation": ["auto"]}, "evaluation is ['auto'] in its settings, expected one of auto,"),
]


@pytest.mark.parametrize(("settings", "part"), SETTINGS)
def test_settings_that_cannot_be_used(
    predict: Predictor, folder: pathlib.Path, settings: dict[str, object], part: str
) -> None:
    with told(str(folder), part):
        predict.add("new", resaved(folder, settings=settings))


TASKS: list[tuple[dict[str, object], str]] = [
    ({"name": None}, "field 'name' is missing or not a text"),
    ({"input": "no column"}, "names no column"),
    ({"labels": "abc"}, "labels and metrics are lists of texts, not one text"),
    ({"labels": 3}, "task"),
    ({"labels": ["a"]}, "one label, 'a', leaves nothing to learn"),
    ({"verbalizers": ["a"]}, "task"),
    ({"metrics": 5}, "task"),
    ({"metrics": ["acuracy"]}, "Did you mean 'accuracy'?"),
    ({"max_target_length": "64"}, "task"),
    ({"max_target_length": 10_000, "labels": []}, "lower prompt_length or max_length"),
    ({"lables": []}, "'lables' is not a field of a task"),
]


@pytest.mark.parametrize(("fields", "part"), TASKS)
def test_a_task_that_is_none(predict: Predictor, folder: pathlib.Path, fields: dict[str, object], part: str) -> None:
    with told(str(folder), part):
        predict.add("new", resaved(folder, task={**Prompt.load(folder).task, **fields}))


TENSORS: dict[str, tuple[Change, str]] = {
    "shape": (
        lambda t: t.update({"input/prompt": t["input/prompt"][1:]}),
        "tensor 'input/prompt' has shape (4, 24), expected (5, 24) for 'tiny-llama'",
    ),
    "rank": (
        lambda t: t.update({"input/prompt": t["input/prompt"][None]}),
        "tensor 'input/prompt' has shape (1, 5, 24), expected (5, 24)",
    ),
    "missing": (lambda t: t.pop("input/lora_a"), "tensor 'input/lora_a' is missing, expected (13, 3)"),
    "none": (lambda t: t.clear(), "tensor 'input/"),
    "extra": (
        lambda t: t.update({"input/more": np.zeros(2, np.float32)}),
        "tensor 'input/more' has shape (2,), expected no such tensor",
    ),
    "dtype": (
        lambda t: t.update({"input/prompt": t["input/prompt"].astype(np.int32)}),
        "tensor 'input/prompt' holds what is no finite number",
    ),
    "nan": (
        lambda t: t.update({"input/lora_b": t["input/lora_b"] * np.nan}),
        "tensor 'input/lora_b' holds what is no finite number",
    ),
}


@pytest.mark.parametrize("change", TENSORS)
def test_tensors_that_are_not_the_methods(predict: Predictor, folder: pathlib.Path, change: str) -> None:
    """A folder that its writer made so, with a run_id that agrees; `Prompt`s in memory are held to the same."""
    from flax import traverse_util

    tensors = load_file(folder / "prompt.safetensors")
    TENSORS[change][0](tensors)
    wrong = resaved(folder, trainable=traverse_util.unflatten_dict(tensors, sep="/"))
    with told(str(folder), TENSORS[change][1]):
        predict.add("new", wrong)
    with told("prompt 'reviews'", TENSORS[change][1]):
        predict.add("reviews", Prompt.load(folder))
    bank = predict._served.tasks["reviews"].bank
    assert isinstance(bank, PromptBank)
    with told(str(folder), TENSORS[change][1]):
        bank.add("new", wrong)


def test_a_field_of_the_method_that_does_not_fit(predict: Predictor, folder: pathlib.Path) -> None:
    prompt = Prompt.load(folder)
    for fields, part in (
        ({"prompt_length": 10**9}, "expected (1000000000, 24)"),
        ({"prompt_length": 5.0}, "prompt_length is 5.0; it must be a whole number"),
        ({"rank": [3]}, "dept"),
        ({"scaling": "beta"}, "scaling 'beta' is not known"),
        ({"alpha": "8"}, "dept: alpha is '8'; it must be a number"),
    ):
        method = DePT(prompt_length=5, rank=3, max_length=13)
        for name, value in fields.items():
            object.__setattr__(method, name, value)
        wrong = dataclasses.replace(prompt, method=method).save(folder)
        with told(str(folder), part):
            predict.add("new", wrong)


def test_a_prompt_of_another_backbone(predict: Predictor, folder: pathlib.Path) -> None:
    with told(f"{folder} was tuned on 'tiny-llama', not on 'tiny-llama': embedding is "):
        Predictor(tiny_llama(seed=7), folder)
    wide = make_case(tiny_llama(width=48, head_dim=8), DePT(prompt_length=5, rank=3, max_length=13))
    other = dataclasses.replace(
        prompt_of("dept"), trainable=wide.trainable, fingerprint=wide.backbone.fingerprint, backbone="wide"
    )
    with told("prompt 'new' was tuned on 'wide', not on 'tiny-llama'", "width is 24, not 48"):
        predict.add("new", other)


def test_a_folder_that_is_still_being_written(predict: Predictor, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(folder, tmp_path / ".prompt.0a1b2c3d.new")
    with told(".prompt.0a1b2c3d.new", "still being written"):
        predict.add("new", tmp_path / ".prompt.0a1b2c3d.new")
    (folder / "prompt.safetensors").rename(tmp_path / "kept")
    with told(str(folder), "has no prompt.safetensors"):
        predict.add("new", folder)
    (tmp_path / "kept").rename(folder / "prompt.safetensors")
    (folder / "prompt.json").unlink()
    with told(str(folder), "it holds neither prompt.json"):
        predict.add("new", folder)
    with told(f"{tmp_path / 'nowhere'}: there is no such file or folder"):
        predict.add("new", tmp_path / "nowhere")


def test_the_folder_of_a_run_is_told_from_its_prompt(predict: Predictor, folder: pathlib.Path) -> None:
    with told(f"{folder.parent} is no prompt", f"name {folder}"):
        predict.add("new", folder.parent)


def test_a_folder_between_two_renames_is_the_old_one(
    predict: Predictor, folder: pathlib.Path, wanted: list[Any]
) -> None:
    folder.rename(folder.with_name(f".{folder.name}.old"))
    alone = Predictor(backbone_of("llama"), folder, batch_size=4)
    assert alone(TEXTS) == wanted[:3]


def test_a_link_that_leaves_the_folder(predict: Predictor, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Who may write into a folder may not have the server read other files; links to the folder are its owner's."""
    for name in ("prompt.safetensors", "prompt.json"):
        outside = tmp_path / f"outside-{name}"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)
        with told(name, "leads out of"):
            predict.add("new", folder)
        (folder / name).unlink()
        outside.rename(folder / name)
    (tmp_path / "current").symlink_to(folder)
    (folder / "v1").mkdir()
    (folder / "prompt.json").rename(folder / "v1" / "prompt.json")  # as a mounted volume has it
    (folder / "prompt.json").symlink_to("v1/prompt.json")
    predict.add("new", tmp_path / "current")
    assert predict.tasks == ["reviews", "words", "new"]
    predict.remove("new")


def test_a_path_that_the_system_refuses(predict: Predictor, folder: pathlib.Path) -> None:
    for path in (folder / ("x" * 300), folder / "x\0y"):
        with told(str(folder)):
            predict.add("new", path)


def test_what_is_no_prompt_and_no_name(predict: Predictor, folder: pathlib.Path) -> None:
    for wrong in (None, 5, b"prompt", {"a": 1}, [folder]):
        with told("prompt 'new' is a ", type(wrong).__name__, "give a Prompt, or the path of one"):
            predict.add("new", wrong)  # type: ignore[arg-type]
    for name in ("", 5, None):
        with told(f"a task is named {name!r}"):
            predict.add(name, folder)  # type: ignore[arg-type]
    with told("no prompt is loaded for task 'nobody'; there are: reviews, words."):
        predict.remove("nobody")
    with told("prompt 'prompt' is a list"):
        Predictor(backbone_of("llama"), [folder])  # type: ignore[arg-type]
    bare = Prompt.build(prompt_of("dept").method_config, prompt_of("dept").trainable, backbone_of("llama"))
    with told("prompt 'prompt': max_length is missing from its settings"):
        Predictor(backbone_of("llama"), bare)


def test_texts_that_are_none(predict: Predictor) -> None:
    for texts in (None, 5, 2.5, "fine", b"fine", {"text": "fine"}, {"fine", "dull"}, object(), np.asarray("fine")):
        with told("texts must be a list of texts, not"):
            predict(texts, "reviews")  # type: ignore[arg-type]
        with told("texts must be a list of texts, not"):
            predict.score(texts, ["good"], "reviews")  # type: ignore[arg-type]
    for text in (None, 5, b"fine", ["fine"], ("text", "fine")):
        with told("text 2 is of type", type(text).__name__):
            predict(["fine", text], "reviews")  # type: ignore[list-item]
    for text, part in (
        ("", "text 2: the text of column 'text' is empty"),
        (" \n", "text 2: the text of column 'text' is empty"),
        ("\ud800", "text 2: column 'text' holds half a character"),
        ({}, "text 2: no column 'text'"),
        ({"text": None}, "text 2: column 'text' is empty (null)"),
        ({"text": b"x"}, "text 2: column 'text' is a bytes"),
    ):
        with told(part):
            predict(["fine", text], "reviews")


def test_tasks_that_are_none(predict: Predictor) -> None:
    for task in (5, b"reviews", {"reviews": 1}, {"reviews"}, [5, 5], [None, "reviews"], object()):
        with told("task is ", "give the name of a task, or a list of names"):
            predict(["fine", "dull"], task)  # type: ignore[arg-type]
    with told("no prompt is loaded for task 'review'; there are: reviews, words. Did you mean 'reviews'?"):
        predict(["fine"], "review")
    with told("text 2: no prompt is loaded for task 'nobody'"):
        predict(["fine", "dull"], ["reviews", "nobody"])
    with told("there are 2 texts and 1 names of tasks"):
        predict(["fine", "dull"], ["reviews"])


def test_decoding_and_batches_that_are_none(predict: Predictor) -> None:
    for decoding in (5, {"max_new_tokens": 3}, "greedy"):
        with told("decoding is of type ", type(decoding).__name__):
            predict.generate(["fine"], "words", decoding)  # type: ignore[arg-type]
        with told("decoding is of type "):
            Predictor(backbone_of("llama"), {}, decoding=decoding)  # type: ignore[arg-type]
    for size in (0, -1, 2.5, "32", True, None):
        with told("batch_size is "):
            Predictor(backbone_of("llama"), {}, batch_size=size)  # type: ignore[arg-type]
    with told("on_too_long='never' must be 'cut' or 'error'"):
        Predictor(backbone_of("llama"), prompt_of("dept"), on_too_long="never")


def test_continuations_that_are_none(predict: Predictor) -> None:
    for wrong in (None, 5, "good", b"good", {"good": 1}, [5], [["good"], "bad"], [["good"], [5]], ["good", 5]):
        with told("continuations"):
            predict.score(["fine", "dull"], wrong, "reviews")  # type: ignore[arg-type]
    with told("text 2: the continuation '' has no tokens"):
        predict.score(["fine", "dull"], [["good"], [""]], "reviews")


def test_a_text_that_is_too_long(
    predict: Predictor, wanted: list[Any], folder: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = " ".join(["fine"] * 40)
    strict = Predictor(backbone_of("llama"), folder, on_too_long="error")
    assert strict(["fine", "dull"])[0].scores
    with told("text 2: the source is 44 tokens, more than max_length=13"):
        strict(["fine", long])
    lenient = Predictor(backbone_of("llama"), {"reviews": folder})
    with caplog.at_level(logging.WARNING, "deptjax"):
        assert lenient([long])[0].text in ("negative", "positive")
        lenient([long])
    assert caplog.messages == ["task 'reviews': texts of more than 13 tokens, the prompt's max_length, are cut"]


def test_a_text_for_which_there_are_no_positions(predict: Predictor) -> None:
    """The context is 512: five vectors, six tokens of text, so 501 are left for new ones."""
    text = ["fine good"]
    with told("text 2: 5 prompt vectors, 6 tokens of text and 502 new ones are 513 positions", "has 512"):
        predict.generate(["fine", *text], "words", Decoding(max_new_tokens=502))
    with told("text 1: 5 prompt vectors, 6 tokens of text and 601 new ones are 612 positions"):
        predict.score(text, ["good", " ".join(["fine"] * 600)], "words")
    assert predict.score(text, [" ".join(["fine"] * 501)], "words", end=False)


def test_positions_are_those_of_a_texts_own_prompt(predict: Predictor, folder: pathlib.Path) -> None:
    """A prompt of 480 vectors beside it takes none of the 512 positions of a text that is not behind it."""
    large = make_case(backbone_of("llama"), DePT(prompt_length=480, rank=1, max_length=13))
    large_prompt = dataclasses.replace(
        prompt_of("dept"), method=large.model.method, trainable=jax.device_get(large.trainable)
    )
    both = Predictor(backbone_of("llama"), {"small": folder, "large": large_prompt})
    decoding = Decoding(max_new_tokens=40)
    assert len(both.generate(["fine"], "small", decoding)) == 1
    with told("text 1: 480 prompt vectors, 5 tokens of text and 40 new ones are 525 positions"):
        both.generate(["fine"], "large", decoding)


def test_one_bad_prompt_of_several_adds_none(predict: Predictor, folder: pathlib.Path) -> None:
    prompt = Prompt.load(folder)
    broken = dataclasses.replace(prompt, trainable={})
    for prompts in ({"one": prompt, "two": broken}, {"reviews": prompt, "two": broken}):
        with told("prompt 'two': tensor 'input/"):
            predict._served.add(prompts)


def test_prompts_of_other_libraries_are_served(tmp_path: pathlib.Path) -> None:
    """What peft's folder or a bare file holds is served as the prompt that it was written from."""
    backbone = backbone_of("llama")
    fields = {"input": "{text}", "labels": (), "target": "{label}", "max_target_length": 64}
    prompt, lora = prompt_of("prompt_tuning", **fields), prompt_of("lora", **fields)
    longer = {"max_length": 443, "evaluation": "auto"}  # what is left of the context of 512
    paths = {
        "soft": export_prompt(prompt, backbone, tmp_path / "soft", "peft"),
        "file": export_prompt(prompt, backbone, tmp_path / "file.npz", "npz"),
        "lora": export_prompt(lora, backbone, tmp_path / "lora", "peft"),
    }
    from_paths = Predictor(backbone, paths)
    own = Predictor(backbone, {"soft": dataclasses.replace(prompt, settings=longer), "lora": lora})
    for name in ("soft", "lora"):
        assert from_paths(TEXTS, name) == own(TEXTS, name)
    assert from_paths(TEXTS, "file") == own(TEXTS, "soft")
    bank = PromptBank(backbone, {"soft": paths["soft"], "file": paths["file"]})
    for leaf in jax.tree.leaves(bank.rows(["soft", "file"]).trainable):
        np.testing.assert_array_equal(leaf[0], leaf[1])
    save_file({"base_model.prompt": np.zeros(3, np.float32)}, paths["soft"] / "adapter_model.safetensors")
    with told(str(paths["soft"])):
        from_paths.add("soft", paths["soft"])
    assert from_paths(TEXTS, "soft") == own(TEXTS, "soft")


def test_evaluate_takes_the_same_paths(folder: pathlib.Path) -> None:
    task = review_task()
    backbone = backbone_of("llama")
    assert evaluate(backbone, folder, task) == evaluate(backbone, prompt_of("dept"), task)
    with told("there is no such file or folder"):
        evaluate(backbone, folder / "nowhere", task)
