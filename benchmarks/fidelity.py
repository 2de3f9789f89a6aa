"""Predicted against exactly measured sensitivity of every convolution, side by side on the same images.

The prediction is the probe matrix. The measurement executes the network once per convolution and image with the
rounding of that convolution alone switched on (its weights, its input, its output). Besides, all convolutions at once:
predicted from the matrix, measured on the rewritten model in ONNX Runtime with its fused INT8 kernels.

    python benchmarks/fidelity.py --model yolo11n.onnx --images coco128-calib/images
    python benchmarks/fidelity.py --model yolo11n.onnx --images coco128-calib/images --scope sites

With `--scope sites` every rounding by itself is compared: each tensor on its way into a unit, and each weight.

As in `bitalloy run`, the units (or sites) that the probe finds worst are then measured on a few images, and the
measurement stands for their prediction (`confirmed`; their number and images are in the JSON, as are the figures of the
probe alone and of the units that were not measured).

The last line is JSON. `spearman`, `mean_abs_db` and `max_abs_db` are over the SQNR of the whole output (all elements
of all outputs together); `heads` has the same per head.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from scipy.stats import spearmanr

from bitalloy import load, open_data
from bitalloy.calibrate.streaming import collect
from bitalloy.core.effort import EFFORTS, USUAL_EFFORT
from bitalloy.core.schemes import Plan
from bitalloy.measure.bench import interleave
from bitalloy.measure.sqnr import output_sqnr
from bitalloy.model.heads import find_heads
from bitalloy.pipeline.run import CONFIRM_SAMPLES
from bitalloy.rewrite.apply import write_plan
from bitalloy.runtime.ort import OrtSession
from bitalloy.runtime.steps import once
from bitalloy.sensitivity.exact import Switchboard, damage, secant
from bitalloy.sensitivity.matrix import ProbeMatrix, bend, decibel
from bitalloy.sensitivity.probe import Prober
from bitalloy.targets import target
from bitalloy.targets.base import split
from bitalloy.targets.placement import all_sites, rounded
from bitalloy.targets.recipe import Recipe


def agreement(exact_db: np.ndarray, predicted_db: np.ndarray) -> dict[str, float]:
    """Rank correlation and errors in dB of the units that reach the head at all."""
    reached = exact_db < 120
    gap = np.abs(exact_db - predicted_db)[reached]
    return {
        "spearman": round(float(spearmanr(exact_db[reached], predicted_db[reached])[0]), 4),
        "mean_abs_db": round(float(gap.mean()), 3),
        "max_abs_db": round(float(gap.max()), 3),
        "units": int(reached.sum()),
    }


def main() -> None:
    """Run the comparison and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an .onnx file or a name of the zoo")
    parser.add_argument("--images", type=Path, required=True, help="folder of images, or .npz feeds")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--probes", type=int, default=8, help="reverse passes per image, shared by the heads")
    parser.add_argument("--scope", choices=("convolutions", "sites"), default="convolutions")
    parser.add_argument(
        "--confirm", type=int, default=EFFORTS[USUAL_EFFORT].confirmed, help="how many of the worst are measured"
    )
    parser.add_argument("--ranges", default="minmax", help="range method of the calibration")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console(stderr=True)

    model = load(options.model)
    device = target("ort-cpu")
    heads = tuple(h for h in find_heads(model) if h.scores is None and not h.kind)
    units = split(model, device, heads)
    data = open_data(model, options.images, limit=options.samples, seed=options.seed)
    feeds = [data.feeds(i) for i in range(len(data))]
    tensors = {e.root for e in units.edges} | {e.tensor for u in units.units for e in u.inner}
    statistics = collect(model.to_bytes(), [t for t in model.value if t in tensors], iter(feeds))
    ranges = statistics.ranges(options.ranges)

    start = time.perf_counter()
    prober = Prober(model, heads, [Recipe(units, device, ranges)])
    built = time.perf_counter()
    each = max(2, -(-options.probes // len(heads)))
    shards = [prober.measure(f, sample=i, probes=each, seed=options.seed) for i, f in enumerate(feeds)]
    matrix = ProbeMatrix.concatenate(shards)
    probed = time.perf_counter()
    del prober
    reference = OrtSession(model.to_bytes())
    float_s = float(np.median(interleave({"float": reference}, [once(feeds[0])], repeats=20)["float"])) / 1e3

    whole = units.lowest_gated()
    convolutions = [u.id for u in units.units if u.kind == "Conv" and u.id in whole]
    recipe = Recipe(units, device, ranges)
    board = Switchboard(model, recipe, at_once=len(feeds))
    if options.scope == "sites":
        again = {site.id for site in all_sites(units) if site.again}
        found_sites = sorted(rounded(units, whole) - again)
        things = {s: frozenset({s}) for s in found_sites}
    else:
        things = {u: rounded(units, Plan.of(whole[u], u)) for u in convolutions}
    with Progress(console=console) as progress:
        task = progress.add_task("exact", total=len(things) * len(feeds))
        sets = [board.gates(sites) for sites in things.values()]
        exact, energy = damage(board, sets, heads, feeds, progress=lambda n: progress.advance(task, n))
    started = time.perf_counter()
    bent = secant(board, matrix, rounded(units, whole), heads, feeds)
    secant_s = time.perf_counter() - started
    linear = np.stack([matrix.damage(matrix.select(sites)).mean(axis=0) for sites in things.values()])  # things, heads
    measured = exact.mean(axis=0)  # (heads, things)
    share = energy.mean(axis=0) / energy.mean(axis=0).sum()
    started = time.perf_counter()
    worst = np.argsort(-linear.max(axis=1))[: options.confirm]
    few = damage(board, [sets[i] for i in worst], heads, feeds[:CONFIRM_SAMPLES])[0]
    confirm_s = time.perf_counter() - started
    predicted = linear.T.copy()
    predicted[:, worst] = few.mean(axis=0)
    others = np.setdiff1d(np.arange(len(things)), worst)

    together = Plan((u, whole[u]) for u in convolutions)
    rewritten = OrtSession(write_plan(model, recipe, together).to_bytes())
    found = output_sqnr(reference, {"int8": rewritten}, heads, iter(feeds), seed=options.seed)["int8"]
    all_linear = matrix.damage(matrix.select(rounded(units, together))).mean(axis=0)
    all_predicted = decibel(all_linear * bend(bent, all_linear))

    result = {
        "benchmark": "fidelity",
        "scope": options.scope,
        "model": model.info.name,
        "model_sha256": model.info.sha256[:16],
        "samples": len(feeds),
        "probes": each * len(heads),
        "seed": options.seed,
        **agreement(decibel(share @ measured), decibel(share @ predicted)),
        "heads": {h.name: agreement(decibel(measured[i]), decibel(predicted[i])) for i, h in enumerate(heads)},
        "probe_alone": agreement(decibel(share @ measured), decibel(linear @ share)),
        "not_measured": agreement(decibel(share @ measured)[others], decibel(linear @ share)[others]),
        "confirmed": {"units": len(worst), "images": CONFIRM_SAMPLES, "seconds": round(confirm_s, 3)},
        "probe_seconds": round(probed - start, 3),
        "probe_build_seconds": round(built - start, 3),
        "secant_seconds": round(secant_s, 3),
        "float_pass_seconds": round(float_s, 5),
        "float_passes_per_image": round((probed - built) / len(feeds) / float_s, 2),
        "all_int8_db": {
            "predicted": {h.name: round(float(d), 2) for h, d in zip(heads, all_predicted, strict=True)},
            "measured": {h.name: round(e.value, 2) for h, e in zip(heads, found, strict=True)},
        },
    }
    rows = sorted(zip(measured.T, predicted.T, things, strict=True), key=lambda r: -float(r[0].max()))
    for true, guess, name in rows[:15]:
        console.print(f"{name:<50} exact {decibel(true).round(1)} dB, predicted {decibel(guess).round(1)} dB")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
