"""Batches for a loop: on the devices one ahead of the step that takes them, and how long steps had to wait for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any


class Ahead:
    """Takes batches from an iterator and puts them on the devices, one of them before it is asked for.

    Data is waited for when a batch comes only after the devices have nothing to do any more; `waited` has the seconds
    of such waits. The time of a batch that comes while a step still runs does not count: it is hidden behind the step.

    Attributes:
      batches: an iterator with `get_state`.
      put: places a batch on the devices; they copy while the host goes on.
      waited: seconds.
    """

    def __init__(self, batches: Iterator[Any], put: Callable[[Any], Any]) -> None:
        self.batches, self.put, self.waited = batches, put, 0.0
        self._ready: list[tuple[Any, Any]] = []  # the placed batch, and where the data stood before it

    @property
    def ready(self) -> bool:
        """Whether a batch is there that nobody has taken yet."""
        return bool(self._ready)

    def fetch(self, idle: Callable[[], bool] = lambda: True) -> None:
        """Gets the next batch ready. `idle` says whether the devices have done all that they were given."""
        began, state = time.perf_counter(), self.batches.get_state()  # type: ignore[attr-defined]
        batch = next(self.batches)
        if idle():
            self.waited += time.perf_counter() - began
        self._ready.append((self.put(batch), state))

    def take(self) -> Any:
        """Returns the next batch, on the devices."""
        if not self._ready:
            self.fetch()
        return self._ready.pop()[0]

    def get_state(self) -> Any:
        """Returns where the data stands: behind the batches that were taken."""
        return self._ready[0][1] if self._ready else self.batches.get_state()  # type: ignore[attr-defined]
