"""SQNR of rounded models without and with each light correction, whether or not `bitalloy run` would keep it.

Scaling between layers: everything in INT8, each rule by itself. Bias correction: everything in INT8, and random halves
of the units. Factors, ranges and offsets come from the first samples, SQNR from the last ones.

    python benchmarks/corrections.py --model yolo11n.onnx --images coco128-calib/images --out DIR
    python benchmarks/corrections.py --model mobilevlm-shapes --out DIR

The last line is JSON: `scaling` and `bias`, by rule or plan: `places`, and dB by head `without` and `with`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bitalloy import Calibrated, Settings, calibrate
from bitalloy.core.schemes import Plan
from bitalloy.measure.sqnr import artefact_sqnr
from bitalloy.pipeline.prepare import prepare
from bitalloy.rewrite.biases import bias_offsets, find_biases, mean_inputs
from bitalloy.rewrite.equalize import CROSS_LAYER, SMOOTHING, exponents, find_places, scale
from bitalloy.targets.placement import weight_site


def compare(parts: dict[str, Calibrated], plan: Plan, samples: Sequence[int]) -> dict[str, dict[str, float]]:
    """SQNR in dB by head of a plan on `without` and on `with`."""
    first = parts["without"]
    models = {name: part.executable(part.artefact(plan)) for name, part in parts.items()}
    found = artefact_sqnr(first.original(), models, first.heads, (first.data.feeds(i) for i in samples))
    return {n: {h.name: round(e.value, 2) for h, e in zip(first.heads, found[n], strict=True)} for n in parts}


def main() -> None:
    """Measure and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an .onnx file or a name of the zoo")
    parser.add_argument("--images", type=Path, help="folder of images, or .npz feeds; the embedded sample without it")
    parser.add_argument("--out", type=Path, required=True, help="run directory")
    parser.add_argument("--samples", type=int, default=16, help="fitted; others are measured")
    parser.add_argument("--halves", type=int, default=2, help="random plans of half of the units")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    prepared = prepare(options.model, out=options.out, data=options.images, seed=options.seed)
    model, data = prepared.model, prepared.data
    settings = Settings(seed=options.seed, calibration_samples=options.samples, equalize=False, bias_correction=False)
    plain = calibrate(model, data, settings, work=prepared.work)
    feeds, judged = [plain.data.feeds(i) for i in plain.parts.calibration], plain.parts.verification
    result: dict[str, dict[str, object]] = {"scaling": {}, "bias": {}}

    places = find_places(model)
    factors = exponents(model, places, feeds)
    for rule in (SMOOTHING, CROSS_LAYER):
        own = {p: powers for p, powers in factors.items() if p.rule == rule}
        entry: dict[str, object] = {"found": sum(p.rule == rule for p in places), "places": len(own)}
        if own:
            parts = {"without": plain, "with": calibrate(scale(model, own), data, settings, work=prepared.work)}
            entry |= compare(parts, plain.units.lowest(), judged)
        result["scaling"][rule] = entry
        print(rule, entry, flush=True)

    generator, lowest = np.random.default_rng(options.seed), plain.units.lowest()
    plans = {"all": lowest}
    for number in range(options.halves):
        plans[f"half {number}"] = Plan(choice for choice in lowest.listed if generator.random() < 0.5)
    biases = find_biases(plain.graph, plain.units)
    found = bias_offsets(plain.graph, biases, plain.recipe(), mean_inputs(plain.graph, biases, feeds))
    parts = {"without": plain, "with": plain.corrected(found)}
    layers = {u.id: u.weights for u in plain.units.units}
    for name, plan in plans.items():
        result["bias"][name] = {
            "places": sum(weight_site(w, s).id in found for u, s in plan.items() for w in layers[u]),
            **compare(parts, plan, judged),
        }
        print(name, result["bias"][name], flush=True)
    facts = {"benchmark": "corrections", "model": options.model, "samples": len(feeds), "seed": options.seed}
    print(json.dumps({**facts, "model_sha256": model.info.sha256[:16], **result}))


if __name__ == "__main__":
    main()
