"""FP16 in programs: graphs keep their interface, compute what they say at every size, and do what is predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image
from tests.pipeline.test_programs import axes, decibels, random_feeds, run

import bitalloy as api
from bitalloy.core.schemes import Plan
from bitalloy.measure.sqnr import artefact_sqnr
from bitalloy.pipeline.prepare import prepare
from bitalloy.rewrite.cast import as_specified
from bitalloy.rewrite.divide import divide
from bitalloy.runtime.artefact import Artefact
from bitalloy.sensitivity.matrix import draws, estimate_sqnr
from bitalloy.targets.placement import rounded
from bitalloy.tasks.chat import IDS, open_chat
from bitalloy.tasks.open import interface_of, runner

TARGETS = ("tensorrt", "ort-cuda")
FEW = api.Settings(targets=TARGETS, samples=4, probes=16, calibration_samples=6)


@pytest.fixture(scope="module")
def analyses(
    promptable: Path, language: Path, drawn: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Any]:
    """(program, target) -> analysis; both targets from the same passes."""
    found: dict[tuple[str, str], Any] = {}
    for name, folder, labels in (
        ("promptable", promptable, "instances.json"),
        ("language", language, "questions.jsonl"),
    ):
        prepared = prepare(folder, out=tmp_path_factory.mktemp(name) / "run", data=drawn / labels)
        first = api.analyze(prepared.model, prepared.data, FEW, work=prepared.work)
        found |= {(name, a.target.name): a for a in first.targets}
    return found


def plans(analysis: Any) -> dict[str, Plan]:
    """All that may in FP16, and schemes drawn at random."""
    random = np.random.default_rng(3)
    drawn = {u.id: u.allowed[int(random.integers(len(u.allowed)))] for u in analysis.units.units}
    return {"FP16": Plan.of("fp16", *analysis.units.able("fp16")), "random": Plan(drawn)}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["promptable", "language"])
def test_measured_damage_is_the_predicted_one(analyses: Any, name: str, target: str) -> None:
    analysis = analyses[name, target]
    evidence = [u.evidence.get("fp16") for u in analysis.units.units if "fp16" in u.allowed]
    assert len(evidence) > 10 and all(half is not None and not half.reason for half in evidence)
    chosen = plans(analysis)
    feeds = [analysis.data.feeds(i) for i in analysis.parts.probe[: analysis.matrix.samples]]
    models = {plan: analysis.executable(analysis.artefact(lowered)) for plan, lowered in chosen.items()}
    found = artefact_sqnr(analysis.original(), models, analysis.heads, feeds)
    for plan, lowered in chosen.items():
        sites = analysis.matrix.select(rounded(analysis.units, lowered))
        predicted = estimate_sqnr(analysis.matrix, sites, draws(analysis.matrix.samples, seed=0))
        for head, guess, measured in zip(analysis.heads, predicted, found[plan], strict=True):
            assert guess.low < measured.value < guess.high, (plan, head.name)
            # a head of four numbers varies more from sample to sample than one of a thousand
            assert measured.value == pytest.approx(guess.value, abs=7 if head.name == "iou_predictions" else 3)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["promptable", "language"])
def test_files_keep_their_interface(
    analyses: Any, name: str, target: str, promptable: Path, language: Path, tmp_path: Path
) -> None:
    """Names, types, sizes and order, those of the cache included; inside there are half weights."""
    analysis, source = analyses[name, target], {"promptable": promptable, "language": language}[name]
    analysis.artefact(plans(analysis)["FP16"]).save(tmp_path)
    for file in sorted(source.glob("*.onnx")):
        model = onnx.load(tmp_path / file.name)
        onnx.checker.check_model(model, full_check=True)
        assert axes(tmp_path / file.name) == axes(file)
        ends = [v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)]
        assert set(ends) <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
        assert any(i.data_type == onnx.TensorProto.FLOAT16 for i in model.graph.initializer)


@pytest.mark.parametrize("target", TARGETS)
def test_arithmetic_is_the_same_with_open_sizes(analyses: Any, target: str, tmp_path: Path) -> None:
    """At the samples' sizes, graph by graph: nothing but the form differs."""
    analysis = analyses["language", target]
    lowered = plans(analysis)["random"]
    fixed = divide(analysis.variant(lowered).model, analysis.graph.program)
    shipped = analysis.artefact(lowered)
    random = np.random.default_rng(0)
    for name, model in fixed.items():
        both = {"fixed": as_specified(model), "open": as_specified(shipped.models[name])}
        for form, one in both.items():
            Artefact({"model": one}).save(tmp_path / f"{name}-{form}.onnx")
        feeds = random_feeds(analysis.graph.program.graphs[name], random)
        expected, found = (run(tmp_path / f"{name}-{form}.onnx", feeds) for form in ("fixed", "open"))
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert value.dtype == found[key].dtype == np.float32
            np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-5)


def test_a_cache_in_fp16_generates_as_without(analyses: Any, drawn: Path) -> None:
    """Tokens one by one through the cache, and all at once: the same logits up to roundings."""
    analysis = analyses["language", "ort-cuda"]
    lowered = plans(analysis)["FP16"]
    assert any("self_attn" in unit for unit in lowered)
    chat = open_chat(interface_of(analysis.graph))
    image = chat.feed(Image.open(drawn / "images" / "000003.png"))
    prompt = list(chat.prompt("Is there a red circle?"))
    session = analysis.executable(analysis.artefact(lowered)).session()
    talk = runner(analysis.graph, session)
    ids = list(prompt)
    for _ in range(3):
        step = talk({"pixel_values": image, IDS: np.array([ids])})["logits"]
        ids.append(int(step[0, -1].argmax()))
    step = talk({"pixel_values": image, IDS: np.array([ids])})["logits"]
    whole = runner(analysis.graph, analysis.executable(analysis.artefact(lowered)).session())
    once = whole({"pixel_values": image, IDS: np.array([ids])})["logits"]
    assert decibels(once[:, -3:], step[:, -3:]) > 50
    exact = runner(analysis.graph, analysis.original().session())({"pixel_values": image, IDS: np.array([ids])})[
        "logits"
    ]
    assert 40 < decibels(exact[:, -3:], step[:, -3:]) < 100


def test_a_run_for_cuda(inside: Any, promptable: Path, drawn: Path) -> None:
    """A program has a plan on a target without INT8, and the summary has its measured SQNR."""
    inside.run(promptable, "--data", drawn / "images", "--target", "ort-cuda", "--size", "0.58x").succeeded()
    summary = inside.summary()
    assert summary["fp16_units"] and summary["schemes"] == {"fp16": summary["fp16_units"]}
    for head in summary["sqnr_db"].values():
        assert head["mixed"]["measured"] == pytest.approx(head["mixed"]["predicted"], abs=4)
    assert {"mixed/encoder.onnx", "mixed/decoder.onnx", "mixed/program.json"} <= inside.files()
