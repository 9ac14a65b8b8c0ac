"""Batches that are there before they are asked for, and what a loop says of its waits."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import pytest

from deptjax.training.ahead import Ahead
from deptjax.training.loop import SETTLED_SECONDS, _Window


class Counting(Iterator[int]):
    """Counts up; its state is the next number. It may be slow."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.next, self.seconds = 0, seconds

    def __next__(self) -> int:
        time.sleep(self.seconds)
        self.next += 1
        return self.next - 1

    def get_state(self) -> dict[str, int]:
        return {"next": self.next}


def test_batches_come_in_order_whether_they_were_fetched_or_not() -> None:
    ahead = Ahead(Counting(), lambda batch: batch * 10)
    found = [ahead.take()]
    ahead.fetch()
    assert ahead.ready
    found += [ahead.take(), ahead.take()]
    assert not ahead.ready
    assert found == [0, 10, 20]


def test_the_state_is_that_behind_the_batches_taken() -> None:
    ahead = Ahead(Counting(), lambda batch: batch)
    assert ahead.get_state() == {"next": 0}
    ahead.fetch()
    assert ahead.get_state() == {"next": 0}
    ahead.take()
    assert ahead.get_state() == {"next": 1}


def test_a_wait_counts_where_nothing_runs_meanwhile() -> None:
    ahead = Ahead(Counting(seconds=0.02), lambda batch: batch)
    ahead.fetch(lambda: False)
    assert ahead.waited == 0.0
    ahead.take()
    ahead.fetch(lambda: True)
    assert 0.02 <= ahead.waited < 1.0


@pytest.mark.parametrize(("share", "said"), [(0.05, False), (0.5, True)])
def test_a_slow_input_is_said_once(share: float, said: bool, caplog: pytest.LogCaptureFixture) -> None:
    ahead = Ahead(Counting(), lambda batch: batch)
    window = _Window(began=time.perf_counter() - 4 * SETTLED_SECONDS)
    ahead.waited = share * 4 * SETTLED_SECONDS
    with caplog.at_level(logging.WARNING, "deptjax"):
        window.warn_of_slow_input(ahead)
        window.warn_of_slow_input(ahead)
    assert len(caplog.messages) == said
    if said:
        assert "the input is the bottleneck; give the process more CPU cores" in caplog.messages[0]
