"""Predicted against measured SQNR of plans with FP16, head by head.

Of every target: all units in FP16 that may run in it, every unit in the lowest scheme that it may take, units in
schemes drawn at random, and the plan of a search. Measured: the models as they are shipped, of a program all of its
graphs with the sizes that its files leave open, executed on the CPU with every rounding as the graphs say, on the
samples of the probe matrix.

    python benchmarks/half_prediction.py --model mobilesam-shapes --out /tmp/halves
    python benchmarks/half_prediction.py --model yolo11n.onnx --data coco128-calib/images --out /tmp/halves

The last line is JSON: target -> plan -> `heads` with [predicted, measured] dB, and how many units run in what. Of heads
named `... KL` dB are below 1 nat.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from rich.console import Console

from bitalloy import Budget, Plan, RunDirectory, Settings, Workspace, analyze, measure_cost, plan
from bitalloy.measure.prices import latency_us
from bitalloy.measure.sqnr import artefact_sqnr
from bitalloy.pipeline.prepare import prepare
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.sensitivity.matrix import bend, decibel
from bitalloy.targets.placement import rounded

TARGETS = ("tensorrt", "ort-cuda")


def plans_of(analysis: Analysis, seed: int, work: Workspace) -> dict[str, Plan]:
    """Name -> plan, without repetitions. The search has a budget halfway between float and everything lowered."""
    units, cost, lowest = analysis.units.units, measure_cost(analysis), analysis.units.lowest()
    ratio = round((1 + latency_us(cost, analysis.units, lowest) / cost.float_us) / 2, 2)
    random = np.random.default_rng(seed)
    found = {
        "FP16": Plan.of("fp16", *analysis.units.able("fp16")),
        "lowest": lowest,
        "random": Plan({u.id: u.allowed[int(random.integers(len(u.allowed)))] for u in units}),
        "search": plan(analysis, Budget(latency_ratio=ratio), table=cost, front=False, work=work).plan.chosen,
    }
    return {name: p for i, (name, p) in enumerate(found.items()) if p not in list(found.values())[:i]}


def measure(analysis: Analysis, plans: dict[str, Plan]) -> dict[str, object]:
    """Predictions beside measurements."""
    feeds = [analysis.data.feeds(i) for i in analysis.parts.probe[: analysis.matrix.samples]]
    models = {name: analysis.executable(analysis.artefact(p)) for name, p in plans.items()}
    found = artefact_sqnr(analysis.original(), models, analysis.heads, feeds)
    result: dict[str, object] = {}
    for name, lowered in plans.items():
        linear = analysis.matrix.damage(analysis.matrix.select(rounded(analysis.units, lowered))).mean(axis=0)
        predicted = decibel(linear * bend(analysis.secant, linear))
        result[name] = {
            "units": {"fp16": 0, "int8": 0} | lowered.counts() | {"all": len(analysis.units.units)},
            "heads": {
                head.name: [round(float(p), 2), round(m.value, 2)]
                for head, p, m in zip(analysis.heads, predicted, found[name], strict=True)
            },
        }
    return result


def main() -> None:
    """Run the comparison and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an .onnx file, a folder of a program, or a name of the zoo")
    parser.add_argument("--data", type=Path, help="samples; the embedded ones without it")
    parser.add_argument("--out", type=Path, required=True, help="run directory that keeps what was measured")
    parser.add_argument("--samples", type=int, default=8, help="of the probe matrix and of the measurement")
    parser.add_argument("--calibration-samples", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console(stderr=True, soft_wrap=True)
    prepared = prepare(options.model, out=options.out, data=options.data)
    work = Workspace(RunDirectory(options.out))
    settings = Settings(
        targets=TARGETS,
        samples=options.samples,
        calibration_samples=options.calibration_samples,
        seed=options.seed,
        protect=False,
    )
    first = analyze(prepared.model, prepared.data, settings, work=work)
    result: dict[str, object] = {
        "benchmark": "half_prediction",
        "model": prepared.model.info.name,
        "model_sha256": prepared.model.info.sha256[:16],
        "samples": first.matrix.samples,
        "seed": options.seed,
    }
    for analysis in first.targets:
        found = measure(analysis, plans_of(analysis, options.seed, work))
        result[analysis.target.name] = found
        for name, entry in found.items():
            console.print(f"{analysis.target.name} {name}: {entry}", highlight=False)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
