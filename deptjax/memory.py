"""Peak memory of a stretch of work: of the process on a CPU, of the device on an accelerator."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import pathlib
import sys

import jax

_STATUS = pathlib.Path("/proc/self/status")
_CLEAR = pathlib.Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures the peak while the `with` block runs; `mib` has it afterwards, in MiB.

    On Linux the kernel's high-water mark of resident memory is reset at the start. Elsewhere the mark cannot be reset,
    and `mib` is the peak since the process began. On an accelerator it is what its allocator reports.
    """

    mib: float = 0.0

    def __enter__(self) -> PeakMemory:
        _reset()  # where it cannot be, the peak of the whole process is reported
        return self

    def __exit__(self, *error: object) -> None:
        stats = jax.local_devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
        self.mib = stats["peak_bytes_in_use"] / 2**20 if stats else _resident_peak_mib()


def release_unused() -> None:
    """Gives back to the system what earlier work has left: compiled programs, garbage, and the pages of freed memory.

    Without it, the peak of a run counts some of what the runs before it in this process have used.
    """
    jax.clear_caches()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc: the allocator keeps its pages
        ctypes.CDLL(None).malloc_trim(0)


def peak_can_be_reset() -> bool:
    """Returns whether `PeakMemory` measures a stretch of work alone, and not all of the process before it as well."""
    return jax.default_backend() == "cpu" and _reset()


def _reset() -> bool:
    """Resets the high-water mark of resident memory; returns whether this system can and may."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _resident_peak_mib() -> float:
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
