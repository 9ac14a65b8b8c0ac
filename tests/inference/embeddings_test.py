"""Input embeddings: what the model is fed, and what torch's own `generate` answers to them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import deptjax
from deptjax.errors import UserError
from deptjax.inference import embeddings
from deptjax.models.backbone import Backbone
from deptjax.prompt import Prompt
from deptjax.testing import save_hf_folder, tiny_llama, tiny_t5
from tests.cases import METHODS, Case, case_of, make_case

TEXTS = ["a film", "the plot was very very bad", "good story ? yes , it is fine"]


def prompt_of(case: Case, template: str = "{text} label :") -> Prompt:
    """Returns a case's moved parameters as a prompt of free text."""
    return case.prompt(deptjax.Task("t", None, template, labels=(), max_target_length=9).to_config())


def our_answer(backbone: Backbone, prompt: Prompt, text: str) -> str:
    """Returns our own greedy answer to a text."""
    return deptjax.Predictor(backbone, prompt)([text])[0].text


@pytest.mark.parametrize(("family", "method"), [("llama", "dept"), ("llama", "prompt_tuning"), ("t5", "dept")])
def test_torch_generates_from_them_what_we_do(family: str, method: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    backbone = {"llama": tiny_llama, "t5": tiny_t5}[family](seed=4, tied=False)
    prompt = prompt_of(make_case(backbone, METHODS[method]))
    auto = {"llama": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}[family]
    model = auto.from_pretrained(save_hf_folder(backbone, tmp_path / "model")).eval()
    answers = set()
    for text, embeds in zip(TEXTS, deptjax.input_embeddings(backbone, prompt, TEXTS), strict=True):
        with torch.no_grad():
            tokens = model.generate(
                inputs_embeds=torch.from_numpy(embeds)[None],
                attention_mask=torch.ones((1, len(embeds)), dtype=torch.long),
                max_new_tokens=9,
                do_sample=False,
                use_cache=False,  # torch's has no room for more decoder layers than encoder layers
                eos_token_id=1,
                pad_token_id=0,
            )[0]
        wanted = backbone.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert our_answer(backbone, prompt, text) == wanted
        answers.add(wanted)
    assert len(answers) > 1


def test_they_are_the_prompt_and_the_changed_embeddings() -> None:
    backbone = tiny_llama()
    case = make_case(backbone, METHODS["dept"])
    prompt = prompt_of(case)
    p, a, b = (prompt.trainable["input"][name] for name in ("prompt", "lora_a", "lora_b"))
    for text, got in zip(TEXTS, deptjax.input_embeddings(backbone, prompt, TEXTS), strict=True):
        ids = backbone.tokenizer(f"{text} label :", add_special_tokens=False)["input_ids"]
        offsets = 8 / 3**0.5 * (a @ b)[: len(ids)]
        wanted = np.concatenate([p, np.asarray(backbone.embedding)[ids] + offsets])
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["dept", "adept", "accept", "lopa", "attempt", "mpt"])
def test_a_text_is_what_it_is_alone_and_lengths_are_compiled_once(method: str) -> None:
    case = case_of("llama", method)
    prompt, texts = prompt_of(case), [" ".join(["good film story"] * (1 + i % 3)) for i in range(19)]
    found = deptjax.input_embeddings(case.backbone, prompt, texts)
    compiled = embeddings._streams._cache_size()
    for text, got in zip(texts[:4], found, strict=False):
        (wanted,) = deptjax.input_embeddings(case.backbone, prompt, [text])
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert [len(one) for one in found[:3]] == [len(found[0]) + 3 * i for i in range(3)]
    assert embeddings._streams._cache_size() - compiled <= 1  # of the length of a short text alone


def test_dtype_and_scan_do_not_matter_but_for_rounding() -> None:
    backbone = tiny_llama()
    prompt = prompt_of(make_case(backbone, METHODS["dept"]))
    wanted = deptjax.input_embeddings(backbone, prompt, TEXTS)
    narrow = dataclasses.replace(
        backbone,
        config=dataclasses.replace(backbone.config, dtype="bfloat16"),
        params=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), backbone.params),
    )
    for got, want in zip(deptjax.input_embeddings(narrow, prompt, TEXTS), wanted, strict=True):
        assert got.dtype == ml_dtypes.bfloat16
        np.testing.assert_allclose(got.astype(np.float32), want, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("format", ["peft", "npz"])
def test_any_format_is_taken_and_any_iterable_of_texts(format: str, tmp_path: Path) -> None:
    case = make_case(tiny_llama(), METHODS["prompt_tuning"])
    path = tmp_path / ("x.npz" if format == "npz" else "x")
    deptjax.export_prompt(case.prompt(), case.backbone, path, format)
    wanted = deptjax.input_embeddings(case.backbone, prompt_of(case, "{text}"), TEXTS)
    got = deptjax.input_embeddings(case.backbone, path, (text for text in TEXTS))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


@pytest.mark.parametrize("method", ["lora", "prefix_tuning", "full"])
def test_methods_inside_the_backbone_are_refused(method: str) -> None:
    case = make_case(tiny_llama(), METHODS[method])
    with pytest.raises(UserError, match=f"method '{method}' acts inside the backbone, not on its input alone"):
        deptjax.input_embeddings(case.backbone, prompt_of(case), TEXTS)


def test_mistakes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backbone = tiny_llama()
    prompt = prompt_of(make_case(backbone, METHODS["dept"]), "{a} and {b}")
    with pytest.raises(UserError, match="texts must be a list of texts, not one str: write"):
        deptjax.input_embeddings(backbone, prompt, "text")
    with pytest.raises(UserError, match=r"text 2: .*'b'"):
        deptjax.input_embeddings(backbone, prompt, [{"a": "film", "b": "plot"}, {"a": "film"}])
    with pytest.raises(UserError, match="was tuned on 'tiny-llama', not on 'tiny-t5'"):
        deptjax.input_embeddings(tiny_t5(), prompt, TEXTS)
    with pytest.raises(UserError, match="text 2 is of type int; give a text"):
        deptjax.input_embeddings(backbone, prompt, [{"a": "film", "b": "plot"}, 5])  # type: ignore[list-item]
    with pytest.raises(UserError, match="there is no such file or folder"):
        deptjax.input_embeddings(backbone, tmp_path / "none", TEXTS)
    nameless = dataclasses.replace(prompt, settings={})
    with pytest.raises(UserError, match="prompt 'prompt': max_length is missing from its settings"):
        deptjax.input_embeddings(backbone, nameless, TEXTS)
    assert not caplog.records
    prompt.save(tmp_path / "prompt")
    (long,) = deptjax.input_embeddings(backbone, tmp_path / "prompt", [{"a": "very " * 20, "b": "good"}])
    assert long.shape == (5 + 13, 24)
    assert "texts of more than 13 tokens, the prompt's max_length, are cut" in caplog.text
