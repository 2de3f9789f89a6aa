"""The plan of the package: every public name means one thing, functions stay small, the root stays short."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import bitalloy

ROOT = Path(bitalloy.__file__).parent
MODULES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
MOST_PARAMETERS, MOST_LINES, MOST_BRANCHES, MOST_ENTRIES = 7, 70, 25, 24
BRANCHES = (
    ast.If,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.IfExp,
    ast.ExceptHandler,
    ast.BoolOp,
    ast.comprehension,
    ast.match_case,
)
EXCEPTIONS: dict[str, str] = {
    "pipeline/run.py:run": "the command line in Python: every parameter is a decision of the user's, given by name",
}
"""Function, as `module:name` -> why it may pass the limits."""


def public_names(module: ast.Module) -> Iterator[str]:
    """The functions, classes and constants that a module defines at its top level without an underscore in front."""
    for statement in module.body:
        targets: list[ast.expr] = []
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names = [statement.name]
            case ast.Assign():
                targets, names = statement.targets, []
            case ast.AnnAssign():
                targets, names = [statement.target], []
            case _:
                continue
        names += [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
        yield from (name for name in names if not name.startswith("_"))


def functions(node: ast.AST, owner: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """All functions and methods of a module with their dotted names, those inside other functions as well."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = f"{owner}{child.name}"
            if not isinstance(child, ast.ClassDef):
                yield name, child
            yield from functions(child, f"{name}.")
        else:
            yield from functions(child, owner)


def over_limits(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Which limits a function passes, in words; empty where it keeps all of them."""
    given = function.args
    parameters = [p.arg for p in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg) if p]
    if parameters[:1] in (["self"], ["cls"]):
        del parameters[0]
    counts = (
        ("parameters", len(parameters), MOST_PARAMETERS),
        ("lines", (function.end_lineno or 0) - function.lineno + 1, MOST_LINES),
        ("branches", sum(isinstance(node, BRANCHES) for node in ast.walk(function)), MOST_BRANCHES),
    )
    return ", ".join(f"{count} {what}" for what, count, most in counts if count > most)


def test_a_public_name_is_defined_in_one_module() -> None:
    owners: dict[str, set[str]] = defaultdict(set)
    for path, module in MODULES.items():
        for name in public_names(module):
            owners[name].add(path)
    shared = {name: sorted(paths) for name, paths in sorted(owners.items()) if len(paths) > 1}
    assert not shared, "give each a name of its own, or define it once and import it"


@pytest.mark.parametrize("path", [path for path in MODULES if not path.startswith("adjoint/rules/")])
def test_functions_keep_the_limits(path: str) -> None:
    found = {f"{path}:{name}": over for name, node in functions(MODULES[path]) if (over := over_limits(node))}
    assert {name: over for name, over in found.items() if name not in EXCEPTIONS} == {}
    stale = [name for name in EXCEPTIONS if name.startswith(f"{path}:") and name not in found]
    assert not stale, "take what keeps the limits off the list"


def test_exceptions_name_existing_modules() -> None:
    assert {name.partition(":")[0] for name in EXCEPTIONS} <= MODULES.keys()


def test_the_root_of_the_package_is_short() -> None:
    entries = [entry.name for entry in ROOT.iterdir() if entry.name != "__pycache__"]
    assert len(entries) <= MOST_ENTRIES, sorted(entries)
