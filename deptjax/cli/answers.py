"""Where `deptjax predict` writes: a stream, or a file that an interrupted job goes on with.

NAME            the answers, when the last of them is there
NAME.part       the answers so far; locked while a process writes it
NAME.part.json  what the job is: its prompts, its input, and the flags that change an answer

Texts that are computed together may change the last bits of each other's scores. So a job goes on only where a chunk
of rows begins: the chunks, and with them the file, are those of a job that nothing interrupted.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Protocol

from deptjax.checkpoint import disk_errors
from deptjax.errors import UserError

_NOTHING = "nothing"


class Output(Protocol):
    """Takes answers in the order of the rows.

    Where the input can be read twice, `compare(head)` is called for each of its rows with the bytes with which the
    row's answer begins. `start()` then returns the number of rows that are answered already. `write(lines)` takes the
    answers of the next chunk of rows, and `finish()` is called behind the last.
    """

    def compare(self, head: bytes) -> None: ...
    def start(self) -> int: ...
    def write(self, lines: Sequence[bytes]) -> None: ...
    def finish(self) -> None: ...


class Stream:
    """Standard output, a pipe or a device: what is written is gone, and there is nothing to go on with."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def compare(self, head: bytes) -> None:
        """Does nothing: there are no earlier answers."""

    def start(self) -> int:
        """Returns 0."""
        return 0

    def write(self, lines: Sequence[bytes]) -> None:
        """Writes the lines at once, so that a reader need not wait for the next chunk."""
        self._file.write(b"".join(lines))
        self._file.flush()

    def finish(self) -> None:
        """Does nothing: everything is written."""


class PartFile:
    """A file that gets its name when it is whole.

    Args:
      path: the file.
      job: what decides its bytes, JSON-ready; only the same job goes on with what is there. Its field `input` is `None`
        for an input that can be read only once, and so not be gone on with.
      chunk: rows that are computed together.
      overwrite: a finished file is replaced when the new one is whole, and another job's part at `start`.

    Attributes:
      part: the path of the unfinished file.
      rows: the rows whose answers are in it.

    Raises `UserError` in one line: for a finished file, or another job's part, without `overwrite`; while another
    process writes it; for a folder that cannot be written, and a full disk.
    """

    def __init__(self, path: pathlib.Path, job: Mapping[str, Any], chunk: int, overwrite: bool) -> None:
        self._told, self._path = path, pathlib.Path(os.path.realpath(path))  # a link to a file stays one
        self.part = self._path.with_name(f"{self._path.name}.part")
        self.rows = 0
        self._card = self._path.with_name(f"{self._path.name}.part.json")
        self._job, self._chunk, self._overwrite = json.loads(json.dumps(job)), chunk, overwrite
        self._compared = self._compared_bytes = self._bytes = 0
        self._refuse_finished()
        self._file = self._locked()
        try:
            self._refuse_finished()  # the process that had the lock may just have put it there
            self._earlier = self._whole_lines() if self._is_ours() else iter(())
        except BaseException:
            self.close()
            raise

    def compare(self, head: bytes) -> None:
        """Compares the next earlier answer with the row that it must be of; another input has other rows."""
        line = next(self._earlier, None)
        if line is None:
            return
        if not line.startswith(head):
            if not self._overwrite:
                raise UserError(
                    f"{self.part}, line {self._compared + 1} does not answer that row of the input, which has changed; "
                    "--overwrite starts anew"
                )
            self._earlier, self.rows, self._bytes = iter(()), 0, 0
            return
        self._compared += 1
        self._compared_bytes += len(line)
        if self._compared % self._chunk == 0:
            self.rows, self._bytes = self._compared, self._compared_bytes

    def start(self) -> int:
        """Returns the number of rows that are answered, whole chunks, and drops what stands behind them."""
        with self._disk_errors():
            os.ftruncate(self._file, self._bytes)
            os.lseek(self._file, self._bytes, os.SEEK_SET)
            if not self.rows:
                os.fsync(self._file)  # what another job left must be gone before the card says that it is ours
                self._write_card()
        return self.rows

    def write(self, lines: Sequence[bytes]) -> None:
        """Appends the answers of a chunk. Whatever ends the process on the way, the next `start` cuts to a chunk."""
        left = memoryview(b"".join(lines))
        with self._disk_errors():
            while left:
                left = left[os.write(self._file, left) :]
        self.rows += len(lines)

    def finish(self) -> None:
        """Puts the answers on the disk and gives the file its name."""
        with self._disk_errors():
            os.fsync(self._file)
            self._refuse_finished()
            os.replace(self.part, self._path)
            self._card.unlink(missing_ok=True)
            _sync(self._path.parent)
        self.rows = 0

    def close(self) -> None:
        """Lets other processes have the file. A part without an answer is removed."""
        with contextlib.suppress(OSError):
            if _is_at(self.part, self._file) and _is_empty(self.part):
                self._card.unlink(missing_ok=True)
                self.part.unlink()
        os.close(self._file)

    def _refuse_finished(self) -> None:
        if self._path.is_file() and not self._overwrite:
            raise UserError(f"--output {self._told} exists; choose another file, or add --overwrite")

    def _locked(self) -> int:
        """Returns the open part, locked. The kernel frees the lock when the process ends, however it ends."""
        with self._disk_errors():
            while True:
                file = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # Between opening and locking, the process that had the lock may have renamed the file.
                    if _is_at(self.part, file):
                        return file
                except BlockingIOError:
                    os.close(file)
                    raise UserError(
                        f"--output {self._told} is being written by another process; wait, or choose another file"
                    ) from None
                os.close(file)

    def _is_ours(self) -> bool:
        """Returns whether the part holds answers of this job. Raises `UserError` where they are of another one."""
        if _is_empty(self.part):
            return False
        different = self._difference()
        if different and not self._overwrite:
            raise UserError(
                f"{self.part} holds the unfinished answers of another job ({different}); --overwrite starts "
                "anew, or choose another --output"
            )
        return not different

    def _difference(self) -> str:
        try:
            earlier = json.loads(self._card.read_bytes())
        except (OSError, ValueError):
            return f"{self._card.name} does not say which"
        if not isinstance(earlier, dict):
            return f"{self._card.name} does not say which"
        old, new = _flat(earlier), _flat(self._job)
        told = [
            f"{name} was {old.get(name, _NOTHING)}, is now {new.get(name, _NOTHING)}"
            for name in sorted({**old, **new})
            if old.get(name, _NOTHING) != new.get(name, _NOTHING)
        ]
        if not told and self._job["input"] is None:
            return "its input can be read only once"
        return "; ".join(told)

    def _whole_lines(self) -> Iterator[bytes]:
        """Yields the lines up to the first that a crash left half-written (on a power loss, even zeros)."""
        with self.part.open("rb") as file:
            for line in file:
                if not line.endswith(b"}\n") or not _is_json(line):
                    return
                yield line

    def _write_card(self) -> None:
        fresh = self._card.with_name(f".{self._card.name}.{os.getpid()}")
        try:
            with fresh.open("w", encoding="utf-8") as file:
                file.write(json.dumps(self._job, indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, self._card)
            _sync(self._card.parent)
        finally:
            fresh.unlink(missing_ok=True)

    def _disk_errors(self) -> disk_errors:
        return disk_errors(self._told, "choose another --output")


@contextlib.contextmanager
def open_output(
    name: str | None, source: pathlib.Path | None, job: Mapping[str, Any], chunk: int, overwrite: bool
) -> Iterator[Output]:
    """Yields the output of a job; what it has of a file when an error ends the job is kept for the next command.

    Args:
      name: of the file; `None` for standard output.
      source: the input file, which the output must not be.
      job, chunk, overwrite: as in `PartFile`.
    """
    if name is None:
        yield Stream(sys.stdout.buffer)
        return
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        raise UserError(f"--output {name} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise UserError(f"--output {name}: there is no folder {path.parent}; make it first")
    if path.exists() and not path.is_file():  # a pipe or a device: nothing to put in its place
        with path.open("wb") as file:
            yield Stream(file)
        return
    for ending in ("", ".part", ".part.json"):
        there = path.with_name(path.name + ending)
        if source is not None and source.exists() and there.exists() and there.samefile(source):
            raise UserError(f"--output {name} would be written over the input {source}; choose another file")
    with contextlib.closing(PartFile(path, job, chunk, overwrite)) as output:
        try:
            yield output
        except BaseException:
            if output.rows:
                behind = "" if job["input"] is None else "; the same command goes on behind them"
                print(f"deptjax: {output.rows:,} answers are kept in {output.part}{behind}", file=sys.stderr)
            raise


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _is_at(path: pathlib.Path, file: int) -> bool:
    """Returns whether an open file is the one that has the name now."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _is_empty(file: pathlib.Path) -> bool:
    return file.stat().st_size == 0


def _sync(folder: pathlib.Path) -> None:
    """Puts the names in a folder on the disk, where the file system can do that for a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v for name, item in value.items() for k, v in _flat(item, f"{prefix}.{name}" if prefix else name).items()
    }
