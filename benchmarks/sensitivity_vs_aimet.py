"""The table of per-operator sensitivities against AIMET's: same model, images, operators and quantizers.

AIMET (aimet-onnx, `analyze_per_layer_sensitivity`) switches on the quantizers of one operator after another and runs
all images each time. bitalloy predicts the table from one probe matrix, and measures it exactly in segments.

    python -m venv /tmp/aimet && /tmp/aimet/bin/pip install aimet-onnx==2.42.0
    python benchmarks/sensitivity_vs_aimet.py --model yolo11n.onnx --images coco128-calib/images \
        --aimet-python /tmp/aimet/bin/python
    ... --operators 20                                  a quick look: every so many-th operator

The quantizers of an operator are, on both sides: its weights (int8, symmetric, per channel, min-max) and its output
(8 bits, asymmetric, per tensor, min-max over the same images), that of the first operator also the input of the model.
The score is the same: SQNR in dB of each head over all images, mean over the heads. What differs: AIMET rounds
weights to 255 steps of max/127.5, bitalloy to 254 of max/127; and constants that an elementwise operator reads are
rounded by AIMET only. Operators of which the quantizers are not the same are timed but not compared.

The last line is JSON. `probe` and `exact` have seconds, the ratio `times_faster` of AIMET's analysis to them, and the
agreement with AIMET's scores over `compared` operators; building AIMET's simulation and both calibrations are not in
the ratio and are listed beside it. `probe_agrees_with_exact` compares bitalloy's two tables.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from rich.console import Console
from scipy.stats import spearmanr

from bitalloy import load, open_data
from bitalloy.calibrate import collect
from bitalloy.graph import Graph, constant, name_of
from bitalloy.heads import find_heads
from bitalloy.matrix import ProbeMatrix, decibel
from bitalloy.records import UnitGraph, WeightSite
from bitalloy.sensitivity import Prober, Switchboard, damage
from bitalloy.targets import target
from bitalloy.targets.base import Core, split

CHILD = Path(__file__).with_name("aimet_sensitivity.py")


def operator_units(graph: Graph) -> UnitGraph:
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

    device = replace(target("ort-cpu"), match=match, follows=lambda node: False)
    return split(graph, device, ())


def operator_sites(graph: Graph, units: UnitGraph) -> dict[str, tuple[frozenset[str], dict[str, list[str]]]]:
    """Operator -> its sites, and what they round in AIMET's terms."""
    first = {use.node: e for e in units.edges if e.producer is None for use in e.uses}
    found = {}
    for unit in units.units:
        leaving = [e for e in units.edges if e.producer == unit.id and e.rooted]
        sites = {w.id for w in unit.weights} | {e.id for e in leaving}
        rounds = {
            "inputs": [first[unit.id].tensor] if unit.id in first else [],
            "outputs": [unit.root] if leaving else [],
            "weights": [w.tensor for w in unit.weights],
        }
        if unit.id in first:
            sites.add(first[unit.id].id)
        if sites:
            found[unit.id] = (frozenset(sites), rounds)
    return found


def agreement(theirs: np.ndarray, ours: np.ndarray) -> dict[str, float]:
    """Of two scores in dB."""
    gap = np.abs(theirs - ours)
    return {
        "spearman": round(float(spearmanr(theirs, ours)[0]), 4),
        "mean_abs_db": round(float(gap.mean()), 3),
        "max_abs_db": round(float(gap.max()), 3),
    }


def run_aimet(python: Path, job: dict, folder: Path) -> dict:
    """AIMET's result."""
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
    parser.add_argument("--aimet-python", type=Path, required=True, help="interpreter that has aimet-onnx 2.42")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--probes", type=int, default=8, help="reverse passes per image, shared by the heads")
    parser.add_argument("--operators", type=int, help="only so many operators, evenly chosen")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console(stderr=True, soft_wrap=True)

    model = load(options.model)
    heads = find_heads(model)
    device = replace(target("ort-cpu"), pair_limit=None)  # weights as AIMET scales them
    units = operator_units(model)
    data = open_data(model, options.images, limit=options.samples, seed=options.seed)
    feeds = [data.feeds(i) for i in range(len(data))]
    table = operator_sites(model, units)
    names = list(table)
    if options.operators is not None:
        names = [names[i] for i in np.linspace(0, len(names) - 1, options.operators).astype(int)]

    with tempfile.TemporaryDirectory() as folder:
        files = []
        for index, sample in enumerate(feeds):
            files.append(str(Path(folder) / f"{index}.npz"))
            np.savez(files[-1], **sample)
        job = {
            "model": str(options.model.resolve()),
            "feeds": files,
            "heads": [{k: getattr(h, k) for k in ("output", "axis", "start", "stop")} for h in heads],
            "operators": names if options.operators is not None else None,
        }
        console.print("AIMET: one operator after another")
        theirs = run_aimet(options.aimet_python, job, Path(folder))
    console.print(f"AIMET took {theirs['analysis_seconds']:.1f} s for {len(theirs['operators'])} operators")

    start = time.perf_counter()
    tensors = {e.root for e in units.edges}
    ranges = collect(model.to_bytes(), [t for t in model.value if t in tensors], iter(feeds)).ranges("minmax")
    calibrated = time.perf_counter()
    prober = Prober(model, units, heads, ranges, device)
    built = time.perf_counter()
    each = max(2, -(-options.probes // len(heads)))
    shards = [prober.measure(f, sample=i, probes=each, seed=options.seed) for i, f in enumerate(feeds)]
    matrix = ProbeMatrix.concatenate(shards)
    predicted = {n: matrix.damage(matrix.select(table[n][0])).mean(axis=0) for n in names}
    probed = time.perf_counter()
    del prober
    board = Switchboard(model, units, ranges, device)
    sets = [board.gates(table[n][0]) for n in names]
    found, _ = damage(board, sets, heads, feeds)
    exact = dict(zip(names, found.mean(axis=0).T, strict=True))
    measured = time.perf_counter()

    energy = np.mean(theirs["energy"], axis=0)
    same, other = [], []
    for name, entry in theirs["operators"].items():
        alike = name in exact and all(sorted(entry[k]) == sorted(v) for k, v in table[name][1].items())
        (same if alike else other).append(name)
    aimet = {n: np.mean(theirs["operators"][n]["errors"], axis=0) / energy for n in same}

    def scores(damages: dict[str, np.ndarray]) -> np.ndarray:
        return np.array([float(decibel(damages[n]).mean()) for n in same])

    for name in sorted(same, key=lambda n: float(decibel(aimet[n]).mean()))[:15]:
        texts = [f"{label} {decibel(t[name]).round(1)}" for label, t in (("AIMET", aimet), ("exact", exact))]
        console.print(f"{name:<50} {', '.join(texts)}, probe {decibel(predicted[name]).round(1)} dB", highlight=False)
    seconds, size = theirs["analysis_seconds"], len(theirs["operators"])
    result = {
        "benchmark": "sensitivity_vs_aimet",
        "model": model.info.name,
        "model_sha256": model.info.sha256[:16],
        "samples": len(feeds),
        "probes": each * len(heads),
        "seed": options.seed,
        "aimet": {
            "version": theirs["version"],
            "operators": size,
            "seconds": round(seconds, 2),
            "build_seconds": round(theirs["build_seconds"], 2),
            "calibration_seconds": round(theirs["calibration_seconds"], 2),
        },
        "compared": len(same),
        "not_compared": other,
        "calibration_seconds": round(calibrated - start, 2),
        "probe": {
            "operators": len(names),
            "seconds": round(probed - calibrated, 2),
            "build_seconds": round(built - calibrated, 2),
            "times_faster": round(seconds / (probed - calibrated), 1),
            **agreement(scores(aimet), scores(predicted)),
        },
        "exact": {
            "operators": len(names),
            "seconds": round(measured - probed, 2),
            "times_faster": round(seconds / size / ((measured - probed) / len(names)), 2),
            **agreement(scores(aimet), scores(exact)),
        },
        "probe_agrees_with_exact": agreement(scores(exact), scores(predicted)),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
