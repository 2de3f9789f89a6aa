"""Whether the analysis costs the same number of float passes however large the network is.

YOLO11 n, s, m, l and x with random weights: the same structure, 88 to 174 convolutions, 2.6 to 57 million parameters.
One-at-a-time measurement grows with the number of units times the time of a pass; the probe matrix should only grow
with the time of a pass. For each network the time to probe one image (forward, errors, reverse passes) is taken by
turns with the time of a float pass, and their ratio is compared between the networks. Needs torch, to export them.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --scales ns --size 160 --repeats 3      a quick look

The last line is JSON. `passes_per_image` has the ratio of each network, `largest_over_smallest` how flat it is,
`build_passes` the time to build the probe's sessions, once per model, likewise in float passes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from rich.console import Console

from bitalloy import load
from bitalloy.calibrate.streaming import collect
from bitalloy.model.heads import find_heads
from bitalloy.runtime.ort import OrtSession
from bitalloy.sensitivity.probe import Prober
from bitalloy.targets import target
from bitalloy.targets.base import split
from bitalloy.targets.recipe import Recipe


def export(scale: str, size: int, seed: int, path: Path) -> None:
    """Write YOLO11 of a scale with random weights."""
    try:
        import torch
    except ImportError:
        raise SystemExit("This benchmark exports networks with torch. Install it with: pip install torch") from None
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "reference"))
    from yolo11 import Yolo11, fuse

    torch.manual_seed(seed)
    network = fuse(Yolo11(scale=scale).eval())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the legacy exporter is wanted, and a fixed image size as well
        image = torch.zeros(1, 3, size, size)
        torch.onnx.export(network, (image,), path, opset_version=17, dynamo=False, input_names=["images"])


def measure(path: Path, options: argparse.Namespace) -> dict[str, float]:
    """Times of one network."""
    model = load(path)
    device, heads = target("ort-cpu"), find_heads(model)
    units = split(model, device, heads)
    name, shape = model.info.inputs[0].name, model.info.inputs[0].shape
    random = np.random.default_rng(options.seed)
    feeds = {name: random.random([int(d) for d in shape], dtype=np.float32)}
    tensors = {e.root for e in units.edges} | {e.tensor for u in units.units for e in u.inner}
    ranges = collect(model.to_bytes(), [t for t in model.value if t in tensors], iter([feeds])).ranges("minmax")
    session = OrtSession(model.to_bytes())
    start = time.perf_counter()
    prober = Prober(model, heads, [Recipe(units, device, ranges)])
    build = time.perf_counter() - start
    each = max(2, -(-options.probes // len(heads)))
    passes, probes = [], []
    for number in range(options.repeats + 1):
        started = time.perf_counter()
        session.run(feeds)
        between = time.perf_counter()
        prober.measure(feeds, sample=0, probes=each, seed=options.seed)
        if number:  # the first round allocates
            passes.append(between - started)
            probes.append(time.perf_counter() - between)
    float_s, probe_s = float(np.median(passes)), float(np.median(probes))
    return {
        "parameters": model.info.parameters,
        "units": len(units.lowest()),
        "float_ms": round(1e3 * float_s, 2),
        "probe_ms": round(1e3 * probe_s, 2),
        "passes_per_image": round(probe_s / float_s, 2),
        "build_passes": round(build / float_s, 1),
    }


def main() -> None:
    """Measure all networks and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scales", default="nsmlx", help="letters of the networks")
    parser.add_argument("--size", type=int, default=640, help="side of the image, a multiple of 32")
    parser.add_argument("--probes", type=int, default=8, help="reverse passes per image, shared by the heads")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of one pass and one probed image each")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console(stderr=True, soft_wrap=True)

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for scale in options.scales:
            path = Path(folder) / f"yolo11{scale}.onnx"
            export(scale, options.size, options.seed, path)
            found[f"yolo11{scale}"] = measure(path, options)
            path.unlink()
            console.print(f"yolo11{scale}: {found[f'yolo11{scale}']}", highlight=False)
    ratios = [f["passes_per_image"] for f in found.values()]
    result = {
        "benchmark": "scaling",
        "size": options.size,
        "probes": options.probes,
        "repeats": options.repeats,
        "seed": options.seed,
        "passes_per_image": {name: f["passes_per_image"] for name, f in found.items()},
        "largest_over_smallest": round(max(ratios) / min(ratios), 3),
        "build_passes": {name: f["build_passes"] for name, f in found.items()},
        "models": found,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
