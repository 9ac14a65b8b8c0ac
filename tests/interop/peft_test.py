"""Adapters of HF peft: read with peft's own logits, written so that peft reads them, refused in one line otherwise."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import deptjax
from deptjax.errors import UserError
from deptjax.interop.prompts import export_prompt, load_prompt
from deptjax.methods import LoRA
from deptjax.prompt import Prompt
from deptjax.testing import save_hf_folder, tiny_gpt2, tiny_llama, tiny_t5
from tests.cases import METHODS, make_case, some_batch
from tests.goldens.make_goldens import VARIANTS, make_model
from tests.goldens.make_peft_goldens import data_of, folder_of, logits_of
from tests.interop.adapter_cases import ADAPTERS, assert_close, backbone_of, golden, our_logits, write_adapter


def prompt_of(name: str, folder: Path, scan_layers: bool = False) -> Prompt:
    """Returns a golden's adapter, imported."""
    return load_prompt(write_adapter(name, folder / name), backbone_of(ADAPTERS[name].variant, scan_layers))


@pytest.mark.parametrize("scan_layers", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_what_peft_trained_has_pefts_logits(name: str, scan_layers: bool, tmp_path: Path) -> None:
    stored, backbone = golden(name), backbone_of(ADAPTERS[name].variant, scan_layers)
    prompt = prompt_of(name, tmp_path, scan_layers)
    assert_close(our_logits(backbone, prompt, stored), stored["logits"], stored["target_mask"])
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(prompt.trainable))
    prompt.save(tmp_path / "own")
    assert Prompt.load(tmp_path / "own").run_id == prompt.run_id
    loaded = deptjax.load_prompt(tmp_path / "own", backbone)
    np.testing.assert_array_equal(our_logits(backbone, loaded, stored), our_logits(backbone, prompt, stored))


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_still_writes_what_is_stored(name: str, tmp_path: Path) -> None:
    """The goldens are peft's of today: they are not stale, and its folders of today are read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, logits = folder_of(name, tmp_path / name)
    backbone, mask = backbone_of(ADAPTERS[name].variant), golden(name)["target_mask"]
    assert_close(our_logits(backbone, load_prompt(tmp_path / name, backbone), golden(name)), logits, mask)
    assert_close(golden(name)["logits"], logits, mask)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_reads_what_is_written(name: str, scan_layers: bool, tmp_path: Path) -> None:
    variant = ADAPTERS[name].variant
    folder = export_prompt(prompt_of(name, tmp_path, scan_layers), backbone_of(variant, scan_layers), tmp_path / "out")
    base = make_model(VARIANTS[variant], list(VARIANTS).index(variant))
    logits = peft_logits(base, folder, data_of(variant))
    assert_close(logits, golden(name)["logits"], golden(name)["target_mask"], 1e-5)


def peft_logits(base: Any, folder: Path, data: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the logits of torch's model with the adapter of a folder."""
    import peft
    import torch

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(base, folder).eval()
        return logits_of(model, data).numpy()


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("gpt2", "prompt_tuning"),
        ("gpt2", "lora"),
        ("llama", "prompt_tuning"),
        ("llama", "lora"),
        ("llama", "prefix_tuning"),
        ("t5", "prompt_tuning"),
        ("t5", "lora"),
    ],
)
def test_what_is_tuned_here_has_our_logits_in_peft(family: str, method: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    backbone = {"gpt2": tiny_gpt2, "llama": tiny_llama, "t5": tiny_t5}[family]()
    case = make_case(backbone, METHODS[method])
    prompt = case.prompt()
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    data = {key: np.asarray(value) for key, value in some_batch().items()}
    wanted = np.asarray(case.logits(case.moved, case.frozen, some_batch()))
    folder = save_hf_folder(backbone, tmp_path / "model")
    base = auto.from_pretrained(folder, attn_implementation="eager").eval()
    export_prompt(prompt, backbone, tmp_path / "adapter", "peft")
    assert_close(peft_logits(base, tmp_path / "adapter", data), wanted, data["target_mask"])
    again = load_prompt(tmp_path / "adapter", backbone)
    if (family, method) == ("gpt2", "lora"):  # query and value come back as parts of one module of twice the rank
        assert again.method == LoRA(6, 32.0, "^(attention/key|attention/query|attention/value)$")
        assert_close(our_logits(backbone, again, data), wanted, data["target_mask"], 1e-5)
        return
    jax.tree.map(  # keys are turned and turned back
        lambda got, want: np.testing.assert_allclose(got, want, rtol=0, atol=1e-6), again.trainable, prompt.trainable
    )


def test_an_unread_half_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """peft's default for T5 stores two times M vectors and reads the first M."""
    with caplog.at_level(logging.WARNING, "deptjax"):
        prompt = prompt_of("peft_prompt_t5_default", tmp_path)
    assert "the last 3 of 6 vectors are left out: peft does not read them either" in caplog.text
    assert prompt.trainable["input"]["prompt"].shape == (3, 23)


def test_settings_task_and_name(tmp_path: Path) -> None:
    prompt = prompt_of("peft_prompt_llama", tmp_path)
    assert prompt.task["name"] == "peft_prompt_llama"
    assert (prompt.task["input"], prompt.task["labels"]) == ("{text}", [])
    assert prompt.task["max_target_length"] == 29  # half of the 64 - 5 positions
    assert prompt.settings == {"max_length": 30, "evaluation": "auto"}
    task = deptjax.Task("films", None, "{review}\nlabel :", labels=("good", "bad"), max_target_length=2)
    named = load_prompt(tmp_path / "peft_prompt_llama", backbone_of("llama_gqa"), task)
    assert named.task == task.to_config()
    assert named.settings["max_length"] == 64 - 5 - 2
    long = deptjax.Task("films", None, "{review}", labels=())
    with pytest.raises(UserError, match="has 64 positions; 5 prompt vectors and answers of 64 tokens leave none"):
        load_prompt(tmp_path / "peft_prompt_llama", backbone_of("llama_gqa"), long)
    with pytest.raises(UserError, match=r"no task is named 'sms_span'.* Did you mean 'sms_spam'"):
        load_prompt(tmp_path / "peft_prompt_llama", backbone_of("llama_gqa"), "sms_span")


def test_lora_is_one_rank_and_one_alpha(tmp_path: Path) -> None:
    plain = prompt_of("peft_lora_llama", tmp_path).method
    assert (plain.rank, plain.alpha, plain.targets) == (3, 7, "^(attention/query|attention/value)$")
    mixed = prompt_of("peft_lora_llama_patterns", tmp_path)
    assert mixed.method.rank == 4
    layers = prompt_of("peft_lora_llama_layers", tmp_path).trainable["backbone"]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(layers["layers_1"]))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(layers["layers_2"]))


def test_targets_are_the_last_words_where_these_are_enough(tmp_path: Path) -> None:
    backbone = tiny_t5()
    for targets, wanted in [
        ("(query|value)$", ["q", "v"]),
        ("encoder/mlp/wi", [f"encoder.block.{i}.layer.1.DenseReluDense.wi" for i in range(2)]),
    ]:
        case = make_case(backbone, deptjax.LoRA(rank=2, targets=targets))
        folder = export_prompt(case.prompt(), backbone, tmp_path / wanted[0], "peft")
        assert json.loads((folder / "adapter_config.json").read_text())["target_modules"] == wanted


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("peft_prompt_llama", {"peft_type": "IA3"}, "'peft_type' is \"IA3\": expected one of PROMPT_TUNING, P_TUNING"),
    ("peft_prompt_llama", {"peft_type": ...}, "'peft_type' is null: expected one of"),
    (
        "peft_prompt_llama",
        {"task_type": "SEQ_CLS"},
        "'task_type' is \"SEQ_CLS\": 'llama_gqa' takes adapters of CAUSAL_LM",
    ),
    ("peft_prompt_llama", {"num_virtual_tokens": 6}, r"'prompt_embeddings' has shape \(5, 24\), expected \(6, 24\)"),
    ("peft_prompt_llama", {"num_virtual_tokens": "5"}, "'num_virtual_tokens' is \"5\": expected a whole number"),
    ("peft_prompt_llama", {"num_transformer_submodules": 2}, "'num_transformer_submodules' is 2: expected 1 for this"),
    (
        "peft_prompt_llama",
        {"modules_to_save": ["lm_head"]},
        "'modules_to_save' is .*modules trained beside the adapter",
    ),
    ("peft_prompt_llama", {"prompt_dropout": 0.1}, "'prompt_dropout' is 0.1: this field is not known here"),
    ("peft_prompt_t5", {"num_transformer_submodules": 3}, "'num_transformer_submodules' is 3: expected 1 or 2"),
    ("peft_prefix_llama", {"num_virtual_tokens": 5}, r"'prompt_embeddings' has shape \(4, 48\), expected \(5, 48\)"),
    ("peft_prefix_llama", {"num_transformer_submodules": 2}, "'num_transformer_submodules' is 2: expected 1"),
    ("peft_lora_llama", {"use_dora": True}, "'use_dora' is true: DoRA cannot be held here"),
    (
        "peft_lora_llama",
        {"init_lora_weights": "pissa_niter_4"},
        "'init_lora_weights' is \"pissa_niter_4\": it may change",
    ),
    ("peft_lora_llama", {"init_lora_weights": "olora"}, "'init_lora_weights' is \"olora\""),
    ("peft_lora_llama", {"fan_in_fan_out": True}, "'fan_in_fan_out' is true"),
    ("peft_lora_llama", {"lora_bias": True}, "'lora_bias' is true: a bias in B"),
    ("peft_lora_llama", {"trainable_token_indices": [3]}, "'trainable_token_indices' is .3.: trained token embeddings"),
    ("peft_lora_llama", {"layer_replication": [[0, 2]]}, "'layer_replication'"),
    ("peft_lora_llama", {"kasa_config": {"beta": 1}}, "'kasa_config'"),
    ("peft_lora_llama", {"use_something": 1}, "'use_something' is 1: this field is not known here"),
    (
        "peft_lora_llama",
        {"r": 4},
        r"'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight' has shape \(3, 24\)",
    ),
    ("peft_lora_llama", {"r": 0}, "'r' is 0: expected a whole number"),
    ("peft_lora_llama", {"lora_alpha": "x"}, "'lora_alpha' is \"x\": expected a number"),
    ("peft_lora_llama", {"rank_pattern": {"(": 2}}, "'rank_pattern' is .*is not a regular expression"),
    ("peft_lora_llama", {"rank_pattern": {"q_proj": 1.5}}, "'q_proj' has 1.5, expected a number"),
    ("peft_lora_llama", {"rank_pattern": [1]}, "'rank_pattern' is .1.: expected an object"),
]


@pytest.mark.parametrize(("name", "fields", "told"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_what_cannot_be_held_is_refused(name: str, fields: dict[str, Any], told: str, tmp_path: Path) -> None:
    folder = write_adapter(name, tmp_path / "adapter", **fields)
    with pytest.raises(UserError, match=told) as raised:
        load_prompt(folder, backbone_of(ADAPTERS[name].variant))
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    backbone = backbone_of("llama_gqa")
    folder = write_adapter("peft_lora_llama", tmp_path / "adapter")
    whole = load_file(folder / "adapter_model.safetensors")
    first = next(name for name in whole if name.endswith("lora_A.weight"))
    other = first.replace("lora_A", "lora_B")

    def told(tensors: dict[str, np.ndarray]) -> str:
        with pytest.raises(UserError) as raised:
            load_prompt(write_adapter("peft_lora_llama", folder, tensors), backbone)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert f"tensor '{other}' is missing" in told({k: v for k, v in whole.items() if k != other})
    head = np.zeros((3, 24), np.float32)
    assert "'base_model.model.lm_head.lora_A.weight' has no place" in told(
        {**whole, "base_model.model.lm_head.lora_A.weight": head}
    )
    assert "'base_model.model.model.embed_tokens.lora_embedding_A' has no place" in told(
        {**whole, "base_model.model.model.embed_tokens.lora_embedding_A": head}
    )
    assert f"tensor '{first}' has dtype" not in told({**whole, first: whole[first].T.copy()})
    assert f"tensor '{first}' has shape (24, 3), expected (3, 24)" in told({**whole, first: whole[first].T.copy()})
    assert f"tensor '{first}' holds numbers that are not finite" in told({**whole, first: whole[first] * np.nan})
    assert "it holds no LoRA of this backbone's projections" in told({})


def test_an_adapter_of_another_backbone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'prompt_embeddings' has shape \(5, 24\), expected \(5, 16\)"):
        load_prompt(write_adapter("peft_prompt_llama", tmp_path / "a"), tiny_llama(width=16))
    with pytest.raises(UserError, match="'task_type' is \"CAUSAL_LM\": 'tiny-t5' takes adapters of SEQ_2_SEQ_LM"):
        load_prompt(tmp_path / "a", tiny_t5())


def test_prefixes_on_gpt2_are_refused(tmp_path: Path) -> None:
    """peft's stand in front of a text whose positions start behind them; ours leave the positions alone."""
    with pytest.raises(UserError, match="'peft_type' is \"PREFIX_TUNING\": on GPT-2 peft moves the text's positions"):
        load_prompt(write_adapter("peft_prefix_llama", tmp_path / "x"), tiny_gpt2())


def test_prefixes_on_t5_are_refused(tmp_path: Path) -> None:
    folder = write_adapter("peft_prefix_llama", tmp_path / "x", task_type="SEQ_2_SEQ_LM")
    with pytest.raises(UserError, match=r"'peft_type' is \"PREFIX_TUNING\": on T5 peft adds .* cannot be held here"):
        load_prompt(folder, tiny_t5())
    case = make_case(tiny_t5(), METHODS["prefix_tuning"])
    with pytest.raises(UserError, match="'peft_type' is \"PREFIX_TUNING\": on T5 peft adds a relative position bias"):
        export_prompt(case.prompt(), case.backbone, tmp_path / "y", "peft")


def test_a_method_that_peft_has_not_is_refused(tmp_path: Path) -> None:
    case = make_case(tiny_llama(), METHODS["dept"])
    with pytest.raises(UserError, match="peft has no method 'dept'; it takes prompt_tuning, "):
        export_prompt(case.prompt(), case.backbone, tmp_path / "x", "peft")
    assert not list(tmp_path.iterdir())
