"""A run's folder: what was asked, what was measured, and the best prompt so far.

config.json       everything that decides the result; a run is resumed only by the same
metrics.jsonl     one line a logged step
tensorboard/      the same, for TensorBoard
checkpoints/      to resume from
prompt/           the best prompt so far (see `deptjax.prompt`)
result.json       written when the run has ended
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, TextIO

from deptjax.checkpoint import disk_errors
from deptjax.distributed import first_host, on_first_host
from deptjax.errors import UserError
from deptjax.prompt import recover_folder
from deptjax.training.tensorboard import EventFile

MISSING = "nothing"
TOLD = 6  # fields in a message


class RunFolder:
    """The files of one run. Raises `UserError` where the folder cannot be written, or belongs to another run.

    Of several hosts the first alone makes and locks the folder and writes the logs; the others wait until it is there.
    """

    def __init__(
        self, path: str | os.PathLike[str], config: dict[str, Any], notes: Mapping[str, str] | None = None
    ) -> None:
        if str(path).startswith("gs://"):
            raise UserError(
                f"workdir {path}: a bucket cannot be a run's folder; name one that is mounted on every host"
            )
        self.path = pathlib.Path(path)
        self._config_file = self.path / "config.json"
        self._lock: TextIO | None = None
        self._metrics: Any = None
        self._events: EventFile | None = None
        on_first_host(lambda: self._claim(config, notes or {}))

    def _claim(self, config: dict[str, Any], notes: Mapping[str, str]) -> None:
        with disk_errors(self.path):
            if self._config_file.exists():
                self._refuse_other(config)
            elif self.path.exists() and any(self.path.iterdir()) and not self._started_by_us():
                raise UserError(f"{self.path} is not empty and holds no run of deptjax; choose another workdir")
            else:
                self.path.mkdir(parents=True, exist_ok=True)
                write_json(self._config_file, config)
            for name, text in notes.items():
                if not (self.path / name).exists():
                    write_text(self.path / name, text)
            self._lock = locked(self.path / ".lock", "a run")
        recover_folder(self.prompt)

    @property
    def checkpoints(self) -> pathlib.Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def prompt(self) -> pathlib.Path:
        """The folder of the best prompt."""
        return self.path / "prompt"

    @property
    def result(self) -> pathlib.Path:
        """The file that says that the run has ended, and how."""
        return self.path / "result.json"

    def open_logs(self, step: int) -> None:
        """Opens the logs at `step`; lines of later steps, which a resumed run writes again, are dropped."""
        if not first_host():
            return
        file = self.path / "metrics.jsonl"
        with disk_errors(file):
            if file.exists():
                kept = [line for line in file.read_text().splitlines() if _step_of(line) <= step]
                write_text(file, "".join(line + "\n" for line in kept))
            self._metrics = file.open("a")
            self._events = EventFile(self.path / "tensorboard", step)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Writes one line of numbers."""
        if self._metrics is None:  # on the first host alone
            return
        with disk_errors(self.path):
            known = {name: value if math.isfinite(value) else None for name, value in values.items()}
            self._metrics.write(json.dumps({"step": step, **known}) + "\n")  # JSON has no NaN
            self._metrics.flush()
            assert self._events is not None
            self._events.write(step, values)

    def close_logs(self) -> None:
        """Closes the logs."""
        files, self._metrics, self._events = (self._metrics, self._events), None, None
        with disk_errors(self.path), contextlib.ExitStack() as stack:
            for file in files:
                if file is not None:
                    stack.callback(file.close)

    def close(self) -> None:
        """Lets other processes have the folder."""
        if self._lock is not None:
            self._lock.close()

    def _started_by_us(self) -> bool:
        # A run cut off before it wrote its config has at most the temporary file of that config.
        return all(entry.name.startswith(".config.json.") for entry in self.path.iterdir())

    def _refuse_other(self, config: dict[str, Any]) -> None:
        try:
            old = json.loads(self._config_file.read_text())
        except json.JSONDecodeError as error:
            raise UserError(f"{self._config_file} is not JSON: line {error.lineno}: {error.msg}") from error
        if told := differences(old, json.loads(json.dumps(config))):
            raise UserError(f"{self.path} holds a run with another configuration ({told}); choose another workdir")


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Returns the fields in which two configs differ, as `train.steps was 4, is now 6; ...`; empty where they agree.

    Of another model every field of its fingerprint may differ: these come last, and the first six fields are told.
    """
    old, new = _flat(old), _flat(new)
    different = sorted(k for k in {**old, **new} if old.get(k, MISSING) != new.get(k, MISSING))
    different = [k for k in different if k.rpartition(".")[2] != "devices"]  # a run may go on on others
    different.sort(key=lambda k: "fingerprint" in k)
    told = [f"{k} was {_shown(old, k)}, is now {_shown(new, k)}" for k in different[:TOLD]]
    more = len(different) - len(told)
    return "; ".join([*told, f"and {more} more"] if more else told)


def _shown(values: dict[str, Any], name: str) -> str:
    """Returns a value of a config in one line."""
    value = values.get(name, MISSING)
    return repr(value) if isinstance(value, str) and "\n" in value else str(value)


def locked(file: pathlib.Path, whose: str) -> TextIO:
    """Returns the open lock of a folder. The kernel frees it when the process ends, however it ends.

    Raises `UserError` where another process holds it, which says that `whose` is under way there.
    """
    lock = file.open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(
            f"{file.parent} is in use by {whose} under way; wait for it, or choose another workdir"
        ) from None
    return lock


def check_folder_name(task: str) -> None:
    """Raises `UserError` for a task's name that cannot be a folder's."""
    if not re.fullmatch(r"\w[\w.-]*", task):
        raise UserError(f"task '{task}' cannot name a folder; give it a name of letters, digits, '_', '-', '.'")


def write_json(file: pathlib.Path, value: Any) -> None:
    """Writes a JSON file that is never seen half-written."""
    write_text(file, json.dumps(value, indent=2) + "\n")


def write_text(file: pathlib.Path, text: str) -> None:
    """Writes a text file that is never seen half-written."""
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    fresh.write_text(text)
    os.replace(fresh, file)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):  # the last line of a run that was killed while writing it
        return float("inf")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v for name, item in value.items() for k, v in _flat(item, f"{prefix}.{name}" if prefix else name).items()
    }
