"""What the files of a sentence-transformers checkpoint say of pooling, and what becomes of it."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from deptjax import load_backbone
from deptjax.errors import UserError
from deptjax.inference.text_encoder import SavedEncoders, encoder_of
from deptjax.interop.sentence_transformers import sentence_pooling
from deptjax.methods import LoPA
from deptjax.testing import save_hf_folder, tiny_bert
from deptjax.training.config import TrainConfig
from deptjax.training.tuning import Tuning
from tests.cases import backbone_of, make_case
from tests.reviews import review_prompt, review_task


def write(folder: pathlib.Path, pooling: Any = None, then: tuple[str, ...] = ("Normalize",)) -> pathlib.Path:
    """Writes what such a library writes beside the weights: the modules, and how the second of them pools."""
    kinds = ["Transformer", "Pooling", *then]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(modules))
    if pooling is not None:
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.mark.parametrize(
    ("pooling", "then", "wanted"),
    [
        (
            {"word_embedding_dimension": 24, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True},
            ("Normalize",),
            ("mean", True),
        ),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, (), ("first", False)),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, (), ("last", False)),
        ({"pooling_mode": "cls", "embedding_dimension": 24}, ("Normalize",), ("first", True)),
        ({"pooling_mode": ["mean", "max"]}, (), ("mean and max", False)),
        ({"pooling_mode": "mean", "pooling_mode_mean_tokens": True}, (), ("mean", False)),
        ({"pooling_mode": 3}, (), ("3", False)),
        ({}, ("Normalize",), ("mean", True)),
        (None, ("Normalize",), ("what 1_Pooling/config.json says, which is missing", True)),
        ({"pooling_mode_max_tokens": True}, (), ("max_tokens", False)),
        ({"pooling_mode_mean_tokens": True}, ("Dense", "Normalize"), ("a Dense layer", False)),
    ],
)
def test_what_is_written_is_read(tmp_path: pathlib.Path, pooling: Any, then: tuple[str, ...], wanted: Any) -> None:
    assert sentence_pooling(write(tmp_path, pooling, then)) == wanted


def test_other_folders_say_nothing_and_damaged_files_are_named(tmp_path: pathlib.Path) -> None:
    assert sentence_pooling(tmp_path) is None
    write(tmp_path, {}, ())
    (tmp_path / "1_Pooling" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"1_Pooling/config.json: not JSON .*; fetch it again"):
        sentence_pooling(tmp_path)
    (tmp_path / "modules.json").write_text("{}")
    with pytest.raises(UserError, match=r"modules.json: expected a JSON array"):
        sentence_pooling(tmp_path)


READER = LoPA(prompt_length=2, rank=1, hidden=4)


def test_an_encoder_is_used_as_its_files_say(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where the user said nothing; a run writes down what it took, and a saved prompt goes by that alone."""
    folder = write(save_hf_folder(tiny_bert(), tmp_path / "reader"), {"pooling_mode_mean_tokens": True})
    backbone, method = backbone_of("llama"), READER.clone(encoder=str(folder))
    encoder = encoder_of(method, backbone)
    assert encoder is not None
    assert (encoder.encoding.pooling, encoder.encoding.normalize) == ("mean", True)
    assert "pooled by mean, normalised, as its files say; encoder_pooling and" in caplog.text
    (vector,) = encoder.vectors(encoder.tokens(["good film"]))
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)

    tuned = Tuning.prepare(backbone, method, review_task(), TrainConfig()).model.method
    assert (tuned.encoder_pooling, tuned.encoder_normalize) == ("mean", True)
    for fields, wanted in (
        ({"encoder_pooling": "first"}, ("first", False)),
        ({"encoder_normalize": False}, ("mean", False)),
    ):
        own = encoder_of(method.clone(**fields), backbone)
        assert own is not None
        assert (own.encoding.pooling, own.encoding.normalize) == wanted

    saved = review_prompt(make_case(backbone, method.clone(encoder_width=24)))
    assert saved.method.encoder_pooling is None  # of a run from before these files were read
    old = SavedEncoders(backbone).of(dataclasses.replace(saved, encoder=encoder.card()))
    assert old is not None
    assert (old.encoding.pooling, old.encoding.normalize) == ("first", False)
    with pytest.raises(UserError, match=r"has no fingerprint of it \(field encoder\) to know it by; tune it again"):
        SavedEncoders(backbone).of(dataclasses.replace(saved, encoder=None))


def test_what_is_not_implemented_has_to_be_named(tmp_path: pathlib.Path) -> None:
    folder = write(save_hf_folder(tiny_bert(), tmp_path / "reader"), {"pooling_mode_max_tokens": True}, ())
    assert load_backbone(folder).sentence == ("max_tokens", False)
    method = READER.clone(encoder=str(folder))
    with pytest.raises(UserError, match=r"its files pool by max_tokens, and not by one of first, .*; name one"):
        encoder_of(method, backbone_of("llama"))
    assert encoder_of(method.clone(encoder_pooling="mean"), backbone_of("llama")) is not None
