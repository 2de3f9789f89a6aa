"""Mutants of the source: small faults put into one module at a time, which the tests that serve it must catch.

    python -m tests.mutants                                  all modules of `SERVED`, 100 mutants of each
    python -m tests.mutants formats/affine --count 0         all mutants of one module
    python -m tests.mutants search/moves --only 17 --only 40

The mutants are those of Cosmic Ray (https://cosmic-ray.readthedocs.io, dependency group `mutation`): another operator,
another comparison, a number one larger or smaller, a condition negated, a loop that never runs, a decorator removed.
Those that change annotations alone, marks between parameters, or `is` to `==`, are left out. Where a module has more
than `--count`, a sample is drawn by `--seed`.

Each mutant runs in a forked child, in which the import of the module gives the mutated code; nothing on the disk is
changed. Tests that reach the mutated line run first to last by how long they take, and the first that fails ends it. A
mutant that takes much longer than the tests did without it counts as caught. Processes that tests start do not see it.
"""

from __future__ import annotations

import argparse
import ast
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

import pytest
from hypothesis import Phase, settings

ROOT = Path(__file__).parents[1]
SERVED: Mapping[str, tuple[str, ...]] = {
    "formats/affine": ("formats/test_affine.py", "formats/test_formats.py"),
    "core/status": ("verify/test_status.py",),
    "verify/status": ("verify/test_status.py",),
    "targets/placement": ("targets/test_sites.py",),
    "targets/recipe": ("targets/test_stored.py",),
    "targets/pairs": ("targets/test_stored.py",),
    "sensitivity/matrix": ("sensitivity/test_matrix.py", "sensitivity/test_coverage.py"),
    "search/choice": (
        "search/test_choice.py",
        "search/test_constraints.py::test_reasons_quote_the_table_and_say_what_stands_against_a_unit",
    ),
    "search/program": (
        "search/test_choice.py",
        "search/test_drawn_graphs.py",
        "search/test_precisions.py",
        "search/test_search.py::test_the_program_is_optimal_within_its_gap",
        "search/test_search.py::test_a_limit_of_the_solver_is_said",
    ),
    "search/moves": (
        "search/test_drawn_graphs.py",
        "search/test_search.py::test_moves_are_what_each_plan_gives_by_itself",
    ),
    "tasks/bootstrap": ("tasks/test_bootstrap.py",),
    "measure/cost": ("measure/test_cost.py",),
    "measure/bench": ("measure/test_bench.py",),
    "core/store": ("core/test_store.py",),
    "core/encoding": ("core/test_encoding.py",),
    "formats/float16": ("formats/test_float16.py",),
}
"""Module of the package -> the files of tests that must catch its mutants."""
SAME = ("_Is_Eq", "_IsNot_NotEq")
"""Operators of Cosmic Ray that are left out: the sides of every `is` are None, or members of one enumeration."""
PRELOADED = (
    *(
        "msgspec",
        "numpy",
        "onnx",
        "onnx_ir.passes.common",
        "onnxruntime",
        "PIL.Image",
        "pycocotools.coco",
        "rich.console",
    ),
    *("scipy.optimize", "scipy.stats", "typer"),
)
"""What every child needs, imported once; none of it starts threads, which a fork would lose."""


@dataclass(frozen=True)
class Mutant:
    """A fault, by its place in the list of all of its module."""

    number: int
    operator: str
    line: int
    text: str
    """The mutated line as it was, and as it is now."""
    code: str
    """The mutated module."""


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("modules", nargs="*", help="modules as in the table; all where none is given")
    parser.add_argument("--count", type=int, default=100, help="mutants of each module; 0 for all")
    parser.add_argument("--seed", type=int, default=0, help="draws the sample")
    parser.add_argument("--only", type=int, action="append", help="number of a mutant")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    unknown = set(arguments.modules) - SERVED.keys()
    if unknown:
        parser.error(f"no tests are named for {', '.join(sorted(unknown))}; the modules are {', '.join(SERVED)}")
    for name in PRELOADED:
        importlib.import_module(name)
    print(
        "| module | mutants | tried | caught | survived | share | seconds |\n|---|---|---|---|---|---|---|", flush=True
    )
    for module in arguments.modules or SERVED:
        print(_run(module, arguments), flush=True)


def _run(module: str, arguments: argparse.Namespace) -> str:
    """Try the mutants of a module, print those that no test caught, and return its row of the table."""
    start = time.monotonic()
    path = ROOT / "src/bitalloy" / f"{module}.py"
    source = path.read_text()
    found = _places(source)
    chosen = list(_valid(source, found, arguments))
    reached = _in_child(lambda report: _trace(module, report))
    if reached["code"] != 0:
        raise SystemExit(f"The tests of {module} fail without a mutant:\n{reached['output']}")
    limit = 30 + 5 * reached["seconds"]

    def caught(mutant: Mutant) -> bool:
        tests = _reaching(source, mutant.line, reached)
        if not tests:
            return False
        return bool(_in_child(lambda report: _try(module, mutant, tests, report), limit)["code"])

    gone = 0
    with ThreadPoolExecutor(arguments.workers) as pool:
        for mutant, ended in zip(chosen, pool.map(caught, chosen), strict=True):
            gone += ended
            if not ended:
                print(f"    {module}:{mutant.line} #{mutant.number} {mutant.operator}: {mutant.text}", flush=True)
    left, seconds = len(chosen) - gone, time.monotonic() - start
    share = f"{gone / max(len(chosen), 1):.0%}"
    return f"| {module} | {len(found)} | {len(chosen)} | {gone} | {left} | {share} | {seconds:.0f} |"


def _places(source: str) -> list[tuple[str, int]]:
    """List all mutants of a source as operator and occurrence, in the order of Cosmic Ray."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    nodes = list(ast_nodes(get_ast(source)))
    found = []
    for name in sorted(operator_names()):
        if not get_operator(name).arguments() and not name.endswith(SAME):  # those that have arguments need them
            operator = get_operator(name)()
            count = sum(len(list(operator.mutation_positions(node))) for node in nodes)
            found += [(name, occurrence) for occurrence in range(count)]
    return found


def _valid(source: str, places: Sequence[tuple[str, int]], arguments: argparse.Namespace) -> Iterator[Mutant]:
    """Make the mutants to try: those that compile and change more than annotations, in an order drawn by seed."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    order = list(range(len(places)))
    random.Random(arguments.seed).shuffle(order)
    same, before, left = _meaning(source), source.splitlines(), arguments.count or len(places)
    for number in arguments.only or order:
        name, occurrence = places[number]
        code = mutate_code(source, get_operator(name)(), occurrence)
        meaning = None if code is None else _meaning(code)
        if left == 0:
            return
        if code is None or meaning is None or meaning == same:
            continue
        left -= 1
        after = code.splitlines()
        line = next(i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b)
        text = f"{before[line].strip()}  ->  {after[line].strip()}"
        yield Mutant(number, name.removeprefix("core/"), line + 1, text, code)


def _meaning(source: str) -> str | None:
    """Dump the syntax tree without annotations, and the marks `*` and `/` between parameters; None for no Python."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef():
                node.returns = None
            case ast.arg():
                node.annotation = None
            case ast.arguments():
                node.args, node.posonlyargs, node.kwonlyargs = [*node.posonlyargs, *node.args, *node.kwonlyargs], [], []
                node.defaults, node.kw_defaults = [*node.defaults, *filter(None, node.kw_defaults)], []
            case ast.AnnAssign():
                node.annotation = ast.Constant("")
    return ast.dump(tree)


def _reaching(source: str, line: int, reached: Mapping[str, Any]) -> list[str]:
    """List the tests that ran the statement of a line, the fastest first; all of them where imports run it."""
    inside, first, last = False, 1, len(source.splitlines())
    waiting: list[tuple[ast.AST, bool]] = [(ast.parse(source), False)]
    while waiting:
        node, within = waiting.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.stmt, ast.ExceptHandler)) and child.lineno <= line <= (child.end_lineno or 0):
                body = getattr(child, "body", None)
                inside, first, last = within, child.lineno, child.end_lineno or child.lineno
                if isinstance(body, list) and body[0].lineno > line:
                    last = max(body[0].lineno - 1, child.lineno)
                waiting.append((child, within or isinstance(child, ast.FunctionDef)))
            elif isinstance(child, ast.match_case):
                waiting.append((child, within))
    seconds: dict[str, float] = reached["tests"]
    wanted = set(range(first, last + 1))
    chosen = [test for test in seconds if (wanted.intersection(reached["lines"][test]) if inside else True)]
    return sorted(chosen, key=lambda test: seconds[test])


class _Tracer:
    """A plugin of pytest that notes which lines of a file each test and its fixtures run, and how long it takes."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.now: set[int] = set()
        self.lines: dict[str, set[int]] = {}
        self.seconds: dict[str, float] = {}
        self.fixtures: dict[str, set[int]] = defaultdict(set)

    def __call__(self, frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename != self.path:
            return None
        if event == "line":
            self.now.add(frame.f_lineno)
        return self

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Any:
        outer, self.now = self.now, set()
        try:
            return (yield)
        finally:
            self.fixtures[fixturedef.argname] |= self.now
            self.now |= outer

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.now = set()
        start = time.monotonic()
        sys.settrace(self)
        threading.settrace(self)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            self.seconds[item.nodeid] = time.monotonic() - start
            self.lines[item.nodeid] = self.now.union(*(self.fixtures[f] for f in getattr(item, "fixturenames", ())))


class _Chosen:
    """A plugin of pytest that runs some tests, in their order; drawn examples that fail are not made smaller."""

    def __init__(self, tests: Sequence[str] | None = None) -> None:
        self.tests = tests

    def pytest_sessionstart(self) -> None:
        settings.register_profile("mutants", settings(), phases=(Phase.explicit, Phase.generate))
        settings.load_profile("mutants")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.tests is not None:
            known = {item.nodeid: item for item in items}
            items[:] = [known[test] for test in self.tests if test in known] or items


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a module from code in memory."""

    code: str

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = compile(self.code, self.path, "exec", dont_inherit=True)
        return code


class _Mutated(importlib.abc.MetaPathFinder):
    """Finds one module, which is then imported from mutated code."""

    def __init__(self, module: str, code: str) -> None:
        self.name = "bitalloy." + module.replace("/", ".")
        self.loader = _Loader(self.name, str(ROOT / "src/bitalloy" / f"{module}.py"))
        self.loader.code = code

    def find_spec(self, fullname: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(self.name, self.loader.path, loader=self.loader)


def _pytest(module: str, *plugins: object, options: Sequence[str] = ()) -> int:
    files = [f"tests/{name}" for name in SERVED[module]]
    usual = (
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--tb=short",
        "-W",
        "ignore::pytest.PytestAssertRewriteWarning",
    )
    return int(pytest.main([*files, *usual, *options], plugins=list(plugins)))


def _trace(module: str, report: Path) -> None:
    tracer = _Tracer(ROOT / "src/bitalloy" / f"{module}.py")
    start = time.monotonic()
    code = _pytest(module, _Chosen(), tracer)
    seconds = time.monotonic() - start
    lines = {test: sorted(found) for test, found in tracer.lines.items()}
    report.write_text(json.dumps({"code": code, "seconds": seconds, "lines": lines, "tests": tracer.seconds}))


def _try(module: str, mutant: Mutant, tests: Sequence[str], report: Path) -> None:
    sys.meta_path.insert(0, _Mutated(module, mutant.code))
    report.write_text(json.dumps({"code": _pytest(module, _Chosen(tests), options=["-x"])}))


def _in_child(work: Callable[[Path], None], limit: float = 600) -> dict[str, Any]:
    """Run work in a forked child and return what it reports, with its output; code -1 where it dies or takes long."""
    with tempfile.TemporaryDirectory(prefix="bitalloy-mutant-") as name:
        report, shown = Path(name) / "report.json", Path(name) / "output"
        child = os.fork()
        if child == 0:
            try:
                os.setsid()
                os.environ["TMPDIR"] = tempfile.tempdir = name
                at = os.open(shown, os.O_WRONLY | os.O_CREAT)
                os.dup2(at, 1)
                os.dup2(at, 2)
                work(report)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)
        end = time.monotonic() + limit
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return {"code": -1, "output": f"killed after {limit:.0f} s"}
            time.sleep(0.02)
        found: dict[str, Any] = json.loads(report.read_text()) if report.exists() else {"code": -1}
        return {**found, "output": shown.read_text(errors="replace")}


if __name__ == "__main__":
    main()
