"""Whole runs on tiny models: what they leave behind, and that a killed or starved one goes on where it stopped."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from bitalloy.core.examples import Examples
from bitalloy.core.outcome import Summary
from bitalloy.core.summaries import OLD_COUNTS
from bitalloy.runtime.ort import OrtSession

RESULTS = {
    "audit.json", "calibration.json", "cost.json", "mixed.onnx", "plan.json", "planning.json",
    "planning.npz", "probe_matrix.npz", "report.html", "sensitivity.csv", "sensitivity.json", "summary.json",
    "units.json",
}  # fmt: skip
SHOWN = {"examples.json"}
"""Result of a run whose model has a task that was evaluated."""
SUMMARY = {
    "schema", "headline", "status", "model", "model_sha256", "target", "device", "threads", "budget", "latency_ms",
    "latency_ratio", "predicted_latency_ratio", "latency_spread_ms", "size_bytes", "sqnr_db", "sqnr_interval_db",
    "metrics", "confidence_shift", "units", "schemes", "int8_units", "samples", "probes", "settled", "flagged_units",
    "fp16_margin", "calibration", "analysis", "seconds", "rounds", "evaluations", "seed",
    "versions", "notes", "parts", "peak_memory_mb", "rewritten_latency_ratio",
}  # fmt: skip
"""Names of summary.json: others read it, so one may be added, none removed or renamed."""
SEEDED = ("calibration.json", "sensitivity.json", "sensitivity.csv", "probe_matrix.npz", "units.json")
"""Results that the seed decides; the others hold measured times."""
STAGES = ("calibrate", "probe", "secant", "cost", "search", "verify", "front", "evaluate")

KILLED = """
import os, signal
from bitalloy.cli.main import main
from bitalloy.core import progress

class Killer(progress.Shown):
    def start(self, stage, total):
        super().start(stage, total)
        self.stage = stage

    def advance(self, steps=1):
        super().advance(steps)
        if self.stage == {stage!r}:
            os.kill(os.getpid(), signal.SIGKILL)

progress.Shown = Killer
main()
"""
"""The command line that kills itself after the first step of a stage."""

KILLED_WRITING = """
import os, pathlib, signal
from bitalloy.cli.main import main

replace = pathlib.Path.replace

def die(self, target):
    if target.name == {name!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)

pathlib.Path.replace = die
main()
"""
"""The command line that kills itself when a file is written, but not yet in its place."""

LIMITED = """
import resource
from bitalloy.cli.main import main
from bitalloy.core import progress

class Limiter(progress.Shown):
    def start(self, stage, total):
        super().start(stage, total)
        if stage == "verify":
            resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))

progress.Shown = Limiter
main()
"""
"""The command line that can write no file larger than a limit from a stage on: what a quota does."""


@pytest.fixture(scope="module")
def finished(inputs: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An uninterrupted run of the detector, with labels."""
    line = inputs.command_line(tmp_path_factory.mktemp("finished"))
    line.command = detect(line, inputs)
    return line


def detect(line: Any, inputs: Any, *more: object) -> Any:
    return line.run(inputs.detector, "--data", inputs.scenes, "--eval", inputs.labels, *line.REACHABLE, *more)


# -- results -----------------------------------------------------------------------------------------


def test_run_directory_holds_all_results(finished: Any) -> None:
    assert finished.command.succeeded()
    assert finished.results() == RESULTS | SHOWN


def test_report_shows_the_images_on_which_the_models_differ_most(finished: Any, inputs: Any) -> None:
    folder = finished.folder / "run"
    shown = msgspec.json.decode((folder / "examples.json").read_bytes(), type=Examples)
    names = {image["file_name"] for image in json.loads(inputs.labels.read_text())["images"]}
    assert shown.task == "detection" and shown.samples <= len(names)
    assert {one.name for one in shown.worst} <= {Path(name).name for name in names}
    assert [one.agreement for one in shown.worst] == sorted(one.agreement for one in shown.worst)
    page = (folder / "report.html").read_text()
    for one in shown.worst:
        assert base64.b64encode(one.reference).decode() in page and base64.b64encode(one.mixed).decode() in page


def test_summary_has_its_documented_names(finished: Any) -> None:
    summary = finished.summary()
    assert set(summary) >= SUMMARY
    assert set(summary) == {*Summary.__struct_encode_fields__, *OLD_COUNTS}
    page = (Path(__file__).parents[2] / "docs/reference/summary.md").read_text()
    assert [name for name in summary if f"| `{name}`" not in page] == []


def test_summary_speaks_of_this_run(finished: Any, inputs: Any) -> None:
    summary = finished.summary()
    assert summary["model"] == "detector" and summary["target"] == "ort-cpu" and summary["seed"] == 0
    for name in ("latency_ms", "size_bytes"):
        assert set(summary[name]) == {"float", "int8", "single", "mixed", "rewritten"}
        assert summary[name].pop("single") is None, "with one scheme the lowest model is it"
        assert min(summary[name].values()) > 0
    assert summary["size_bytes"]["mixed"] == (finished.folder / "run" / "mixed.onnx").stat().st_size
    interval = summary["latency_ratio_interval"]
    assert 0 < interval["low"] <= interval["value"] == summary["latency_ratio"] <= interval["high"]
    assert set(summary["sqnr_db"]) == set(summary["sqnr_interval_db"]) == {"boxes", "scores", "detections"}
    assert set(summary["kl_nats"]) == {"scores"}
    for pair in (*summary["sqnr_db"].values(), *summary["kl_nats"].values()):
        assert set(pair) == {"int8", "single", "mixed", "rewritten"} and set(pair["mixed"]) == {
            "predicted",
            "measured",
            "corrected",
        }
    assert all(pair["rewritten"]["measured"] > 100 for pair in summary["sqnr_db"].values()), "it rounds nothing"
    assert 0 < summary["rewritten_latency_ratio"]["value"] < 10
    assert 0 < summary["kl_nats"]["scores"]["int8"]["measured"] < 100
    assert all(len(r["sqnr_db"]) == 3 for r in summary["rounds"])
    table = json.loads((finished.folder / "run" / "sensitivity.json").read_text())
    assert {r["head"] for r in table["rows"]} == {"boxes", "scores", "detections", "scores KL"}
    assert set(summary["metrics"]) == {"AP50-95", "AP50", "agreement"}
    assert summary["metrics"]["AP50-95"]["float"]["n"] == 8
    assert 0 < summary["int8_units"] == summary["schemes"]["int8"] <= summary["units"]
    assert summary["samples"] == 8 and summary["calibration"]["count"] == 8
    of_timing = (
        "The machine",
        "The plan was chosen at",
        "All that is saved comes without",
        "of the time that the mixed model saves",
    )
    notes = [n for n in summary["notes"] if not any(part in n for part in of_timing)]
    assert notes == ["Intervals rest on 8 images only and are rough."]
    memory = summary["peak_memory_mb"]
    assert 20 < memory["process"] < min(memory["float"], memory["int8"], memory["mixed"])
    assert set(summary["seconds"]) >= {"calibration", "probe", "cost", "plan", "verify", "evaluate", "kernels"}
    assert summary["kernel_effects"] == []


def test_headline_and_status_are_honest(finished: Any, inputs: Any) -> None:
    summary = finished.summary()
    assert summary["headline"] in finished.command.out
    same = not summary["schemes"]
    slow = summary["latency_ratio_interval"]["low"] >= 1
    assert ("NOT faster" in summary["headline"]) == (slow or same)
    assert summary["status"]["verdict"] == "met" and "\nStatus: met\n" in finished.command.out
    (limit,) = summary["status"]["limits"]
    assert (limit["kind"], limit["verdict"], limit["got"]) == ("size_bytes", "met", summary["size_bytes"]["mixed"])
    share = summary["size_bytes"]["mixed"] / inputs.detector.stat().st_size
    assert f"{share:.2f}x of the given file's size" in summary["headline"]


def test_tables_agree_with_the_summary(finished: Any) -> None:
    summary = finished.summary()
    plan, table = (json.loads((finished.folder / "run" / f"{n}.json").read_text()) for n in ("plan", "sensitivity"))
    chosen = [c for c in plan["choices"] if c["scheme"] == "int8"]
    assert len(chosen) == summary["int8_units"] == summary["schemes"].get("int8", 0)
    assert all(c["reason"] for c in plan["choices"])
    assert plan["model_sha256"] == table["model_sha256"] == summary["model_sha256"]
    assert plan["budget"] == summary["budget"]
    rows = (finished.folder / "run" / "sensitivity.csv").read_text().splitlines()
    assert len(rows) == len(table["rows"]) + 1


def interface(path: Path) -> list[list[tuple[str, str, list[int]]]]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [[(v.name, v.type, v.shape) for v in side] for side in (session.get_inputs(), session.get_outputs())]


def check_mixed(float_model: Path, mixed: Path, feeds: dict[str, np.ndarray], least_db: float) -> None:
    """The shipped file runs wherever the float one did, and does the same up to rounding."""
    model = onnx.load(mixed)
    onnx.checker.check_model(model, full_check=True)
    assert "QuantizeLinear" in {n.op_type for n in model.graph.node}
    assert {o.domain for o in model.opset_import} <= {"", "ai.onnx"}
    assert interface(mixed) == interface(float_model)
    exact, found = (OrtSession(path, threads=1).run(feeds) for path in (float_model, mixed))
    for name, value in exact.items():
        noise = float(np.square(found[name] - value).sum())
        assert 10 * np.log10(np.square(value).sum() / noise) > least_db


def test_mixed_detector_keeps_its_interface(finished: Any, inputs: Any) -> None:
    feeds = {"images": np.random.default_rng(5).random((1, 3, 64, 64), np.float32)}
    check_mixed(inputs.detector, finished.folder / "run" / "mixed.onnx", feeds, 20)


def test_two_inputs_fed_from_arrays(inside: Any, inputs: Any) -> None:
    inside.run(inputs.two_inputs, "--data", inputs.feeds, "--schemes", "int8", *inside.REACHABLE).succeeded()
    assert inside.results() == RESULTS
    random = np.random.default_rng(6)
    feeds = {name: random.standard_normal((1, 16)).astype(np.float32) for name in ("left", "right")}
    check_mixed(inputs.two_inputs, inside.folder / "run" / "mixed.onnx", feeds, 20)


def test_channels_last(inside: Any, inputs: Any) -> None:
    inside.run(inputs.channels_last, "--data", inputs.images, *inside.REACHABLE).succeeded()
    assert "24x32 (height x width)" in inside.summary()["calibration"]["preprocessing"]
    feeds = {"pixels": np.random.default_rng(6).standard_normal((1, 24, 32, 3)).astype(np.float32)}
    check_mixed(inputs.channels_last, inside.folder / "run" / "mixed.onnx", feeds, 20)


def test_the_embedded_sample_serves_where_no_data_is_given(inside: Any, inputs: Any) -> None:
    """And the results say so."""
    inside.run(inputs.classifier, *inside.REACHABLE).succeeded()
    summary = inside.summary()
    assert any("embedded sample" in note for note in summary["notes"])
    assert "embedded sample" in (inside.folder / "run" / "report.html").read_text()


def test_excluded_nodes_stay_in_float(inside: Any, inputs: Any) -> None:
    inside.run(inputs.classifier, "--data", inputs.images, "--exclude", "Conv", "--max-drop-db", "5").succeeded()
    mixed = onnx.load(inside.folder / "run" / "mixed.onnx")
    made_by = {o: n.op_type for n in mixed.graph.node for o in n.output}
    convolutions = [n for n in mixed.graph.node if n.op_type == "Conv"]
    assert len(convolutions) == 3
    assert not [n.name for n in convolutions if made_by.get(n.input[1]) == "DequantizeLinear"]


def test_input_files_are_not_changed(finished: Any, inputs: Any) -> None:
    """Nothing is written beside the model or the data."""
    assert finished.command.succeeded()
    assert {p.name for p in inputs.folder.iterdir()} == {
        "classifier.onnx", "two_inputs.onnx", "channels_last.onnx", "detector.onnx", "images", "feeds", "scenes",
        "labelled",
    }  # fmt: skip
    assert {p.name for p in inputs.scenes.iterdir()} == {f"{i:06d}.png" for i in range(32)}


def test_json_prints_the_summary_alone(bitalloy: Any, inputs: Any) -> None:
    shown = bitalloy.run(inputs.classifier, "--data", inputs.images, *bitalloy.REACHABLE, "--json").succeeded()
    assert json.loads(shown.out) == bitalloy.summary()
    assert "Error" not in shown.err


# -- again and after a kill --------------------------------------------------------------------------


def test_killed_in_every_stage_and_finished_by_the_same_command(bitalloy: Any, inputs: Any, finished: Any) -> None:
    """One run directory, one kill in each stage in turn; every command goes on from what the last one stored."""
    assert finished.command.succeeded()
    for stage in STAGES:
        killed = detect(bitalloy.starting(KILLED.format(stage=stage)), inputs)
        assert killed.code == -9, f"{stage}: {killed.err}"
        assert not bitalloy.files() & RESULTS
    detect(bitalloy, inputs).succeeded()
    assert bitalloy.results() == RESULTS | SHOWN
    seconds = bitalloy.summary()["seconds"]
    assert seconds["calibration"] == seconds["probe"] == seconds["cost"] == seconds["plan"] == seconds["verify"] == 0
    assert seconds["evaluate"] > 0
    for name in SEEDED:
        assert (bitalloy.folder / "run" / name).read_bytes() == (finished.folder / "run" / name).read_bytes(), name


def test_shards_of_a_killed_stage_are_kept(bitalloy: Any, inputs: Any) -> None:
    detect(bitalloy.starting(KILLED.format(stage="probe")), inputs)
    shards = {p: p.stat().st_mtime_ns for p in (bitalloy.folder / "run" / "cache").glob("probe-*.d/*")}
    assert len(shards) == 1
    detect(bitalloy, inputs).succeeded()
    assert {p: p.stat().st_mtime_ns for p in shards} == shards


def test_same_command_again_uses_everything_again(bitalloy: Any, inputs: Any) -> None:
    detect(bitalloy, inputs).succeeded()
    first, before = bitalloy.summary(), bitalloy.contents()
    detect(bitalloy, inputs).succeeded()
    second = bitalloy.summary()
    assert set(second["seconds"].values()) == {0}
    assert {**second, "seconds": first["seconds"]} == first
    changed = {name for name, content in bitalloy.contents().items() if content != before[name]}
    assert changed <= {"summary.json", "report.html"}


def test_another_budget_uses_the_analysis_again(inside: Any, inputs: Any) -> None:
    data = ("--data", inputs.images)
    inside.run(inputs.classifier, *data, "--size", "0.9x").succeeded()
    before = inside.contents()
    inside.run(inputs.classifier, *data, "--size", "0.5x").succeeded()
    seconds = inside.summary()["seconds"]
    assert seconds["calibration"] == seconds["probe"] == seconds["secant"] == seconds["cost"] == 0 < seconds["plan"]
    assert inside.contents()["mixed.onnx"] != before["mixed.onnx"]
    assert inside.contents()["sensitivity.json"] == before["sensitivity.json"]


@pytest.mark.parametrize("change", ["seed", "data", "model", "samples"])
def test_changed_input_never_meets_an_old_result(inside: Any, inputs: Any, change: str) -> None:
    model, images = inside.folder / "model.onnx", inside.folder / "images"
    model.write_bytes(inputs.classifier.read_bytes())
    images.mkdir()
    for path in sorted(inputs.images.iterdir()):
        (images / path.name).write_bytes(path.read_bytes())
    arguments: tuple[object, ...] = (model, "--data", images, *inside.REACHABLE)
    inside.run(*arguments).succeeded()
    before = inside.contents()["probe_matrix.npz"]
    if change == "seed":
        arguments += ("--seed", "1")
    elif change == "samples":
        arguments += ("--samples", "7")
    elif change == "data":
        probed, other = inside.summary()["parts"]["probe"][:2]
        (images / probed).write_bytes((images / other).read_bytes())
    else:
        proto = onnx.load(model)
        weight = np.random.default_rng(9).standard_normal(proto.graph.initializer[0].dims).astype(np.float32)
        proto.graph.initializer[0].raw_data = weight.tobytes()
        onnx.save(proto, model)
    inside.run(*arguments).succeeded()
    seconds = inside.summary()["seconds"]
    assert seconds["calibration"] > 0 and seconds["probe"] > 0
    assert inside.contents()["probe_matrix.npz"] != before


def test_seed_decides_everything_but_times(inside: Any, inputs: Any) -> None:
    for out in ("one", "two"):
        arguments = ("--data", inputs.images, *inside.REACHABLE, "--seed", "3")
        inside.run(inputs.classifier, *arguments, out=out).succeeded()
    one, two = inside.contents("one"), inside.contents("two")
    assert [name for name in SEEDED if one[name] != two[name]] == []


def test_killed_while_a_result_is_stored(bitalloy: Any, inputs: Any, finished: Any) -> None:
    """What was written, but not yet in its place, is cleared away by the next command."""
    detect(bitalloy.starting(KILLED_WRITING.format(name="000000")), inputs)
    assert [f for f in bitalloy.files() if f.endswith(".partial")]
    detect(bitalloy, inputs).succeeded()
    assert bitalloy.results() == RESULTS | SHOWN
    for name in SEEDED:
        assert (bitalloy.folder / "run" / name).read_bytes() == (finished.folder / "run" / name).read_bytes(), name


def test_killed_while_results_are_published(bitalloy: Any, inputs: Any) -> None:
    """Results of two runs never stand side by side with a summary that speaks of one of them."""
    data = ("--data", inputs.images)
    bitalloy.run(inputs.classifier, *data, "--size", "0.9x").succeeded()
    killed = bitalloy.starting(KILLED_WRITING.format(name="report.html"))
    assert killed.run(inputs.classifier, *data, "--size", "0.5x").code == -9
    assert "summary.json" not in bitalloy.files()
    bitalloy.run(inputs.classifier, *data, "--size", "0.5x").succeeded()
    assert bitalloy.results() == RESULTS
    assert bitalloy.summary()["size_bytes"]["mixed"] == (bitalloy.folder / "run" / "mixed.onnx").stat().st_size


# -- no space ----------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(here: Path) -> Iterator[Path]:
    """A mounted disk of 64 KB, where this process may mount one."""
    disk = here / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, check=False)
    if mount.returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_full_disk_is_said_and_the_run_goes_on_with_more_space(bitalloy: Any, inputs: Any, small_disk: Path) -> None:
    arguments = (inputs.classifier, "--data", inputs.images, *bitalloy.REACHABLE)
    text = bitalloy.run(*arguments, out="disk/run").refused()
    assert "No space left" in text and "cannot be written" in text
    assert "summary.json" not in bitalloy.results("disk/run")
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    bitalloy.run(*arguments, out="disk/run").succeeded()
    assert bitalloy.results("disk/run") == RESULTS
    assert bitalloy.summary("disk/run")["seconds"]["calibration"] == 0


def test_quota_is_said(bitalloy: Any, inputs: Any) -> None:
    """The model fits below the limit, the profile of the audit does not: it is the one that fails."""
    arguments = (inputs.classifier, "--data", inputs.images, *bitalloy.REACHABLE)
    text = bitalloy.starting(LIMITED.format(size=100_000)).run(*arguments).refused()
    assert "cannot be written" in text and "profile" in text
    assert "summary.json" not in bitalloy.results()
    bitalloy.run(*arguments).succeeded()
    assert bitalloy.results() == RESULTS


def test_full_temporary_folder_is_said(
    bitalloy: Any, inputs: Any, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime's profiles are written there."""
    monkeypatch.setenv("TMPDIR", str(small_disk))
    arguments = (inputs.classifier, "--data", inputs.images, *bitalloy.REACHABLE)
    assert str(small_disk) in bitalloy.run(*arguments).refused()
    assert bitalloy.results() == set()
