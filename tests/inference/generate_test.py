"""Generation as users have it: buckets, end tokens of the tokenizer, stop strings; and a real model against torch."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest

from deptjax.errors import UserError
from deptjax.inference.beam import beam_search
from deptjax.inference.controls import EOS, LENGTH, STOP, Decoded
from deptjax.inference.decode import decode
from deptjax.inference.decoding import Decoding
from deptjax.inference.generate import generate
from deptjax.inference.stop import cut_at_stop
from deptjax.interop.load import load_backbone
from deptjax.methods import DePT, ZeroShot
from deptjax.models.prompted import PromptedModel
from tests.cases import Case, make_case, padded, rows_of
from tests.inference.torch_oracle import PAD, load, one_thread, torch_inputs, torch_model, torch_texts, tuned

ROWS = rows_of((7, 3, 5))


def run(case: Case, decoding: Decoding, rows: list[np.ndarray] = ROWS, side: str = "right", **more: Any) -> Decoded:
    source, mask = padded(rows, max(map(len, rows)) + 1, side)
    tokenizer = case.backbone.tokenizer
    out = generate(case.model, case.frozen, case.rows, source, mask, decoding, tokenizer, **more)
    return jax.tree.map(np.asarray, out)


def text_of(case: Case, tokens: np.ndarray) -> str:
    return case.backbone.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def texts_of(case: Case, got: Decoded) -> list[list[str]]:
    return [[text_of(case, t[:n]) for t, n in zip(texts, lengths)] for texts, lengths in zip(got.tokens, got.lengths)]


def crossing(text: str) -> str:
    """Returns a stop string from the end of one word of a text to the beginning of a later one."""
    words = text.split(" ")
    return f"{words[1][-1]} {words[2]} {words[3][0]}"


def torch_until(family: str, method: str, decoding: Decoding, eos: tuple[int, ...]) -> np.ndarray:
    """Returns torch's tokens (B, N, up to G) where a text that holds a stop string is finished."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    case = tuned(family, method)

    class Holds(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            texts = [text_of(case, row) for row in input_ids.numpy()]
            return torch.tensor([any(stop in text for stop in decoding.stop) for text in texts])

    with one_thread():
        out = torch_model(family, method).generate(
            **torch_inputs(case, ROWS),
            stopping_criteria=StoppingCriteriaList([Holds()]),
            max_new_tokens=decoding.max_new_tokens,
            num_beams=decoding.num_beams,
            num_return_sequences=decoding.num_return,
            eos_token_id=list(eos),
            pad_token_id=PAD,
            do_sample=False,
            use_cache=family == "llama",
        )
    return out[:, int(family == "t5") :].numpy().reshape(len(ROWS), decoding.num_return, -1)


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_stop_strings_end_texts_as_in_torch(family: str, beams: int) -> None:
    case = tuned(family, "dept")
    plain = run(case, Decoding(8, num_beams=beams, num_return=beams), eos_ids=())
    assert (plain.ended == LENGTH).all()
    stops = (crossing(texts_of(case, plain)[0][0]), crossing(texts_of(case, plain)[2][-1]))
    eos = int(plain.tokens[1, 0, 4])
    decoding = Decoding(8, num_beams=beams, num_return=beams, stop=stops)
    got = run(case, decoding, eos_ids=(eos,))
    wanted = torch_until(family, "dept", decoding, (eos,))
    real = np.arange(8)[None, None] < got.lengths[..., None]
    width = wanted.shape[2]
    np.testing.assert_array_equal(np.where(real, got.tokens, PAD)[:, :, :width], wanted)
    assert STOP in got.ended
    for texts, reasons in zip(texts_of(case, got), got.ended):
        for text, reason in zip(texts, reasons):
            assert (reason == STOP) == (cut_at_stop(text, stops) != text)


def test_samples_end_with_stop_strings() -> None:
    case = tuned("llama", "dept")
    decoding = Decoding(8, sample=True, temperature=2.0, num_return=3)
    plain = run(case, decoding)
    texts = [text for row in texts_of(case, plain) for text in row]
    stop = next(crossing(text) for text in texts if len(text.split(" ")) > 4)
    got = run(case, Decoding(8, sample=True, temperature=2.0, num_return=3, stop=(stop,)))
    for before, after, reason in zip(texts, [t for row in texts_of(case, got) for t in row], got.ended.ravel()):
        assert before.startswith(after)
        assert (stop in after) == (reason == STOP) == (stop in before)
    assert (got.ended == STOP).any()


def test_end_and_padding_tokens_are_the_tokenizers() -> None:
    case = tuned("llama", "zero_shot")
    eos = case.backbone.tokenizer.eos_token_id
    decoding = Decoding(8, sample=True, temperature=1e6, num_return=20)  # nearly even: an end comes soon
    got = run(case, decoding)
    ends = np.take_along_axis(got.tokens, got.lengths[..., None] - 1, axis=2)[..., 0]
    np.testing.assert_array_equal(got.ended, np.where(ends == eos, EOS, LENGTH))
    assert (got.ended == EOS).any()
    behind = np.arange(8)[None, None] >= got.lengths[..., None]
    assert (got.tokens[behind] == case.backbone.tokenizer.pad_token_id).all()


def test_few_programs_serve_many_requests() -> None:
    case = tuned("llama", "dept")
    run(case, Decoding(5))
    run(case, Decoding(5, num_beams=2))
    before = decode._cache_size(), beam_search._cache_size()
    for new in (1, 3, 8):
        run(case, Decoding(new), limits=[1, 0, new])
        run(case, Decoding(new, num_beams=2, length_penalty=0.3, early_stopping=True), numbers=[4, 5, 6])
    assert (decode._cache_size(), beam_search._cache_size()) == before
    run(case, Decoding(9))
    assert decode._cache_size() == before[0] + 1


def test_a_tokenizer_whose_bytes_are_not_known_is_told() -> None:
    class Other:
        eos_token_id, pad_token_id, added_tokens_decoder = 1, 0, {}

    case = tuned("llama", "dept")
    source, mask = padded(ROWS, 8)
    with pytest.raises(UserError, match="stop strings are not implemented for a Other; leave stop empty"):
        generate(case.model, case.frozen, case.rows, source, mask, Decoding(stop=("a",)), Other())


@functools.cache
def smollm2(method: str) -> Case:
    """Returns the real model alone, or with a DePT prompt that is moved a little."""
    backbone = load_backbone("packaged:smollm2-135m-instruct", scan_layers=True)  # compiles faster
    if method == "zero_shot":
        return Case(backbone, PromptedModel.build(backbone, ZeroShot()), {}, backbone.params)
    case = make_case(backbone, DePT(prompt_length=4, rank=2, max_length=32, prompt_init="text"))
    random = np.random.default_rng(0)
    scale = backbone.embedding_rms
    moved = jax.tree.map(lambda p: p + 0.3 * scale * random.standard_normal(p.shape).astype(np.float32), case.trainable)
    return Case(backbone, case.model, moved, case.frozen)


@functools.cache
def smollm2_in_torch() -> Any:
    return load(smollm2("zero_shot").backbone)


@pytest.mark.parametrize("method", ["zero_shot", "dept"])
def test_a_real_model_writes_what_it_writes_in_torch(method: str) -> None:
    """SmolLM2, three texts padded to one length, greedy and with beams, some of which end with a full stop."""
    case = smollm2(method)
    tokenizer = case.backbone.tokenizer
    texts = ("The capital of France is", "Water boils at a temperature of about", "Once upon a time,")
    rows = [np.array(tokenizer(text)["input_ids"], np.int32) for text in texts]
    eos = (tokenizer.convert_tokens_to_ids("."), tokenizer.eos_token_id)
    for decoding in (Decoding(12), Decoding(12, num_beams=3, num_return=3, length_penalty=0.6)):
        got = run(case, decoding, rows, "left", eos_ids=eos)
        tokens, scores = torch_texts(smollm2_in_torch(), case, rows, decoding, eos)
        real = np.arange(16)[None, None] < got.lengths[..., None]
        np.testing.assert_array_equal(np.where(real, got.tokens, PAD)[:, :, : tokens.shape[2]], tokens)
        assert got.lengths.max() == tokens.shape[2]
        if scores is not None:
            np.testing.assert_allclose(got.scores, scores, rtol=0, atol=1e-4)
