"""The table of sizes against published numbers of parameters, and the gin files that name the models."""

from __future__ import annotations

import functools
import pathlib

import pytest

from deptjax.cli import settings
from deptjax.models.gpt2 import GPT2Config
from deptjax.models.sizes import SIZES, parameter_count

# Exact numbers as public code and pages quote them; the checkpoints themselves were not opened for this table. Where a
# family has only its paper's rounded numbers, they are in `ROUNDED`.
PUBLISHED = {
    # T5 1.0, torch's `num_parameters` of the released files; the paper (arXiv 1910.10683) has 60M, 220M, 770M, 3B, 11B.
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    # T5 1.1: KerasHub's presets (base, xl, xxl), the safetensors headers of Flan-T5 (small, large).
    "t5-1.1-small": 76_961_152,
    "t5-1.1-base": 247_577_856,
    "t5-1.1-large": 783_150_080,
    "t5-1.1-xl": 2_849_757_184,
    "t5-1.1-xxl": 11_135_332_352,
    # torch's `num_parameters` of google/mt5-small and -base, google/byt5-small and -base.
    "mt5-small": 300_176_768,
    "mt5-base": 582_401_280,
    "byt5-small": 299_637_760,
    "byt5-base": 581_653_248,
    # torch's `num_parameters` of BertForPreTraining, less the 2 D + 2 of its head that tells the next sentence, of
    # RobertaForMaskedLM, and of BertModel.
    "bert-base": 110_106_428 - 1_538,
    "bert-large": 336_226_108 - 2_050,
    "roberta-base": 124_697_433,
    "roberta-large": 355_412_057,
    "all-minilm-l6-v2": 22_713_216,
    # GPT-2: KerasHub's presets and the safetensors headers; OpenAI's own 117M .. 1542M were corrected by them later.
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    # Headers of the safetensors on the model hub.
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}
PUBLISHED |= {
    f"{kind}-{size}": PUBLISHED[f"t5-1.1-{size}"]
    for kind in ("t5-lm", "flan-t5")
    for size in ("small", "base", "large", "xl", "xxl")
}
# In billions: table 1 of the paper of ByT5 (arXiv 2105.13626), which has mT5's beside them.
ROUNDED = {
    "mt5-large": ("1.23", 2),
    "mt5-xl": ("3.74", 2),
    "mt5-xxl": ("12.9", 1),
    "byt5-large": ("1.23", 2),
    "byt5-xl": ("3.74", 2),
    "byt5-xxl": ("12.9", 1),
}
CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs" / "models"


@functools.cache
def count_of(name: str) -> int:
    """Returns the number of parameters, computed once."""
    return parameter_count(SIZES[name])


def test_every_size_is_checked() -> None:
    assert set(SIZES) == set(PUBLISHED) | set(ROUNDED)


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_those_published(name: str) -> None:
    count = count_of(name)
    if name in PUBLISHED:
        assert count == PUBLISHED[name]
    else:
        billions, digits = ROUNDED[name]
        assert f"{count / 1e9:.{digits}f}" == billions


@pytest.mark.parametrize("name", SIZES)
def test_every_size_has_a_gin_file(name: str) -> None:
    """It loads the model by a name, says its size, and stacks the layers of deep models."""
    path = CONFIGS / f"{name.replace('-', '_').replace('.', '_')}.gin"
    model = settings.model_settings(settings.merged([str(path)], [], {}))
    config, count = SIZES[name], count_of(name)
    said = f"{count / 1e6:.0f}M" if count < 1e9 else f"{count / 1e9:.1f}B"
    assert f", {said} parameters." in path.read_text()
    place, size = str(model["name_or_path"]).lower(), name.rpartition("-")[2]
    assert size in place
    if place.startswith("gs://"):
        assert model["tokenizer"] in ("packaged:t5", "packaged:mt5", f"google/{name}")
    depth = config.num_encoder_layers if config.is_encoder_decoder else config.num_layers
    assert model.get("scan_layers", False) == (depth > 12)
    assert model["dtype"] == ("bfloat16" if count > 2.5e9 else "float32")


def test_the_table_is_of_models_that_can_be_made() -> None:
    gpt2 = SIZES["gpt2"]
    assert isinstance(gpt2, GPT2Config)
    assert (gpt2.head_dim, gpt2.context) == (64, 1024)
    assert {config.head_dim for name, config in SIZES.items() if name.startswith("llama")} == {128}
