"""Groups of collectives, in all the ways in which HLO writes them."""

from __future__ import annotations

import pytest

from deptjax.planning.groups import group_of

MESH = {"data": 2, "fsdp": 4, "model": 2}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups=[8,2]<=[16]", (("model",), 2)),
        ("replica_groups=[4,4]<=[2,4,2]T(0,2,1)", (("fsdp",), 4)),
        ("replica_groups=[8,2]<=[2,8]T(1,0)", (("data",), 2)),
        ("replica_groups=[2,8]<=[16]", (("fsdp", "model"), 8)),
        ("replica_groups={{0,2,4,6},{1,3,5,7},{8,10,12,14},{9,11,13,15}}", (("fsdp",), 4)),
        ("replica_groups={}, dimensions={0}", (("data", "fsdp", "model"), 16)),
        ("replica_groups=mesh['a'=2,'b'=4,'c'=2] {'b'}", (("fsdp",), 4)),
        ("replica_groups=mesh['a'=2,'b'=4,'c'=2] {'a','c'}", (("data", "model"), 4)),
        ("replica_groups=mesh['a'=16] {'a':(2)4}", (("fsdp",), 4)),
        ("replica_groups=mesh['a'=16] {'a':(8)2}", (("model",), 2)),
        ("replica_groups=mesh['a'=8,'b'=1,'c'=2], device_ids=([2,8]T(1,0)) {'c'}", (("data",), 2)),
        ("replica_groups=mesh['a'=8,'b'=2], device_ids=([2,8]T(1,0)) {'a'}", (("fsdp", "model"), 8)),
        ("source_target_pairs={{0,2},{2,4},{4,6},{6,0}}", (("fsdp",), 4)),
    ],
)
def test_the_axes_of_a_group(text: str, expected: tuple[tuple[str, ...], int]) -> None:
    assert group_of(f"%a), channel_id=1, {text}, to_apply=%add", MESH) == expected
