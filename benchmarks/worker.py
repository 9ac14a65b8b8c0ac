"""A worker: one side with one method in a process of its own, told over a pipe when to take a step.

    python -m benchmarks.worker deptjax < commands > answers

Commands and answers are lines of JSON. Between commands the worker blocks on its pipe, so none of its threads runs
while another worker is timed.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from benchmarks.cases import Entrant
from benchmarks.decode_cases import Decoder
from benchmarks.matmul import Products

ROOT = pathlib.Path(__file__).resolve().parents[1]
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG: a leader that is killed leaves nobody on the card
_STATUS = pathlib.Path("/proc/self/status")
_CLEAR = pathlib.Path("/proc/self/clear_refs")
_STAT = pathlib.Path("/proc/stat")


class WorkerError(RuntimeError):
    """A worker ended without an answer; the message has the last lines of what it wrote to stderr."""


class OutOfMemory(WorkerError):
    """A worker had too little memory for what it was told to do."""


class NoAnswerYet(RuntimeError):
    """A worker has not answered within the time that it was given."""


# What the memory of a device or of the host running out is called by XLA, CUDA, cuDNN and cuBLAS, torch and numpy.
_TOO_LITTLE = (
    "RESOURCE_EXHAUSTED",
    "out of memory",
    "OUT_OF_MEMORY",
    "ALLOC_FAILED",
    "can't allocate memory",
    "Unable to allocate",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error, or one that it came from, says that there was too little memory.

    >>> is_out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."))
    True
    >>> is_out_of_memory(RuntimeError("INVALID_ARGUMENT: memory is laid out otherwise"))
    False
    """
    if isinstance(error, MemoryError) or any(text in str(error) for text in _TOO_LITTLE):
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and is_out_of_memory(cause)


class Runner(Protocol):
    """One side's implementation: built, warmed up, then stepped."""

    def warm(self) -> dict[str, float]:
        """Compiles and takes the first steps. Returns `compile_s`, seconds (0 where nothing is compiled)."""

    def step(self) -> tuple[float, int]:
        """Takes a step, over all its batches. Returns the last loss, when it is known, and the rows trained on."""

    def describe(self) -> dict[str, Any]:
        """Returns `parameters` (trainable scalars) and `versions` of the libraries."""


# Memory is taken as it is needed, since several processes share the card, and all of it but what the libraries of the
# other side take. The CPU is there for what a check compares with.
_GPU = {"JAX_PLATFORMS": "cuda,cpu", "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}


def environment_of(device: str) -> dict[str, str]:
    """Returns the environment of a process that computes on a device, `cpu` or `gpu`."""
    return {**os.environ, **(_GPU if device == "gpu" else {"JAX_PLATFORMS": "cpu"})}


class Worker:
    """The leader's end: starts the process and asks it."""

    def __init__(self, entrant: Entrant | Decoder | Products, threads: int):
        self.entrant: Any = entrant
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        environment = {
            **environment_of(getattr(entrant, "device", "cpu")),
            "NPROC": str(threads),  # the size of XLA's thread pool
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", entrant.side],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=ROOT,
            env=environment,
            start_new_session=True,  # Ctrl-C is the leader's
        )

    def send(self, command: str, **fields: Any) -> None:
        """Sends a command without waiting for the answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": command, **fields}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerError(self._last_words()) from error

    def answer(self, timeout: float | None = None) -> dict[str, Any]:
        """Returns the answer to the last command.

        Raises `WorkerError` when the worker has ended, `OutOfMemory` when it says that it had too little, and
        `NoAnswerYet` when it says nothing for `timeout` seconds.
        """
        assert self._process.stdout is not None
        # There is never more than one line on its way, so none can wait in the buffer.
        if timeout is not None and not select.select([self._process.stdout], [], [], max(timeout, 0.0))[0]:
            raise NoAnswerYet(f"{self.entrant.name} on {self.entrant.model}")
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "out_of_memory" in answer:
            raise OutOfMemory(f"{self.entrant.name} on {self.entrant.model}: {answer['out_of_memory']}")
        return answer

    def ask(self, command: str, timeout: float | None = None, **fields: Any) -> dict[str, Any]:
        """Sends a command and returns its answer."""
        self.send(command, **fields)
        return self.answer(timeout)

    def close(self) -> None:
        """Ends the process; more than once is no mistake."""
        if self._log.closed:
            return
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _last_words(self) -> str:
        status = self._process.wait()
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        said = lines[-1].strip() if lines else "it wrote nothing"
        hint = " (killed: too little memory?)" if status == -9 else ""
        return f"{self.entrant.name} on {self.entrant.model} ended with status {status}{hint}: {said}"


@contextlib.contextmanager
def built(entrants: Sequence[Entrant | Decoder], threads: int) -> Iterator[list[tuple[Worker, dict[str, Any]]]]:
    """Yields a worker for each entrant with the record it begins: `name`, `spec`, and what `build` answered.

    All are built at the same time; at the end of the block their processes end. Raises `WorkerError` when one fails.
    """
    with contextlib.ExitStack() as stack:
        workers = [Worker(entrant, threads) for entrant in entrants]
        for worker in workers:
            stack.callback(worker.close)
        for worker in workers:
            worker.send("build", entrant=dataclasses.asdict(worker.entrant), threads=threads)
        yield [
            (
                worker,
                {"name": worker.entrant.name, "spec": dataclasses.asdict(worker.entrant), **worker.answer()},
            )
            for worker in workers
        ]


def reset_peak() -> bool:
    """Resets the kernel's high-water mark of this process's memory; returns whether that was possible.

    What is free is given back to the system first, so that a peak is of the steps to come and not of the start.
    """
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def memory_mib(field: str) -> float:
    """Returns `VmHWM` (the peak) or `VmRSS` (now) of this process in MiB; the peak since the start where not Linux."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) / 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def pin(threads: int) -> None:
    """Keeps this process on the first `threads` processors it may use, where the system can do that."""
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[:threads])


class OtherWork:
    """What the machine did while the `with` block ran.

    `share` of all processors was used by others (0 where not Linux), `own` seconds of processors by this process.
    Work of other processes and time that a virtual machine did not get make a comparison worth less.
    """

    share: float = 0.0
    own: float = 0.0

    def __enter__(self) -> OtherWork:
        self._busy, self._cpu, self._began = _busy_seconds(), time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.own, wall = time.process_time() - self._cpu, time.perf_counter() - self._began
        others = _busy_seconds() - self._busy - self.own
        self.share = max(0.0, others / (wall * (os.cpu_count() or 1)))


def _busy_seconds() -> float:
    if not _STAT.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, _STAT.read_text().split(None, 9)[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def make_runner(side: str, spec: dict[str, Any], threads: int) -> Runner:
    """Returns a side's runner, of training or, where `spec` says how many new tokens, of decoding.

    Only that side's libraries are imported.
    """
    if "products" in spec:
        from benchmarks.matmul import MatmulRunner

        return MatmulRunner(Products(**spec))
    if "new_tokens" in spec and side == "torch":
        from benchmarks.decode_torch import TorchDecoder

        return TorchDecoder(Decoder(**spec), threads)
    if "new_tokens" in spec:
        from benchmarks.decode_jax import JaxDecoder

        return JaxDecoder(Decoder(**spec))
    if side == "torch":
        from benchmarks.torch_side import TorchRunner

        return TorchRunner(Entrant(**spec), threads)
    from benchmarks.jax_side import JaxRunner

    return JaxRunner(Entrant(**spec))


def serve(side: str) -> None:
    """Answers commands from stdin until it is closed.

    `build` (fields `entrant`, `threads`) answers with `describe()` and the memory then in use; `warm` with the seconds
    of compiling and of the first step; `reset` with whether the peak could be reset; `step` with `seconds`, `cpu`
    seconds, `loss`, `rows` and the share of the machine that `others` used; `peak` with `peak_mib` of the host's
    memory, `device_peak` of the device's; `flops` with the operations of a step by formula. Where there is too little
    memory, the answer is `out_of_memory` alone; any other error ends the process.
    """
    with contextlib.suppress(AttributeError, OSError):  # elsewhere than on Linux
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    runners: list[Any] = []
    for line in sys.stdin:
        try:
            answer = _answer(json.loads(line), side, runners)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            answer = {"out_of_memory": " ".join(str(error).split())[:200] or type(error).__name__}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(command: dict[str, Any], side: str, runners: list[Any]) -> dict[str, Any]:
    """Returns the answer to a command; `runners` holds the one runner once it is built."""
    began = time.perf_counter()
    if command["do"] == "build":
        pin(command["threads"])
        runners.append(make_runner(side, command["entrant"], command["threads"]))
        seconds = time.perf_counter() - began
        return {**runners[0].describe(), "build_s": seconds, "built_mib": memory_mib("VmRSS")}
    if command["do"] == "reset":
        return {"peak_is_of_steps": reset_peak()}
    if command["do"] == "peak":
        return {"peak_mib": memory_mib("VmHWM")}
    if command["do"] == "device_peak":
        return {"peak_mib": runners[0].device_peak_mib()}
    if command["do"] == "flops":
        return {"flops": runners[0].flops()}
    if command["do"] == "warm":
        answer = dict(runners[0].warm())
        answer["first_s"] = time.perf_counter() - began - answer["compile_s"]
        return answer
    with OtherWork() as others:
        began = time.perf_counter()
        loss, rows = runners[0].step()
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "loss": loss, "rows": rows, "others": others.share, "cpu": others.own}


if __name__ == "__main__":
    serve(sys.argv[1])
