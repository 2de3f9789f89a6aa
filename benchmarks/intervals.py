"""Whether the 95 % intervals of the sensitivity table hold what they promise.

The probe matrix of many images gives the value that a unit's interval from few images should contain. The many images
are dealt into blocks of the size of an ordinary analysis; for every block, unit and head the value from all images is
or is not inside the block's interval. (A block is part of all images, so a share a little above 95 % is expected.)

    python benchmarks/intervals.py --model yolo11n.onnx --images coco128-calib/images --out /tmp/intervals

Rows of the matrix are stored in --out image by image; the same command goes on after a stop. The last line is JSON:
`inside` is the share of units whose interval contains the value, per head, for the first block and for all blocks;
`width_db` the median width of the intervals.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from bitalloy import RunDirectory, Settings, Workspace, calibrate, load, open_data
from bitalloy.core.schemes import Plan
from bitalloy.core.store import StageInputs, key_of
from bitalloy.rewrite.calibrated import ExecutedNetwork
from bitalloy.sensitivity.matrix import ProbeMatrix, draws, estimate_sqnr
from bitalloy.sensitivity.probe import Prober
from bitalloy.targets.placement import rounded


class RowInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides the rows of a sample."""

    network: ExecutedNetwork
    probes: int
    seed: int


def main() -> None:
    """Run the check and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an .onnx file or a name of the zoo")
    parser.add_argument("--images", type=Path, required=True, help="folder of images, or .npz feeds")
    parser.add_argument("--out", type=Path, required=True, help="run directory that keeps the rows")
    parser.add_argument("--few", type=int, default=16, help="images of a block")
    parser.add_argument("--many", type=int, default=64, help="images of the value to be contained")
    parser.add_argument("--probes", type=int, default=8, help="reverse passes per image, shared by the heads")
    parser.add_argument("--calibration-samples", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console(stderr=True)

    model = load(options.model)
    data = open_data(model, options.images, limit=options.many, seed=options.seed)
    if len(data) < options.many or options.many < 2 * options.few:
        parser.error(f"{len(data)} images; needed are --many, and at least twice --few")
    store = RunDirectory(options.out)
    settings = Settings(calibration_samples=options.calibration_samples, seed=options.seed)
    ready = calibrate(model, data, settings, work=Workspace(store))
    each = max(2, -(-options.probes // len(ready.heads)))
    key = key_of(RowInputs(network=ready.executed, probes=each, seed=options.seed))
    prober: Prober | None = None
    shards = []
    for index in track(range(options.many), description="probe", console=console):
        stored = store.get("interval-rows", key, f"{index:06d}")
        if stored is None:
            prober = prober or Prober(ready.graph, ready.heads, [ready.recipe()])
            stored = prober.measure(data.feeds(index), sample=index, probes=each, seed=options.seed).to_bytes()
            store.put("interval-rows", key, stored, f"{index:06d}")
        shards.append(ProbeMatrix.from_bytes(stored))
    everything = ProbeMatrix.concatenate(shards)
    blocks = [
        ProbeMatrix.concatenate(shards[start : start + options.few])
        for start in range(0, options.many - options.few + 1, options.few)
    ]
    free = ready.units.lowest_gated()

    chosen = [everything.select(rounded(ready.units, Plan.of(scheme, u))) for u, scheme in free.items()]
    weights = draws(options.many, options.seed)
    truth = np.array([[e.value for e in estimate_sqnr(everything, c, weights)] for c in chosen])  # (units, heads)
    inside, width = [], []
    weights = draws(options.few, options.seed)
    for block in blocks:
        found = [estimate_sqnr(block, c, weights) for c in chosen]
        low, high = (np.array([[getattr(e, side) for e in row] for row in found]) for side in ("low", "high"))
        reached = truth < 120
        held = np.where(reached, (low <= truth) & (truth <= high), np.nan)
        inside.append(np.nanmean(held, axis=0))
        width.append(np.nanmedian(np.where(reached, high - low, np.nan), axis=0))

    result = {
        "benchmark": "intervals",
        "model": model.info.name,
        "model_sha256": model.info.sha256[:16],
        "few": options.few,
        "many": options.many,
        "blocks": len(blocks),
        "probes": each * len(ready.heads),
        "seed": options.seed,
        "units": len(free),
        "inside": {
            h.name: {
                "first": round(float(inside[0][i]), 4),
                "all": round(float(np.mean([block[i] for block in inside])), 4),
            }
            for i, h in enumerate(ready.heads)
        },
        "width_db": {h.name: round(float(np.mean([w[i] for w in width])), 2) for i, h in enumerate(ready.heads)},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
