"""What the configs of all backbones have in common: how a function is computed, and not which one it is."""

from __future__ import annotations

import dataclasses

import pytest

from deptjax.models.config import BackboneConfig
from deptjax.models.sizes import SIZES
from tests.cases import BACKBONES, backbone_of

OTHERWISE = {"scan_layers": True, "remat": "full", "dtype": "bfloat16", "attention": "xla", "quantize": "int8"}


@pytest.mark.parametrize("family", BACKBONES)
def test_how_a_backbone_is_computed_does_not_make_it_another(family: str) -> None:
    backbone = backbone_of(family)
    config = dataclasses.replace(backbone.config, **OTHERWISE)
    assert {field.name for field in dataclasses.fields(BackboneConfig)} == set(OTHERWISE)
    assert dataclasses.replace(backbone, config=config).fingerprint == backbone.fingerprint
    wider = dataclasses.replace(backbone.config, mlp_dim=backbone.config.mlp_dim + 1)
    assert dataclasses.replace(backbone, config=wider).fingerprint != backbone.fingerprint


@pytest.mark.parametrize("name", ["t5-small", "llama2-7b", "gpt2", "bert-base"])
def test_the_sizes_alone_may_be_given_by_their_places(name: str) -> None:
    config = SIZES[name]
    fields = dataclasses.fields(config)
    assert {field.name for field in fields if field.kw_only} == set(OTHERWISE)
    assert type(config)(*(getattr(config, field.name) for field in fields if not field.kw_only)) == config
