"""What each numbered case of a target becomes, compared with text that was read by people.

BITALLOY_GOLDEN=write writes the files again; read the difference before it is committed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from bitalloy.targets import TARGETS

GOLDEN = Path(__file__).parent / "golden"


def test_case_becomes_its_golden_graph(rewrite, as_text, name: str, case: str) -> None:
    path = GOLDEN / f"{name}-{case}.txt"
    found = as_text(rewrite(name, case))
    if os.environ.get("BITALLOY_GOLDEN") == "write":
        path.write_text(found)
    assert found == path.read_text()


def test_every_numbered_case_has_a_golden_graph() -> None:
    """Of the targets that have files at all."""
    files = [p.stem for p in GOLDEN.glob("*.txt")]
    for name in {n for n in TARGETS for f in files if f.startswith(f"{n}-case")}:
        module = __import__(f"bitalloy.targets.{name.replace('-', '_')}", fromlist=["__doc__"])
        numbers = set(re.findall(r"^Case (\d+)\.", str(module.__doc__), re.MULTILINE))
        assert numbers == {m.group(1) for f in files if (m := re.match(rf"{name}-case(\d+)-", f))}


def test_integer_kernels_are_known_by_what_they_work_on(rewrite, tmp_path: Path) -> None:
    """A QLinearConcat names its scale first, which is a float."""
    session = rewrite("ort-cpu", "case4-kernels").artefact.session(profile=tmp_path / "profile")
    session.run(rewrite("ort-cpu", "case4-kernels").feeds)
    found = {k.op: k.precision for k in session.kernels() if k.op.startswith("QLinear")}
    assert {"QLinearConv", "QLinearAdd", "QLinearConcat", "QLinearAveragePool"} <= set(found)
    assert set(found.values()) == {"int8"}
