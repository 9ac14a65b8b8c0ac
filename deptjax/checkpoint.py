"""Checkpoints of a run: trainable tree, optimiser state, step, key, data position and the best score so far.

Written by orbax in the background. Orbax writes into a temporary folder and renames it, so a crash in the middle of
a save leaves the checkpoint before it as the newest one.
"""

from __future__ import annotations

import errno
import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from deptjax.errors import UserError
from deptjax.training.state import TrainState

KEEP = 2  # checkpoints on disk: the newest, and one before it


class Checkpoints:
    """The checkpoints below one folder, numbered by step."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=KEEP, enable_async_checkpointing=True)
        self._folder = pathlib.Path(folder).absolute()
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, or `None`."""
        return self._manager.latest_step()

    def on_disk(self) -> int | None:
        """Returns the step of the newest checkpoint that is whole on disk; any thread may ask."""
        steps = [int(path.name) for path in self._folder.glob("*") if path.name.isdecimal()]
        return max(steps, default=None)

    def save(self, state: TrainState, progress: dict[str, Any]) -> None:
        """Starts to save `state` and `progress` (JSON-ready: the data position, the best score). Returns at once."""
        step = int(state.step)
        if step == self.latest:
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_with_key_data(state)._asdict()), progress=ocp.args.JsonSave(progress)
        )
        with disk_errors(self._folder):
            self._manager.save(step, args=args)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Returns the newest checkpoint as a state of the structure and shardings of `like`, and its progress."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _with_key_data(like)._asdict())
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore())
        restored = self._manager.restore(self.latest, args=args)
        state = TrainState(**restored["state"])
        return state._replace(key=jax.random.wrap_key_data(state.key)), restored["progress"]

    def progress(self) -> dict[str, Any]:
        """Returns the progress of the newest checkpoint, and does not read its state."""
        restored = self._manager.restore(self.latest, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))
        return dict(restored["progress"])

    def wait(self) -> None:
        """Returns when everything is on disk."""
        with disk_errors(self._folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the background work."""
        self.wait()
        self._manager.close()


class disk_errors:  # noqa: N801 - a context manager, used like a function
    """Turns a full disk, or a folder that cannot be written, into a `UserError` that names it."""

    def __init__(self, place: str | os.PathLike[str], remedy: str = "choose another workdir") -> None:
        self.place, self.remedy = place, remedy

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, UserError):
            return
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if full or any(sign in str(error) for sign in ("No space left", "File too large", "quota exceeded")):
            raise UserError(
                f"no room on the disk while writing {self.place}; free some, then run the same command again"
            ) from error
        if isinstance(error, OSError) and error.errno in (
            errno.EACCES,
            errno.EROFS,
            errno.EPERM,
            errno.ENOENT,  # what /proc says of a new folder
            errno.ENOTDIR,
            errno.EEXIST,
        ):
            raise UserError(f"cannot write {self.place}: {error.strerror}; {self.remedy}") from error


def _with_key_data(state: TrainState) -> Any:
    return state._replace(key=jax.random.key_data(state.key))
