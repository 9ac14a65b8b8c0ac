"""The bytes that each token of a tokenizer stands for, by the rules with which the tokenizer joins tokens to a text.

Three rules are known: byte-level BPE (GPT-2, LLaMA 3, SmolLM2: every character of a token is a byte), sentencepiece
(T5, LLaMA 2: a meta space is a space, `<0xAB>` is a byte, the space in front of a text is dropped), and tokens joined
by spaces (a tokenizer without a decoder). The text of tokens is the concatenation of their bytes, read as UTF-8; only
what stands first in a text may differ, by a space.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from deptjax.errors import UserError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes(NamedTuple):
    """What each token adds to a text: `first` where it is the first of the text, `later` anywhere else.

    `None` for tokens that no text shows (special tokens): these are not counted when it is asked which is the first.
    """

    first: tuple[bytes | None, ...]
    later: tuple[bytes | None, ...]


_Rule = tuple[Callable[[str], bytes], Callable[[str], bytes]]  # of the first token, and of the later ones


@functools.lru_cache(maxsize=4)
def token_bytes(tokenizer: Any) -> TokenBytes:
    """Returns the bytes of every token of a transformers tokenizer, as `decode(..., skip_special_tokens=True)` has it.

    Raises `UserError` for a tokenizer that joins tokens by a rule which is not known here.
    """
    first, later = _rule(tokenizer)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        special = set(tokenizer.all_special_ids)
    else:
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    shown = [None if i in special or token is None else token for i, token in enumerate(tokens)]
    return TokenBytes(*(tuple(None if t is None else rule(t) for t in shown) for rule in (first, later)))


def _rule(tokenizer: Any) -> _Rule:
    if type(tokenizer).__name__ == "ByT5Tokenizer":  # written in Python: a token is the character of its byte
        return _same(lambda token: bytes([ord(token)]) if len(token) == 1 else token.encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"stop strings are not implemented for a {type(tokenizer).__name__}; leave stop empty")
    if backend.decoder is None:
        return str.encode, lambda token: b" " + token.encode()
    return _rule_of(json.loads(backend.decoder.__getstate__()))


def _rule_of(decoder: dict[str, Any]) -> _Rule:
    """Returns the rule of a decoder of the `tokenizers` library, given as it stands in tokenizer.json."""
    kind = decoder["type"]
    if kind == "ByteLevel":
        return _same(_byte_level)
    if kind == "Metaspace":
        meta = decoder["replacement"]
        dropped = "" if decoder["prepend_scheme"] != "never" else " "
        return lambda t: t.replace(meta, dropped).encode(), lambda t: t.replace(meta, " ").encode()
    if kind == "Sequence":
        return _sentencepiece(decoder["decoders"])
    raise UserError(f"stop strings are not implemented for a tokenizer with a {kind} decoder; leave stop empty")


def _sentencepiece(steps: list[dict[str, Any]]) -> _Rule:
    """Returns the rule of LLaMA's chain: replace the meta space, read byte tokens, join, drop a space in front."""
    replaced: list[tuple[str, str]] = []
    has_bytes, strip = False, b""
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                replaced.append((old, new))
            case {"type": "ByteFallback"}:
                has_bytes = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Strip", "content": content, "start": 1, "stop": 0} if step is steps[-1]:
                strip = content.encode()
            case _:
                told = f"stop strings are not implemented for a tokenizer with a {step['type']} step in its decoder"
                raise UserError(f"{told}; leave stop empty")

    def later(token: str) -> bytes:
        for old, new in replaced:
            token = token.replace(old, new)
        found = _BYTE_TOKEN.fullmatch(token) if has_bytes else None
        return bytes([int(found[1], 16)]) if found else token.encode()

    return lambda token: later(token).removeprefix(strip), later


def _same(rule: Callable[[str], bytes]) -> _Rule:
    return rule, rule


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    """Returns GPT-2's table backwards: printable bytes stand for themselves, the others from U+0100 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _byte_level(token: str) -> bytes:
    table = _byte_of_letter()
    known = [table.get(letter) for letter in token]
    # An added token need not be written in the letters of the table, and then stands for itself.
    return token.encode() if None in known else bytes(byte for byte in known if byte is not None)
