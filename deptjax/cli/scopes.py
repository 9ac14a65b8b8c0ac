r"""The settings of each run of a suite. A name in gin may have a scope, a task's name, a method's, or both:

    TrainConfig.steps = 320                      # of all runs
    lora/TrainConfig.low_rank_lr = 0.001         # of one method
    trec6/TrainConfig.max_length = 56            # of one task
    trec6/lora/LoRA.rank = 4                     # of one method on one task
    films/FileSource.train = "films.jsonl"       # makes films a task: the user's own file
    films/Task.input = "{text}\nlabel :"

A flag goes before `--gin.NAME=VALUE`, which goes before a gin file; of the same level, more scopes go before fewer. A
setting without a method's scope is for the methods that have it: a rank, or the learning rate of soft prompts.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from deptjax.cli import settings
from deptjax.cli.fields import BINDING, FILE, FLAG, Field, Given, checked
from deptjax.cli.flags import METHOD
from deptjax.cli.gin_files import Scoped, read_scoped_gin
from deptjax.cli.settings import Settings
from deptjax.data.suites import suite
from deptjax.data.tasks import Task, task_names
from deptjax.errors import UserError, nearest
from deptjax.methods import method_class, method_names
from deptjax.methods.base import method_fields
from deptjax.suite.plan import Plan, Recipe
from deptjax.training.config import TrainConfig

SUITE = "suite"
DEFAULT_SEEDS = (0, 1, 2)
_FIELDS = ("name", "tasks", "methods", "seeds", "test_examples", "workdir")
_GROUPS = ("prompt", "low_rank", "backbone")
_GROUP_FIELDS = {f"{group}_{field}": group for group in _GROUPS for field in ("lr", "schedule", "warmup_steps")}
_NAMES_ROWS = tuple(settings.NAMED_BY.items())
_CLASSES = {method_class(kind).__name__: kind for kind in method_names()}
_INSTEAD = {
    ("train", "method"): "name them with --methods or suite.methods",
    ("train", "task"): "name them with --tasks or suite.tasks",
    ("train", "workdir"): "name the suite's folder with --workdir or suite.workdir",
    ("TrainConfig", "seed"): "name them with --seeds or suite.seeds",
}


class SuiteSettings:
    """What flags and gin say of a suite: which runs, and the settings of each.

    Raises `UserError` for a setting of a single run's (`train.method`), for a scope that is neither a task nor a
    method, and for one of a binding that no run is in.
    """

    def __init__(self, files: list[str], bindings: list[str], flags: Settings) -> None:
        known = {**settings.known_names(), SUITE: _FIELDS}
        self._scoped: Scoped = read_scoped_gin(files, bindings, known)
        self._common = self._scoped[frozenset()]
        self._common.update(flags)

    def text(self, name: str) -> str | None:
        """Returns a field of the suite that is a text, `None` where it is not given."""
        return settings.text_of(self._common, SUITE, name)

    def model(self) -> dict[str, Any]:
        """Returns the arguments of `load_backbone`."""
        model = settings.model_settings(self._common)
        if "name_or_path" not in model:
            raise UserError("no model; name one with --model, a hub name, a local folder or a GGUF file")
        return model

    def plan(self, workdir: str) -> Plan:
        """Returns the runs that are asked for, each with its settings."""
        name, tasks = self._tasks()
        methods = self._names("methods") or _none("methods", "dept,lora", method_names())
        for method in methods:
            method_class(method)
        self._check_scopes(tasks, methods)
        pairs = list(itertools.product(tasks, methods))
        tuned = {(t, m): settings.make_method(self._of_method(t, m, methods)) for t, m in pairs}
        groups = {m: tuple(tuned[t, m].learning_rates(1.0)) for t, m in pairs}
        return Plan(
            pathlib.Path(workdir),
            tuple(self._recipe(task, tuned[task, method], groups) for task, method in pairs),
            self._seeds(),
            name,
        )

    def _recipe(self, task: str, method: Any, groups: dict[str, tuple[str, ...]]) -> Recipe:
        used = set(itertools.chain(*groups.values()))
        own = {}
        for key, (given, scope) in self._of_pair(task, method.kind, tuple(groups)).items():
            group = _GROUP_FIELDS.get(key[1]) if key[0] == "TrainConfig" else None
            of_others = group not in (None, *groups[method.kind]) and method.kind not in scope
            # A file may speak of methods that are not chosen; what is asked for on the command line must be of use.
            if not of_others or (given.level >= BINDING and group not in used):
                own[key] = given
        config = settings.make_config(own, method)
        asked = self._common.get((SUITE, "test_examples"))
        examples = None if asked is None else checked(asked, Field("test_examples", ("int", "None"), None, ""))
        return Recipe(_task(task, own), method, settings.changed_from_default(config), examples)

    def _of_method(self, task: str, method: str, planned: Sequence[str]) -> Settings:
        own = {key: given for key, (given, _) in self._of_pair(task, method, planned).items()}
        return {**own, ("train", "method"): Given(method, "--methods", FLAG)}

    def _of_pair(
        self, task: str, method: str, planned: Sequence[str]
    ) -> dict[tuple[str, str], tuple[Given, frozenset[str]]]:
        """Returns the settings of one method on one task with their scopes, without those of other methods."""
        there: dict[tuple[str, str], list[tuple[Given, frozenset[str]]]] = {}
        for scope, bound in self._scoped.items():
            if scope <= {task, method}:
                for key, given in bound.items():
                    there.setdefault(key, []).append((given, scope))
        return {key: _first(key, found) for key, found in there.items() if not _is_anothers(key, method, planned)}

    def _tasks(self) -> tuple[str | None, tuple[str, ...]]:
        """Returns the name of the suite, where it has one, and the names of its tasks."""
        named, listed = (self._common.get((SUITE, field)) for field in ("name", "tasks"))
        if named and listed and named.level == listed.level:
            raise UserError(f"{named.origin} and {listed.origin} both name the tasks; keep one")
        if named and (not listed or named.level > listed.level):
            name = checked(named, Field("name", ("str",), None, ""))
            return name, suite(name)
        tasks = self._names("tasks") or _none("tasks", "trec6,sms_spam", task_names(), " or a suite with --suite NAME")
        return None, tuple(tasks)

    def _names(self, field: str) -> tuple[str, ...]:
        given = self._common.get((SUITE, field))
        return () if given is None else tuple(name for name in settings.texts(given) or () if name)

    def _seeds(self) -> tuple[int, ...]:
        given = self._common.get((SUITE, "seeds"))
        if given is None:
            return DEFAULT_SEEDS
        parts = given.value.split(",") if isinstance(given.value, str) else given.value
        if not isinstance(parts, (list, tuple)):
            parts = [parts]
        level = FLAG if isinstance(given.value, str) else given.level
        of_one = Field("seed", ("int",), None, "")
        return tuple(checked(Given(p.strip() if isinstance(p, str) else p, given.origin, level), of_one) for p in parts)

    def _check_scopes(self, tasks: Sequence[str], methods: Sequence[str]) -> None:
        for scope, bound in self._scoped.items():
            for (owner, name), given in bound.items():
                where = "/".join([*sorted(scope), f"{owner}.{name}"])
                if (owner, name) in _INSTEAD:
                    raise UserError(f"{given.origin}: {where} is of a single run; {_INSTEAD[owner, name]}")
                if scope and owner in (SUITE, "load_backbone"):
                    raise UserError(f"{given.origin}: {where} is one for all runs; leave its scope out")
                theirs = scope & set(method_names())
                if theirs and owner in _CLASSES and _CLASSES[owner] not in theirs:
                    raise UserError(f"{given.origin}: {owner}.{name} is not for the method '{min(theirs)}'")
                self._check_scope(scope, given, tasks, methods)

    def _check_scope(self, scope: frozenset[str], given: Given, tasks: Sequence[str], methods: Sequence[str]) -> None:
        # A file may make tasks of rows that this suite leaves out.
        own_rows = (there for there, bound in self._scoped.items() if any(key in bound for key in _NAMES_ROWS))
        known_tasks, known_methods = {*task_names(), *tasks, *itertools.chain(*own_rows)}, set(method_names())
        for name in sorted(scope):
            if name not in known_tasks | known_methods:
                raise UserError(
                    f"{given.origin}: the scope '{name}' is neither a task nor a method of this suite."
                    f"{nearest(name, known_tasks | known_methods)}"
                )
        if given.level >= BINDING and not scope <= {*tasks, *methods}:
            raise UserError(f"{given.origin} is for no run of this suite")


def _first(key: tuple[str, str], found: list[tuple[Given, frozenset[str]]]) -> tuple[Given, frozenset[str]]:
    """Returns the setting that goes before the others. Raises `UserError` where two have equal right."""
    ranked = sorted(found, key=lambda item: (item[0].level, len(item[1])), reverse=True)
    best = ranked[0]
    for other in ranked[1:]:
        if (other[0].level, len(other[1])) == (best[0].level, len(best[1])) and other[0].value != best[0].value:
            both = "/".join(sorted(best[1] | other[1]))
            raise UserError(
                f"{best[0].origin} and {other[0].origin} both set {'.'.join(key)} of one run; say which holds with"
                f" {both}/{'.'.join(key)}"
            )
    return best


def _is_anothers(key: tuple[str, str], method: str, planned: Sequence[str]) -> bool:
    """Returns whether a setting is of another method of the plan, and not of this one."""
    owner, name = key
    fields = {kind: method_fields(method_class(kind)) for kind in planned}
    if owner == METHOD:
        ours = name in fields[method] or name in settings.fields_of(TrainConfig)
        return not ours and any(name in there for there in fields.values())
    return owner in _CLASSES and _CLASSES[owner] != method and _CLASSES[owner] in planned


def _task(name: str, own: Settings) -> Task:
    """Returns a registered task, or that of the user's own rows where they are given, under this name."""
    here = dict(own)
    if settings.chosen_source(own) is None:
        here["train", "task"] = Given(name, "--tasks", FILE)
    else:
        here["Task", "name"] = Given(name, "--tasks", FILE)
        for field in ("train", "dev", "test"):
            given = own.get(("FileSource", field))
            if given is not None and not pathlib.Path(str(given.value)).expanduser().is_file():
                raise UserError(f"{given.origin}: there is no file {given.value}")
    return settings.make_task(here)


def _none(field: str, example: str, known: Iterable[str], otherwise: str = "") -> tuple[str, ...]:
    raise UserError(f"no {field}; name some with --{field} {example}{otherwise}; there are {', '.join(known)}")
