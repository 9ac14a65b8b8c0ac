"""New text for a batch of rows, in the way that a `Decoding` says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from deptjax.inference.beam import beam_search
from deptjax.inference.controls import Decoded, make_controls, room_for
from deptjax.inference.decode import decode
from deptjax.inference.decoding import Decoding
from deptjax.inference.rows import Rows
from deptjax.inference.stop import stop_table
from deptjax.typing import Array, Bool, Tokens, Tree


def generate(
    model: Any,
    frozen: Tree,
    rows: Rows,
    source: Tokens,
    source_mask: Bool[Array, "B T"],
    decoding: Decoding,
    tokenizer: Any,
    *,
    limits: Sequence[int] | np.ndarray | None = None,
    numbers: Sequence[int] | np.ndarray | None = None,
    eos_ids: Sequence[int] | None = None,
) -> Decoded:
    """Returns `decoding.num_return` texts a row as tokens, with their scores; see `Decoded`.

    Args:
      model: a `PromptedModel`.
      frozen: the backbone's parameters.
      rows: what the rows are tuned with.
      source: (B, T) int32 token ids.
      source_mask: true on real tokens.
      decoding: what the user chose.
      tokenizer: for the end and padding tokens, and for stop strings.
      limits: (B,) the most new tokens of each row where they differ from `decoding.max_new_tokens`; 0 for fillers.
      numbers: (B,) each row's own number, on which its samples depend; by default its place in the batch.
      eos_ids: the tokens that end a text, four at most; by default the tokenizer's. `()` is none.

    A program is compiled for each shape of the source, number of beams or samples and power of two of new tokens (and
    of states of the stop strings' automaton); no other setting needs one. Raises `UserError` for a tokenizer with
    which stop strings cannot be used.
    """
    if eos_ids is None:
        eos_ids = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    pad_id = next((i for i in (tokenizer.pad_token_id, *eos_ids) if i is not None), 0)
    stops = stop_table(tokenizer, decoding.stop, model.module.config.vocab_size)
    controls = make_controls(
        decoding, source.shape[0], eos_ids=eos_ids, pad_id=pad_id, stops=stops, limits=limits, numbers=numbers
    )
    room = room_for(decoding.max_new_tokens if limits is None else max(1, int(np.max(limits))))
    inputs = (model, frozen, rows, source, source_mask, controls)
    if decoding.is_beam_search:
        return beam_search(*inputs, max_new=room, num_beams=decoding.num_beams, num_return=decoding.num_return)
    return decode(*inputs, max_new=room, texts=decoding.num_return, sample=decoding.sample)
