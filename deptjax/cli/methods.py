"""`deptjax methods`: what there is to tune, where each acts, where it is from, and what it trains on a backbone."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Sequence
from typing import Any

from deptjax.cli.entry import run_command

EXAMPLES = """
  deptjax methods
  deptjax methods --model t5-base
  deptjax methods --model smollm2-135m --budget 57600 --json

With --budget, one size of each method (behind `at`) is the largest at which it trains no more numbers than that; where
even 1 is too much, the prompt is halved until it is not.
"""
DEFAULT_MODEL = "t5-base"
LEFT = 24  # columns of the names
LETTERS = """Letters that no field names: D, the backbone's width; K, its key heads, each H wide; I and O, the numbers
that a projection reads and gives.
"""
SPOT = """SPoT is no method of its own: a run of any of them starts from another task's prompt with --start-from DIR.
Vu et al., SPoT: Better Frozen Model Adaptation through Soft Prompt Transfer, ACL 2022, arXiv 2110.07904"""


def main(argv: Sequence[str] | None = None) -> int:
    """Lists the methods. Returns the exit status (see `deptjax.cli.entry`)."""
    return run_command(_methods, argv)


def _methods(words: list[str]) -> int:
    from deptjax.cli import flags
    from deptjax.cli.plan import model_config
    from deptjax.errors import UserError

    told = "List the methods: paper, site, parameters on a backbone."
    parser = flags.Parser("deptjax methods", "[--model MODEL] [--budget N] [--json]", told, EXAMPLES)
    group = parser.add_argument_group("what")
    group.add_argument(
        "--model", metavar="MODEL", help=f"a published size or a folder with config.json (default {DEFAULT_MODEL})"
    )
    group.add_argument("--budget", metavar="N", help="the most numbers that a method may train")
    group.add_argument("--json", action="store_true", help="a JSON object instead of a list")
    flags.add_general(parser)
    options, bindings = parser.parse(words)
    if bindings:
        raise UserError(f"--gin.{bindings[0]}: methods takes no gin settings; use flags")
    name, config = model_config(options.get("model", DEFAULT_MODEL))
    budget = flags.whole(options, "budget", 0) or None
    found = [described(config, kind, budget) for kind in _kinds()]
    if "json" in options:
        print(json.dumps({"model": name, "width": config.width, "budget": budget, "methods": found}, indent=2))
    else:
        print("\n".join([_head(name, config, budget), *(_shown(one) for one in found), LETTERS, SPOT]))
    return 0


def _kinds() -> list[str]:
    from deptjax.methods import method_names

    return method_names()


def described(config: Any, kind: str, budget: int | None = None) -> dict[str, Any]:
    """Returns what is told of a method on a backbone's config, as JSON.

    `parameters` is `None` where none fit, or where the default sizes are `refused` on this width.
    """
    from deptjax.errors import UserError
    from deptjax.methods import method_class, method_to_config
    from deptjax.planning.budget import trained_parameters, within_budget

    cls, refused = method_class(kind), None
    method = cls.typical()
    try:
        trained_parameters(config, method)
    except UserError as error:  # its default sizes are not for this width
        refused = str(error)
    fits = refused is None
    chosen = within_budget(config, method, budget) if fits and budget is not None else method if fits else None
    fields = {} if chosen is None else method_to_config(chosen.resolve(config.width))
    sites = method.sites()
    acts = [site.name for site in dataclasses.fields(sites) if getattr(sites, site.name) is not None]
    sized = dict.fromkeys([*cls.letters.values(), cls.free_size])
    return {
        "method": kind,
        "paper": cls.paper,
        "sites": acts or ["the whole backbone"],
        "by_instance": cls.by_instance,
        "formula": cls.formula,
        "letters": dict(cls.letters),
        "parameters": None if chosen is None else trained_parameters(config, chosen),
        "sizes": {name: fields[name] for name in sized if name in fields},
        "free_size": cls.free_size,
        "refused": refused,
    }


def _head(name: str, config: Any, budget: int | None) -> str:
    within = "" if budget is None else f", within {budget:,} trained numbers"
    return f"on {name} (D = {config.width}){within}; encoders and source prompts that stay frozen are not counted\n"


def _shown(one: dict[str, Any]) -> str:
    count, indent = one["refused"] or "does not fit", " " * LEFT
    if one["parameters"] is not None:
        sizes = ", ".join(f"{name} {value}" for name, value in one["sizes"].items())
        count = f"{one['parameters']:,}" + (f" at {sizes}" if sizes else "")
    of = ", ".join(f"{letter} {field}" for letter, field in one["letters"].items())
    told = [
        count,
        f"{one['formula']}{f'; {of}' if of else ''}",
        f"acts on: {', '.join(one['sites'])}{', anew for each text' if one['by_instance'] else ''}",
        one["paper"],
    ]
    lines = [textwrap.fill(text, 118, initial_indent=indent, subsequent_indent=indent) for text in told]
    return f"{one['method']:{LEFT}}{lines[0][LEFT:]}\n" + "\n".join(lines[1:]) + "\n"
