"""A trace of a few steps, for TensorBoard's profiler and for Perfetto."""

from __future__ import annotations

import os
import pathlib
import sys
from typing import Any

import jax

from deptjax.checkpoint import disk_errors

WARM_STEPS = 10  # in front of the traced ones: they compile, and fill the queues of batches


class Profile:
    """Traces `count` steps of a loop that goes from `done` to `steps` into a folder; a `count` of 0 traces none.

    The steps are those behind the first ten, or the last ones of a shorter loop.
    """

    def __init__(self, folder: str | os.PathLike[str], count: int, done: int, steps: int, quiet: bool = False) -> None:
        self.folder, self._quiet, self._active = pathlib.Path(folder), quiet, False
        self._first = max(min(done + WARM_STEPS, steps - count), done)
        self._end = min(self._first + count, steps)

    def before(self, done: int) -> None:
        """Starts the trace where the step behind `done` is the first of the traced ones."""
        if done == self._first < self._end:
            with disk_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                jax.profiler.start_trace(str(self.folder), create_perfetto_trace=True)
            self._active = True

    def after(self, done: int, result: Any) -> None:
        """Ends the trace where `done` was the last of the traced steps, once its `result` is there."""
        if self._active and done == self._end:
            jax.block_until_ready(result)
            self.close()
            if not self._quiet:
                told = f"steps {self._first + 1} to {self._end} are traced in {self.folder}"
                print(f"{told}; open it with tensorboard --logdir, or its perfetto_trace.json.gz", file=sys.stderr)

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._active:
            self._active = False
            with disk_errors(self.folder):
                jax.profiler.stop_trace()
