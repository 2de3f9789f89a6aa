"""What ways to round weights in blocks do to a language model: everything that can be in one scheme of blocks.

Weights at their nearest numbers, and by each way of `--weight-rounding`, fitted on calibration samples. Measured on
samples that were neither calibrated nor probed: SQNR of the outputs and KL divergence in dB (of the latter below 1
nat), and with `--limit` the task metrics on the embedded labels. Every repeat draws other samples for all of it.

    python benchmarks/weight_rounding.py --out /tmp/rounding

The last line is JSON: `schemes`, by scheme and way dB by head (`db`, means over the repeats, and `repeats`), task
`metrics` of the first repeat, and the CPU time that choosing the numbers and their trial took (`seconds`).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from bitalloy import Calibrated, Plan, RunDirectory, Settings, Workspace, calibrate
from bitalloy.corrections.rounding import NEAREST, ROUNDING_WAYS
from bitalloy.measure.sqnr import artefact_sqnr
from bitalloy.pipeline.prepare import Prepared, prepare
from bitalloy.runtime.machine import machine_name
from bitalloy.tasks.evaluate import Evaluator

CALIBRATED = 24
"""Calibration samples: 16 that the numbers are fitted on, and 8 of their trial."""


def unseen(prepared: Prepared, part: Calibrated, count: int) -> list[int]:
    """Draw samples that serve no part of the analysis."""
    data = prepared.data
    known = {part.data.name(i) for i in range(len(part.data))}
    free = [i for i in range(len(data)) if data.name(i) not in known]
    return sorted(np.random.default_rng(part.settings.seed).permutation(free)[:count].tolist())


def measure(prepared: Prepared, parts: dict[str, Calibrated], scheme: str, count: int) -> dict[str, dict[str, float]]:
    """Return for every way dB by head."""
    first = next(iter(parts.values()))
    plan = Plan.of(scheme, *first.units.able(scheme))
    models = {way: part.executable(part.artefact(plan)) for way, part in parts.items()}
    feeds = (prepared.data.feeds(i) for i in unseen(prepared, first, count))
    found = artefact_sqnr(first.original(), models, first.heads, feeds, seed=first.settings.seed)
    return {way: {h.name: round(e.value, 2) for h, e in zip(first.heads, found[way], strict=True)} for way in parts}


def metrics(prepared: Prepared, part: Calibrated, scheme: str, limit: int, work: Workspace) -> dict[str, float]:
    """Return task metrics of float and of everything in a scheme, on the labels of the sample."""
    evaluator = Evaluator(part, prepared.labels, limit, work, prepared.image)  # type: ignore[arg-type]
    plan = Plan.of(scheme, *part.units.able(scheme))
    subjects = {"float": evaluator.reference, scheme: evaluator.subject(plan)}
    found: dict[str, float] = {}
    for result in evaluator.results(subjects, "evaluate", resamples=0):
        for metric in result.metrics:
            found[metric.name] = round(metric.values[scheme].value, 5)
            found[f"{metric.name} of float"] = round(metric.values["float"].value, 5)
    return found


def main() -> None:
    """Measure and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilevlm-shapes", help="an .onnx file or a name of the zoo")
    parser.add_argument("--data", type=Path, help="samples; the embedded ones without it")
    parser.add_argument("--schemes", default="w4,w4-128", help="with commas")
    parser.add_argument("--samples", type=int, default=48, help="that are measured on")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=int, default=0, help="labelled samples for task metrics")
    parser.add_argument("--out", type=Path, required=True, help="run directory")
    options = parser.parse_args()
    names, ways = options.schemes.split(","), (NEAREST, *ROUNDING_WAYS)
    prepared = prepare(options.model, out=options.out, data=options.data)
    work = Workspace(RunDirectory(options.out))
    result: dict[str, dict[str, Any]] = {s: {w: {"repeats": []} for w in ways} for s in names}
    seconds: dict[str, list[float]] = {way: [] for way in ROUNDING_WAYS}
    for seed in range(options.repeats):
        parts = {}
        for way in ways:
            settings = Settings(
                seed=seed,
                schemes=tuple(names),
                calibration_samples=CALIBRATED,
                range_method="minmax",
                equalize=False,
                bias_correction=False,
                weight_rounding=way,
            )
            start = time.process_time()  # the first way has calibrated the ranges, which all share
            parts[way] = calibrate(prepared.model, prepared.data, settings, work=work)
            if way != NEAREST:
                seconds[way].append(time.process_time() - start)
        for scheme in names:
            for way, found in measure(prepared, parts, scheme, options.samples).items():
                result[scheme][way]["repeats"].append(found)
                print(seed, scheme, way, found, flush=True)
                if seed == 0 and options.limit:
                    result[scheme][way]["metrics"] = metrics(prepared, parts[way], scheme, options.limit, work)
                    print(result[scheme][way]["metrics"], flush=True)
    for entry in (e for by_way in result.values() for e in by_way.values()):
        heads = entry["repeats"][0]
        entry["db"] = {h: round(float(np.mean([one[h] for one in entry["repeats"]])), 2) for h in heads}
    print(
        json.dumps(
            {
                "benchmark": "weight_rounding",
                "machine": machine_name(),
                "model": options.model,
                "samples": options.samples,
                "seconds": {way: round(float(np.median(found)), 2) for way, found in seconds.items()},
                "schemes": result,
            }
        )
    )


if __name__ == "__main__":
    main()
