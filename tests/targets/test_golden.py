"""What each numbered case of a target becomes, compared with text that was read by people.

BITALLOY_GOLDEN=write writes the files again; read the difference before it is committed.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.targets.conftest import CASES, PAIR_LIMIT, Rewrite, Rewritten

from bitalloy.model.read import constant
from bitalloy.targets import TARGETS

Text = Callable[[Rewritten], str]
GOLDEN = Path(__file__).parent / "golden"


def test_case_becomes_its_golden_graph(rewrite: Rewrite, as_text: Text, name: str, case: str) -> None:
    path = GOLDEN / f"{name}-{case}.txt"
    found = as_text(rewrite(name, case))
    if os.environ.get("BITALLOY_GOLDEN") == "write":
        path.write_text(found)
    assert found == path.read_text()


@pytest.mark.parametrize("device", TARGETS)
def test_every_numbered_case_has_a_golden_graph(device: str) -> None:
    module = importlib.import_module(f"bitalloy.targets.{device.replace('-', '_')}")
    numbers = set(re.findall(r"^Case (\d+)\.", str(module.__doc__), re.MULTILINE))
    files = [p.stem for p in GOLDEN.glob("*.txt")]
    assert numbers and numbers == {m.group(1) for f in files if (m := re.match(rf"{device}-case(\d+)-", f))}


def test_every_golden_graph_has_a_case() -> None:
    assert {p.stem for p in GOLDEN.glob("*.txt")} == {f"{name}-{case}" for name in CASES for case in CASES[name]}


@pytest.mark.parametrize(("device", "numbered"), [(n, c) for n in PAIR_LIMIT for c in CASES[n]])
def test_without_a_pair_limit_only_constants_change(
    rewrite: Rewrite, as_text: Text, device: str, numbered: str
) -> None:
    """Such as those of a processor with VNNI: the same nodes round, and every channel uses the whole of INT8."""
    free = rewrite.limited(device, numbered, None)
    assert without_constants(as_text(free)) == without_constants((GOLDEN / f"{device}-{numbered}.txt").read_text())
    for node in (n for n in free.model.graph if n.op_type == "DequantizeLinear"):
        stored = constant(node.inputs[0])
        if stored is not None and stored.dtype == np.int8 and "block_size" not in node.attributes:
            axis = node.attributes["axis"].as_int()
            rows = np.abs(np.moveaxis(stored, axis, 0).astype(int)).reshape(stored.shape[axis], -1)
            assert (rows.max(axis=1) == 127).all()


def without_constants(text: str) -> str:
    return re.sub(r"(\w+\[[\d, ]*\]) [^,)]*", r"\1", text)


def test_integer_kernels_are_known_by_what_they_work_on(rewrite: Rewrite, tmp_path: Path) -> None:
    """A QLinearConcat names its scale first, which is a float."""
    session = rewrite("ort-cpu", "case4-kernels").artefact.session(profile=tmp_path / "profile")
    session.run(rewrite("ort-cpu", "case4-kernels").feeds)
    found = {k.op: k.precision for k in session.kernels() if k.op.startswith("QLinear")}
    assert {"QLinearConv", "QLinearAdd", "QLinearConcat", "QLinearAveragePool"} <= set(found)
    assert set(found.values()) == {"int8"}
