"""Schemes are data: outside a few rooms no module names one, so that a new one needs no change there."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import bitalloy

ROOT = Path(bitalloy.__file__).parent
KNOWING = {"formats", "targets", "cli", "report"}
"""Rooms whose business is to know schemes: how they are stored, who has them, and what people read."""
ALLOWED = {
    "core/outcome.py": "names of the columns of summary.json, which are stable",
    "core/schemes.py": "the name of the baseline",
    "core/summaries.py": "names of the first schema of summary.json",
}
NAMED = re.compile(
    r"(?<![A-Za-z.])(int8|fp8|fp16|fp32|bf16|INT8|FP8|FP16|FP32|Precision|HALF|AGAIN)(?![A-Za-z0-9_])|_int8|_fp16"
)


def documentation(module: ast.Module) -> set[int]:
    """Lines of strings that stand alone: docstrings of modules, classes, functions and fields."""
    return {
        line
        for node in ast.walk(module)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }


def test_no_other_module_names_a_scheme() -> None:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        text = path.read_text()
        silent = documentation(ast.parse(text))
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        spoken = [
            token.string
            for before, token in zip([None, *tokens], tokens, strict=False)
            if token.type in (tokenize.NAME, tokenize.STRING)
            and token.start[0] not in silent
            and NAMED.search(token.string)
            and (before is None or before.string != ".")  # np.int8, ir.DataType.INT8: types of memory, no schemes
        ]
        if spoken and name.split("/")[0] not in KNOWING:
            found[name] = spoken
    assert set(found) <= set(ALLOWED), found
