"""Ctrl-C and SIGTERM while training: the step under way is finished, and everything is saved.

The machines of a cloud send SIGTERM before they are taken away. Of several hosts one may be sent it alone; all stop
before the same step (`deptjax.watch`).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

from deptjax.distributed import watch


class StopSignals:
    """While active, Ctrl-C and SIGTERM ask the loop to stop after its step; a second Ctrl-C ends it at once.

    Args:
      saved: returns the step of the last checkpoint, or `None`; for the line that says that a host was lost.

    Attributes:
      received: the signal that this host was sent, and once the loop is to stop, the one it stops for.
    """

    def __init__(self, saved: Callable[[], int | None] = lambda: None) -> None:
        self.received: int | None = None
        self._saved, self._step = saved, -1
        self._watch = watch()
        self._agreement = self._watch.agreement() if self._watch else None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if self._watch:
            self._watch.where = self._where
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def stop_before(self, step: int, ready: bool = False) -> bool:
        """Returns whether the loop is to stop before it takes this step; on all hosts the same.

        A host alone takes a step whose batch is `ready` on the devices, whatever asks to stop.
        """
        self._step = step
        if self._agreement is None:
            return self.received is not None and not ready
        stop = self._agreement.reached(step)
        self.received = self._agreement.signal if stop else self.received
        return stop

    def _where(self) -> str:
        saved = self._saved()
        again = "begin again" if saved is None else f"go on from step {saved}"
        return f" at step {self._step + 1}; run the same command again on all hosts to {again}"

    def _receive(self, number: int, frame: Any) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if self._agreement is not None:
            self._agreement.asked = number

    def __exit__(self, *error: object) -> None:
        if self._watch and error[0] is None:  # after an error it is still here that another host was lost
            self._watch.where = None
        for number, handler in self._before.items():
            signal.signal(number, handler)
