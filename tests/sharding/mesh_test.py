"""Which mesh a text means, which one a model gets by itself, and what a mesh that does not fit is answered with."""

from __future__ import annotations

import re

import jax
import pytest

from deptjax.errors import UserError
from deptjax.mesh import mesh_shape, shown
from deptjax.models.sizes import SIZES
from deptjax.sharding import RULES, Placement, sizes_of

LLAMA = sizes_of(SIZES["llama3-8b"])  # 32 heads, 8 of keys and values, width 4096


def shape_of(asked: object, devices: int, *args: object, sizes: object = LLAMA) -> str:
    return shown(mesh_shape(asked, devices, sizes, RULES, *args))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "devices", "wanted"),
    [
        (None, 8, "data:8"),
        ("data", 8, "data:8"),
        ("fsdp", 8, "fsdp:8"),
        ("tensor", 8, "model:8"),
        ("fsdp+tensor", 8, "fsdp:4,model:2"),
        ("fsdp+tensor", 256, "fsdp:128,model:2"),
        ("fsdp+tensor", 1, "data:1"),
        ("data:2,fsdp:4,model:2", 16, "data:2,fsdp:4,model:2"),
        (" fsdp:4 , data:2", 8, "data:2,fsdp:4"),
        ({"model": 4}, 4, "model:4"),
        ("data:1", 1, "data:1"),
    ],
)
def test_a_mesh_is_what_was_asked_for(asked: object, devices: int, wanted: str) -> None:
    assert shape_of(asked, devices) == wanted


GIB = 2**30


@pytest.mark.parametrize(
    ("weights", "memory", "devices", "wanted"),
    [
        (1 * GIB, 16 * GIB, 8, "data:8"),  # fits: a copy on each costs no communication
        (13 * GIB, 16 * GIB, 8, "data:2,fsdp:4"),  # 3.25 of 16 GiB
        (140 * GIB, 16 * GIB, 256, "data:8,fsdp:32"),
        (140 * GIB, 16 * GIB, 8, "fsdp:8"),  # fits nowhere: as far as it can be split
        (13 * GIB, None, 8, "data:8"),
        (13 * GIB, 16 * GIB, 1, "data:1"),
    ],
)
def test_a_model_is_split_as_little_as_it_must(weights: int, memory: int | None, devices: int, wanted: str) -> None:
    assert shape_of("auto", devices, weights, memory) == wanted


@pytest.mark.parametrize(
    ("asked", "devices", "told"),
    [
        ("fsdp:4", 8, "mesh fsdp:4 is of 4 devices, and the number of devices is 8; use data:2,fsdp:4"),
        ("data:2,fsdp:4", 1, "mesh data:2,fsdp:4 is of 8 devices, and the number of devices is 1; use data:1"),
        (
            "model:16",
            16,
            "mesh model:16: the model's kv_heads (8) does not divide into 16; use data:2,model:8, or the rule "
            "kv_heads:none to leave that axis whole",
        ),
        (
            "dta:8",
            8,
            "mesh 'dta:8': there is no axis or preset 'dta'; write sizes such as data:2,fsdp:4 (axes: data, "
            "fsdp, model), or one of data, fsdp, tensor, fsdp+tensor, auto. Did you mean 'data'?",
        ),
        ("data:0", 8, "mesh 'data:0': the size of 'data' is '0'; give a whole number, such as data:4"),
        ("data", 8, None),
        ("data:2,data:4", 8, "mesh 'data:2,data:4' names an axis twice; give each once"),
        ("tensor", 16, "mesh model:16: the model's kv_heads (8) does not divide into 16; use"),
    ],
)
def test_what_does_not_fit_is_answered_with_what_does(asked: str, devices: int, told: str | None) -> None:
    if told is None:
        assert shape_of(asked, devices) == "data:8"
        return
    with pytest.raises(UserError, match=re.escape(told)):
        shape_of(asked, devices)


def test_a_vocabulary_that_does_not_divide_names_the_rule_that_leaves_it_whole() -> None:
    sizes = sizes_of(SIZES["gpt2"])
    with pytest.raises(UserError, match=re.escape("the model's vocab (50257) does not divide into 2; use data:2")):
        shape_of("model:2", 2, sizes=sizes)
    assert mesh_shape("model:2", 2, sizes, {**RULES, "vocab": ()})["model"] == 2


def test_no_sizes_of_two_axes_for_a_prime_number_of_devices() -> None:
    with pytest.raises(UserError, match="no sizes of fsdp and model make 7 devices and divide the model; use data:7"):
        shape_of("fsdp+tensor", 7)


def test_rules_of_the_users_own() -> None:
    devices = jax.devices()[:1]
    rules = dict(Placement.over(devices, rules="vocab:none, embed:fsdp+model").rules)
    assert (rules["vocab"], rules["embed"], rules["mlp"]) == ((), ("fsdp", "model"), ("model",))
    assert dict(Placement.over(devices, rules={"vocab": None, "mlp": "fsdp"}).rules)["mlp"] == ("fsdp",)
    with pytest.raises(UserError, match=re.escape("sharding rule 'vocb': there is no such logical axis; there are")):
        Placement.over(devices, rules="vocb:none")
    with pytest.raises(UserError, match=re.escape("sharding rule 'vocab:modle': there is no such axis of a mesh")):
        Placement.over(devices, rules="vocab:modle")


def test_rows_must_divide_among_the_parts() -> None:
    mesh = jax.sharding.AbstractMesh((2, 4, 2), ("data", "fsdp", "model"))
    placement = Placement(mesh)  # type: ignore[arg-type]
    placement.check_batch_size(16)
    told = r"batch_size 12 does not divide among the 8 parts of the mesh data:2,fsdp:4,model:2; use 8 or 16"
    with pytest.raises(UserError, match=told):
        placement.check_batch_size(12)
    with pytest.raises(UserError, match=r"eval_batch_size 5 does not divide among .*; use 8"):
        placement.check_batch_size(5, "eval_batch_size")
