"""Each run in a process of its own: its peak memory is its own, and a crash of the process ends no other run."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence

from deptjax.errors import UserError
from deptjax.suite.folder import SuiteFolder
from deptjax.suite.plan import Cell, Plan
from deptjax.training.signals import StopSignals

_LOOK_EVERY = 0.1  # seconds


class Isolated:
    """Trains each cell by a command; see `CellTrainer`.

    Args:
      plan: what the cells belong to.
      command: trains, as `InProcess` does, the cell whose text is appended to it. Its exit status is 0 when it has
        written how the cell ended, and 128 and a signal's number where it was stopped by one.
    """

    def __init__(self, plan: Plan, command: Sequence[str]) -> None:
        self._command = list(command)
        self._folder = SuiteFolder(plan.workdir)

    def groups(self, cells: Sequence[Cell]) -> list[list[Cell]]:
        """Returns each cell by itself."""
        return [[cell] for cell in cells]

    def __call__(self, cells: Sequence[Cell]) -> int | None:
        """Trains the cells, one process after the other; a process that dies is written down as a failed run."""
        with StopSignals() as signals:
            for cell in cells:
                process = subprocess.Popen([*self._command, str(cell)])
                try:
                    status = _wait(process, signals)
                finally:
                    process.kill()  # where it has not ended: an error or a second Ctrl-C ends both
                if signals.received is not None:
                    return signals.received
                if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
                    return status - 128
                if status == 2:  # a mistake that is not of one run, such as a model that is not there
                    raise UserError(f"the process of {cell} could not begin; the line above says why")
                if status != 0:
                    self._folder.write_record(cell, {"status": "failed", "error": _told(status)})
        return None


def _wait(process: subprocess.Popen[bytes], signals: StopSignals) -> int:
    """Returns the exit status of a process; what asks this one to stop asks that one, too."""
    told = False
    while True:
        try:
            return process.wait(_LOOK_EVERY)
        except subprocess.TimeoutExpired:
            if signals.received is not None and not told:
                told = True
                process.send_signal(signal.SIGTERM)  # a Ctrl-C it has had from the terminal already


def _told(status: int) -> str:
    if status >= 0:
        return f"its process ended with status {status}; what it wrote before that says more"
    memory = "; the system may have run out of memory" if -status == signal.SIGKILL else ""
    return f"its process was ended by {signal.Signals(-status).name}{memory}"
