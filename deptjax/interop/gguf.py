"""Reads a LLaMA-family model from a GGUF file: config, tokenizer metadata, and tensors dequantised block by block.

The layout is that of ggml's GGUF versions 2 and 3 (github.com/ggml-org/ggml, docs/gguf.md). The header is read here,
with seek and read, because mapping the file would hold its pages as well as the tree; the `gguf` package turns
quantised blocks into floats. Tensors appear under Hugging Face's names and in its order of rows: a GGUF's query and
key rows are interleaved for a rotary rule that pairs neighbours, and are put back on the way.
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from deptjax.errors import UserError
from deptjax.interop.safetensors import BLOCK_BYTES, read_exactly
from deptjax.models.llama import LlamaConfig
from deptjax.models.rope import RopeScaling, rope_frequencies

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_TEXT = 1 << 28  # no string or array of a sound header is as long; a broken length must not ask for memory

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"

_FIELDS = (
    "vocab_size context_length embedding_length block_count feed_forward_length attention.head_count"
    " attention.head_count_kv attention.key_length attention.value_length attention.layer_norm_rms_epsilon"
    " attention.sliding_window rope.dimension_count rope.freq_base rope.scaling.type rope.scaling.factor"
    " rope.scaling.original_context_length rope.scaling.finetuned rope.scale_linear expert_count expert_used_count"
    " tensor_data_layout attention.causal"
).split()


class _Tensor(NamedTuple):
    stored: str  # its name in the file
    shape: tuple[int, ...]  # (out, in), as Hugging Face has it
    kind: int
    offset: int


class GGUFFile:
    """A GGUF file: `metadata`, and the tensors, as a `TensorSource` with Hugging Face's names and rows.

    Raises `UserError` when the file is not a GGUF, is truncated, or holds quantised blocks that cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: there is no such file")
        self._size = self.path.stat().st_size
        with open(self.path, "rb") as file:
            try:
                self.metadata, infos, end = self._header(file)
            except (struct.error, UnicodeDecodeError, KeyError, OverflowError):
                raise UserError(f"{path}: the file ends inside its header or is damaged; fetch it again") from None
        align = int(self.metadata.get("general.alignment", 32))
        self._start = end + -end % align
        self._tensors = {_huggingface_name(t.stored): t for t in infos}
        for tensor in infos:
            ends = self._start + tensor.offset + math.prod(tensor.shape[:-1]) * self._row_bytes(tensor)
            if ends > self._size:
                raise UserError(
                    f"{path}: the file has {self._size} bytes but tensor '{tensor.stored}' ends at byte {ends};"
                    " it is truncated, fetch it again"
                )

    def _header(self, file: BinaryIO) -> tuple[dict[str, Any], list[_Tensor], int]:
        if file.read(4) != b"GGUF":
            raise UserError(f"{self.path}: not a GGUF file (its first four bytes are not 'GGUF')")
        version, tensors, fields = _unpack(file, "IQQ")
        if version not in (2, 3):
            raise UserError(f"{self.path}: GGUF version {version} is not supported, expected 2 or 3; convert it again")
        metadata = {_text(file): _value(file, _unpack(file, "I")[0]) for _ in range(fields)}
        infos = []
        for _ in range(tensors):
            name = _text(file)
            (rank,) = _unpack(file, "I")
            shape = _unpack(file, f"{rank}Q")[::-1]  # the file names the fastest dimension first
            kind, offset = _unpack(file, "IQ")
            infos.append(_Tensor(name, shape, kind, offset))
        return metadata, infos, file.tell()

    def _row_bytes(self, tensor: _Tensor) -> int:
        import gguf

        try:
            values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.kind)]
        except (ValueError, KeyError):
            raise UserError(
                f"{self.path}: tensor '{tensor.stored}' has the unknown quantisation {tensor.kind}"
            ) from None
        if not tensor.shape or tensor.shape[-1] % values:
            raise UserError(f"{self.path}: tensor '{tensor.stored}' has rows that are no whole number of blocks")
        return tensor.shape[-1] // values * size

    def names(self) -> list[str]:
        """Returns the names of all tensors but the rotary factors, which belong to the config."""
        return [name for name in self._tensors if name != ROPE_FACTORS]

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor, (out, in)."""
        return self._tensors[name].shape

    def where(self, name: str) -> str:
        """Returns the file's path, for messages."""
        return str(self.path)

    def blocks(self, name: str, wanted: tuple[int, int] | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Yields `(start, rows)`: consecutive slices of a tensor along axis 0, dequantised to float32.

        Only those that hold `wanted` rows are read; a block has more than these where its heads must stay together.
        """
        import gguf

        tensor = self._tensors[name]
        kind, row_bytes = gguf.GGMLQuantizationType(tensor.kind), self._row_bytes(tensor)
        rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
        # A block holds whole heads, so that their rows can be put in order inside it.
        heads = self._rotary_heads(name)
        unit = rows // heads if heads else 1
        step = unit * max(1, BLOCK_BYTES // (tensor.shape[-1] * 4 * unit))
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._start + tensor.offset)
            for start in range(0, rows, step):
                if wanted and len(tensor.shape) > 1 and not (start < wanted[1] and wanted[0] < start + step):
                    file.seek(min(step, rows - start) * row_bytes, os.SEEK_CUR)
                    continue
                raw = np.empty((min(step, rows - start), row_bytes), np.uint8)
                read_exactly(file, raw, self.path, tensor.stored)
                try:
                    block = gguf.dequantize(raw, kind)
                except NotImplementedError:
                    raise UserError(
                        f"{self.path}: tensor '{tensor.stored}' is quantised as {kind.name}, which cannot be read;"
                        " take the file in another quantisation, such as Q8_0"
                    ) from None
                block = np.asarray(block, np.float32).reshape(len(raw), tensor.shape[-1])
                if heads:
                    block = _unpermute(block, len(raw) // unit)
                yield start, block if len(tensor.shape) > 1 else block[0]

    def _rotary_heads(self, name: str) -> int:
        """Returns how many heads the interleaved rows of a tensor belong to; 0 where rows are in plain order."""
        query, key = name.endswith("self_attn.q_proj.weight"), name.endswith("self_attn.k_proj.weight")
        heads = int(self.metadata["llama.attention.head_count"]) if query or key else 0
        return int(self.metadata.get("llama.attention.head_count_kv", heads)) if key else heads

    def rope_factors(self) -> np.ndarray | None:
        """Returns what the rotary frequencies are divided by, (H / 2,) float32, where the file holds it."""
        return next(self.blocks(ROPE_FACTORS))[1] if ROPE_FACTORS in self._tensors else None


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Returns the rows of `heads` whole heads with pair (2 i, 2 i + 1) moved to (i, i + H / 2)."""
    width = rows.shape[0] // heads
    return rows.reshape(heads, width // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def _huggingface_name(name: str) -> str:
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    return _NAMES.get(name, name)


def _unpack(file: BinaryIO, code: str) -> tuple[Any, ...]:
    return struct.unpack("<" + code, file.read(struct.calcsize("<" + code)))


def _text(file: BinaryIO) -> str:
    (length,) = _unpack(file, "Q")
    data = file.read(length) if length < _MAX_TEXT else b""
    if len(data) != length:
        raise struct.error
    return data.decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _text(file)
    if kind != _ARRAY:
        return _unpack(file, _SCALARS[kind])[0]
    item, count = _unpack(file, "IQ")
    if count >= _MAX_TEXT:
        raise struct.error
    if item in (_STRING, _ARRAY):
        return [_value(file, item) for _ in range(count)]
    return list(_unpack(file, f"{count}{_SCALARS[item]}"))


def config_from_gguf(file: GGUFFile) -> LlamaConfig:
    """Returns the config of the model in a GGUF file. Raises `UserError` for what is not implemented."""
    where, metadata = file.path, file.metadata
    kind = metadata.get("general.architecture")
    if kind != "llama":
        raise UserError(f"{where}: 'general.architecture' is {kind!r}, expected 'llama'; take a LLaMA-family model")
    for name, value in metadata.items():
        if name.startswith("llama.") and name.removeprefix("llama.") not in _FIELDS:
            raise UserError(
                f"{where}: '{name}' is {value!r}: not known here, and it may change what the model computes"
            )

    def get(name: str, default: Any = None) -> Any:
        value = metadata.get(f"llama.{name}", default)
        if value is None:
            raise UserError(f"{where}: field 'llama.{name}' is missing; convert the model again")
        if isinstance(value, list):
            raise UserError(f"{where}: 'llama.{name}' differs between layers, which is not implemented")
        return value

    positions, width, heads = int(get("context_length")), int(get("embedding_length")), int(get("attention.head_count"))
    head_dim = int(get("attention.key_length", width // heads))
    for name, value, wanted in (
        ("attention.value_length", get("attention.value_length", head_dim), head_dim),
        ("rope.dimension_count", get("rope.dimension_count", head_dim), head_dim),
        ("expert_count", get("expert_count", 0), 0),
        ("attention.causal", get("attention.causal", True), True),
    ):
        if value != wanted:
            raise UserError(f"{where}: 'llama.{name}' is {value!r}: only {wanted!r} is implemented for this model")
    window = int(get("attention.sliding_window", 0))
    if 0 < window < positions:
        raise UserError(
            f"{where}: 'llama.attention.sliding_window' is {window}: a window shorter than the context ({positions})"
            " is not implemented; take a model without one"
        )
    config = LlamaConfig(
        vocab_size=file.shape("model.embed_tokens.weight")[0] if "model.embed_tokens.weight" in file.names() else 1,
        width=width,
        num_layers=int(get("block_count")),
        num_heads=heads,
        num_kv_heads=int(get("attention.head_count_kv", heads)),
        head_dim=head_dim,
        mlp_dim=int(get("feed_forward_length")),
        # float32 in the file: 1e-5 comes back as 9.99999974e-06, and the digits it was written with are the shortest.
        norm_eps=float(str(np.float32(get("attention.layer_norm_rms_epsilon")))),
        max_positions=positions,
        rope_theta=float(str(np.float32(get("rope.freq_base", 10000.0)))),
        tied="lm_head.weight" not in file.names(),
    )
    return _with_rope_scaling(config, file, get)


def _with_rope_scaling(config: LlamaConfig, file: GGUFFile, get: Any) -> LlamaConfig:
    kind = get("rope.scaling.type", "none")
    factors = file.rope_factors()
    if kind not in ("none", "linear"):
        raise UserError(f"{file.path}: 'llama.rope.scaling.type' is '{kind}', expected 'none' or 'linear'")
    scale = float(get("rope.scaling.factor", get("rope.scale_linear", 1.0)))
    if kind == "linear" or (kind == "none" and scale not in (0.0, 1.0) and "llama.rope.scale_linear" in file.metadata):
        config = dataclasses.replace(config, rope_scaling=RopeScaling("linear", scale))
    if factors is None:
        return config
    # Llama 3.1's rule is stored as its result. All released models share its bounds; the largest factor is the factor.
    scaled = dataclasses.replace(config, rope_scaling=RopeScaling("llama3", round(float(factors.max()), 3)))
    found = np.asarray(rope_frequencies(dataclasses.replace(config, rope_scaling=None))) / factors
    if kind == "linear" or not np.allclose(found, np.asarray(rope_frequencies(scaled)), rtol=1e-4, atol=0):
        raise UserError(
            f"{file.path}: tensor '{ROPE_FACTORS}' does not follow Llama 3.1's rule, the only one implemented"
        )
    return scaled
