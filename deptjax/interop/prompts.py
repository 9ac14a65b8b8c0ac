"""One door for prompts, whatever format they are in: `load_prompt` and `export_prompt`."""

from __future__ import annotations

import dataclasses
import os
import shutil
import uuid
from pathlib import Path

from deptjax.data.tasks import Task, get_task
from deptjax.errors import UserError, nearest
from deptjax.interop.adapters import CONFIG, TENSORS, Adapter
from deptjax.interop.array_files import check_finished, inside
from deptjax.interop.bare_arrays import bare_bytes, read_bare
from deptjax.interop.official_dept import dept_files
from deptjax.interop.peft import peft_files, read_peft
from deptjax.models.backbone import Backbone
from deptjax.models.prompted import check_parameters
from deptjax.prompt import CARD, Prompt, check_holds_no_more, replace_folder, whole_folder
from deptjax.prompt import TENSORS as OWN_TENSORS

FORMATS = ("peft", "dept", "npz", "safetensors", "npy")
_FOLDERS = {"peft": peft_files, "dept": dept_files}
_WRITTEN = {CONFIG, *TENSORS, "README.md", ".gitattributes"}  # what a folder may hold that an export replaces
DEFAULT_MAX_LENGTH = 512


def load_prompt(path: str | os.PathLike[str], backbone: Backbone, task: Task | str | None = None) -> Prompt:
    """Returns the prompt at `path`, in any format that is known, checked against the backbone.

    Args:
      path: a folder that `Prompt.save` wrote; a folder of HF peft (prompt tuning, P-tuning, prefix tuning, LoRA) or of
        DePT's authors; or a `.npz`, `.npy`, `.safetensors`, `.bin` or `.pt` file of arrays.
      backbone: the one it was tuned on, or is to be used with.
      task: what it is for: a `Task`, the name of a registered one, or `None` for the one that the prompt names. Other
        formats name none: then it answers bare texts with free text.

    Raises:
      UserError: in one line that names the file and the field or tensor, for whatever is missing, damaged, still being
        written, of another backbone, or cannot be held exactly.
    """
    path = Path(path).expanduser()
    check_finished(path)
    chosen = get_task(task) if isinstance(task, str) else task
    path = whole_folder(path)
    if (path / CARD).exists():
        return _own(path, backbone, chosen)
    if path.is_dir():
        if not (path / CONFIG).exists() and not (path / CONFIG).is_symlink():
            inner = path / "prompt" if (path / "prompt" / CARD).exists() else "the folder that does"
            raise UserError(f"{path} is no prompt: it holds neither {CARD} nor {CONFIG}; name {inner}")
        _check_kind(backbone, str(path))
        adapter = read_peft(path, backbone)
    elif path.exists():
        adapter = read_bare(path, backbone)
    else:
        raise UserError(f"{path}: there is no such file or folder; check the path")
    return _built(path, adapter, backbone, chosen)


def export_prompt(
    prompt: Prompt, backbone: Backbone, path: str | os.PathLike[str], format: str = "peft", overwrite: bool = False
) -> Path:
    """Writes a prompt in another format, and returns its path.

    Args:
      prompt: any prompt of `backbone`.
      backbone: gives the names of modules and the sizes that the format's config holds.
      path: the folder (`peft`, `dept`) or the file, whose ending is the format's name.
      format: `peft` (HF peft), `dept` (DePT's authors), `npz`, `safetensors` or `npy`.
      overwrite: replace what is at `path`: a file, or a folder that holds nothing but an adapter.

    Raises:
      UserError: for a method that the format cannot hold, a prompt of another backbone, or something at `path`.
    """
    path = Path(path).expanduser()
    if format not in FORMATS:
        raise UserError(f"format '{format}' is not one of {', '.join(FORMATS)}.{nearest(format, FORMATS)}")
    prompt.check_backbone(backbone)
    if format in _FOLDERS:
        _check_kind(backbone, f"format '{format}'")
        _check_folder(path, overwrite)
        _write_folder(path, _FOLDERS[format](prompt.method_config, prompt.trainable, backbone))
        return path
    if path.suffix != f".{format}":
        raise UserError(f"{path}: a file of format '{format}' must end in .{format}; name it so")
    check_free(path, overwrite)
    write_file(path, bare_bytes(prompt.method_config, prompt.trainable, path.suffix))
    return path


def _check_kind(backbone: Backbone, where: str) -> None:
    """Raises `UserError` for a backbone of which the formats of other libraries are not known here."""
    if backbone.config.is_masked:
        raise UserError(
            f"{where}: adapters of masked backbones are not implemented, and '{backbone.name}' is one; use this"
            " library's own folder, or npz, safetensors or npy"
        )


def _own(path: Path, backbone: Backbone, task: Task | None) -> Prompt:
    inside(path, CARD), inside(path, OWN_TENSORS)
    prompt = Prompt.load(path)
    prompt.check_backbone(backbone, str(path))
    prompt = prompt.on(backbone)
    check_parameters(backbone, prompt.method, prompt.trainable, str(path))
    if task is None:
        return prompt
    return dataclasses.replace(prompt, task=task.to_config(), metrics={}).with_run_id()


def _built(path: Path, adapter: Adapter, backbone: Backbone, task: Task | None) -> Prompt:
    try:
        bare = Prompt.build(adapter.method, adapter.trainable, backbone).on(backbone)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: its method cannot be made ({error}); export it again") from None
    check_parameters(backbone, bare.method, bare.trainable, str(path))
    method, context = bare.method, backbone.config.context
    left = None if context is None else context - method.positions_in_front()
    task = task or _any_text(path, left)
    length = method.source_limit() or DEFAULT_MAX_LENGTH
    if left is not None:
        if left <= task.max_target_length:
            raise UserError(
                f"{path}: '{backbone.name}' has {context} positions; {method.positions_in_front()} prompt vectors and"
                f" answers of {task.max_target_length} tokens leave none for a text; lower the task's max_target_length"
            )
        length = min(length, left - task.max_target_length)
    settings = {"max_length": length, "evaluation": "auto"}
    return dataclasses.replace(bare, task=task.to_config(), settings=settings).with_run_id()


def _any_text(path: Path, positions: int | None) -> Task:
    """Returns the task of an adapter that names none: a bare text in, free text out, in at most half the positions."""
    longest = Task.max_target_length if positions is None else min(Task.max_target_length, max(1, positions // 2))
    return Task(path.resolve().stem or "prompt", None, "{text}", labels=(), max_target_length=longest)


def check_free(path: Path, overwrite: bool) -> None:
    """Raises `UserError` for a file that exists, unless it may be overwritten, and for a folder in its place."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; name another file, or overwrite it (overwrite=True, --overwrite)")


def write_file(path: Path, data: bytes) -> None:
    """Writes a file that gets its name when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        fresh.write_bytes(data)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _check_folder(path: Path, overwrite: bool) -> None:
    there = check_holds_no_more(path, _WRITTEN, "an adapter")
    if there and not overwrite:
        raise UserError(f"{path} exists; name another folder, or overwrite it (overwrite=True, --overwrite)")


def _write_folder(path: Path, files: dict[str, bytes]) -> None:
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        fresh.mkdir(parents=True)
        for name, data in files.items():
            (fresh / name).write_bytes(data)
        replace_folder(fresh, path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
