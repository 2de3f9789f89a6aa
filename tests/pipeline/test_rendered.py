"""`report`: the page of a finished run again from its files, and several runs side by side."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.test_check import around, stored

import bitalloy
from bitalloy.core.errors import BitalloyError, RunDirectoryError

QUICK = ("--samples", "4", "--probes", "4", "--calibration-samples", "4", "--effort", "quick")


@pytest.fixture(scope="module")
def finished(inputs: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A detector with labels on two targets, one of which cannot run on this machine."""
    process = inputs.command_line(tmp_path_factory.mktemp("rendered"))
    targets = ("--target", "ort-cpu,tensorrt")
    process.run(inputs.detector, "--data", inputs.scenes, "--eval", inputs.labels, *QUICK, *targets).succeeded()
    return process


def test_the_page_is_the_one_that_the_run_wrote(finished: Any) -> None:
    """With examples, an audit, and another target; and once more in that target's folder, which has none of them."""
    for folder in ("run", "run/tensorrt"):
        page = finished.folder / folder / "report.html"
        before = page.read_bytes()
        page.unlink()
        assert f"Report: {folder}/report.html" in finished("report", folder).succeeded().out
        assert page.read_bytes() == before
        rows = re.findall(r"<tr.*?</tr>", before.decode().split("plans as a table")[1].split("</table>")[0], re.DOTALL)
        assert len(rows) > 1 and len({len(re.findall("<t[hd][ >]", row)) for row in rows}) == 1, "a cell per header"
    assert finished.summary()["others"] == ["tensorrt"]
    assert json.loads((finished.folder / "run/tensorrt/summary.json").read_text())["others"] == []


def test_what_an_earlier_run_left_is_not_shown_as_of_this_one(inputs: Any, finished: Any) -> None:
    """The same folder, now for the target that nothing here can execute: it has no audit and no other target."""
    assert (finished.folder / "run" / "audit.json").is_file()
    finished.run(inputs.detector, "--data", inputs.scenes, *QUICK, "--target", "tensorrt").succeeded()
    assert not (finished.folder / "run" / "audit.json").exists()
    before = (finished.folder / "run" / "report.html").read_bytes()
    finished("report", "run").succeeded()
    assert (finished.folder / "run" / "report.html").read_bytes() == before
    assert b'id="targets"' not in before


def test_runs_stand_side_by_side_with_what_differs_beyond_noise(tmp_path: Path, inputs: Any) -> None:
    base = stored(tmp_path, "base", latency_ratio=0.8, latency_ratio_interval=around(0.8, 0.01))
    (base / "report.html").write_text("x")
    stored(tmp_path, "faster", latency_ratio=0.6, latency_ratio_interval=around(0.6, 0.01), target="openvino-cpu")
    stored(tmp_path, "<b>noisy", latency_ratio=0.79, latency_ratio_interval=around(0.79, 0.2))
    process = inputs.command_line(tmp_path)
    shown = process("report", "base", "faster", "<b>noisy", "--out", "pages/all.html").succeeded().out
    assert "Report: pages/all.html" in shown
    page = (tmp_path / "pages" / "all.html").read_text()
    assert '<a href="../base/report.html">base</a>' in page and "faster/report.html" not in page
    assert "<b>" not in page and "&lt;b&gt;noisy" in page
    assert "<script" not in page and "http" not in page.replace("http-equiv", "").replace("Content", "")
    beside = {part.split(" beside ")[0]: part for part in page.split("<h2>")[1:]}
    latency = {name: part.split("latency over float")[1].split("</tr>")[0] for name, part in beside.items()}
    assert "better" in latency["faster"] and "within noise" in latency["&lt;b&gt;noisy"]
    assert "for different targets" in beside["faster"] and "for different targets" not in beside["&lt;b&gt;noisy"]


def test_the_chart_puts_runs_where_their_numbers_are(tmp_path: Path) -> None:
    """Positions are on one straight scale, and an interval lies around its point."""
    ratios = {"a": 0.5, "b": 0.75, "c": 1.0}
    runs = [
        stored(tmp_path, name, latency_ratio=ratio, latency_ratio_interval=around(ratio, 0.05))
        for name, ratio in ratios.items()
    ]
    page = bitalloy.write_report(runs, tmp_path / "page.html").read_text()
    chart = page.split("<figcaption>Latency over float</figcaption>")[1].split("</svg>")[0]
    x = [float(part.split('"')[0]) for part in chart.split('cx="')[1:]]
    low = [float(part.split('"')[0]) for part in chart.split("<g>")[1:] for part in part.split('x1="')[1:]]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2) and x[0] < x[1]
    assert x[0] - low[0] == pytest.approx((x[1] - x[0]) / 5, abs=0.2)


def test_what_cannot_be_shown_is_refused(tmp_path: Path, inputs: Any) -> None:
    run = stored(tmp_path, "run")
    with pytest.raises(RunDirectoryError, match="no finished run"):
        bitalloy.write_report([tmp_path / "absent"])
    assert not (tmp_path / "absent").exists()
    with pytest.raises(BitalloyError, match="two or more different runs"):
        bitalloy.write_report([run, run], tmp_path / "page.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(BitalloyError, match="Give another --out"):
        bitalloy.write_report([run, stored(tmp_path, "other")], tmp_path / "file" / "page.html")
    damaged = stored(tmp_path, "damaged")
    (damaged / "plan.json").write_bytes(b"{")
    assert "finished `bitalloy run`" in inputs.command_line(tmp_path)("report", "damaged", "--out", "p.html").refused()
    assert not (tmp_path / "p.html").exists() and not (tmp_path / "page.html").exists()
