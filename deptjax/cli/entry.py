"""How a command ends: a mistake in one line on standard error, a signal with its exit status, never a bare traceback.

Exit statuses: 0 done, 1 an error that is not the user's, 2 a user's mistake, 130 stopped by Ctrl-C, 143 by SIGTERM,
141 when the reader of the output went away.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from deptjax.errors import UserError

STOPPED = 128  # plus the signal's number, as shells have it


class Terminated(BaseException):
    """SIGTERM came while no training loop was there to catch it."""


def run_command(command: Callable[[list[str]], int], argv: Sequence[str] | None) -> int:
    """Returns the exit status of a command; errors are told in one line, with `--debug` behind their traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words or os.environ.get("DEPTJAX_DEBUG", "") not in ("", "0")
    words = [word for word in words if word != "--debug"]
    try:
        with _terminated(), _debugging(debug):
            return command(words)
    except BrokenPipeError:
        # Python would complain once more when it flushes at exit.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return STOPPED + signal.SIGPIPE
    except KeyboardInterrupt:
        return _leave("stopped", STOPPED + signal.SIGINT)
    except Terminated:
        return _leave("stopped", STOPPED + signal.SIGTERM)
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _leave(*_told(error))


@contextlib.contextmanager
def _debugging(debug: bool) -> Iterator[None]:
    """Tells what runs in C++ and its watch (`deptjax.watch`) of `--debug`; the environment is left as it was."""
    if not debug:
        yield
        return
    before = os.environ.get("DEPTJAX_DEBUG", "")
    os.environ["DEPTJAX_DEBUG"] = "1"
    try:
        yield
    finally:
        os.environ["DEPTJAX_DEBUG"] = before  # empty is unset


def _leave(message: str, status: int) -> int:
    """Returns the status, having said the message here, and to the other hosts where there are some."""
    from deptjax.distributed import leave

    leave(message, status)
    return _tell(message, status)


def _told(error: Exception) -> tuple[str, int]:
    if isinstance(error, UserError):
        return f"error: {error}", 2
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        return f"error: {name}{error.strerror}", 2
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "error: out of memory; lower batch_size and eval_batch_size, or max_length", 2
    return f"error: {type(error).__name__}: {error} (not expected; --debug shows where)", 1


def _tell(message: str, status: int) -> int:
    with contextlib.suppress(OSError):
        print("deptjax: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return status


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
