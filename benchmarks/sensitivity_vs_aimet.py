"""The table of per-operator sensitivities against AIMET's: same model, images, operators and quantizers.

AIMET (aimet-onnx, `analyze_per_layer_sensitivity`) switches on the quantizers of one operator after another and runs
all images each time. bitalloy predicts the table from one probe matrix, and measures it exactly in segments.

    python -m venv /tmp/aimet && /tmp/aimet/bin/pip install aimet-onnx==2.42.0
    python benchmarks/sensitivity_vs_aimet.py --model yolo11n.onnx --images coco128-calib/images \
        --aimet-python /tmp/aimet/bin/python
    ... --operators 20              a quick look: every so many-th operator
    ... --reuse aimet.json          keep AIMET's result there, and take it from there the next time

The quantizers of an operator are, on both sides: its weights (int8, symmetric, per channel, min-max) and its output
(8 bits, asymmetric, per tensor, min-max over the same images), that of the first operator also the input of the model.
The score is the same: SQNR in dB of each head over all images, mean over the heads. What differs: AIMET rounds
weights to 255 steps of max/127.5, bitalloy to 254 of max/127; constants that an elementwise operator reads are
rounded by AIMET only; and AIMET puts the operands of a Concat on the scale of its output. Agreement is given twice:
over operators for which both round the same tensors (`compared`), and over those of them for which all scales are the
same, too, to 1 % (`same_quantizers`): only there both claim to measure the same thing.

Both sides time a plain float pass again and again between their own steps, and `passes` is their time in units of its
mean, so that `times_faster`, the ratio of AIMET's passes to ours, does not depend on how busy the machine was during
either; `times_faster_seconds` is the ratio of seconds. For `exact` both are per operator, because AIMET analyses fewer.

The last line is JSON. `probe` has an entry for each number of probes and images: with fewer than all images the table
is made from the first of them, and compared with AIMET's from all. Building the probe's sessions is in its time;
building AIMET's simulation and both calibrations are in no ratio and are listed beside it.
`probe_agrees_with_exact` compares bitalloy's two tables, for the most probes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
from rich.console import Console
from scipy.stats import spearmanr

from bitalloy import load, open_data
from bitalloy.calibrate.streaming import collect
from bitalloy.core.units import UnitEdge, UnitGraph, WeightSite
from bitalloy.model.heads import find_heads
from bitalloy.model.load import Graph
from bitalloy.model.read import constant, name_of
from bitalloy.runtime.ort import OrtSession
from bitalloy.sensitivity.exact import Switchboard, damage
from bitalloy.sensitivity.matrix import ProbeMatrix, decibel
from bitalloy.sensitivity.probe import Prober
from bitalloy.targets import target
from bitalloy.targets.base import Core, Target, split
from bitalloy.targets.placement import ACTIVATIONS, Site, weight_site
from bitalloy.targets.recipe import Recipe

CHILD = Path(__file__).with_name("aimet_sensitivity.py")
SCHEME = "int8"


def aimet_target() -> Target:
    """ONNX Runtime with the whole of INT8 for weights, as AIMET scales them."""
    (offer,) = target("ort-cpu").offers
    full = replace(offer, scheme=msgspec.structs.replace(offer.scheme, pair_limit=None))
    return replace(target("ort-cpu"), offers=(full,))


def operator_units(graph: Graph, device: Target) -> UnitGraph:
    """Every operator as a unit of its own that may run in INT8, with its weights: what AIMET's simulation rounds."""

    def match(node: ir.Node, graph: Graph) -> Core:
        weights: tuple[WeightSite, ...] = ()
        if node.op_type in ("Conv", "Gemm", "MatMul", "ConvTranspose"):
            weight = node.inputs[1]
            array = constant(weight)
            if weight is not None and array is not None:
                axis = 0 if node.op_type == "Conv" else array.ndim - 1
                site = WeightSite(
                    tensor=str(weight.name), node=name_of(node), slot=1, axis=axis, elements=int(array.size)
                )
                weights = (site,)
        return Core(f"operator {node.op_type}", (node,), weights=weights)

    return split(graph, replace(device, match=match, follows=lambda node: False), ())


def operator_sites(graph: Graph, units: UnitGraph) -> dict[str, tuple[frozenset[str], dict[str, list[str]]]]:
    """Operator -> its sites, and what they round in AIMET's terms."""
    first = {use.node: e for e in units.edges if e.producer is None for use in e.uses}
    found = {}
    for unit in units.units:
        leaving = [e for e in units.edges if e.producer == unit.id and e.rooted]
        sites = {weight_site(w, SCHEME).id for w in unit.weights} | {entry_site(e) for e in leaving}
        rounds = {
            "inputs": [first[unit.id].tensor] if unit.id in first else [],
            "outputs": [unit.root] if leaving else [],
            "weights": [w.tensor for w in unit.weights],
        }
        if unit.id in first:
            sites.add(entry_site(first[unit.id]))
        if sites:
            found[unit.id] = (frozenset(sites), rounds)
    return found


def entry_site(edge: UnitEdge) -> str:
    """The site of a tensor."""
    return Site(edge.id, SCHEME, ACTIVATIONS).id


def scales_of(graph: Graph, recipe: Recipe) -> dict[str, np.ndarray]:
    """Scales of every tensor and weight that may be rounded."""
    rounded = {t: recipe.tensor_params(SCHEME, t)[1] for t in recipe.ranges}
    for site in (w for u in recipe.units.units for w in u.weights):
        rounded[site.tensor] = recipe.weight(SCHEME, graph.node[site.node], site).params
    return {tensor: params.scale.reshape(-1) for tensor, params in rounded.items() if params is not None}


def agreement(theirs: np.ndarray, ours: np.ndarray) -> dict[str, float]:
    """Of two scores in dB."""
    gap = np.abs(theirs - ours)
    return {
        "spearman": round(float(spearmanr(theirs, ours)[0]), 4),
        "mean_abs_db": round(float(gap.mean()), 3),
        "max_abs_db": round(float(gap.max()), 3),
    }


class Yardstick:
    """The time of a plain float pass, taken between the steps of what is measured."""

    def __init__(self, model: Graph, feeds: list[dict[str, np.ndarray]]) -> None:
        self._session, self._feeds = OrtSession(model.to_bytes()), feeds
        self._session.run(feeds[0])
        self.passes: list[float] = []

    def measure(self) -> None:
        """One pass."""
        feeds = self._feeds[len(self.passes) % len(self._feeds)]
        start = time.perf_counter()
        self._session.run(feeds)
        self.passes.append(time.perf_counter() - start)

    def read(self) -> float:
        """Seconds of a pass since the last reading, on the mean."""
        mean, self.passes = float(np.mean(self.passes)), []
        return mean


def aimet_result(
    options: argparse.Namespace, job: dict[str, Any], feeds: list[dict[str, np.ndarray]]
) -> dict[str, Any]:
    """AIMET's result, from the file of an earlier run of the same job where there is one."""
    digest = hashlib.sha256(options.model.read_bytes())
    digest.update(json.dumps(job, sort_keys=True).encode())
    for sample in feeds:
        for name in sorted(sample):
            digest.update(name.encode() + np.ascontiguousarray(sample[name]).tobytes())
    key = digest.hexdigest()
    if options.reuse is not None and options.reuse.exists():
        kept = json.loads(options.reuse.read_text())
        if kept["job"] != key:
            raise SystemExit(f"{options.reuse} is of another model, images or operators. Give another --reuse.")
        return kept
    if options.aimet_python is None:
        raise SystemExit("There is no earlier result in --reuse. Give --aimet-python to make one.")
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for index, sample in enumerate(feeds):
            files.append(str(Path(folder) / f"{index}.npz"))
            np.savez(files[-1], **sample)  # type: ignore[arg-type]
        found = {"job": key, **run_aimet(options.aimet_python, {**job, "feeds": files}, options.model, Path(folder))}
    if options.reuse is not None:
        options.reuse.write_text(json.dumps(found))
    return found


def run_aimet(python: Path, job: dict[str, Any], model: Path, folder: Path) -> dict[str, Any]:
    """AIMET's result."""
    job = {**job, "model": str(model.resolve())}
    (folder / "job.json").write_text(json.dumps({**job, "result": str(folder / "result.json")}))
    done = subprocess.run([python, CHILD, folder / "job.json"], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"AIMET failed in {python}:\n{done.stderr[-3000:]}")
    return json.loads((folder / "result.json").read_text())


def main() -> None:
    """Run the comparison and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="an .onnx file")
    parser.add_argument("--images", type=Path, required=True, help="folder of images, or .npz feeds")
    parser.add_argument("--aimet-python", type=Path, help="interpreter that has aimet-onnx 2.42")
    parser.add_argument("--reuse", type=Path, help="file of AIMET's result, read if it exists and written if not")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--probes", type=int, nargs="+", default=[1, 2, 4], help="reverse passes per image and head")
    parser.add_argument("--operators", type=int, help="only so many operators, evenly chosen")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console(stderr=True, soft_wrap=True)

    model = load(options.model)
    heads = tuple(
        h for h in find_heads(model) if h.scores is None and not h.kind
    )  # AIMET measures parts of outputs, unweighed
    device = aimet_target()
    units = operator_units(model, device)
    data = open_data(model, options.images, limit=options.samples, seed=options.seed)
    feeds = [data.feeds(i) for i in range(len(data))]
    table = operator_sites(model, units)
    names = list(table)
    if options.operators is not None:
        names = [names[i] for i in np.linspace(0, len(names) - 1, options.operators).astype(int)]

    job = {
        "heads": [{k: getattr(h, k) for k in ("output", "axis", "start", "stop")} for h in heads],
        "operators": names if options.operators is not None else None,
    }
    console.print("AIMET: one operator after another")
    theirs = aimet_result(options, job, feeds)
    console.print(f"AIMET took {theirs['analysis_seconds']:.1f} s for {len(theirs['operators'])} operators")

    start = time.perf_counter()
    tensors = {e.root for e in units.edges}
    ranges = collect(model.to_bytes(), [t for t in model.value if t in tensors], iter(feeds)).ranges("minmax")
    calibrated = time.perf_counter()
    stick = Yardstick(model, feeds)
    recipe = Recipe(units, device, ranges)
    prober = Prober(model, heads, [recipe])
    build = time.perf_counter() - calibrated
    prober.measure(feeds[0], sample=0, probes=min(options.probes), seed=options.seed)  # the first one allocates
    tables, spent, pace = {}, {}, {}
    for probes in options.probes:
        shards, seconds = [], build
        for index, sample in enumerate(feeds):
            stick.measure()
            begun = time.perf_counter()
            shards.append(prober.measure(sample, sample=index, probes=probes, seed=options.seed))
            seconds += time.perf_counter() - begun
            if (count := index + 1) == len(feeds) or not count & index:  # powers of two
                matrix = ProbeMatrix.concatenate(shards)
                tables[probes, count] = {n: matrix.damage(matrix.select(table[n][0])).mean(axis=0) for n in names}
                spent[probes, count] = seconds
        pace[probes] = stick.read()
    del prober
    board = Switchboard(model, recipe, at_once=len(feeds))
    sets = [board.gates(table[n][0]) for n in names]
    begun, marks = time.perf_counter(), []

    def progress(count: int) -> None:
        marks.append(count)
        if len(marks) % len(feeds) == 0:
            stick.measure()

    found, _ = damage(board, sets, heads, feeds, progress=progress)
    exact_s = time.perf_counter() - begun - sum(stick.passes)
    exact = dict(zip(names, found.mean(axis=0).T, strict=True))
    exact_pass = stick.read()

    energy = np.mean(theirs["energy"], axis=0)
    entries, ours = theirs["operators"], scales_of(model, recipe)
    same = [
        n for n, e in entries.items() if n in exact and all(sorted(e[k]) == sorted(v) for k, v in table[n][1].items())
    ]

    def equal(tensor: str) -> bool:
        scale = np.array(theirs["scales"][tensor])
        return scale.shape == ours[tensor].shape and bool(np.allclose(scale, ours[tensor], rtol=0.01, atol=0))

    strict = [n for n in same if all(equal(t) for tensors in table[n][1].values() for t in tensors)]
    aimet = {n: np.mean(entries[n]["errors"], axis=0) / energy for n in same}

    def scores(damages: dict[str, np.ndarray], names: list[str]) -> np.ndarray:
        return np.array([float(decibel(damages[n]).mean()) for n in names])

    most = tables[options.probes[-1], len(feeds)]
    for name in sorted(same, key=lambda n: float(decibel(aimet[n]).mean()))[:15]:
        texts = [f"{label} {decibel(t[name]).round(1)}" for label, t in (("AIMET", aimet), ("exact", exact))]
        console.print(f"{name:<50} {', '.join(texts)}, probe {decibel(most[name]).round(1)} dB", highlight=False)
    seconds, size = theirs["analysis_seconds"], len(theirs["operators"])
    passes = seconds / theirs["float_pass_seconds"]

    def against(damages: dict[str, np.ndarray]) -> dict[str, Any]:
        found = {}
        for label, chosen in (("compared", same), ("same_quantizers", strict)):
            rows = [[decibel(t[n]) for n in chosen] for t in (aimet, damages)]
            by_head = {h.name: agreement(*np.array(rows)[:, :, i]) for i, h in enumerate(heads)}
            found[label] = {**agreement(scores(aimet, chosen), scores(damages, chosen)), "heads": by_head}
        return found

    result = {
        "benchmark": "sensitivity_vs_aimet",
        "model": model.info.name,
        "model_sha256": model.info.sha256[:16],
        "samples": len(feeds),
        "seed": options.seed,
        "aimet": {
            "version": theirs["version"],
            "operators": size,
            "seconds": round(seconds, 2),
            "passes": round(passes, 1),
            "build_seconds": round(theirs["build_seconds"], 2),
            "calibration_seconds": round(theirs["calibration_seconds"], 2),
        },
        "compared": len(same),
        "not_compared": [n for n in entries if n not in same],
        "same_quantizers": len(strict),
        "other_scales": [n for n in same if n not in strict],
        "calibration_seconds": round(calibrated - start, 2),
        "probe_build_seconds": round(build, 2),
        "operators": len(names),
        "probe": [
            {
                "probes": probes * len(heads),
                "samples": count,
                "seconds": round(spent[probes, count], 2),
                "passes": round(spent[probes, count] / pace[probes], 1),
                "times_faster": round(passes * pace[probes] / spent[probes, count], 1),
                "times_faster_seconds": round(seconds / spent[probes, count], 1),
                **against(damages),
            }
            for (probes, count), damages in tables.items()
        ],
        "exact": {
            "seconds": round(exact_s, 2),
            "passes_per_measurement": round(exact_s / exact_pass / len(names) / len(feeds), 3),
            "times_faster": round(passes / size / (exact_s / exact_pass / len(names)), 2),
            "times_faster_seconds": round(seconds / size / (exact_s / len(names)), 2),
            **against(exact),
        },
        "probe_agrees_with_exact": agreement(scores(exact, same), scores(most, same)),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
