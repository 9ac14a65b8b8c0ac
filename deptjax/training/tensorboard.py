"""Scalars for TensorBoard, written by the caller itself.

tensorboardX writes in a thread of its own. When the disk is full that thread dies, and the next writes wait for ever
for room in its queue; so only its file format is used here, and a write that fails raises where it is made.
"""

from __future__ import annotations

import os
import pathlib
import socket
import time
from collections.abc import Mapping
from typing import Any

FLUSH_SECONDS = 10.0


class EventFile:
    """One file of events below `folder`. What other files there hold behind `step` is hidden by TensorBoard."""

    def __init__(self, folder: pathlib.Path, step: int) -> None:
        from tensorboardX.proto.event_pb2 import SessionLog
        from tensorboardX.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{step}"
        self._records = RecordWriter(str(folder / name))
        self._flushed = time.monotonic()
        self._write(0, file_version="brain.Event:2")
        self._write(step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one step's numbers. Raises `OSError` where they cannot be written."""
        from tensorboardX.proto.summary_pb2 import Summary

        self._write(step, summary=Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()]))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._records.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Writes what is left, and closes the file, also when that fails."""
        self._records.close()

    def _write(self, step: int, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), step=step, **fields).SerializeToString())
