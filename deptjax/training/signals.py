"""Ctrl-C and SIGTERM while training: the step under way is finished, and everything is saved."""

from __future__ import annotations

import signal
import threading
from typing import Any


class StopSignals:
    """While active, Ctrl-C and SIGTERM ask the loop to stop after its step; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: Any) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
