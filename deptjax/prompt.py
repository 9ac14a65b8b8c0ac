"""A saved prompt: a folder with `prompt.safetensors` (the tuned parameters) and `prompt.json` (what they are for)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Collection
from importlib import metadata
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from deptjax.errors import UserError
from deptjax.methods.base import method_from_config, method_to_config
from deptjax.models.layout import with_layout
from deptjax.typing import Tree
from deptjax.version import __version__

TENSORS = "prompt.safetensors"
CARD = "prompt.json"
_FRESH = ".new"  # ending of a folder that is being written
VERSIONED = ("jax", "flax", "optax", "transformers")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a run leaves behind, whatever the method: parameters, and all that is needed to use them rightly.

    Attributes:
      method: with every field resolved.
      trainable: numpy arrays, as `PromptedModel` takes them.
      backbone: name of the backbone it was tuned on.
      fingerprint: `Backbone.fingerprint` of that backbone.
      task: the task's configuration (template, labels, metrics).
      metrics: scores of this prompt, `{"dev/accuracy": 0.9}`.
      settings: what else prediction must repeat (`max_length`).
      encoder: of a method with an encoder, its card: `name`, `fingerprint`, digests of `vocabulary` and `weights`.
      run_id: 12 hex digits that depend on the parameters and the run's configuration, as a git commit does on its tree.
    """

    method: Any
    trainable: Tree
    backbone: str
    fingerprint: dict[str, Any]
    task: dict[str, Any]
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    run_id: str = ""
    encoder: dict[str, Any] | None = None

    @classmethod
    def build(cls, method: dict[str, Any], trainable: Tree, backbone: Any) -> Prompt:
        """Returns a prompt for `backbone`, without a task, of a method's configuration and its parameters.

        Raises `UserError` for an unknown method or field.
        """
        return cls(method_from_config(method), trainable, backbone.name, backbone.fingerprint, {})

    @property
    def method_config(self) -> dict[str, Any]:
        """The method as JSON: `{"method": kind, field: value, ...}`."""
        return method_to_config(self.method)

    @property
    def _encoder(self) -> tuple[dict[str, Any], ...]:
        return () if self.encoder is None else (self.encoder,)

    def with_run_id(self) -> Prompt:
        """Returns the prompt with the run_id of what it holds, which `save` would give it."""
        tensors = {k: np.ascontiguousarray(v) for k, v in _flatten(self.trainable).items()}
        run_id = _digest(tensors, self.method_config, self.fingerprint, self.task, self.settings, *self._encoder)
        return dataclasses.replace(self, run_id=run_id)

    def check_backbone(self, backbone: Any, where: str = "this prompt") -> None:
        """Raises `UserError` naming the fields in which `backbone` differs from the one the prompt was tuned on."""
        actual = backbone.fingerprint
        different = [k for k in {**self.fingerprint, **actual} if self.fingerprint.get(k) != actual.get(k)]
        if different:
            told = "; ".join(f"{k} is {actual.get(k)}, not {self.fingerprint.get(k)}" for k in sorted(different))
            raise UserError(f"{where} was tuned on '{self.backbone}', not on '{backbone.name}': {told}")

    def check_is_of_a_task(self, where: str) -> None:
        """Raises `UserError` for what `train_shared` leaves for other runs to start from."""
        if self.settings.get("shared"):
            raise UserError(
                f"{where} is shared by tasks, for runs to start from (start_from); the prompts of its own tasks are in "
                "the folder prompts beside it"
            )

    def soft_prompt(self, where: str = "this prompt") -> np.ndarray:
        """Returns the vectors (M, D) in front of every text, worked out where the method has them in parts.

        Raises `UserError`, which begins with `where`, for a method without them, or with others for each text.
        """
        vectors = self.method.soft_prompt(self.trainable, self.fingerprint["width"])
        if vectors is None:
            why = "which makes one for each text" if self.method.by_instance else "which has none"
            raise UserError(f"{where} holds no soft prompt: it is of method '{self.method.kind}', {why}")
        return np.asarray(vectors)

    def on(self, backbone: Any) -> Prompt:
        """Returns the prompt with its layers as the backbone has them: stacked, where it scans them, or one by one."""
        if not isinstance(self.trainable.get("backbone"), dict):
            return self
        inner = with_layout(self.trainable["backbone"], backbone.config.scan_layers)
        return dataclasses.replace(self, trainable={**self.trainable, "backbone": inner})

    def size(self) -> int:
        """Returns the bytes of the tuned parameters."""
        return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(self.trainable))

    def save(self, folder: str | os.PathLike[str]) -> pathlib.Path:
        """Writes the folder, replacing a prompt that is there; a crash at any moment leaves the old or the new one.

        Raises `UserError` for a folder that holds something else, and for a file; both are left as they are.
        """
        from safetensors.numpy import save_file

        folder = pathlib.Path(folder)
        check_holds_no_more(folder, (CARD, TENSORS))
        tensors = {k: np.ascontiguousarray(v) for k, v in _flatten(self.trainable).items()}
        run_id = _digest(tensors, self.method_config, self.fingerprint, self.task, self.settings, *self._encoder)
        card = {
            "format": 1,
            "run_id": run_id,
            "method": method_to_config(self.method),
            "backbone": {"name": self.backbone, "fingerprint": self.fingerprint},
            **({} if self.encoder is None else {"encoder": self.encoder}),
            "task": self.task,
            "settings": self.settings,
            "metrics": self.metrics,
            "versions": {"deptjax": __version__, **{name: metadata.version(name) for name in VERSIONED}},
        }
        fresh = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}{_FRESH}")
        try:
            fresh.mkdir(parents=True)
            save_file(tensors, fresh / TENSORS)
            (fresh / CARD).write_text(json.dumps(card, indent=2) + "\n")
            replace_folder(fresh, folder)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)  # a full disk needs the room back
            raise
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Prompt:
        """Reads a folder that `save` wrote. Raises `UserError` for one that is missing, foreign or damaged."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        folder = whole_folder(pathlib.Path(folder))
        for name in (CARD, TENSORS):
            if not (folder / name).is_file():
                inside = f"; name {folder / 'prompt'}" if (folder / "prompt" / CARD).is_file() else ""
                raise UserError(f"{folder} is not a saved prompt: it has no {name}{inside}")
        try:
            card = json.loads((folder / CARD).read_text(encoding="utf-8"))
            _check_card(card)
            tensors = load_file(folder / TENSORS)
            prompt = cls(
                method=method_from_config(card["method"]),
                trainable=_unflatten(tensors),
                backbone=card["backbone"]["name"],
                fingerprint=card["backbone"]["fingerprint"],
                task=card["task"],
                metrics=card["metrics"],
                settings=card["settings"],
                run_id=card["run_id"],
                encoder=card.get("encoder"),
            )
        except json.JSONDecodeError as error:
            raise UserError(f"{folder / CARD} is not JSON: line {error.lineno}: {error.msg}") from error
        except KeyError as error:
            raise UserError(f"{folder / CARD} has no field {error}; it was not written by deptjax") from error
        except SafetensorError as error:
            raise UserError(f"{folder / TENSORS} is damaged: {error}") from error
        except UserError as error:
            raise UserError(f"{folder / CARD}: {error}") from error
        except OSError as error:
            raise UserError(f"{folder} cannot be read: {error}") from error
        except (TypeError, AttributeError, ValueError, RecursionError) as error:
            raise UserError(f"{folder / CARD} was not written by deptjax, or is damaged: {error}") from error
        said = (card["method"], prompt.fingerprint, prompt.task, prompt.settings, *prompt._encoder)
        if prompt.run_id != _digest(tensors, *said):
            raise UserError(
                f"{folder / TENSORS} and {CARD} do not belong together: one of them was changed or damaged since they "
                f"were written as run_id {prompt.run_id}; take a copy that is whole"
            )
        return prompt


def check_holds_no_more(folder: pathlib.Path, names: Collection[str], what: str = "a prompt") -> list[str]:
    """Returns the names of what a folder holds. Raises `UserError` for a file, and for others than `names`."""
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder")
    there = sorted(child.name for child in folder.iterdir())
    for name in there:
        if name not in names:
            raise UserError(f"{folder} holds '{name}', which is no part of {what}; name another folder")
    return there


def replace_folder(fresh: pathlib.Path, folder: pathlib.Path) -> None:
    """Puts `fresh` in the place of `folder`; `recover_folder` mends what a crash between the two renames leaves."""
    old = _aside(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def whole_folder(folder: pathlib.Path) -> pathlib.Path:
    """Returns the folder, or the old one in its place that a replacement has put aside, for a moment or in a crash."""
    return _aside(folder) if not folder.exists() and _aside(folder).exists() else folder


def recover_folder(folder: pathlib.Path) -> None:
    """Brings back the folder that a killed `replace_folder` had put aside, and removes what a killed save left.

    For the run that owns the folder: to anybody else, what looks left behind may be a save under way.
    """
    for leftover in folder.parent.glob(f".{folder.name}.*{_FRESH}"):
        shutil.rmtree(leftover, ignore_errors=True)
    if not folder.exists() and _aside(folder).exists():
        os.replace(_aside(folder), folder)


def _aside(folder: pathlib.Path) -> pathlib.Path:
    return folder.with_name(f".{folder.name}.old")


def _check_card(card: Any) -> None:
    """Raises `UserError` for a field of a card that is not of its type, `KeyError` for one that is not there."""
    wanted = {"run_id": str, "method": dict, "backbone": dict, "task": dict, "settings": dict, "metrics": dict}
    if not isinstance(card, dict):
        raise UserError(f"it holds a {type(card).__name__}, expected an object; it was not written by deptjax")
    fields: dict[str, tuple[Any, type]] = {name: (card[name], kind) for name, kind in wanted.items()}
    if isinstance(card["backbone"], dict):
        fields["backbone name"] = (card["backbone"]["name"], str)
        fields["backbone fingerprint"] = (card["backbone"]["fingerprint"], dict)
    if card.get("encoder") is not None:
        fields["encoder"] = (card["encoder"], dict)
    for name, (value, kind) in fields.items():
        if not isinstance(value, kind):
            told = "an object" if kind is dict else "a text"
            raise UserError(f"field {name} is a {type(value).__name__}, expected {told}; it was not written by deptjax")


def _flatten(tree: Tree) -> dict[str, np.ndarray]:
    return {k: np.asarray(v) for k, v in traverse_util.flatten_dict(tree, sep="/").items()}


def _unflatten(tensors: dict[str, np.ndarray]) -> Tree:
    return traverse_util.unflatten_dict(tensors, sep="/")


def _digest(tensors: dict[str, np.ndarray], *configs: Any) -> str:
    digest = hashlib.sha1()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].tobytes())
    digest.update(json.dumps(configs, sort_keys=True).encode())
    return digest.hexdigest()[:12]
