"""Reads a Hugging Face model: what its `config.json` says, and where its files are.

A config field that this library does not know might change the function that the weights compute; so every field must
be one that is read here or one that is known to change nothing. What cannot be computed faithfully is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from deptjax.errors import UserError, nearest
from deptjax.models.bert import BertConfig
from deptjax.models.gpt2 import GPT2Config
from deptjax.models.layers import ACTIVATIONS
from deptjax.models.llama import LlamaConfig
from deptjax.models.rope import RopeScaling
from deptjax.models.t5 import T5Config

# Names, notes, training settings, special tokens (the tokenizer has them) and defaults of generation: none of them
# changes what the weights compute from given tokens.
HARMLESS = frozenset(
    "_name_or_path _commit_hash _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled"
    " architectures classifier_dropout dtype torch_dtype transformers_version use_cache"
    " output_past output_attentions output_hidden_states return_dict use_return_dict torchscript"
    " initializer_factor initializer_range gradient_checkpointing pretraining_tp n_positions max_sequence_length"
    " task_specific_params tokenizer_class finetuning_task prefix id2label label2id num_labels problem_type"
    " pad_token_id bos_token_id eos_token_id sep_token_id unk_token_id max_length max_new_tokens min_length"
    " do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p"
    " repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids"
    " num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id"
    " remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens tf_legacy_loss"
    " use_bfloat16 is_llama_config chunk_size_feed_forward transformers.js_config license".split()
)
_LLAMA = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
    " hidden_act max_position_embeddings rms_norm_eps tie_word_embeddings rope_theta rope_scaling rope_parameters"
    " sliding_window partial_rotary_factor"
).split()
_T5 = (
    "vocab_size d_model d_kv d_ff num_layers num_decoder_layers num_heads relative_attention_num_buckets"
    " relative_attention_max_distance dropout_rate layer_norm_epsilon feed_forward_proj dense_act_fn is_gated_act"
    " tie_word_embeddings scale_decoder_outputs decoder_start_token_id"
).split()
_GPT2 = (
    "vocab_size n_embd n_layer n_head n_inner n_positions n_ctx activation_function layer_norm_epsilon embd_pdrop"
    " attn_pdrop resid_pdrop tie_word_embeddings summary_type summary_use_proj summary_activation"
    " summary_proj_to_labels summary_first_dropout _num_labels"  # of a classifier that stands on the model
    " n_special predict_special_tokens"  # GPT-1's, which the files of GPT-2 medium, large and XL still name
).split()
_BERT = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act hidden_dropout_prob"
    " attention_probs_dropout_prob max_position_embeddings type_vocab_size layer_norm_eps tie_word_embeddings"
    " pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type directionality"
    " output_past gradient_checkpointing num_labels"  # of the first files, and of training
).split()
# Fields with one value that this library implements, and what another value would mean.
_LLAMA_FIXED = {
    "attention_bias": (False, "biases in the attention"),
    "mlp_bias": (False, "biases in the feed-forward layers"),
    "attention_dropout": (0.0, "dropout of attention weights"),
    "rope_interleaved": (False, "interleaved rotary dimensions"),
    "is_encoder_decoder": (False, "an encoder"),
    "add_cross_attention": (False, "cross-attention"),
    "is_decoder": (None, ""),  # said of decoders and not said of others; a causal mask is used in both cases
}
_T5_FIXED = {
    "is_encoder_decoder": (True, "one stack alone"),
    "is_decoder": (False, "one stack alone"),
    "add_cross_attention": (None, ""),
}
_GPT2_FIXED = {
    "scale_attn_weights": (True, "attention without its scale"),
    "scale_attn_by_inverse_layer_idx": (False, "attention scaled by the number of the layer"),
    "reorder_and_upcast_attn": (False, "attention computed in another order and precision"),
    "pruned_heads": ({}, "attention with heads cut out"),
    "is_encoder_decoder": (False, "an encoder"),
    "add_cross_attention": (False, "cross-attention"),
    "is_decoder": (None, ""),
}
_BERT_FIXED = {
    "position_embedding_type": ("absolute", "an embedding of relative positions"),
    "is_decoder": (False, "a decoder"),
    "add_cross_attention": (False, "cross-attention"),
    "is_encoder_decoder": (False, "a decoder"),
    "pruned_heads": ({}, "attention with heads cut out"),
}


Config = LlamaConfig | GPT2Config | T5Config | BertConfig


class _Fields:
    """The fields of one `config.json`; every complaint names the file and the field."""

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        self.fields = fields
        self.where = where

    def refuse(self, field: str, why: str) -> NoReturn:
        """Raises the error about `field`."""
        raise UserError(f"{self.where}: '{field}' is {self.fields.get(field)!r}: {why}")

    def get(self, field: str, default: Any = None) -> Any:
        """Returns the field, or `default` where it is absent or null."""
        value = self.fields.get(field)
        return default if value is None else value

    def number(self, field: str, default: Any = None, kind: Callable[[Any], Any] = int) -> Any:
        """Returns a positive number; raises `UserError` for one that is missing or is no such number."""
        value = self.get(field, default)
        if value is None:
            raise UserError(f"{self.where}: field '{field}' is missing; is this the config of a whole model?")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0 or kind(value) != value:
            self.refuse(field, "expected a positive number" if kind is float else "expected a positive whole number")
        return kind(value)

    def rate(self, field: str, default: float) -> float:
        """Returns a dropout rate."""
        value = self.get(field, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            self.refuse(field, "expected a number from 0 up to, not including, 1")
        return float(value)

    def only(self, known: list[str], fixed: dict[str, tuple[Any, str]]) -> None:
        """Refuses every field that is neither known nor harmless, and every fixed one with another value."""
        for field, value in self.fields.items():
            if field in fixed:
                wanted, meaning = fixed[field]
                if wanted is not None and value is not None and value != wanted:
                    self.refuse(field, f"{meaning} is not implemented; take another checkpoint")
            elif field not in known and field not in HARMLESS and field != "model_type" and value is not None:
                self.refuse(
                    field, "this field is not known here and may change what the model computes" + _advice(field)
                )


def _advice(field: str) -> str:
    if field in ("quantization_config", "quantization"):
        return "; take a checkpoint that is not quantised, or a GGUF file"
    return nearest(field, [*_LLAMA, *_T5, *_GPT2, *_BERT])


def read_config(folder: str | Path) -> Config:
    """Returns the config of the model in a folder, read from its `config.json`. Raises `UserError`."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: there is no config.json; is this the model's folder?")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); fetch it again") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: expected a JSON object; fetch it again")
    return config_from_dict(fields, str(path))


def config_from_dict(fields: dict[str, Any], where: str = "config.json") -> Config:
    """Returns the backbone's config for the fields of a Hugging Face `config.json`.

    Raises `UserError`, naming `where` and the field, for a model type, a value or a field that is not implemented.

    >>> config_from_dict({"model_type": "opt"}, "here")
    Traceback (most recent call last):
    deptjax.errors.UserError: here: 'model_type' is 'opt': expected one of bert, gpt2, llama, mistral, mt5, roberta, t5
    """
    config = _Fields(fields, where)
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        config.refuse("model_type", f"expected one of {', '.join(FAMILIES)}{nearest(str(kind), FAMILIES)}")
    return FAMILIES[kind](config, kind)


def _llama(config: _Fields, kind: str) -> LlamaConfig:
    config.only(_LLAMA, _LLAMA_FIXED)
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        config.refuse("hidden_act", "only 'silu' is implemented")
    positions = config.number("max_position_embeddings", 2048 if kind == "llama" else 4096 * 32)
    if kind == "mistral":
        # transformers' defaults for fields that a file leaves out; a null window means none.
        window = config.fields.get("sliding_window", 4096)
        if window is not None and window < positions:
            why = f"a window shorter than max_position_embeddings ({positions}) is not implemented"
            raise UserError(
                f"{config.where}: 'sliding_window' is {window!r}: {why}; take a checkpoint without a window"
            )
        config.fields = {"num_key_value_heads": 8, **config.fields}
    elif config.get("sliding_window") is not None:
        config.refuse("sliding_window", "a Llama model has no window; take another checkpoint")
    width, heads = config.number("hidden_size"), config.number("num_attention_heads")
    kv_heads = config.number("num_key_value_heads", heads)
    if heads % kv_heads:
        config.refuse("num_key_value_heads", f"it does not divide num_attention_heads ({heads})")
    if config.get("head_dim") is None and width % heads:
        config.refuse("num_attention_heads", f"it does not divide hidden_size ({width}) and there is no 'head_dim'")
    head_dim = config.number("head_dim", width // heads)
    if head_dim % 2:
        config.refuse("head_dim", f"rotary embeddings need an even width of a head, not {head_dim}")
    theta, scaling = _rope(config, positions)
    return LlamaConfig(
        vocab_size=config.number("vocab_size"),
        width=width,
        num_layers=config.number("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_dim=config.number("intermediate_size"),
        norm_eps=config.number("rms_norm_eps", 1e-6, float),
        max_positions=positions,
        rope_theta=theta,
        rope_scaling=scaling,
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def _rope(config: _Fields, positions: int) -> tuple[float, RopeScaling | None]:
    """Returns theta and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    field = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    value = config.get(field, {})
    if not isinstance(value, dict):
        config.refuse(field, "expected an object")
    rope = _Fields({k: v for k, v in value.items() if v is not None}, f"{config.where}: {field}")
    theta = rope.number("rope_theta", config.number("rope_theta", 10000.0, float), float)
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if kind in ("linear", "llama3"):
        known.add("factor")
    if kind == "llama3":
        known |= {"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    if kind not in ("default", "linear", "llama3"):
        rope.refuse("rope_type", f"'{kind}' is not implemented; expected one of default, linear, llama3")
    for name in rope.fields:
        # Some versions write the last one into every rope; the plain and the linear rule do not look at it.
        if name not in known and name != "original_max_position_embeddings":
            rope.refuse(name, f"a rope of type '{kind}' has no such field; correct the config")
    for source in (config, rope):
        if source.get("partial_rotary_factor", 1.0) != 1.0:
            source.refuse("partial_rotary_factor", "rotary embeddings on a part of a head are not implemented")
    if kind == "default":
        return theta, None
    factor = rope.number("factor", None, float)
    if kind == "linear":
        return theta, RopeScaling("linear", factor)
    low, high = (rope.number(f"{name}_freq_factor", None, float) for name in ("low", "high"))
    if high <= low:
        rope.refuse("high_freq_factor", f"it must be above low_freq_factor ({low})")
    original = rope.number("original_max_position_embeddings", positions)
    return theta, RopeScaling("llama3", factor, low, high, original)


def _t5(config: _Fields, kind: str) -> T5Config:
    config.only(_T5, _T5_FIXED)
    projection = config.get("feed_forward_proj", "relu" if kind == "t5" else "gated-gelu")
    *gate, activation = str(projection).split("-")
    # An accident of history that all readers of these files share: "gated-gelu" means the tanh approximation.
    activation = "gelu_new" if gate and activation == "gelu" else activation
    if gate not in ([], ["gated"]) or activation not in ACTIVATIONS:
        config.refuse("feed_forward_proj", f"expected one of {', '.join(ACTIVATIONS)}, alone or after 'gated-'")
    if config.get("dense_act_fn", activation) != activation:
        config.refuse("dense_act_fn", f"feed_forward_proj '{projection}' says '{activation}'; correct one of them")
    if config.get("is_gated_act", bool(gate)) != bool(gate):
        config.refuse("is_gated_act", f"feed_forward_proj '{projection}' denies it; correct one of them")
    # T5 1.0 alone scales its logits, and files tell it by the tie; newer writers say so in a field of its own. The
    # files of mT5 never scale, whatever they say of the tie.
    scaled = kind == "t5" and bool(config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True)))
    layers = config.number("num_layers")
    return T5Config(
        vocab_size=config.number("vocab_size"),
        width=config.number("d_model"),
        num_encoder_layers=layers,
        num_decoder_layers=config.number("num_decoder_layers", layers),
        num_heads=config.number("num_heads"),
        head_dim=config.number("d_kv"),
        mlp_dim=config.number("d_ff"),
        activation=activation,
        gated=bool(gate),
        tied=scaled,
        relative_buckets=config.number("relative_attention_num_buckets", 32),
        relative_max_distance=config.number("relative_attention_max_distance", 128),
        dropout_rate=config.rate("dropout_rate", 0.1),
        norm_eps=config.number("layer_norm_epsilon", 1e-6, float),
        decoder_start_token=int(config.get("decoder_start_token_id", config.get("pad_token_id", 0))),
    )


def _gpt2(config: _Fields, kind: str) -> GPT2Config:
    config.only(_GPT2, _GPT2_FIXED)
    width, heads = config.number("n_embd"), config.number("n_head")
    if width % heads:
        config.refuse("n_head", f"it does not divide n_embd ({width})")
    activation = str(config.get("activation_function", "gelu_new"))
    if activation not in ACTIVATIONS:
        config.refuse("activation_function", f"expected one of {', '.join(ACTIVATIONS)}")
    dropout = config.rate("resid_pdrop", 0.1)
    for field in ("embd_pdrop", "attn_pdrop"):
        if config.rate(field, 0.1) != dropout:
            config.refuse(field, f"resid_pdrop is {dropout}; one rate for all is implemented, so make them equal")
    return GPT2Config(
        vocab_size=config.number("vocab_size"),
        width=width,
        num_layers=config.number("n_layer"),
        num_heads=heads,
        mlp_dim=config.number("n_inner", 4 * width),
        max_positions=config.number("n_positions", 1024),
        activation=activation,
        norm_eps=config.number("layer_norm_epsilon", 1e-5, float),
        tied=bool(config.get("tie_word_embeddings", True)),
        dropout_rate=dropout,
    )


def _bert(config: _Fields, kind: str) -> BertConfig:
    config.only(_BERT, _BERT_FIXED)
    width, heads = config.number("hidden_size", 768), config.number("num_attention_heads", 12)
    if width % heads:
        config.refuse("num_attention_heads", f"it does not divide hidden_size ({width})")
    activation = str(config.get("hidden_act", "gelu"))
    if activation not in ACTIVATIONS:
        config.refuse("hidden_act", f"expected one of {', '.join(ACTIVATIONS)}")
    if kind == "roberta" and activation != "gelu":
        config.refuse("hidden_act", "RoBERTa's head has 'gelu', and another one in its layers is not implemented")
    dropout, of_attention = (config.rate(f"{what}_dropout_prob", 0.1) for what in ("hidden", "attention_probs"))
    offset = 0
    if kind == "roberta":  # positions are counted from the one behind the padding token's id
        padding = config.get("pad_token_id", 1)
        if not isinstance(padding, int) or isinstance(padding, bool) or padding < 0:
            config.refuse("pad_token_id", "expected a whole number of at least 0")
        offset = padding + 1
    positions = config.number("max_position_embeddings", 512)
    if positions <= offset:
        config.refuse(
            "max_position_embeddings", f"RoBERTa's first position is row {offset}, so expected more than that"
        )
    return BertConfig(
        vocab_size=config.number("vocab_size", 30522 if kind == "bert" else 50265),
        width=width,
        num_layers=config.number("num_hidden_layers", 12),
        num_heads=heads,
        mlp_dim=config.number("intermediate_size", 3072),
        max_positions=positions - offset,
        position_offset=offset,
        token_types=config.number("type_vocab_size", 2),
        activation=activation,
        norm_eps=config.number("layer_norm_eps", 1e-12, float),
        tied=bool(config.get("tie_word_embeddings", True)),
        dropout_rate=dropout,
        attention_dropout_rate=None if of_attention == dropout else of_attention,
    )


FAMILIES: dict[str, Callable[[_Fields, str], Config]] = {
    "bert": _bert,
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _llama,
    "mt5": _t5,
    "roberta": _bert,
    "t5": _t5,
}

HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")  # of huggingface_hub, by age


def download(name: str, revision: str | None = None, weights: bool = True) -> Path:
    """Returns the local folder of the model called `name` on the Hugging Face hub, fetched if need be.

    Only JSON, safetensors (with `weights`) and tokenizer files are fetched. Raises `UserError` when there is no such
    model or revision, when it is not open to this user, or when the hub is not reachable.
    """
    import huggingface_hub
    from huggingface_hub import errors

    where = f"'{name}'" + (f" at revision '{revision}'" if revision else "")
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=["*.json", *(["*.safetensors"] if weights else []), "*.model", "*.txt", "*.jinja"],
            ignore_patterns=["*/*", "consolidated*"],  # exports to other formats, and a second copy of the weights
        )
        if (Path(folder) / "modules.json").is_file():  # of sentence-transformers: how a text's vector is pooled
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=["*_Pooling/config.json"])
    except errors.GatedRepoError:
        raise UserError(
            f"{where}: the model is gated; accept its terms on the hub and log in with `hf auth login`"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(f"{where} is neither a local path nor a model on the hub; check the spelling") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{where}: the model has no such revision; correct 'revision'") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{where} is not a local path and the model hub is not reachable ({type(error).__name__});"
            " give a local folder, a .gguf file, or packaged:smollm2-135m-instruct (an encoder:"
            " packaged:all-minilm-l6-v2)"
        ) from None
    except Exception as error:  # its HTTP library's own exceptions derive from Exception alone
        if type(error).__module__.split(".")[0] not in HTTP_LIBRARIES:
            raise
        raise UserError(
            f"{where}: the download from the model hub was interrupted ({type(error).__name__}); run the same command"
            " again, what has arrived is kept"
        ) from None
    return Path(folder)
