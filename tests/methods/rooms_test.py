"""Prompts of two sizes in one room: zeros beyond the smaller one's sizes change nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deptjax.methods import ACCEPT, DPT, ADePT, LoPA, Method
from deptjax.methods.base import Texts, input_parameters
from deptjax.methods.room import move_in, room_for

SIZES: dict[str, tuple[Method, Method]] = {
    "accept": (ACCEPT(3, 4, 5, 13, 8, 2), ACCEPT(6, 4, 2, 17, 8, 3)),
    "adept": (ADePT(prompt_length=3, rank=5), ADePT(prompt_length=6, rank=2)),
    "dpt": (DPT(prompt_length=3, rank=5), DPT(prompt_length=6, rank=2)),
}
T, D = 7, 24


@pytest.mark.parametrize("kind", SIZES)
def test_two_sizes_share_a_room(kind: str) -> None:
    """The last vectors of the room's prompt are the method's own, and the text becomes what it did."""
    random, room = np.random.default_rng(0), room_for(SIZES[kind])
    embeds = jnp.asarray(random.standard_normal((2, T, D)), jnp.float32)
    shapes = jax.eval_shape(lambda: {"input": input_parameters(room, jax.random.key(0), D)})
    for method in SIZES[kind]:
        first = input_parameters(method, jax.random.key(0), D)
        trained = jax.tree.map(lambda p: p + jnp.asarray(random.standard_normal(p.shape), p.dtype), first)
        moved = move_in(method, {"input": trained}, room, shapes)["input"]
        assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, shapes["input"])
        wanted, got = (
            m.apply({"params": p}, embeds, Texts.whole(embeds), method="streams")
            for m, p in ((method, trained), (room, moved))
        )
        length = method.positions_in_front()
        np.testing.assert_allclose(got[0][-length:], wanted[0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(got[1], wanted[1], rtol=0, atol=1e-5)
        assert not np.any(got[0][:-length])


def test_what_only_training_reads_keeps_nothing_apart() -> None:
    methods = [LoPA(encoder="reader", encoder_width=24, encoding_dropout=rate) for rate in (0.1, 0.5)]
    assert room_for(methods).prompt_length == 10
