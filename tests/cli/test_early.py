"""What is wrong is refused before any stage, with the name that was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

METRICS = """
def right(session):
    return {"accuracy": 1.0}


def broken(session):
    return "much"
"""


@pytest.mark.parametrize(
    ("options", "meant"),
    [
        (("--target", "ort-cpuu"), "ort-cpu"),
        (("--target", "tensorrt", "--device", "h10"), "h100"),
        (("--keep", "fp23:x"), "fp32"),
        (("--schemes", "int9"), "int8"),
        (("--ranges", "minmx"), "minmax"),
        (("--effort", "quik"), "quick"),
        (("--max-drop-db", "boxs=20"), "boxes"),
        (("--eval", "{labels}", "--max-drop", "AP50-59=0.1"), "AP50-95"),
        (("--metric", "mine:right", "--max-drop", "acuracy=0.1"), "accuracy"),
    ],
)
def test_a_wrong_name_comes_with_the_right_one(inside: Any, inputs: Any, options: tuple[str, ...], meant: str) -> None:
    (inside.folder / "mine.py").write_text(METRICS)
    told = [option.format(labels=inputs.labels) for option in options]
    done = inside.run(inputs.detector, "--data", inputs.scenes, *told)
    assert f"Did you mean '{meant}'?" in done.refused()
    assert " steps" not in done.err  # no stage has ended
    assert not [file for file in inside.files() if file.startswith("cache/") and "/metrics-" not in file]


def test_a_metric_that_gives_no_number_is_refused_before_the_analysis(inside: Any, inputs: Any) -> None:
    (inside.folder / "mine.py").write_text(METRICS)
    done = inside.run(inputs.classifier, "--data", inputs.images, "--metric", "mine:broken")
    assert "'broken'" in done.refused() and " steps" not in done.err


@pytest.mark.parametrize("method", ["probe", "exact"])
def test_so_is_a_pattern_of_sensitivity(inside: Any, inputs: Any, method: str) -> None:
    words = ("--data", inputs.images, "--out", "run", "--units", "/nowhere/*", "--method", method)
    done = inside("sensitivity", inputs.classifier, *words)
    assert "/nowhere/*" in done.refused() and " steps" not in done.err


def test_what_the_metrics_are_is_asked_once(inside: Any, inputs: Any, tmp_path: Path) -> None:
    """The function of a session that measures a whole model is not executed again for the same run directory."""
    (inside.folder / "counting.py").write_text(
        "from pathlib import Path\n\ndef right(session):\n"
        f"    with Path({str(tmp_path / 'calls')!r}).open('a') as file:\n        file.write('x')\n    return 1.0\n"
    )
    for _ in range(2):
        inside.run(
            inputs.classifier, "--data", inputs.images, "--metric", "counting:right", "--max-drop", "oops=1"
        ).refused()
    assert (tmp_path / "calls").read_text() == "x"
