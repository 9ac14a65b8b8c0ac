"""How a checkpoint of sentence-transformers turns the states of a text's tokens into one vector, as its files say.

`modules.json` names what is done one after the other: a `Transformer`, then a `Pooling` with a `config.json` of its
own, and perhaps `Normalize`. Where that file names no way to pool it is `mean`, which is that library's default; a
folder without the file (a copy of its top level alone, say) does not tell.
Reimers and Gurevych 2019 (arXiv 1908.10084); the format is that of sentence-transformers 2 to 5.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deptjax.errors import UserError
from deptjax.models.pooling import SentencePooling

_OURS = {"cls": "first", "cls_token": "first", "mean": "mean", "mean_tokens": "mean", "lasttoken": "last"}
_MODE = "pooling_mode"


def sentence_pooling(folder: Path) -> SentencePooling | None:
    """Returns what the files of a folder say, or `None` where it is no folder of sentence-transformers.

    Its `pooling` may be one that is not implemented, by its name there, or say which file is missing. Raises
    `UserError` for a damaged file.
    """
    if not (folder / "modules.json").is_file():
        return None
    modules = _read(folder / "modules.json", list)
    kinds = [str(module.get("type")).rpartition(".")[2] if isinstance(module, dict) else "" for module in modules]
    if "Pooling" not in kinds:
        return None
    others = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if others:
        return SentencePooling(f"a {others[0]} layer", False)
    name = Path(str(modules[kinds.index("Pooling")].get("path", ""))).name  # no path leads out of the folder
    path = folder / name / "config.json"
    if not name or not path.is_file():
        return SentencePooling(f"what {name or '1_Pooling'}/config.json says, which is missing", "Normalize" in kinds)
    return SentencePooling(_mode(_read(path, dict)), "Normalize" in kinds)


def _mode(fields: dict[str, Any]) -> str:
    """Returns the pooling that is on: named, or one of the switches `pooling_mode_...`; those of several, joined."""
    named = fields.get(_MODE)
    names = named if isinstance(named, list) else [] if named is None else [named]
    on = [name.removeprefix(f"{_MODE}_") for name, value in fields.items() if name.startswith(f"{_MODE}_") and value]
    return " and ".join(dict.fromkeys(_OURS.get(str(name), str(name)) for name in [*names, *on])) or "mean"


def _read(path: Path, kind: type) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); fetch it again") from None
    if not isinstance(found, kind):
        raise UserError(f"{path}: expected a JSON {'object' if kind is dict else 'array'}; fetch it again")
    return found
