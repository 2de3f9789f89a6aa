"""Whole runs on programs: what is shipped works by itself, at every size, and does what the summary says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from PIL import Image

import bitalloy as api
from bitalloy.core.schemes import Plan
from bitalloy.measure.workload import workload_of, workload_steps
from bitalloy.model.graphs.wiring import load_program
from bitalloy.model.load import Graph
from bitalloy.pipeline.prepare import prepare
from bitalloy.rewrite.apply import write_plan
from bitalloy.rewrite.calibrated import plan_artefact
from bitalloy.rewrite.divide import divide
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.ort import OrtSession
from bitalloy.targets.base import split
from bitalloy.targets.ort_cpu import ORT_CPU
from bitalloy.targets.recipe import Recipe
from bitalloy.tasks.chat import IDS, open_chat
from bitalloy.tasks.open import cache_size, interface_of, runner

Array = np.ndarray[Any, Any]
QUICK = api.Settings(samples=4, probes=4, calibration_samples=6)
LABELS = {"questions.jsonl", "captions.json"}


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def random_feeds(graph: Graph, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Normal numbers, ones for integers, and positions in order."""
    feeds: dict[str, np.ndarray] = {}
    for spec in graph.info.inputs:
        shape = [int(d) for d in spec.shape]
        if spec.dtype == "FLOAT":
            feeds[spec.name] = rng.standard_normal(shape).astype(np.float32)
        else:
            feeds[spec.name] = np.ones(shape, np.int64)
    if "position_ids" in feeds:
        feeds["position_ids"] = np.arange(feeds["position_ids"].size)[None]
    return feeds


def run(path: Path, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """By ONNX Runtime alone."""
    made = session(path)
    return dict(zip([o.name for o in made.get_outputs()], made.run(None, dict(feeds)), strict=True))


def axes(path: Path) -> dict[str, list[int | str]]:
    made = session(path)
    return {v.name: v.shape for v in (*made.get_inputs(), *made.get_outputs())}


def decibels(exact: Array, found: Array) -> float:
    return float(10 * np.log10(np.square(exact).sum() / max(float(np.square(found - exact).sum()), 1e-30)))


# -- promptable ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(inputs: Any, promptable: Path, drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of the promptable program with labels."""
    line = inputs.command_line(tmp_path_factory.mktemp("asked"))
    labels = drawn / "instances.json"
    line.run(promptable, "--data", labels, "--eval", labels, "--size", "0.7x").succeeded()
    return line


def masks_by_hand(folder: Path, image: Path, box: tuple[float, ...]) -> Array:
    """Image of 64x64 through encoder and decoder, written out."""
    pixels = np.asarray(Image.open(image).convert("RGB"), np.float32).transpose(2, 0, 1)[None] / 255
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    image_feed = ((pixels - mean[:, None, None]) / std[:, None, None]).astype(np.float32)
    embeddings = run(folder / "encoder.onnx", {"image": image_feed})["emb"]
    prompt = {
        "point_coords": np.array(box, np.float32).reshape(1, 2, 2),
        "point_labels": np.array([[2, 3]], np.float32),
    }
    return run(folder / "decoder.onnx", {"image_embeddings": embeddings, **prompt})["low_res_masks"]


def test_a_promptable_program_ships_graphs_that_work_alone(asked: Any, promptable: Path, drawn: Path) -> None:
    mixed = asked.folder / "run" / "mixed"
    assert json.loads((mixed / "program.json").read_text()) == json.loads((promptable / "program.json").read_text())
    for name in ("encoder", "decoder"):
        onnx.checker.check_model(onnx.load(mixed / f"{name}.onnx"), full_check=True)
        assert axes(mixed / f"{name}.onnx") == axes(promptable / f"{name}.onnx")
    kinds = [n.op_type for name in ("encoder", "decoder") for n in onnx.load(mixed / f"{name}.onnx").graph.node]
    assert "QuantizeLinear" in kinds
    image, box = drawn / "images" / "000000.png", (10.0, 12.0, 40.0, 50.0)
    measured = asked.summary()["sqnr_db"]["low_res_masks"]["mixed"]["measured"]
    found = decibels(masks_by_hand(promptable, image, box), masks_by_hand(mixed, image, box))
    assert measured == pytest.approx(found, abs=6)  # other samples
    more = {"point_coords": np.ones((1, 5, 2), np.float32), "point_labels": np.ones((1, 5), np.float32)}
    embeddings = np.random.default_rng(0).standard_normal((1, 16, 8, 8)).astype(np.float32)
    exact, rounded = (
        run(f / "decoder.onnx", {"image_embeddings": embeddings, **more}) for f in (promptable, mixed)
    )  # another number of points than the samples have
    assert decibels(exact["low_res_masks"], rounded["low_res_masks"]) > 15


def test_summary_of_a_program_speaks_of_its_graphs(asked: Any) -> None:
    summary, folder = asked.summary(), asked.folder / "run" / "mixed"
    assert set(summary["sqnr_db"]) == {"low_res_masks", "iou_predictions"}
    for name, size in summary["graphs"].items():
        assert size["mixed"] == (folder / f"{name}.onnx").stat().st_size
    assert summary["size_bytes"]["mixed"] == sum(s["mixed"] for s in summary["graphs"].values())
    assert summary["workload"] == (
        "one run of encoder, then decoder: image 1x3x64x64, point_coords 1x2x2, point_labels 1x2"
    )
    assert {"mIoU, box prompts", "mIoU, point prompts", "agreement, box prompts"} <= set(summary["metrics"])
    report = (asked.folder / "run" / "report.html").read_text()
    assert "mean IoU of the masks of both models" in report and report.count("data:image/jpeg") >= 2
    assert "one run of encoder, then decoder" in report and "mIoU, box prompts" in report
    assert {f"mixed/{f}" for f in ("encoder.onnx", "decoder.onnx", "program.json")} <= asked.files()


def test_every_graph_of_a_program_is_audited(asked: Any) -> None:
    """Each node of its file has a place in the graph that ran, or is said to be gone."""
    found = json.loads((asked.folder / "run" / "audit.json").read_text())
    assert {g["graph"] for g in found["graphs"]} == {k["graph"] for k in found["kernels"]} == {"encoder", "decoder"}
    for graph in found["graphs"]:
        nodes = onnx.load(asked.folder / "run" / "mixed" / f"{graph['graph']}.onnx").graph.node
        kept = {n for node in graph["nodes"] for n in node["nodes"]}
        assert {n.name for n in nodes} == kept | {*graph["folded"], *graph["removed"]}
        assert not graph["unknown"] and all(node["ran"] for node in graph["nodes"])


def test_advice_of_the_family_holds_where_measurement_bears_it_out(asked: Any) -> None:
    summary = asked.summary()
    plan = json.loads((asked.folder / "run" / "plan.json").read_text())
    rows = json.loads((asked.folder / "run" / "sensitivity.json").read_text())["rows"]
    units = json.loads((asked.folder / "run" / "units.json").read_text())["units"]
    alone: dict[tuple[str, str], float] = {
        (r["id"], r["head"]): 10 ** (-r["sqnr_db"]["value"] / 10) for r in rows if r["scope"] == "unit"
        if r["part"] == "all"
    }  # fmt: skip
    whole = {h: sum(10 ** (-r["sqnr_db"]["value"] / 10) for r in rows if r["scope"] == "site" and r["head"] == h)
             for h in summary["sqnr_db"]}  # fmt: skip
    advised = {u["id"] for u in units if "int8" in u["allowed"] and "/mask_decoder/" in u["id"]}
    share = {u: max(alone[u, h] / whole[h] for h in whole) for u in advised}
    kept = set(summary["protected_units"])
    # the table follows the bend of the network, what protects does not: near 1 % they differ
    assert kept and {u for u in advised if share[u] > 0.02} <= kept <= {u for u in advised if share[u] > 0.005}
    for choice in plan["choices"]:
        if choice["unit"] in kept:
            assert (
                choice["scheme"] == "fp32"
                and "Outliers. a paper" in choice["reason"]
                and "measured: " in choice["reason"]
            )


def test_no_protect_frees_all(inside: Any, promptable: Path, drawn: Path) -> None:
    inside.run(promptable, "--data", drawn / "images", "--no-protect", "--max-drop-db", "20").succeeded()
    assert inside.summary()["protected_units"] == []
    inside("sensitivity", promptable, "--data", drawn / "images", "--samples", "8", "--probes", "2",
           "--calibration-samples", "8", "--out", "run", "--json").succeeded()  # fmt: skip


# -- language ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spoken(language: Path, drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An analysis of the language program, and its verified plan."""
    out = tmp_path_factory.mktemp("spoken") / "run"
    prepared = prepare(language, out=out, data=drawn / "questions.jsonl")
    analysis = api.analyze(prepared.model, prepared.data, QUICK, work=prepared.work)
    planned = api.plan(analysis, api.Budget(min_sqnr_db=20), work=prepared.work)
    verified = api.verify(
        analysis, planned, labels=[drawn / name for name in sorted(LABELS)], limit=4, work=prepared.work
    )
    api.publish(verified, prepared.store)
    return verified, out


def test_only_logits_are_heads_and_the_cache_stays_open(spoken: Any, language: Path) -> None:
    verified, out = spoken
    assert [h.name for h in verified.analysis.heads] == ["logits"]
    for name in ("vision", "embedding", "decoder"):
        assert axes(out / "mixed" / f"{name}.onnx") == axes(language / f"{name}.onnx")
    assert {"perplexity", "KL divergence", "top-1 agreement", "yes/no accuracy"} <= set(verified.summary.metrics)
    regions = {u.region for u in verified.analysis.units.units}
    assert any(r.startswith("vision") for r in regions) and any(r.startswith("decoder") for r in regions)


def test_int8_graphs_generate_with_a_cache_as_without(spoken: Any, drawn: Path, tmp_path: Path) -> None:
    """Token by token through the cache, or all tokens at once: the same logits up to flips of roundings."""
    verified, _ = spoken
    graph = verified.analysis.graph
    shipped = verified.analysis.artefact(verified.analysis.units.lowest_gated())
    shipped.save(tmp_path)
    chat = open_chat(interface_of(graph))
    talk = runner(graph, shipped.session())
    image = chat.feed(Image.open(drawn / "images" / "000003.png"))
    ids = list(chat.prompt("Is there a red circle?"))
    for _ in range(3):
        step = talk({"pixel_values": image, IDS: np.array([ids])})["logits"]
        ids.append(int(step[0, -1].argmax()))
    step = talk({"pixel_values": image, IDS: np.array([ids])})["logits"]
    at = ids.index(-200)
    features = run(tmp_path / "vision.onnx", {"pixel_values": image})["image_features"]
    before, after = np.array([ids[:at]]), np.array([ids[at + 1 :]])
    given = {"before": before, "image_features": features, "after": after}
    embeds = run(tmp_path / "embedding.onnx", given)["inputs_embeds"]
    count = embeds.shape[1]
    assert count == len(ids) + 3 == step.shape[1]
    feeds = {"inputs_embeds": embeds, "attention_mask": np.ones((1, count), np.int64)}
    feeds |= {"position_ids": np.arange(count)[None]}
    _, heads, width = cache_size(graph.info.inputs)
    feeds |= {f"past.{i}.{k}": np.zeros((1, heads, 0, width), np.float32) for i in range(2) for k in ("key", "value")}
    whole = run(tmp_path / "decoder.onnx", feeds)["logits"]
    assert decibels(whole[:, -3:], step[:, -3:]) > 25


def test_roundings_are_the_same_with_open_sizes(spoken: Any, tmp_path: Path) -> None:
    """At the samples' sizes, graph by graph, with everything in INT8: nothing but the form differs."""
    verified, _ = spoken
    analysis = verified.analysis
    int8 = analysis.units.lowest_gated()
    fixed = divide(analysis.variant(int8).model, analysis.graph.program)
    shipped = analysis.artefact(int8)
    shipped.save(tmp_path / "open")
    rng = np.random.default_rng(0)
    for name, model in fixed.items():
        path = tmp_path / f"{name}.onnx"
        Artefact({"model": model}).save(path)
        feeds = random_feeds(analysis.graph.program.graphs[name], rng)
        expected, found = run(path, feeds), run(tmp_path / "open" / f"{name}.onnx", feeds)
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-5)
        both = [onnx.load(p) for p in (path, tmp_path / "open" / f"{name}.onnx")]
        stored = [sorted(i.name for i in m.graph.initializer if i.data_type == onnx.TensorProto.INT8) for m in both]
        assert stored[0] == stored[1]


def test_kernels_that_round_take_open_sizes(spoken: Any, tmp_path: Path) -> None:
    """Of two schemes in turns: the shipped graphs compute what the joined one does, and take other lengths."""
    analysis = spoken[0].analysis
    units = split(analysis.graph, ORT_CPU, analysis.heads, schemes=("w4", "int8-dynamic"))
    able = [u for u in units.units if u.choices]
    plan = Plan({u.id: u.choices[i % len(u.choices)] for i, u in enumerate(able)})
    assert plan.scheme_of("embedding///Gather_0") == "w4" and {"w4", "int8-dynamic"} <= set(plan.values())
    recipe = Recipe(units, ORT_CPU, {})
    joined = OrtSession(write_plan(analysis.graph, recipe, plan).to_bytes())
    shipped = plan_artefact(analysis.graph, recipe, plan)
    shipped.save(tmp_path)
    session = shipped.session()
    for index in analysis.parts.verification[:2]:
        feeds = analysis.data.feeds(index)
        expected, found = joined.run(feeds), session.run(feeds)
        for name, value in expected.items():
            assert decibels(value, found[name]) > 60
    nodes = Counter(n.op_type for f in tmp_path.glob("*.onnx") for n in onnx.load(f).graph.node)
    assert nodes["MatMulNBits"] + nodes["MatMulInteger"] + nodes["GatherBlockQuantized"] == len(able)
    lengths = [d.dim_param for d in onnx.load(tmp_path / "decoder.onnx").graph.input[0].type.tensor_type.shape.dim]
    assert any(lengths)


def test_an_answer_is_a_prompt_and_new_tokens(spoken: Any) -> None:
    """The steps run on the float program and on what is shipped, at the sizes that were asked for."""
    verified, _ = spoken
    analysis = verified.analysis
    graph, sample = analysis.graph, analysis.data.feeds(0)
    usual = sample["attention_mask"].shape[1]
    for asked, prompt, new in (
        (None, usual, 64),
        (api.Workload(new=5), usual, 5),
        (api.Workload(prompt=usual + 7, new=9), usual + 7, 9),
        (api.Workload(prompt=usual - 1, new=0), usual - 1, 0),
    ):
        workload = workload_of(graph, asked)
        assert workload == api.Workload(prompt=prompt, new=new)
        prefill, *tokens = workload_steps(graph, sample, workload)
        assert prefill.feeds["attention_mask"].shape == prefill.feeds["position_ids"].shape == (1, prompt)
        assert [(t.times, t.graph) for t in tokens] == ([(new, "decoder")] if new else [])
        if tokens:
            past = prompt + new // 2
            assert tokens[0].feeds["inputs_embeds"].shape[1] == 1 and tokens[0].feeds["position_ids"].item() == past
            assert {v.shape[2] for n, v in tokens[0].feeds.items() if n.startswith("past.")} == {past}
            assert tokens[0].feeds["attention_mask"].tolist() == [[1] * (past + 1)]
        for artefact in (analysis.original(), verified.mixed):
            session = artefact.session()
            assert session.run(prefill.feeds)["logits"].shape[1] == prompt
            for token in tokens:
                assert session.part("decoder").run(token.feeds)["logits"].shape[1] == 1
                token.run(session)
    with pytest.raises(api.BitalloyError, match=r"prompt=\d+ is too short: \d+ positions stand before"):
        workload_of(graph, api.Workload(prompt=usual - sample["after"].shape[1]))


def test_a_summary_prices_the_answer(spoken: Any) -> None:
    """A whole answer takes what its steps take, of each of the three models; all schemes are on offer."""
    verified, out = spoken
    summary = verified.summary
    prefill, token = summary.steps
    assert (prefill.name, prefill.times, token.name, token.times) == ("prefill", 1, "token", 64)
    assert summary.workload.endswith("and 64 runs of decoder for one token each")
    for kind in ("reference", "lowest", "mixed"):
        parts = [getattr(step.latency_ms, kind).median_ms * step.times for step in summary.steps]
        assert getattr(summary.latency_ms, kind) == pytest.approx(sum(parts), rel=0.5)
        assert getattr(summary.latency_spread_ms, kind).count == getattr(token.latency_ms, kind).count
    memory = summary.peak_memory_mb
    assert memory.process > 20 and min(memory.reference, memory.lowest, memory.mixed) > memory.process
    assert {"w4", "w8", "int8-dynamic", "int8"} <= {s.name for s in verified.analysis.units.schemes}
    offered = [s.scheme for s in summary.single_formats]
    assert {"w4", "w8", "int8-dynamic", "int8"} <= set(offered) and sum(s.best for s in summary.single_formats) == 1
    single = summary.latency_ms.single is not None
    assert all((step.latency_ms.single is not None) == single for step in summary.steps)
    assert all((m.single is not None) == (m.drop_single is not None) == single for m in summary.metrics.values())
    assert (memory.single is not None) == single == (summary.size_bytes.single is not None)
    assert sum(r.shipped for r in summary.rounds) == 1
    assert summary.metrics["greedy caption agreement"].reference.value == 1
    assert 1 <= summary.metrics["first divergent caption token"].reference.value <= 32
    stored = json.loads((out / "summary.json").read_text())
    assert [step["name"] for step in stored["steps"]] == ["prefill", "token"]
    page = (out / "report.html").read_text()
    assert all(one.mixed == b"" and one.texts for one in verified.examples.worst)
    assert "Latency of one token" in page and "64 in an answer" in page


def test_a_workload_is_for_language_models(inside: Any, inputs: Any) -> None:
    message = inside.run(inputs.classifier, "--workload", "prompt=9,new=2").refused()
    assert "only language models have" in message
    for text in ("prompt", "prompt=", "new=-1", "new=1,new=2", "tokens=4", "prompt=0", "new=1000000000"):
        assert "--workload is" in inside.run(inputs.classifier, "--workload", text).refused()


def test_samples_of_a_language_program_have_one_length(language: Path, drawn: Path, tmp_path: Path) -> None:
    prepared = prepare(language, out=tmp_path / "run", data=drawn / "captions.json")
    sample = prepared.data.feeds(0)
    length = sample["before"].shape[1] + 4 + sample["after"].shape[1]
    assert sample["attention_mask"].shape == sample["position_ids"].shape == (1, length)
    shapes = {tuple((k, v.shape) for k, v in prepared.data.feeds(i).items()) for i in range(len(prepared.data))}
    assert len(shapes) == 1 and 1 < len(prepared.data) <= 10
    assert prepared.model.info.inputs[1].shape == sample["before"].shape
    logits = prepared.model.info.outputs[0].shape
    assert logits[:2] == (1, length)


# -- what is fed and what is refused -------------------------------------------------------------------------------


def test_any_program_is_fed_from_arrays(inside: Any, promptable: Path) -> None:
    folder = inside.folder / "feeds"
    folder.mkdir()
    rng = np.random.default_rng(1)
    for i in range(6):
        arrays = {"image": (1, 3, 64, 64), "point_coords": (1, 3, 2), "point_labels": (1, 3)}
        np.savez(folder / f"{i}.npz", **{n: rng.random(s, np.float32) for n, s in arrays.items()})  # type: ignore[arg-type]
    inside.run(promptable, "--data", folder, "--max-drop-db", "15").succeeded()
    assert "point_coords 1x3x2" in inside.summary()["workload"]
    np.savez(folder / "7.npz", image=rng.random((1, 3, 64, 64), np.float32),
             point_coords=rng.random((1, 4, 2), np.float32), point_labels=rng.random((1, 4), np.float32))  # fmt: skip
    message = inside.run(promptable, "--data", folder, out="other").refused()
    assert "has shape [1, 3, 2] in '0.npz' and [1, 4, 2] in '7.npz'" in message


def test_python_interface_joins_the_graphs(promptable: Path) -> None:
    model = api.load(promptable)
    assert [i.name for i in model.info.inputs] == ["image", "point_coords", "point_labels"]
    assert load_program(promptable, shapes={"decoder:point_coords": (1, 2, 2), "decoder:point_labels": (1, 2)})


def test_mistakes_are_refused(inside: Any, inputs: Any, promptable: Path, language: Path, drawn: Path) -> None:
    (inside.folder / "empty").mkdir()
    assert "neither a file nor a known model" in inside.run("empty").refused()
    assert (
        "--checkpoint belongs to a model that is exported"
        in inside.run(inputs.classifier, "--checkpoint", "x.pt").refused()
    )
    assert "captions.json" in inside.run(promptable, "--data", drawn / "captions.json").refused()
    copy = inside.folder / "copy"
    copy.mkdir()
    for file in language.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "tokenizer.model").unlink()
    assert "No tokenizer at" in inside.run(copy, "--data", drawn / "questions.jsonl", out="b").refused()
    (copy / "decoder.onnx").write_bytes(b"nonsense")
    assert (
        "decoder.onnx' is not an ONNX file" in inside.run(copy, "--data", drawn / "questions.jsonl", out="c").refused()
    )
