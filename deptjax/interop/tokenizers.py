"""Loads a model's tokenizer: from its folder, or rebuilt from the metadata of a GGUF file."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from deptjax.errors import UserError, nearest
from deptjax.interop import packaged
from deptjax.interop.huggingface import download

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # ggml's kinds of tokens
_SPACE = "\u2581"  # what sentencepiece writes for a space

# How text is split before byte-level merges. The pattern of Llama 3 is part of the definition of its tokenizer.
_LLAMA3_SPLIT = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "tokenizer.model")
_USUAL_SPECIAL_TOKENS = {
    "pad_token": ("<pad>", "[PAD]"),
    "eos_token": ("</s>", "<eos>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>"),
    "unk_token": ("<unk>", "[UNK]"),
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>"),
    "mask_token": ("<mask>", "[MASK]"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
}
PRE_TOKENIZERS = ("smollm", "llama-bpe", "gpt-2", "default")


def load_tokenizer(path: str | Path) -> Any:
    """Returns the transformers tokenizer of a model's folder, or of a `.gguf` file. Raises `UserError`."""
    path = Path(path)
    if path.is_file():
        from deptjax.interop.gguf import GGUFFile

        return tokenizer_from_gguf(GGUFFile(path).metadata, str(path))
    if not path.is_dir():
        raise UserError(f"{path}: there is no such folder to read a tokenizer from")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:
        if not isinstance(error, (OSError, ValueError, KeyError, ImportError)) and type(error) is not Exception:
            raise  # the Rust side raises plain Exception, for a tokenizer.json that it cannot read
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path}: no tokenizer can be read from this folder ({reason}); copy tokenizer.json there"
        ) from None


def chosen_tokenizer(chosen: Any) -> Any:
    """Returns the transformers tokenizer that a user names in place of the one beside the weights.

    `chosen` is a folder, a `.gguf` file, a sentencepiece `.model`, a `tokenizer.json`, `packaged:t5` or `packaged:mt5`,
    a name on the model hub, or a loaded tokenizer, which is returned as it is. Raises `UserError`.
    """
    if not isinstance(chosen, (str, Path)):
        return chosen
    name = str(chosen)
    if name.startswith(packaged.PREFIX):
        return load_tokenizer(packaged.tokenizer_folder(name.removeprefix(packaged.PREFIX)))
    path = Path(name).expanduser()
    if name and path.exists():
        if path.is_file() and path.suffix in (".model", ".json"):
            return _from_file(path)
        if path.is_file() and path.suffix != ".gguf":
            raise UserError(f"{path}: expected a tokenizer's folder, tokenizer.json, a .model or a .gguf file")
        return load_tokenizer(path)
    looks_local = isinstance(chosen, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1
    if not name or looks_local or name.endswith((".model", ".json", ".gguf")):
        raise UserError(f"tokenizer '{name}': there is no such file or folder; check the path")
    return load_tokenizer(download(name, weights=False))


def _from_file(path: Path) -> Any:
    """Returns the tokenizer of a single file, with its settings where they stand beside it."""
    if path.name in TOKENIZER_FILES and (path.parent / "tokenizer_config.json").is_file():
        return load_tokenizer(path.parent)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        if path.suffix == ".model":
            shutil.copyfile(path, folder / "spiece.model")
            settings = {"tokenizer_class": _sentencepiece_class(path)}
        else:
            shutil.copyfile(path, folder / "tokenizer.json")
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", **_special_tokens(path)}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        try:
            return load_tokenizer(folder)
        except UserError:
            raise UserError(f"{path}: no tokenizer can be read from this file; give the folder of its model") from None


def _sentencepiece_class(path: Path) -> str:
    """Returns the transformers class for a sentencepiece model: T5's are unigram models."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        raise UserError(f"{path}: not a sentencepiece model; give spiece.model or tokenizer.json") from None
    if model.trainer_spec.model_type != model.trainer_spec.UNIGRAM:
        raise UserError(f"{path}: not a unigram model, as T5's are; give the folder of its model, with its settings")
    return "T5Tokenizer"


def _special_tokens(path: Path) -> dict[str, str]:
    """Returns the usual special tokens among those that a `tokenizer.json` adds: the file does not say their roles."""
    try:
        added = {str(token["content"]) for token in json.loads(path.read_text(encoding="utf-8"))["added_tokens"]}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a tokenizer.json; give the file that transformers or tokenizers wrote") from None
    found = {}
    for role, names in _USUAL_SPECIAL_TOKENS.items():
        token = next((name for name in names if name in added), None)
        if token is not None:
            found[role] = token
    return found


def tokenizer_from_gguf(metadata: dict[str, Any], where: str = "gguf") -> Any:
    """Returns the tokenizer that a GGUF file's metadata describe, as a transformers `PreTrainedTokenizerFast`.

    Byte-level BPE (`tokenizer.ggml.model` `gpt2`, with a `pre` of `PRE_TOKENIZERS`) and sentencepiece BPE with scores
    and byte fallback (`llama`). Raises `UserError`, naming `where`, for any other.
    """
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if kind not in ("gpt2", "llama"):
        raise UserError(f"{where}: 'tokenizer.ggml.model' is {kind!r}, expected 'gpt2' (byte-level BPE) or 'llama'")
    if not tokens:
        raise UserError(f"{where}: 'tokenizer.ggml.tokens' is missing; convert the model again")
    tokenizer = _byte_level(metadata, where) if kind == "gpt2" else _sentencepiece(metadata, where)

    def special(name: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if index is None:
            return None
        if not 0 <= index < len(tokens):
            raise UserError(f"{where}: 'tokenizer.ggml.{name}_token_id' is {index}, but there are {len(tokens)} tokens")
        return str(tokens[index])

    named = {"bos_token": special("bos"), "eos_token": special("eos"), "unk_token": special("unknown")}
    named["pad_token"] = special("padding")
    kinds = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    extra = [
        AddedToken(token, special=k != _USER_DEFINED, normalized=False)
        for token, k in zip(tokens, kinds)
        if k in (_CONTROL, _USER_DEFINED) or (k == _UNKNOWN and kind == "llama")
    ]
    tokenizer.add_tokens(extra)
    begin, end = named["bos_token"], named["eos_token"]
    # Files that do not say follow the two tokenizers' own habit.
    add_begin = bool(metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or _pre(metadata) == "llama-bpe"))
    add_end = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    around = [begin if add_begin else None, "$A", end if add_end else None]
    template = [part for part in around if part]
    if len(template) > 1:
        pairs = [f"{part}:1" if part != "$A" else "$B:1" for part in template]
        ids = [(token, tokens.index(token)) for token in {*template} - {"$A"}]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, pair=template + pairs, special_tokens=ids
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in named.items() if token is not None},
    )
    fast.chat_template = metadata.get("tokenizer.chat_template")
    return fast


def _pre(metadata: dict[str, Any]) -> str:
    return str(metadata.get("tokenizer.ggml.pre", "default"))


def _byte_level(metadata: dict[str, Any], where: str) -> Any:
    """Returns a byte-level BPE with the split that `pre` names."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pre, tokens = _pre(metadata), metadata["tokenizer.ggml.tokens"]
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        hint = nearest(pre, PRE_TOKENIZERS)
        raise UserError(
            f"{where}: 'tokenizer.ggml.pre' is '{pre}', expected one of {known}; use the model's folder.{hint}"
        )
    if "tokenizer.ggml.merges" not in metadata:
        raise UserError(f"{where}: 'tokenizer.ggml.merges' is missing; convert the model again")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe")
    except Exception as error:  # the Rust side raises plain Exception, for a merge whose token is not there
        raise UserError(f"{where}: 'tokenizer.ggml.merges' do not fit the tokens ({error})") from None
    tokenizer = Tokenizer(model)
    if pre == "llama-bpe":
        split = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        if pre == "smollm":
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: dict[str, Any], where: str) -> Any:
    """Returns a sentencepiece BPE: two neighbours are merged if together they are a piece, best score first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens) or len(kinds) != len(tokens):
        raise UserError(f"{where}: 'tokenizer.ggml.scores' and 'token_type' must have one entry a token; convert again")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pieces = {token: i for token, i in vocabulary.items() if kinds[i] not in (_UNKNOWN, _CONTROL, _BYTE)}
    merges = []
    for piece, index in pieces.items():
        splits = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        found = [
            (pieces[left], pieces[right], left, right) for left, right in splits if left in pieces and right in pieces
        ]
        merges += [(-scores[index], order, left, right) for order, (_, _, left, right) in enumerate(sorted(found))]
    merges.sort(key=lambda merge: merge[0])  # stable: equal scores keep the order of pieces, and of their splits
    unknown = next((tokens[i] for i, k in enumerate(kinds) if k == _UNKNOWN), None)
    model = models.BPE(
        vocab=vocabulary,
        merges=[(left, right) for _, _, left, right in merges],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=_BYTE in kinds,
    )
    tokenizer = Tokenizer(model)
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer
