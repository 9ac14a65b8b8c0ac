"""Every method has a paper, and a formula of its parameters that is what it has on a tiny backbone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from deptjax.methods import ATTEMPT, IDPG, DeepPromptTuning, Method, PTuning, method_class, method_names
from deptjax.methods.base import method_fields
from deptjax.models.prompted import PromptedModel
from deptjax.training.state import count_trained
from deptjax.typing import Tree
from tests.cases import ENCODED, METHODS, PROMPT_METHODS, backbone_of

CASES: dict[str, Method] = {
    **{name: method for name, method in (METHODS | PROMPT_METHODS | ENCODED).items() if not method.tunes_backbone},
    # The formulas are of the default networks.
    "p_tuning": PTuning(prompt_length=5, hidden=7),
    "idpg": IDPG(prompt_length=5, hidden=6, factors=3),
    "deep_prompt_tuning": DeepPromptTuning(prompt_length=5),
    "attempt": ATTEMPT(5, "a,b", bottleneck=7),
}
ON = [("llama", name) for name in CASES] + [("t5", "lora"), ("t5", "prefix_tuning")]


def value(formula: str, letters: dict[str, int]) -> float:
    """Returns what a formula comes to: letters side by side are multiplied, as on paper."""
    code = re.sub(r"(?<=[\w)])\s+(?=[\w(])", " * ", formula)
    return float(eval(code, {"__builtins__": {}}, letters))


@pytest.mark.parametrize(("formula", "wanted"), [("2 D R + R", 26), ("M (D / R) R + D", 36), ("(M + D) R", 22)])
def test_a_formula_is_read_as_on_paper(formula: str, wanted: int) -> None:
    assert value(formula, {"M": 5, "D": 6, "R": 2}) == wanted


def places(tree: Tree, params: Tree) -> Iterator[tuple[str, Any]]:
    """Yields the key of each filled site, and what stands beside it in the backbone."""
    for key, node in tree.items():
        if key.endswith("site"):
            yield key, params
        else:
            yield from places(node, params[key])


@pytest.mark.parametrize(("family", "name"), ON)
def test_the_formula_is_the_number_of_parameters(family: str, name: str) -> None:
    backbone = backbone_of(family)
    model = PromptedModel.build(backbone, CASES[name].with_encoding_width(backbone.width))
    shapes, c = model.shapes(backbone.width), backbone.config
    letters = {letter: getattr(model.method, field) for letter, field in model.method.letters.items()}
    letters |= {"D": backbone.width, "K": getattr(c, "num_kv_heads", c.num_heads)}
    if "H" not in letters:
        letters["H"] = c.head_dim
    formula, _, place = model.method.formula.partition(" for each ")
    found = [{}] if not place else []
    for _, beside in places(shapes.get("backbone", {}), backbone.params):
        kernel = beside.get("kernel")
        found.append({} if kernel is None else dict(zip("IO", kernel.shape, strict=True)))
    wanted = sum(value(formula, letters | own) for own in found)
    assert count_trained(shapes, model.method.groups(shapes)) == wanted


def test_every_method_says_where_it_is_from_and_what_it_costs() -> None:
    for name in method_names():
        cls = method_class(name)
        assert re.search(r"\d{4}|^none: ", cls.paper), name
        assert "\n" not in cls.paper + cls.formula
        assert set(cls.letters.values()) <= set(method_fields(cls)), name
        used = set(re.findall(r"\b[A-Za-z]\b", cls.formula.partition(" for each ")[0]))
        assert used <= {*cls.letters, "D", "K", "H", "I", "O"}, name
    assert {name for name in method_names() if not method_class(name).tunes_backbone} == set(CASES)
