"""What a config.json may say, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest

from deptjax.errors import UserError
from deptjax.interop.huggingface import config_from_dict, download, read_config
from deptjax.models.bert import BertConfig
from deptjax.models.gpt2 import GPT2Config
from deptjax.models.llama import LlamaConfig
from deptjax.models.rope import RopeScaling
from deptjax.models.t5 import T5Config
from tests.goldens.make_bert_goldens import VARIANTS as BERT_VARIANTS
from tests.goldens.make_goldens import VARIANTS

LLAMA, T5 = VARIANTS["llama_gqa"], VARIANTS["t5_v1_1"]
MISTRAL, GPT2 = VARIANTS["mistral"], VARIANTS["gpt2"]
BERT, ROBERTA = BERT_VARIANTS["bert_minilm"], BERT_VARIANTS["bert_roberta"]


def llama(**fields: Any) -> LlamaConfig:
    config = config_from_dict({**LLAMA, **fields})
    assert isinstance(config, LlamaConfig)
    return config


def t5(**fields: Any) -> T5Config:
    config = config_from_dict({**T5, **fields})
    assert isinstance(config, T5Config)
    return config


def test_llama_fields() -> None:
    assert llama() == LlamaConfig(
        vocab_size=61,
        width=24,
        num_layers=2,
        num_heads=6,
        num_kv_heads=3,
        head_dim=4,
        mlp_dim=37,
        norm_eps=1e-5,
        max_positions=64,
        rope_theta=500000.0,
    )


def test_bert_fields() -> None:
    bert = {"vocab_size": 53, "width": 24, "num_layers": 2, "num_heads": 3, "mlp_dim": 37, "max_positions": 40}
    assert config_from_dict(ROBERTA) == BertConfig(**bert, position_offset=2, token_types=1, norm_eps=1e-5)
    assert config_from_dict(BERT) == BertConfig(**{**bert, "num_layers": 3, "num_heads": 4})
    # What a file leaves out is as in transformers: bert-base and roberta-base have these sizes.
    base = BertConfig(vocab_size=30522, width=768, num_layers=12, num_heads=12, mlp_dim=3072)
    assert config_from_dict({"model_type": "bert"}) == base
    large = config_from_dict({"model_type": "roberta", "max_position_embeddings": 514, "hidden_size": 1024,
                              "num_attention_heads": 16, "tie_word_embeddings": False})  # fmt: skip
    assert (large.vocab_size, large.max_positions, large.position_offset, large.tied) == (50265, 512, 2, False)


def test_t5_fields() -> None:
    assert t5() == T5Config(
        vocab_size=59,
        width=23,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_heads=3,
        head_dim=5,
        mlp_dim=31,
        activation="gelu_new",
        gated=True,
        tied=False,
    )


def test_gpt2_fields() -> None:
    assert config_from_dict(GPT2) == GPT2Config(
        vocab_size=53, width=24, num_layers=2, num_heads=3, mlp_dim=96, max_positions=64
    )
    assert config_from_dict({**GPT2, "n_inner": 31, "n_ctx": None, "resid_pdrop": None}) == config_from_dict(
        {**GPT2, "n_inner": 31}
    )
    # Of the published files of GPT-2 medium, large and XL, and of DistilGPT2.
    older = {"n_special": 0, "predict_special_tokens": True, "_num_labels": 1, "pruned_heads": {}, "output_past": True}
    assert config_from_dict({**GPT2, **older}) == config_from_dict(GPT2)
    quiet = config_from_dict({**GPT2, **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0)})
    assert isinstance(quiet, GPT2Config)
    assert quiet.dropout_rate == 0.0


@pytest.mark.parametrize(
    ("projection", "activation", "gated"),
    [
        ("relu", "relu", False),
        ("gelu", "gelu", False),
        ("gated-gelu", "gelu_new", True),
        ("gated-gelu_new", "gelu_new", True),
        ("gated-silu", "silu", True),
        ("gated-relu", "relu", True),
    ],
)
def test_t5_activations(projection: str, activation: str, gated: bool) -> None:
    config = t5(feed_forward_proj=projection)
    assert (config.activation, config.gated) == (activation, gated)


@pytest.mark.parametrize(
    ("fields", "tied"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": None}, True),
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, False),
        ({"model_type": "mt5", "tie_word_embeddings": True}, False),
    ],
)
def test_who_scales_the_logits_of_t5(fields: dict[str, Any], tied: bool) -> None:
    assert t5(**fields).tied is tied


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        ({"rope_theta": 7.0, "rope_scaling": None}, 7.0, None),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 500000.0, RopeScaling("linear", 2.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}}, 9.0, None),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 9.0, **LLAMA3}},
            9.0,
            RopeScaling("llama3", 8.0, 1.0, 4.0, 32),
        ),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, 500000.0, RopeScaling("llama3", 8.0, 1.0, 4.0, 32)),
    ],
)
def test_rope_in_both_spellings(fields: dict[str, Any], theta: float, scaling: RopeScaling | None) -> None:
    config = llama(**fields)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


def test_a_window_as_long_as_the_context_is_none() -> None:
    assert config_from_dict({**MISTRAL, "sliding_window": 64}) == config_from_dict(MISTRAL)


@pytest.mark.parametrize(
    ("base", "fields", "field"),
    [
        (LLAMA, {"model_type": "gemma"}, "model_type"),
        (T5, {"model_type": "umt5"}, "model_type"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act"),
        (LLAMA, {"attention_bias": True}, "attention_bias"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias"),
        (LLAMA, {"rope_interleaved": True}, "rope_interleaved"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA, {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type"),
        (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "factor"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0, "attention_factor": 2.0}}, "attention_factor"),
        (LLAMA, {"rope_scaling": [2.0]}, "rope_scaling"),
        (LLAMA, {"sliding_window": 8}, "sliding_window"),
        (MISTRAL, {"sliding_window": 63}, "sliding_window"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA, {"num_key_value_heads": 4}, "num_key_value_heads"),
        (LLAMA, {"head_dim": 5}, "head_dim"),
        (LLAMA, {"hidden_size": None}, "hidden_size"),
        (LLAMA, {"hidden_size": "24"}, "hidden_size"),
        (LLAMA, {"vocab_size": -1}, "vocab_size"),
        (LLAMA, {"logit_scale": 0.5}, "logit_scale"),
        (LLAMA, {"num_layers": 2}, "num_layers"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights"),
        (GPT2, {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
        (GPT2, {"pruned_heads": {"0": [1]}}, "pruned_heads"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention"),
        (GPT2, {"activation_function": "tanh"}, "activation_function"),
        (GPT2, {"activation_function": ["gelu"]}, "activation_function"),
        (GPT2, {"n_head": 5}, "n_head"),
        (GPT2, {"n_embd": None}, "n_embd"),
        (GPT2, {"attn_pdrop": 0.2}, "attn_pdrop"),
        (GPT2, {"embd_pdrop": -0.1}, "embd_pdrop"),
        (GPT2, {"rotary_dim": 4}, "rotary_dim"),
        (BERT, {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        (BERT, {"is_decoder": True}, "is_decoder"),
        (BERT, {"add_cross_attention": True}, "add_cross_attention"),
        (BERT, {"hidden_act": "tanh"}, "hidden_act"),
        (BERT, {"num_attention_heads": 5}, "num_attention_heads"),
        (BERT, {"attention_probs_dropout_prob": 1.2}, "attention_probs_dropout_prob"),
        (BERT, {"embedding_size": 12}, "embedding_size"),
        (ROBERTA, {"pad_token_id": -1}, "pad_token_id"),
        (ROBERTA, {"max_position_embeddings": 2}, "max_position_embeddings"),
        (ROBERTA, {"hidden_act": "relu"}, "hidden_act"),
        (T5, {"feed_forward_proj": "gated-tanh"}, "feed_forward_proj"),
        (T5, {"feed_forward_proj": "silent-relu"}, "feed_forward_proj"),
        (T5, {"dense_act_fn": "relu"}, "dense_act_fn"),
        (T5, {"is_gated_act": False}, "is_gated_act"),
        (T5, {"is_encoder_decoder": False}, "is_encoder_decoder"),
        (T5, {"is_decoder": True}, "is_decoder"),
        (T5, {"dropout_rate": 1.5}, "dropout_rate"),
        (T5, {"scalable_attention": True}, "scalable_attention"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(base: dict[str, Any], fields: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError, match=f"'{field}'") as caught:
        config_from_dict({**base, **fields}, "here/config.json")
    message = str(caught.value)
    assert message.startswith("here/config.json")
    assert "\n" not in message


def test_mistral_without_a_word_on_its_window_has_one() -> None:
    fields = {name: value for name, value in MISTRAL.items() if name != "sliding_window"}
    with pytest.raises(UserError, match="sliding_window"):
        config_from_dict({**fields, "max_position_embeddings": 32768})


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        read_config(tmp_path)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "t5-no-such-size"])
def test_a_hub_that_is_not_reachable_is_one_line(name: str) -> None:
    """The tests run with the hub's offline switch set, so nothing is asked of a network."""
    with pytest.raises(UserError, match="hub is not reachable") as caught:
        download(name)
    assert f"'{name}'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_that_cannot_be_one_is_said_to_be() -> None:
    with pytest.raises(UserError, match="check the spelling"):
        download("not a name!")


@pytest.mark.parametrize(
    "error",
    [httpx2.ReadTimeout("slow"), httpx2.RemoteProtocolError("cut\noff")],
    ids=lambda error: type(error).__name__,
)
def test_a_download_that_is_interrupted_goes_on_with_the_same_command(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's HTTP library lets its errors through, and they derive from no built-in error of the system."""

    def interrupted(*args: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", interrupted)
    with pytest.raises(UserError, match="interrupted") as caught:
        download("nobody/some-model", "v2")
    message = str(caught.value)
    assert "'nobody/some-model' at revision 'v2'" in message
    assert type(error).__name__ in message
    assert "run the same command again" in message
    assert "\n" not in message


def test_an_error_that_is_not_of_the_hub_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> str:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        download("nobody/some-model")
