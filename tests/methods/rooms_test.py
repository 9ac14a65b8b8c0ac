"""Prompts of two sizes in one bank: zeros beyond the smaller one's sizes change nothing."""

from __future__ import annotations

import numpy as np
import pytest

from deptjax.inference.predictor import Predictor
from deptjax.methods import DPT, ADePT, Method
from tests.cases import backbone_of, make_case
from tests.reviews import review_prompt

SIZES: dict[str, tuple[str, Method, Method]] = {
    "adept": ("t5", ADePT(prompt_length=3, rank=5), ADePT(prompt_length=6, rank=2)),
    "dpt": ("llama", DPT(prompt_length=3, rank=5), DPT(prompt_length=6, rank=2)),
}
TEXTS = ["the film is good", "a dull story and a bad ending"]


@pytest.mark.parametrize("kind", SIZES)
def test_two_sizes_share_a_bank(kind: str) -> None:
    family, *methods = SIZES[kind]
    backbone = backbone_of(family)
    prompts = {f"p{i}": review_prompt(make_case(backbone, method)) for i, method in enumerate(methods)}
    together = Predictor(backbone, prompts)
    for name, prompt in prompts.items():
        mixed, alone = together(TEXTS, name), Predictor(backbone, {name: prompt})(TEXTS)
        for got, wanted in zip(mixed, alone, strict=True):
            assert got.scores
            assert wanted.scores
            np.testing.assert_allclose(list(got.scores.values()), list(wanted.scores.values()), rtol=1e-5, atol=1e-5)
    first, second = (together(TEXTS, name)[0].scores for name in prompts)
    assert first != second
