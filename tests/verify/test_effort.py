"""What `--effort` changes: how much is measured, and not what is promised."""

from __future__ import annotations

from typing import Any

import pytest

from bitalloy.cli.arguments import AnalysisArguments
from bitalloy.core.effort import EFFORTS, effort_named
from bitalloy.core.errors import BitalloyError


def test_more_effort_measures_at_least_as_much() -> None:
    quick, usual, thorough = EFFORTS.values()
    for less, more in ((quick, usual), (usual, thorough)):
        for name in less.__struct_fields__:
            if name != "name":
                assert getattr(less, name) <= getattr(more, name), name
    with pytest.raises(BitalloyError, match=r"'slow'.*quick, default, thorough"):
        effort_named("slow")

    given = [AnalysisArguments(), AnalysisArguments(probes=5)]
    assert [[a.settings(effort=name).probes for name in EFFORTS] for a in given] == [[4, 8, 16], [5, 5, 5]]


def test_a_quick_run_verifies_and_leaves_out_what_decides_nothing(inside: Any, inputs: Any) -> None:
    assert "quick, default, thorough" in inside.run(inputs.classifier, "--effort", "slow").refused()
    inside.run(inputs.classifier, "--data", inputs.images, *inside.REACHABLE, "--effort", "quick").succeeded()
    summary = inside.summary()
    assert [r["repair"] for r in summary["rounds"] if r["source"] != "single"] == [None]
    assert summary["peak_memory_mb"] is None and summary["kernel_effects"] is None
    assert not {"neighbours", "confirm", "memory", "kernels"} & {s for s, t in summary["seconds"].items() if t}
    assert [limit["kind"] for limit in summary["status"]["limits"]] == ["size_bytes"]
