"""Two tokenizers made in memory: one like a causal model's (byte-level pieces), one like T5's (pieces, then `</s>`)."""

from __future__ import annotations

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def causal_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and " yes" and " no" as single tokens, as GPT-2's and SmolLM2's vocabularies have them."""
    vocab = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in ("yes", "no"):
        piece = "Ġ"
        for letter in word:
            merges.append((piece, letter))
            piece += letter
            vocab.setdefault(piece, len(vocab))
    vocab["<end>"] = len(vocab)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.fixture(scope="session")
def t5_tokenizer() -> PreTrainedTokenizerFast:
    """Letters, with "▁yes" and "▁no" as single pieces; words start with "▁", texts end with `</s>`."""
    letters = "▁abcdefghijklmnopqrstuvwxyz0123456789:.?"
    pieces = ["<pad>", "</s>", "<unk>", *letters, "▁yes", "▁no", "▁word"]
    scores = [0.0] * 3 + [-10.0] * len(letters) + [-1.0] * 3
    tokenizer = tokenizers.Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", add_eos_token=True
    )
