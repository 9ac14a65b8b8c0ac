"""What torch's `generate` writes for the rows of a case: the prompt, where there is one, among the input embeddings."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from deptjax.inference.controls import Controls, Decoded, make_controls
from deptjax.inference.decoding import Decoding
from deptjax.methods import ZeroShot
from deptjax.methods.base import Texts
from deptjax.models.backbone import Backbone
from deptjax.models.prompted import PromptedModel
from deptjax.testing import save_hf_folder
from deptjax.typing import Tree
from tests.cases import Case, backbone_of, case_of

PAD = 2  # not 0: torch's beam search takes a pad id of 0 for none


@functools.cache
def tuned(family: str, method: str) -> Case:
    """Returns a case by name; `zero_shot` is the backbone alone."""
    if method == "zero_shot":
        backbone = backbone_of(family)
        return Case(backbone, PromptedModel.build(backbone, ZeroShot()), {}, backbone.params)
    return case_of(family, method)


def merged(params: Tree, tuned: Tree, scaling: float) -> Tree:
    """Returns the backbone's tree with LoRA's updates added to its kernels."""
    if "site" in tuned:
        site = tuned["site"]
        return {**params, "kernel": params["kernel"] + scaling * site["lora_a"] @ site["lora_b"]}
    return {**params, **{key: merged(params[key], value, scaling) for key, value in tuned.items()}}


def load(backbone: Backbone) -> Any:
    """Returns the transformers model with a backbone's weights."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind = AutoModelForSeq2SeqLM if backbone.config.is_encoder_decoder else AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        model = kind.from_pretrained(save_hf_folder(backbone, pathlib.Path(folder)), dtype="float32").eval()
    model.generation_config.eos_token_id = None  # the tests say what ends a text
    return model


@functools.cache
def torch_model(family: str, method: str) -> Any:
    """Returns the transformers model of a case."""
    case = tuned(family, method)
    inner = case.moved.get("backbone")
    if inner is None:
        return load(case.backbone)
    lora: Any = case.model.method
    params = merged(case.frozen, inner, lora.alpha / lora.rank)
    return load(dataclasses.replace(case.backbone, params=params))


def embedded(case: Case, row: np.ndarray) -> np.ndarray:
    """Returns what a row's blocks are given: (M + T, D), the prompt in front."""
    embeds = case.model.module.apply({"params": case.frozen}, row[None], method="embed")
    if "input" not in case.moved:
        return np.asarray(embeds[0])
    fill = case.model.method.sites().input
    prompt, embeds = fill.apply({"params": case.moved["input"]}, embeds, Texts.whole(embeds), method="streams")
    return np.concatenate([prompt, embeds[0]])


def torch_inputs(case: Case, rows: Sequence[np.ndarray]) -> dict[str, Any]:
    """Returns `generate`'s inputs: the rows as embeddings, padded on the left, as it wants them."""
    import torch

    parts = [embedded(case, row) for row in rows]
    length = max(map(len, parts))
    embeds = np.zeros((len(parts), length, parts[0].shape[1]), np.float32)
    mask = np.zeros((len(parts), length), np.int64)
    for i, part in enumerate(parts):
        embeds[i, length - len(part) :], mask[i, length - len(part) :] = part, 1
    return {"inputs_embeds": torch.from_numpy(embeds), "attention_mask": torch.from_numpy(mask)}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Lets torch work in one thread: in small steps its threads mostly wait for each other, on a busy machine long."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def torch_texts(
    model: Any, case: Case, rows: Sequence[np.ndarray], decoding: Decoding, eos_ids: Sequence[int]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns torch's tokens (B, N, up to G), `PAD` behind the end, and in a beam search its scores (B, N)."""
    beams = {}
    if decoding.is_beam_search:
        beams = {name: getattr(decoding, name) for name in ("num_beams", "length_penalty", "early_stopping")}
    with one_thread():
        out = model.generate(
            **torch_inputs(case, rows),
            **beams,
            do_sample=False,
            num_return_sequences=decoding.num_return,
            max_new_tokens=decoding.max_new_tokens,
            min_new_tokens=decoding.min_new_tokens or None,
            eos_token_id=list(eos_ids) or None,
            pad_token_id=PAD,
            return_dict_in_generate=True,
            output_scores=True,
            # Its cache would take T5's decoder to be as deep as the encoder.
            use_cache=not case.backbone.config.is_encoder_decoder,
        )
    shape = (len(rows), decoding.num_return, -1)
    start = int(case.backbone.config.is_encoder_decoder)  # T5's start token
    tokens = out.sequences[:, start:].numpy().reshape(shape)
    scores = out.sequences_scores.numpy().reshape(shape[:2]) if decoding.is_beam_search else None
    return tokens, scores


def controls_of(decoding: Decoding, batch: int, eos_ids: Sequence[int] = (), **more: Any) -> Controls:
    """Returns the settings with `PAD` behind the ends."""
    return make_controls(decoding, batch, eos_ids=tuple(eos_ids), pad_id=PAD, **more)


def assert_same_texts(got: Decoded, tokens: np.ndarray, scores: np.ndarray | None) -> None:
    """Fails unless tokens are equal, padding included, and scores are, to 1e-4."""
    got = jax.tree.map(np.asarray, got)
    width = tokens.shape[2]
    np.testing.assert_array_equal(got.tokens[:, :, :width], tokens)
    assert (got.tokens[:, :, width:] == PAD).all()
    assert got.lengths.max() == width
    if scores is not None:
        np.testing.assert_allclose(got.scores, scores, rtol=0, atol=1e-4)
