"""Predicted against measured latency of plans, of the front and at random, all interleaved in one sitting.

The cost table is that of `bitalloy run`: profiles of a few whole-model variants, none of which is measured here. Half
of the plans are of the Pareto front, evenly spread; the others are random runs of neighbouring units and scattered ones
of growing density. Sessions are made anew in every sitting, models take turns in every round, and a plan's latency is
its median ratio to the float model in the same round, so that other work on the machine cancels.

    python benchmarks/plan_latency.py --model yolo11n.onnx --images coco128-calib/images --out DIR

The last line is JSON: `mean_percent` and `max_percent` error of the predicted ratio, `spearman` over the plans, the
same of `front` and `random` alone, and how `unsteady` the machine was: the median over the 10th percentile of float.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from scipy.stats import spearmanr

from bitalloy import Budget, RunDirectory, Settings, Workspace, analyze, confirm, load, measure_cost, open_data, plan
from bitalloy.core.effort import EFFORTS, USUAL_EFFORT
from bitalloy.measure.bench import interleave
from bitalloy.measure.prices import latency_us
from bitalloy.pipeline.run import CONFIRM_SAMPLES
from bitalloy.runtime.steps import once
from plan_prediction import random_plans

SITTINGS = 3


def agreement(measured: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Errors of predicted ratios in percent of the measured ones, and rank correlation."""
    error = 100 * np.abs(predicted / measured - 1)
    return {
        "mean_percent": round(float(error.mean()), 2),
        "max_percent": round(float(error.max()), 2),
        "spearman": round(float(spearmanr(measured, predicted)[0]), 4),
    }


def main() -> None:
    """Measure and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an .onnx file or a name of the zoo")
    parser.add_argument("--images", type=Path, required=True, help="folder of images, or .npz feeds")
    parser.add_argument("--out", type=Path, required=True, help="run directory that keeps analysis and cost table")
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=20, help="timed rounds in each of three sittings")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console(stderr=True, soft_wrap=True)

    work = Workspace(RunDirectory(options.out))
    model = load(options.model)
    data = open_data(model, options.images, seed=options.seed)
    analysis = analyze(model, data, Settings(seed=options.seed), work=work)
    analysis = confirm(analysis, EFFORTS[USUAL_EFFORT].confirmed, flagged=False, samples=CONFIRM_SAMPLES, work=work)
    table = measure_cost(analysis, work=work)
    front = plan(analysis, Budget(latency_ratio=1.0), table=table, work=work).plan.pareto
    inner = [p.chosen for p in front if p.schemes]
    half = min(options.plans // 2, len(inner))
    chosen = [inner[round(i)] for i in np.linspace(0, len(inner) - 1, half)]
    plans = [*chosen, *random_plans(analysis, np.linspace(0.1, 1.0, options.plans - half), [options.seed, 71])]
    predicted = np.array([latency_us(table, analysis.units, p) for p in plans]) / table.float_us

    artefacts = {str(i): analysis.artefact(p) for i, p in enumerate(plans)}
    rounds: list[np.ndarray] = []
    reference: list[np.ndarray] = []
    for _ in range(SITTINGS):
        sessions = {"float": analysis.original().session(), **{n: a.session() for n, a in artefacts.items()}}
        found = interleave(sessions, [once(data.feeds(0))], repeats=options.repeats)
        times = {name: series[:, 0] for name, series in found.items()}
        for session in sessions.values():
            session.close()
        reference.append(times["float"])
        rounds.append(np.stack([times[n] / times["float"] for n in artefacts]))
    measured = np.median(np.concatenate(rounds, axis=1), axis=1)
    floats = np.concatenate(reference)
    for i, p in enumerate(plans):
        kind = "front " if i < half else "random"
        console.print(f"{kind} {len(p):4} units: predicted {predicted[i]:.3f}x, measured {measured[i]:.3f}x")
    result = {
        "benchmark": "plan_latency",
        "model": model.info.name,
        "model_sha256": model.info.sha256[:16],
        "device": table.device,
        "threads": table.threads,
        "plans": len(plans),
        **agreement(measured, predicted),
        "front": agreement(measured[:half], predicted[:half]),
        "random": agreement(measured[half:], predicted[half:]),
        "table_residual_percent": table.residual_percent,
        "float_ms": round(float(np.median(floats)), 2),
        "unsteady": round(float(np.median(floats) / np.percentile(floats, 10)), 2),
        "seed": options.seed,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
