"""Which bytes a token stands for; tests/inference/stop_test.py compares whole texts with what tokenizers decode."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from deptjax.errors import UserError
from deptjax.interop.token_bytes import token_bytes

TOKENS = ["</s>", "Ġthe", "é", "▁the", "<0x20>", "<0xE9>", "plain", "▁▁"]


def tokenizer(decoder: decoders.Decoder | None) -> PreTrainedTokenizerFast:
    """Returns a tokenizer that joins `TOKENS` in this way; the first is special."""
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="plain"))
    if decoder is not None:
        made.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


def llama(*more: decoders.Decoder) -> decoders.Decoder:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, *more])


def test_bytes_of_each_kind() -> None:
    first, later = token_bytes(tokenizer(decoders.ByteLevel()))
    assert first == later == (None, b" the", b"\xe9", "▁the".encode(), b"<0x20>", b"<0xE9>", b"plain", "▁▁".encode())
    first, later = token_bytes(tokenizer(decoders.Metaspace()))
    assert (first[3], later[3], first[7], later[7], later[4]) == (b"the", b" the", b"", b"  ", b"<0x20>")
    first, later = token_bytes(tokenizer(decoders.Metaspace(prepend_scheme="never")))
    assert first[3] == later[3] == b" the"
    first, later = token_bytes(tokenizer(llama(decoders.Strip(" ", 1, 0))))
    assert (first[3], first[4], first[5], first[7]) == (b"the", b"", b"\xe9", b" ")
    assert (later[3], later[4], later[5], later[7]) == (b" the", b" ", b"\xe9", b"  ")
    first, later = token_bytes(tokenizer(llama()))
    assert first == later
    first, later = token_bytes(tokenizer(None))
    assert (first[6], later[6], later[2]) == (b"plain", b" plain", " é".encode())


@pytest.mark.parametrize(
    ("decoder", "told"),
    [
        (decoders.WordPiece(), "a WordPiece decoder"),
        (llama(decoders.Strip(" ", 2, 0)), "a Strip step in its decoder"),
        (decoders.Sequence([decoders.CTC()]), "a CTC step in its decoder"),
    ],
)
def test_a_way_of_joining_that_is_not_known_is_told(decoder: decoders.Decoder, told: str) -> None:
    with pytest.raises(UserError, match=f"stop strings are not implemented for a tokenizer with {told}; leave stop"):
        token_bytes(tokenizer(decoder))
