"""From flags and gin to what `deptjax.train` takes: a model to load, a method, a task, a configuration.

A flag goes before `--gin.NAME=VALUE`, which goes before a gin file, which goes before the default.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from deptjax.cli.fields import BINDING, FLAG, Field, Given, checked, fields_of, unescaped
from deptjax.cli.flags import METHOD, MODEL_FIELDS, spelled
from deptjax.cli.gin_files import Reference, read_gin
from deptjax.data.huggingface import HFSource
from deptjax.data.seqio import SeqioSource
from deptjax.data.sources import FileSource
from deptjax.data.tasks import Task, get_task
from deptjax.data.tfds import TFDSSource
from deptjax.errors import UserError, nearest
from deptjax.inference.decoding import Decoding
from deptjax.methods import method_class, method_names
from deptjax.methods.base import method_fields, method_to_config
from deptjax.training.config import TrainConfig

Settings = dict[tuple[str, str], Given]

_TRAIN = ("method", "task", "workdir")


def known_names() -> dict[str, tuple[str, ...]]:
    """Returns the fields of every name that gin may bind."""
    methods = {cls.__name__: tuple(method_fields(cls)) for cls in map(method_class, method_names())}
    return {
        "train": _TRAIN,
        "load_backbone": tuple(MODEL_FIELDS),
        "TrainConfig": tuple(fields_of(TrainConfig)),
        "Task": tuple(name for name in fields_of(Task) if name != "source"),
        **{name: tuple(fields_of(cls)) for name, cls in _SOURCES.items()},
        **methods,
    }


def merged(files: list[str], bindings: list[str], flags: Settings) -> Settings:
    """Returns all settings, what goes before replacing what it goes before."""
    return {**read_gin(files, bindings, known_names()), **flags}


def text_of(settings: Settings, owner: str, name: str) -> str | None:
    """Returns a setting that is a text, or `None` where it is not given."""
    given = settings.get((owner, name))
    return None if given is None else checked(given, Field(name, ("str",), None, ""))


def model_settings(settings: Settings) -> dict[str, Any]:
    """Returns the arguments of `load_backbone` that were given."""
    return _fields(settings, "load_backbone", MODEL_FIELDS)


def make_method(settings: Settings) -> Any:
    """Returns the method. Raises `UserError` for a flag or binding that the chosen method does not have."""
    chosen = settings.get(("train", "method"))
    cls: Any = method_class("dept") if chosen is None else _class_of(chosen)
    fields = fields_of(cls, linen=True)
    own = _fields(settings, cls.__name__, fields)
    others = {method_class(kind).__name__ for kind in method_names()} - {cls.__name__}
    for (owner, name), given in settings.items():
        if owner in others and given.level >= BINDING:  # a file may hold settings of methods that are not chosen
            raise UserError(f"{given.origin} is not for the method of this run, '{cls.kind}'")
        if owner == METHOD and name in fields:
            own[name] = _value(given, fields[name])
        elif owner == METHOD and name not in fields_of(TrainConfig):
            there = spelled(list(fields)) or "none"
            raise UserError(
                f"{given.origin}: method '{cls.kind}' has no such field; its fields: {there}."
                f"{nearest(given.origin, ['--' + field.replace('_', '-') for field in fields])}"
            )
    return cls(**own)


def make_config(settings: Settings, method: Any) -> TrainConfig:
    """Returns the training configuration."""
    fields = fields_of(TrainConfig)
    own = _fields(settings, "TrainConfig", fields, _SPECIAL)
    for (owner, name), given in settings.items():
        if owner == METHOD and name not in method_fields(type(method)):
            named = settings.get(("TrainConfig", name))
            if named is None or named.level < given.level:  # the flag of the same name stands for this field
                own[name] = checked(given, fields[name])
    rates = method.learning_rates(1.0)
    for group in ("prompt", "low_rank", "backbone"):  # `train` checks this too; here the answer names flags
        rate = settings.get(("TrainConfig", f"{group}_lr"))
        if rate is not None and rate.level == FLAG and group not in rates:
            there = spelled([f"{name}_lr" for name in rates])
            raise UserError(f"{rate.origin}: method '{method.kind}' trains no such parameters; it has {there}")
    return TrainConfig.from_settings(own)


def make_decoding(settings: Settings, longest: int | None) -> Decoding | None:
    """Returns how text is generated, or `None` where no flag says anything of it.

    Args:
      settings: those given.
      longest: the most new tokens where `max_new_tokens` is not given; `None` where nothing is generated.

    Raises `UserError` that names flags.
    """
    given = {name: value for (owner, name), value in settings.items() if owner == "Decoding"}
    if not given:
        return None
    if longest is None:
        origin = next(iter(given.values())).origin
        raise UserError(f"{origin}: nothing is generated here, for the answers are labels; leave it out")
    fields = fields_of(Decoding)
    own: dict[str, Any] = {
        name: tuple(map(unescaped, value.value)) if isinstance(value.value, list) else checked(value, fields[name])
        for name, value in given.items()
    }
    try:
        return Decoding(**{"max_new_tokens": longest, **own})
    except UserError as error:
        raise UserError(_in_flags(str(error), fields)) from None


def changed_from_default(config: TrainConfig) -> dict[str, Any]:
    """Returns the fields of a configuration that are not at their defaults, as arguments of `train`."""
    default = TrainConfig()
    return {k: v for k, v in dataclasses.asdict(config).items() if v != getattr(default, k)}


def make_task(settings: Settings, base: Task | None = None) -> Task:
    """Returns the task: a registered one, or one of the user's own rows, or `base` where neither is named.

    Its template, labels and so on can be replaced. Those of a level below the one that names a registered task belong
    to another task, and are left out. Rows of one's own are named by the first field of a source: a file's by flags or
    in gin, those of other libraries in gin (`HFSource.path = "nyu-mll/glue"`).
    """
    name, owner = settings.get(("train", "task")), chosen_source(settings)
    rows = settings[owner, NAMED_BY[owner]] if owner else None
    if name and rows and name.level == rows.level:
        raise UserError(f"{name.origin} and {rows.origin} both name a task; keep one")
    own = _fields(settings, "Task", _TASK_FIELDS, _SPECIAL)
    if name and (not rows or name.level > rows.level):
        low = {key[1] for key, given in settings.items() if key[0] == "Task" and given.level < name.level}
        own = {key: value for key, value in own.items() if key not in low}
        return dataclasses.replace(get_task(checked(name, Field("task", ("str",), None, ""))), **own)
    if not owner or not rows:
        if base is None:
            raise UserError(
                "no task; name one with --task NAME, or your own rows with --task-file FILE --input TEMPLATE"
            )
        return dataclasses.replace(base, **own)
    source = _SOURCES[owner](**_fields(settings, owner, fields_of(_SOURCES[owner])))
    own = {"name": _name_of(source, owner), **own}
    if base is not None:
        return dataclasses.replace(base, **own, source=source)
    if "input" not in own:
        raise UserError(
            f"{rows.origin}: no --input; give the template of the text, with a column's name in braces, such as "
            '--input "{text}"'
        )
    return Task(**own, source=source)


def chosen_source(settings: Settings) -> str | None:
    """Returns the class of the source that names rows, the one of the highest level where there are several."""
    found = {owner: settings[owner, field] for owner, field in NAMED_BY.items() if (owner, field) in settings}
    for (owner, field), given in settings.items():
        if owner in _SOURCES and owner not in found and owner != "FileSource":
            raise UserError(f"{given.origin}: {owner}.{field} is of no use without {owner}.{NAMED_BY[owner]}; bind it")
    if not found:
        return None
    level = max(given.level for given in found.values())
    first, *others = [owner for owner, given in found.items() if given.level == level]
    if others:
        raise UserError(f"{found[first].origin} and {found[others[0]].origin} both name a task's rows; keep one")
    return first


def _name_of(source: Any, owner: str) -> str:
    """Returns a task's name from where its rows are: `rows` of rows.jsonl, `sst2` of glue/sst2:2.0.0."""
    place = getattr(source, "name", None) or getattr(source, NAMED_BY[owner])
    return pathlib.Path(place).stem if owner == "FileSource" else place.rpartition("/")[2].partition(":")[0]


def check_workdir(path: str) -> None:
    """Raises `UserError` early, before a model is loaded, where the folder of a run cannot be made or written."""
    place = pathlib.Path(path)
    there = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise UserError(f"cannot write {path}: {there} is a file; choose another workdir")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {path}: no permission to write in {there}; choose another workdir")


def as_gin(model: Mapping[str, Any], method: Any, task: Task, config: TrainConfig) -> str:
    """Returns the resolved settings as a gin file, which gives the same run when it is passed back."""
    lines = ["# All settings of this run. Again: deptjax train --gin-file THIS_FILE --workdir ANOTHER_FOLDER", ""]
    lines += [f"load_backbone.{name} = {value!r}" for name, value in model.items()]
    fields = method_to_config(method)
    lines += ["", f"train.method = {fields.pop('method')!r}"]
    lines += [f"{type(method).__name__}.{name} = {value!r}" for name, value in fields.items()]
    description = task.to_config()
    source = description.pop("source") or {}
    kind = source.pop("kind", None)
    if kind in _KINDS:
        lines += ["", *(f"{_KINDS[kind]}.{name} = {value!r}" for name, value in source.items())]
    else:
        lines += ["", f"train.task = {description.pop('name')!r}"]
    lines += [f"Task.{name} = {value!r}" for name, value in description.items()]
    lines += ["", *(f"TrainConfig.{name} = {value!r}" for name, value in dataclasses.asdict(config).items())]
    return "\n".join(lines) + "\n"


def _class_of(given: Given) -> Any:
    """Returns the method's class, named by its kind (`"dept"`) or in gin also as `@DePT`."""
    if isinstance(given.value, Reference):
        classes = {method_class(kind).__name__: method_class(kind) for kind in method_names()}
        name = given.value.name.rpartition(".")[2]
        if name not in classes:
            raise UserError(f"{given.origin}: no method is named @{name}.{nearest(name, classes)}")
        return classes[name]
    return method_class(checked(given, Field("method", ("str",), None, "")))


def _in_flags(told: str, fields: Iterable[str]) -> str:
    """Returns a message about fields as one about their flags; what stands in quotes is the user's own.

    >>> _in_flags("top_p is 0.5, but nothing is sampled; set sample=True, or leave top_p out", ("top_p", "sample"))
    '--top-p is 0.5, but nothing is sampled; set --sample, or leave --top-p out'
    """
    names = "|".join(fields)
    flags = {"": "--", "=True": "--", "=False": "--no-"}
    return re.sub(
        rf"('[^']*')|\b({names})(=True|=False|)\b",
        lambda found: found[1] or flags[found[3]] + found[2].replace("_", "-"),
        told,
    )


def _value(given: Given, field: Field) -> Any:
    value = checked(given, field)
    return unescaped(value) if isinstance(value, str) and given.level == FLAG and field.name in _ESCAPED else value


def _fields(
    settings: Settings,
    owner: str,
    fields: Mapping[str, Field],
    special: Mapping[str, Callable[[Given], Any]] | None = None,
) -> dict[str, Any]:
    found = {name: settings[owner, name] for name in fields if (owner, name) in settings}
    special = special or {}
    return {name: (special[name] if name in special else _of(fields[name]))(given) for name, given in found.items()}


def _of(field: Field) -> Callable[[Given], Any]:
    return lambda given: _value(given, field)


def texts(given: Given) -> tuple[str, ...] | None:
    """Returns a list of texts: `a,b,c` or a JSON list from a flag, a list in gin."""
    value = given.value
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"{given.origin}: broken JSON at column {error.colno}: {error.msg}") from None
    elif isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    if value is None:
        return None
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{given.origin}: {value!r} is not a list of texts such as a,b,c")
    return tuple(value)


def _pairs(given: Given) -> dict[str, str]:
    """Returns a mapping from label to text: `a=x,b=y` from a flag, a dict in gin."""
    if isinstance(given.value, Mapping):
        return dict(given.value)
    pairs = {}
    for part in str(given.value).split(","):
        label, equals, text = part.partition("=")
        if not equals:
            raise UserError(f"{given.origin}: {part!r} is not label=text; write positive=good,negative=bad, say")
        pairs[label.strip()] = text.strip()
    return pairs


_ESCAPED = ("input", "target", "prompt_text")
_SPECIAL: dict[str, Callable[[Given], Any]] = {
    "labels": texts,
    "metrics": texts,
    "start_parts": texts,
    "verbalizers": _pairs,
}
_TASK_FIELDS = {name: field for name, field in fields_of(Task).items() if name != "source"}
_KINDS = {
    "file": "FileSource",
    **{cls.kind: cls.__name__ for cls in (HFSource, TFDSSource, SeqioSource)},
}
_SOURCES: dict[str, Any] = {cls.__name__: cls for cls in (FileSource, HFSource, TFDSSource, SeqioSource)}
NAMED_BY = {  # the field of each source that says where its rows are
    owner: next(field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING)
    for owner, cls in _SOURCES.items()
}
