"""Holds the plan of the house: which room may import which, who may know a method by name, and how files look.

The source is read with `ast`; nothing of deptjax is imported, so imports inside functions count as well.
"""

from __future__ import annotations

import ast
import functools
import pathlib
import re
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "deptjax"
FILES = sorted(PACKAGE.rglob("*.py"))
TEXTS = [p for folder in ("deptjax", "tests", "benchmarks", "configs") for p in sorted((ROOT / folder).rglob("*"))]
TEXTS = [p for p in [*TEXTS, *ROOT.glob("*.md"), ROOT / "setup.py", ROOT / "Makefile"] if p.is_file()]
TEXTS = [p for p in TEXTS if p.suffix in {".py", ".gin", ".md", ""} and "__pycache__" not in p.parts]

# The rooms from the ground up: a room imports rooms of its own number or a lower one. The longest prefix counts.
ORDER = {
    "typing": 0,
    "errors": 0,
    "tokens": 0,
    "version": 0,
    "quantization": 0,
    "methods": 1,
    "models": 1,
    "models.prompted": 2,
    "training": 3,
    "inference": 3,
    "suite": 4,
    "planning": 4,
    "cli": 5,
}
KNOW_NO_METHOD = ("data", "interop", "checkpoint", "sharding")
ENTRY_POINTS = ("cli", "__main__", "train", "search", "evaluate", "predict", "export", "import_", "plan", "quickstart")
FLAGS = ("gin", "argparse", "absl.flags", "absl.app")
LATE = ("interop", "testing")  # formats, tokenizers, and the tiny tokenizer of the tests
OPTIONAL = {"datasets", "seqio", "tensorflow", "tensorflow_datasets"}  # extras: a user may not have them
HEAVY = {"torch", "transformers", "gguf", "huggingface_hub", "tensorstore"}
MAX_LINES = 500


@functools.cache
def parse(path: pathlib.Path) -> ast.Module:
    """Returns the syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def room(path: pathlib.Path) -> str:
    """Returns the module's name without `deptjax.`: `methods.dept`, `methods` for its `__init__`, "" for the top."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_in(name: str, rooms: str | tuple[str, ...]) -> bool:
    """Returns whether `name` is one of the rooms or inside one."""
    return any(name == r or name.startswith(r + ".") for r in ([rooms] if isinstance(rooms, str) else rooms))


def rank(name: str) -> int | None:
    """Returns the storey of a module, or `None` for one that the order does not speak of."""
    known = [r for r in ORDER if is_in(name, r)]
    return ORDER[max(known, key=len)] if known else None


def modules_of(node: ast.AST, path: pathlib.Path) -> list[str]:
    """Returns the full names that one import statement binds, submodules and names alike; [] for other nodes."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        here = path.relative_to(ROOT).parts[: -node.level]
        base = ".".join([*here, base]).rstrip(".")
    return [f"{base}.{alias.name}" for alias in node.names]


def imports(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Yields line and full name of everything that a file imports, wherever in the file."""
    for node in ast.walk(parse(path)):
        for name in modules_of(node, path):
            yield node.lineno, name


def inside_functions(path: pathlib.Path) -> set[int]:
    """Returns the lines that stand inside a function, and so do not run when the module is imported."""
    functions = [n for n in ast.walk(parse(path)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lines: set[int] = set()
    for function in functions:
        lines.update(range(function.body[0].lineno, (function.end_lineno or function.lineno) + 1))
    return lines


def for_type_checkers(path: pathlib.Path) -> set[int]:
    """Returns the lines under `if TYPE_CHECKING`, which never run."""
    lines: set[int] = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            lines.update(range(node.lineno, (node.body[-1].end_lineno or node.lineno) + 1))
    return lines


def own_imports(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Yields line and room (`methods.base.Sites`) of what a file imports from deptjax itself."""
    for line, name in imports(path):
        if name.startswith("deptjax."):
            yield line, name.removeprefix("deptjax.")


def at(path: pathlib.Path, line: int, what: str) -> str:
    """Returns one complaint."""
    return f"{path.relative_to(ROOT)}:{line}: {what}"


@functools.cache
def method_names() -> tuple[frozenset[str], frozenset[str]]:
    """Returns the class names and the registered kinds of all methods."""
    classes, kinds = set(), set()
    for path in FILES:
        for node in parse(path).body:
            registered = isinstance(node, ast.ClassDef) and any(
                ast.unparse(decorator).endswith("register_method") for decorator in node.decorator_list
            )
            if not registered:
                continue
            classes.add(node.name)
            for field in node.body:
                target = field.target if isinstance(field, ast.AnnAssign) else None
                target = field.targets[0] if isinstance(field, ast.Assign) else target
                if isinstance(target, ast.Name) and target.id == "kind" and isinstance(field.value, ast.Constant):
                    kinds.add(field.value.value)
    return frozenset(classes), frozenset(kinds)


def test_the_walk_sees_the_package() -> None:
    """A rule that reads no file holds of everything; so does one that knows no method."""
    assert {"errors", "methods.base", "methods.dept", "models.prompted"} <= {room(path) for path in FILES}
    classes, kinds = method_names()
    assert {"DePT", "PromptTuning", "LoRA", "FullFineTuning"} <= classes
    assert len(kinds) == len(classes)


def test_imports_run_one_way() -> None:
    wrong = []
    for path in FILES:
        here = rank(room(path))
        for line, name in own_imports(path):
            there = rank(name)
            if here is not None and there is not None and there > here:
                wrong.append(at(path, line, f"deptjax.{name} is above {room(path)}"))
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_an_entry_point() -> None:
    wrong = []
    for path in FILES:
        if not is_in(room(path), ENTRY_POINTS):
            # `train` is also a function, re-exported at the top: only a module of that name is an entry point.
            modules = [(line, name) for line, name in own_imports(path) if is_in(name, ENTRY_POINTS)]
            wrong += [at(path, line, f"deptjax.{name} is an entry point") for line, name in modules]
    assert not wrong, "\n".join(wrong)


def test_formats_and_data_know_no_method() -> None:
    wrong = []
    for path in FILES:
        if is_in(room(path), KNOW_NO_METHOD):
            wrong += [at(path, line, f"imports deptjax.{n}") for line, n in own_imports(path) if is_in(n, "methods")]
    assert not wrong, "\n".join(wrong)


def test_a_backbone_knows_sites_and_no_method() -> None:
    allowed = ("methods.base", "methods.initializers")
    wrong = []
    for path in FILES:
        if is_in(room(path), "models"):
            named = [(line, n) for line, n in own_imports(path) if is_in(n, "methods") and not is_in(n, allowed)]
            wrong += [at(path, line, f"imports deptjax.{n}") for line, n in named]
    assert not wrong, "\n".join(wrong)


def test_gin_and_flags_stay_at_the_edge() -> None:
    wrong = []
    for path in FILES:
        if not is_in(room(path), ENTRY_POINTS):
            wrong += [at(path, line, f"imports {n}") for line, n in imports(path) if is_in(n, FLAGS)]
    assert not wrong, "\n".join(wrong)


def test_heavy_libraries_are_imported_late_and_in_interop_only() -> None:
    wrong = []
    for path in FILES:
        for line, name in imports(path):
            if name.split(".")[0] not in HEAVY or line in for_type_checkers(path):
                continue
            if not is_in(room(path), LATE):
                wrong.append(at(path, line, f"imports {name} outside deptjax/interop"))
            elif line not in inside_functions(path):
                wrong.append(at(path, line, f"imports {name} when the module is loaded; move it into a function"))
    assert not wrong, "\n".join(wrong)


def test_libraries_of_extras_are_imported_when_used() -> None:
    wrong = []
    for path in FILES:
        for line, name in imports(path):
            if name.split(".")[0] in OPTIONAL and line not in inside_functions(path):
                wrong.append(at(path, line, f"imports {name} when the module is loaded; move it into a function"))
    assert not wrong, "\n".join(wrong)


def test_training_holds_functions_and_trees_only() -> None:
    wrong = []
    for path in FILES:
        if is_in(room(path), "training"):
            names = [(line, n) for line, n in imports(path) if is_in(n, ("flax.linen", "flax.nnx"))]
            wrong += [at(path, line, f"imports {n}") for line, n in names]
    assert not wrong, "\n".join(wrong)


def asks_which_method(node: ast.AST) -> bool:
    """Returns whether an expression compares with a method's class or kind."""
    classes, kinds = method_names()

    def names_one(part: ast.AST) -> bool:
        for leaf in ast.walk(part):
            if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str) and leaf.value in kinds:
                return True
            if (
                leaf.id if isinstance(leaf, ast.Name) else leaf.attr if isinstance(leaf, ast.Attribute) else ""
            ) in classes:
                return True
        return False

    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
        return any(names_one(argument) for argument in node.args[1:])
    if isinstance(node, ast.Compare):
        return any(names_one(part) for part in [node.left, *node.comparators])
    return isinstance(node, (ast.MatchValue, ast.MatchClass)) and names_one(node)


@pytest.mark.parametrize(
    ("code", "asks"),
    [
        ("isinstance(m, DePT)", True),
        ("isinstance(m, (int, methods.LoRA))", True),
        ("m.kind == 'dept'", True),
        ("type(m) is DePT", True),
        ("m.kind in ('lora', 'x')", True),
        ("match m:\n  case 'lora': pass", True),
        ("match m:\n  case DePT(): pass", True),
        ("isinstance(m, Method)", False),
        ("m.kind == other.kind", False),
        ("DePT(prompt_length=3)", False),
    ],
)
def test_the_question_is_recognised(code: str, asks: bool) -> None:
    assert any(asks_which_method(node) for node in ast.walk(ast.parse(code))) == asks


def test_no_file_but_a_methods_own_asks_which_method_it_is() -> None:
    wrong = []
    for path in FILES:
        if not is_in(room(path), "methods"):
            asked = [node for node in ast.walk(parse(path)) if asks_which_method(node)]
            wrong += [at(path, getattr(node, "lineno", 0), ast.unparse(node)) for node in asked]
    assert not wrong, "\n".join(wrong)


def test_files_are_short_and_have_a_name_that_says_something() -> None:
    wrong = []
    for path in [p for p in TEXTS if p.suffix == ".py"]:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_LINES:
            wrong.append(at(path, MAX_LINES, f"{lines} lines; split it"))
        if path.stem in ("util", "utils", "helpers", "misc", "common"):
            wrong.append(at(path, 1, "a name that says nothing of what is inside"))
    assert not wrong, "\n".join(wrong)


def test_no_unfinished_work_and_no_number_of_an_issue() -> None:
    pattern = re.compile(
        "|".join([r"\bTO" + r"DO\b", r"\bFIX" + r"ME\b", r"\bX" + r"XX\b", r"\bissues? #?\d+\b", r"\s#\d+\b"])
    )
    wrong = []
    for path in TEXTS:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if pattern.search(line):
                wrong.append(at(path, number, line.strip()))
    assert not wrong, "\n".join(wrong)


def is_protocol(node: ast.ClassDef) -> bool:
    """Returns whether a class is a `typing.Protocol`."""
    return any(ast.unparse(base).split("[")[0].endswith("Protocol") for base in node.bases)


def specified_names() -> set[str]:
    """Returns the documented methods of base classes and protocols: those who implement them need not repeat it."""
    names = {"setup"}  # Linen's
    for path in FILES:
        for node in parse(path).body:
            if isinstance(node, ast.ClassDef) and (is_protocol(node) or room(path).endswith(".base")):
                names |= {m.name for m in node.body if isinstance(m, ast.FunctionDef) and ast.get_docstring(m)}
    return names


def undocumented(path: pathlib.Path, specified: set[str]) -> Iterator[tuple[int, str]]:
    """Yields line and name of the public functions, classes and methods of a file that say nothing."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in parse(path).body:
        if not isinstance(node, (*functions, ast.ClassDef)) or node.name.startswith("_"):
            continue
        text = ast.get_docstring(node)
        if not text:
            yield node.lineno, node.name
        if not isinstance(node, ast.ClassDef):
            continue
        # A protocol may speak of its members in its own docstring.
        told = set(re.findall(r"\w+", text or "")) if is_protocol(node) else specified
        for member in node.body:
            if isinstance(member, functions) and not (
                member.name.startswith("_") or ast.get_docstring(member) or member.name in told
            ):
                yield member.lineno, f"{node.name}.{member.name}"


def test_every_public_name_says_what_it_does() -> None:
    specified = specified_names()
    wrong = [at(path, 1, "no module docstring") for path in FILES if not ast.get_docstring(parse(path))]
    wrong += [
        at(path, line, f"{name} has no docstring") for path in FILES for line, name in undocumented(path, specified)
    ]
    assert not wrong, "\n".join(wrong)
