"""`Watch`: what a host sees of the others while it works: who is gone, who has given up, who was asked to stop.

A thread on each host writes a *beat* every second to the key-value store that `jax.distributed` keeps on the first
host, and reads what all the others wrote. It costs a step nothing, and it works while a step hangs because another host
is gone: that is why it may end the process.

- A host whose beats stop is lost: the others end with one line. jax itself would abort in C++ with a stack trace, or
  wait for ever.
- A host that ends with an error says so: the others end with the same line.
- A signal on one host is written there, and all agree on the step before which all stop: the first that none has begun.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from deptjax.errors import UserError

LOST_SECONDS = float(os.environ.get("DEPTJAX_LOST_SECONDS", "30"))  # without a beat
BEAT_SECONDS = 1.0
GRACE_SECONDS = 3.0  # for a host that is about to end with the same error by itself
LINGER_SECONDS = 10.0  # of the first host, which keeps the store, so that the others can read why it ends
ROOT = "deptjax/watch"


class Agreement:
    """On which step the hosts stop; one a training loop."""

    def __init__(self) -> None:
        self.asked: int | None = None  # the signal that this host was sent
        self.signal: int | None = None  # the one that all agreed to stop for
        self._deciding = threading.Lock()
        self._reached, self._stop_at = -1, -1

    def reached(self, step: int) -> bool:
        """Returns whether all hosts stop before this step. Waits, a moment, while the hosts decide."""
        with self._deciding:
            self._reached = step
            return self.signal is not None and step >= self._stop_at

    @property
    def open(self) -> bool:
        """Whether nothing is decided, or being decided."""
        return self.signal is None and not self._deciding.locked()

    def hold(self) -> int:
        """Returns the step that this host has reached; it goes no further until `decide`."""
        self._deciding.acquire()
        return self._reached

    def decide(self, number: int, reached: list[int]) -> None:
        """Stops all before the first step that none has begun."""
        self.signal, self._stop_at = number, max(reached) + 1
        self._deciding.release()


class Watch(threading.Thread):
    """The thread.

    Args:
      client: of `jax.distributed`.
      host: the index of this one.
      hosts: how many there are.
      coordinator: `HOST:PORT` of the store.
    """

    def __init__(self, client: Any, host: int, hosts: int, coordinator: str) -> None:
        super().__init__(name="deptjax-watch", daemon=True)
        self._client, self.host, self._hosts, self._coordinator = client, host, hosts, coordinator
        self._ending = threading.Event()
        self._telling, self._told = threading.Lock(), threading.Event()
        self._beat = 0
        self._seen: dict[int, tuple[str, float]] = {}
        self._works = 0  # how many times `together` was entered
        self._left: set[int] = set()  # those of them that ended with an error here
        self._first_seen_left: float | None = None
        self._status: int | None = None
        self._loops = 0
        self._agreements: dict[int, Agreement] = {}
        self.where: Callable[[], str] | None = None  # says where a loop is, and what to do

    def start(self) -> None:
        """Starts the thread, and leaves word for the end of the process."""
        on_abort(self._told_of_abort, 1)
        atexit.register(self._finish)
        super().start()

    def agreement(self) -> Agreement:
        """Returns that of the next loop; every host must run the same loops in the same order."""
        self._loops += 1
        return self._agreements.setdefault(self._loops, Agreement())

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """As `deptjax.distributed.together`."""
        self._works += 1
        try:
            yield
            self._status = None
        except Exception as error:
            if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
                # A collective that failed: most likely another host is gone. Then this process ends while it waits.
                time.sleep(LOST_SECONDS + 2 * BEAT_SECONDS)
            message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            self.leave(f"error: {message}", 2 if isinstance(error, UserError) else 1)
            raise
        except BaseException as error:  # Ctrl-C, or a signal of the command line's
            number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM
            self.leave("stopped", 128 + number)
            raise

    def leave(self, message: str, status: int) -> None:
        """Tells the others that this host ends."""
        self._status = status
        if self._works in self._left:
            return
        self._left.add(self._works)
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody is there to be told
            self._put(f"left/{self._works}/{self.host}", f"{status} {' '.join(message.split())}")

    def run(self) -> None:
        """Beats and looks until the process ends."""
        while not self._ending.wait(BEAT_SECONDS):
            try:
                board = self._look()
            except jax.errors.JaxRuntimeError:
                if not self._ending.is_set():
                    self._end(self._lost(0), 1)
                return
            self._agree(board)
            self._follow(board)
            if (late := self._late()) is not None:
                self._end(self._lost(late), 1)

    def _put(self, name: str, value: str) -> None:
        self._client.key_value_set(f"{ROOT}/{name}", value, allow_overwrite=True)

    def _look(self) -> dict[str, str]:
        """Returns what all hosts have written, having written this one's beat."""
        self._beat += 1
        self._put(f"beat/{self.host}", str(self._beat))
        board = {key.removeprefix(f"{ROOT}/"): value for key, value in self._client.key_value_dir_get(ROOT)}
        for host in range(self._hosts):
            beat = board.get(f"beat/{host}")
            if beat is not None and (host not in self._seen or self._seen[host][0] != beat):
                self._seen[host] = beat, time.monotonic()
        return board

    def _late(self, seconds: float = LOST_SECONDS) -> int | None:
        """Returns the first host that has been silent for so long, or `None`."""
        now = time.monotonic()
        return next((host for host, (_, when) in sorted(self._seen.items()) if now - when > seconds), None)

    def _agree(self, board: dict[str, str]) -> None:
        """Takes part in finding the step to stop at, in every loop for which a host was sent a signal."""
        for loop, own in list(self._agreements.items()):
            if own.asked is not None and own.open and f"stop/{loop}" not in board:
                with contextlib.suppress(jax.errors.JaxRuntimeError):  # another host was first
                    self._client.key_value_set(f"{ROOT}/stop/{loop}", str(own.asked))
        for name, number in board.items():
            if not name.startswith("stop/"):
                continue
            loop = int(name.removeprefix("stop/"))
            own = self._agreements.setdefault(loop, Agreement())
            if own.open:
                self._put(f"reached/{loop}/{self.host}", str(own.hold()))
            elif own.signal is None:
                reached = [board.get(f"reached/{loop}/{host}") for host in range(self._hosts)]
                if None not in reached:
                    own.decide(int(number), [int(step) for step in reached if step is not None])

    def _follow(self, board: dict[str, str]) -> None:
        """Ends this host with the message of another that has ended, unless it is ending by itself."""
        for name, told in sorted(board.items()):
            kind, _, rest = name.partition("/")
            work, _, host = rest.partition("/")
            if kind != "left" or int(host) == self.host or int(work) in self._left:
                continue
            self._first_seen_left = self._first_seen_left or time.monotonic()
            if time.monotonic() - self._first_seen_left > GRACE_SECONDS:
                status, _, message = told.partition(" ")
                self._end(f"{message} (host {host})", int(status))
            return
        self._first_seen_left = None

    def _lost(self, host: int) -> str:
        where = self.where() if self.where else "; run the same command again on all hosts"
        return f"error: host {host} was lost{where}"

    def _told_of_abort(self) -> str:
        """Returns what to say when C++ aborts: jax does when the first host, which keeps the store, is gone."""
        if self._ending.is_set():
            os._exit(self._status or 0)
        if self._telling.locked():  # by the goodbye, in a store that is gone, of one that has said why it ends
            self._told.wait(BEAT_SECONDS)
            os._exit(self._status or 1)
        late = self._late(5 * BEAT_SECONDS)
        # Not asked over the store: the thread that aborts may hold its lock.
        if late is None and (self.host == 0 or self._first_listens()):
            return "error: jax has aborted this process (DEPTJAX_DEBUG=1 shows why)"
        return self._lost(late or 0)

    def _first_listens(self) -> bool:
        """Returns whether the first host is there; one that was killed closes its files one after the other."""
        for _ in range(10):
            if not listens(self._coordinator):
                return False
            time.sleep(0.3)
        return True

    def _end(self, message: str, status: int) -> None:
        """Ends the process at once: the main thread may be waiting for what never comes."""
        if not self._telling.acquire(blocking=False):
            time.sleep(60)  # another thread is at it
        self._status = status
        with contextlib.suppress(Exception):
            print(f"\ndeptjax: {message}" if sys.stderr.isatty() else f"deptjax: {message}", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
        self._told.set()
        with contextlib.suppress(Exception):
            self._put(f"bye/{self.host}", "")
            self._linger(LINGER_SECONDS)
        os._exit(status)

    def _linger(self, seconds: float) -> bool:
        """Waits, on the first host, until all others have said goodbye; returns whether they have."""
        deadline = time.monotonic() + seconds
        while self.host == 0 and time.monotonic() < deadline:
            board = self._look()
            if all(f"bye/{host}" in board or host == self._late(5) for host in range(1, self._hosts)):
                return True
            time.sleep(BEAT_SECONDS / 5)
        return self.host != 0

    def _finish(self) -> None:
        """Lets the hosts end together. After an error on this one alone, nobody is waited for long."""
        status = self._status
        with contextlib.suppress(Exception):
            self._put(f"bye/{self.host}", "")
            if status is None:
                while not self._all_done():
                    time.sleep(BEAT_SECONDS / 5)
                self._ending.set()
                jax.distributed.shutdown()
                return
            self._linger(LINGER_SECONDS)
        self._ending.set()
        if status is not None:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def _all_done(self) -> bool:
        board = dict(self._client.key_value_dir_get(f"{ROOT}/bye"))
        return len(board) >= self._hosts


def listens(address: str, seconds: float = 5.0) -> bool:
    """Returns whether somebody listens at `HOST:PORT`; raises nothing."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()
    except OSError:
        return False
    return True


def coordination() -> tuple[Any, str]:
    """Returns the client of the key-value store of `jax.distributed`, and its address; jax has no public names."""
    from jax._src import distributed

    return distributed.global_state.client, str(distributed.global_state.coordinator_address)


_HANDLERS: list[Any] = []  # C keeps no reference


def on_abort(told: str | Callable[[], str], status: int) -> None:
    """Says a line and exits where C++ aborts the process, which is how jax ends when the first host is gone."""

    def handle(number: int) -> None:
        message = f"error: {told}" if isinstance(told, str) else told()
        os.write(2, f"deptjax: {message}\n".encode())
        os._exit(status)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
    _HANDLERS.append(handler)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(int(signal.SIGABRT), ctypes.cast(handler, ctypes.c_void_p))


def quieten() -> None:
    """Keeps C++ from writing a stack trace when it aborts, unless `DEPTJAX_DEBUG` is set."""
    from jax._src.lib import utils

    if os.environ.get("DEPTJAX_DEBUG", "") in ("", "0") and hasattr(utils, "absl_set_min_log_level"):
        utils.absl_set_min_log_level(4)  # above fatal
