"""Predicted against executed SQNR of plans that mix the schemes of a target, head by head.

Plans of every model: everything that may in each scheme (the rest in the baseline), and random ones: of every unit a
scheme, each with a chance of its own for the whole plan, so that plans reach from nearly float to all in the lowest.
Measured: the models as they are shipped, executed by the target's runtime, or for a target that is not here by ONNX
Runtime on the CPU with every rounding as the graphs say, on the samples of the probe matrix.

    python benchmarks/format_prediction.py --out /tmp/formats
    python benchmarks/format_prediction.py --out /tmp/fp8 --target tensorrt --device l4 --schemes fp16,fp8,int8 \
        --random 1 --models yolo11n-shapes,segformer-b0-shapes
    python benchmarks/format_prediction.py --out /tmp/layers --models decoder.onnx --data feeds/

The last line is JSON: model -> plan -> `units` by scheme, `opset`, and `heads` with [predicted, executed] dB; with the
mean and the largest error of all heads of all plans, and of every model and head the rank correlation over its plans.
Of heads named `... KL` dB are below 1 nat.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TypedDict

import numpy as np
import onnx
import onnx_ir as ir
from rich.console import Console
from scipy.stats import spearmanr

from bitalloy import Plan, RunDirectory, Settings, Workspace, analyze
from bitalloy.measure.sqnr import artefact_sqnr
from bitalloy.pipeline.prepare import prepare
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.sensitivity.matrix import bend, decibel
from bitalloy.targets.placement import rounded


class Entry(TypedDict):
    """What was found of one plan."""

    units: dict[str, int]
    opset: int
    heads: dict[str, list[float]]


def plans_of(analysis: Analysis, count: int, seed: int) -> dict[str, Plan]:
    """Return name -> plan: all that can in one scheme, for each scheme, and mixtures drawn at random."""
    random, units = np.random.default_rng(seed), analysis.units
    names = [s.name for s in units.schemes]
    found = {f"all {name}": Plan.of(name, *units.able(name)) for name in names[1:]}
    for i in range(count):
        chance = random.dirichlet(np.full(len(names), 0.5))
        drawn = {u.id: names[int(random.choice(len(names), p=chance))] for u in units.units}
        found[f"random {i}"] = Plan({u.id: drawn[u.id] for u in units.units if drawn[u.id] in u.allowed})
    return {name: plan for name, plan in found.items() if plan}


def measure(analysis: Analysis, plans: dict[str, Plan]) -> dict[str, Entry]:
    """Predictions beside executions; the models pass the ONNX checker."""
    feeds = [analysis.data.feeds(i) for i in analysis.parts.probe[: analysis.matrix.samples]]
    result: dict[str, Entry] = {}
    for name, lowered in plans.items():
        artefact = analysis.artefact(lowered)
        protos = [ir.to_proto(m) for m in artefact.models.values() if isinstance(m, ir.Model)]
        for proto in protos if not artefact.large else ():
            onnx.checker.check_model(proto, full_check=True)
        found = artefact_sqnr(analysis.original(), {name: analysis.executable(artefact)}, analysis.heads, feeds)
        linear = analysis.matrix.damage(analysis.matrix.select(rounded(analysis.units, lowered))).mean(axis=0)
        predicted = decibel(linear * bend(analysis.secant, linear))
        result[name] = {
            "units": lowered.counts() | {"all": len(analysis.units.units)},
            "opset": max(o.version for proto in protos for o in proto.opset_import if o.domain == ""),
            "heads": {
                head.name: [round(float(p), 2), round(m.value, 2)]
                for head, p, m in zip(analysis.heads, predicted, found[name], strict=True)
            },
        }
    return result


def ranks(plans: dict[str, Entry]) -> dict[str, float]:
    """Head -> rank correlation of predicted and executed dB over the plans of a model."""
    rows = [entry["heads"] for entry in plans.values()]
    if len(rows) < 3:
        return {}
    tables = {head: np.array([row[head] for row in rows]) for head in rows[0]}
    return {head: round(float(spearmanr(t[:, 0], t[:, 1]).statistic), 4) for head, t in tables.items()}


def main() -> None:
    """Run the comparison and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="mobilevlm-shapes", help="files or names of models, with commas")
    parser.add_argument("--data", type=Path, help="samples of the models; those of embedded samples without it")
    parser.add_argument("--target", default="ort-cpu")
    parser.add_argument("--device", default="", help="device of a target that is not here")
    parser.add_argument("--schemes", default="w4,w8,int8-dynamic", help="with commas")
    parser.add_argument("--random", type=int, default=20, help="random plans")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run directories")
    parser.add_argument("--samples", type=int, default=8, help="of the probe matrix and of the measurement")
    parser.add_argument("--probes", type=int, default=8, help="reverse passes per sample")
    parser.add_argument("--calibration-samples", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console(stderr=True, soft_wrap=True)
    settings = Settings(
        targets=(options.target,),
        device=options.device,
        schemes=tuple(options.schemes.split(",")),
        samples=options.samples,
        probes=options.probes,
        calibration_samples=options.calibration_samples,
        range_method="minmax",
        seed=options.seed,
        protect=False,
        equalize=False,
        bias_correction=False,
    )
    models: dict[str, dict[str, Entry]] = {}
    for name in options.models.split(","):
        folder = options.out / Path(name).name
        prepared = prepare(name, out=folder, data=options.data)
        work = Workspace(RunDirectory(folder))
        analysis = analyze(prepared.model, prepared.data, settings, work=work)
        found = models[name] = measure(analysis, plans_of(analysis, options.random, options.seed))
        for plan, entry in found.items():
            console.print(f"{name} {plan}: {entry}", highlight=False)
    pairs = [pair for found in models.values() for entry in found.values() for pair in entry["heads"].values()]
    errors = [abs(p - m) for p, m in pairs]
    print(
        json.dumps(
            {
                "benchmark": "format_prediction",
                "target": options.target,
                "device": options.device,
                "samples": options.samples,
                "seed": options.seed,
                "spearman": {name: ranks(found) for name, found in models.items()},
                "mean_error_db": round(float(np.mean(errors)), 2),
                "largest_error_db": round(max(errors), 2),
                "models": models,
            }
        )
    )


if __name__ == "__main__":
    main()
