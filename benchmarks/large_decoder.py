"""Memory and time of the analysis of a large language-model decoder: MobileVLM V2's, with random weights.

The decoder is exported once by a process of its own, then loaded, calibrated and probed here. All weights stay in the
mapped files, so resident memory has two parts: pages of those files, which the system may drop at any time, and the
anonymous rest.

    python benchmarks/large_decoder.py --folder /tmp/decoder                  24 layers: 5.1 GiB on disk
    python benchmarks/large_decoder.py --folder /tmp/small --layers 2
    python benchmarks/large_decoder.py --folder /tmp/small --layers 2 --target ort-cuda
    python benchmarks/large_decoder.py --folder /tmp/decoder --schemes w4,w4-128,w8,int8-dynamic,int8    all as columns

On a target with FP16 all units that may run in it are then put into it, and the model is executed with every rounding:
`half_db` are predicted and measured SQNR of the logits.

The last line is JSON. `float_passes` is the time of one sample (its forward, and all probes back) over that of an
inference; `float_passes_cpu` is the same in processor time, which holds on a busy machine too. `anonymous_gb` is
the peak of anonymous memory, `peak_rss_gb` that of everything resident, pages of the mapped weights included.
Token embeddings are a graph of their own in these models, and not counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from bitalloy.calibrate.streaming import collect
from bitalloy.core.records import TensorRange
from bitalloy.core.schemes import Plan
from bitalloy.model import load as graph
from bitalloy.model.heads import Reference, find_heads
from bitalloy.model.load import Graph
from bitalloy.rewrite.apply import write_plan
from bitalloy.rewrite.cast import as_specified
from bitalloy.runtime.ort import Execution, OrtSession
from bitalloy.sensitivity.matrix import ProbeMatrix, decibel
from bitalloy.sensitivity.probe import Prober
from bitalloy.targets import target
from bitalloy.targets.base import split
from bitalloy.targets.placement import rounded
from bitalloy.targets.recipe import Recipe
from bitalloy.targets.safety import judge, tensors_to_judge

FLOAT_RUNS = 3
LLAMA = Path(__file__).resolve().parents[1] / "reference" / "llama.py"


def status_gb(field: str) -> float:
    """A memory figure of this process from /proc/self/status, in GB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e9
    return float("nan")


@contextmanager
def peak_of(field: str, every_s: float = 0.05) -> Iterator[list[float]]:
    """The largest value of a memory figure while the block runs, in a list of one."""
    peak, done = [status_gb(field)], threading.Event()

    def watch() -> None:
        while not done.wait(every_s):
            peak[0] = max(peak[0], status_gb(field))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def feeds_of(model: Graph, seed: int) -> dict[str, np.ndarray]:
    """Random embeddings, all positions attended, an empty cache."""
    generator = np.random.default_rng(seed)
    feeds = {}
    for spec in model.info.inputs:
        shape = tuple(int(d) for d in spec.shape)
        if spec.name == "attention_mask":
            feeds[spec.name] = np.ones(shape, np.int64)
        elif spec.name == "position_ids":
            feeds[spec.name] = np.arange(shape[1])[None]
        else:
            feeds[spec.name] = (0.02 * generator.standard_normal(shape)).astype(np.float32)
    return feeds


def sizes_of(path: Path, tokens: int, past: int = 0) -> dict[str, tuple[int, ...]]:
    """Input shapes for `tokens` tokens behind `past` ones."""
    import onnx

    inputs = onnx.load(path, load_external_data=False).graph.input
    known = {"new": tokens, "total": tokens + past, "past": past}
    return {
        i.name: tuple(d.dim_value or known[d.dim_param] for d in i.type.tensor_type.shape.dim)
        for i in inputs
    }  # fmt: skip


def only(model: Graph, output: str) -> Graph:
    """The same graph with one output: the caches that it also returns are not measured."""
    copy = model.clone()
    kept = [v for v in copy.graph.outputs if v.name == output]
    del copy.graph.outputs[:]
    copy.graph.outputs.extend(kept)
    return Graph(model.info, copy, model.source)


def main() -> None:
    """Run the analysis and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="holds the exported decoder; filled where empty")
    parser.add_argument("--size", default="1.7b", help="see reference/llama.py")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--probes", type=int, default=2, help="reverse passes per sample")
    parser.add_argument("--target", default="ort-cpu")
    parser.add_argument("--schemes", default="", help="with commas; the usual ones of the target without it")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    path = options.folder / "decoder.onnx"
    seconds: dict[str, float] = {}
    processor: dict[str, float] = {}
    memory: dict[str, tuple[float, float]] = {}

    @contextmanager
    def step(name: str) -> Iterator[None]:
        start, used = time.perf_counter(), time.process_time()
        with peak_of("RssAnon") as peak:
            yield
        seconds[name], processor[name] = time.perf_counter() - start, time.process_time() - used
        memory[name] = (peak[0], status_gb("RssFile"))
        print(f"{name:<12} {seconds[name]:8.1f} s   anonymous {peak[0]:6.2f} GB   mapped {memory[name][1]:6.2f} GB")

    with step("export"):
        if not path.is_file():
            arguments = ["--size", options.size, "--layers", str(options.layers), "--seed", str(options.seed)]
            subprocess.run([sys.executable, str(LLAMA), *arguments, "--out", str(path)], check=True)
    with step("load"):
        model = only(graph.load_graph(path, shapes=sizes_of(path, options.tokens)), "logits")
    samples = [feeds_of(model, options.seed + i) for i in range(options.samples)]
    heads = find_heads(model)
    device = target(options.target)
    units = split(model, device, heads, schemes=[name for name in options.schemes.split(",") if name])
    with step("calibrate"):
        inner = {e.tensor for u in units.units for e in u.inner}
        wanted = {e.root for e in units.edges} | inner | tensors_to_judge(model, units)
        order = [t for t in model.value if t in wanted]
        statistics = collect(model.model, order, iter(samples))
        ranges = statistics.ranges("minmax")
        magnitude = dict(zip(order, statistics.magnitude, strict=True))
        known = {
            t: TensorRange(
                tensor=t,
                low=0,
                high=0,
                method="",
                magnitude=float(magnitude[t]),
                subnormal=statistics.half_subnormal[t],
            )
            for t in order
        }
        units = judge(model, units, known)
    with step("build"):
        prober = Prober(model, heads, [Recipe(units, device, ranges)])
    with step("probe"):
        parts = [prober.measure(f, sample=i, probes=options.probes, seed=options.seed) for i, f in enumerate(samples)]
    matrix = ProbeMatrix.concatenate(parts)
    del prober
    analysis = status_gb("VmHWM")
    session = OrtSession(model.model)
    session.run(samples[0])
    with step("float pass"):
        for _ in range(FLOAT_RUNS):
            session.run(samples[0])
    half = Plan.of("fp16", *units.able("fp16"))
    if half:
        with step("FP16"):
            exact = Reference(session.run(samples[0]), heads)
            lowered = as_specified(write_plan(model, Recipe(units, device, ranges), half).model)
            halved = OrtSession(lowered, execution=Execution(integers=False))
            measured = exact.error(halved.run(samples[0])) / exact.energy
    each, plain = seconds["probe"] / len(samples), seconds["float pass"] / FLOAT_RUNS
    busy, plainly = processor["probe"] / len(samples), processor["float pass"] / FLOAT_RUNS
    weights = sum(v.const_value.nbytes for v in model.model.graph.initializers.values() if v.const_value is not None)
    result = {
        "benchmark": "large_decoder",
        "target": options.target,
        "schemes": [scheme.name for scheme in units.schemes],
        "layers": options.layers,
        "params": model.info.parameters,
        "weights_gb": round(weights / 1e9, 3),
        "tokens": options.tokens,
        "samples": len(samples),
        "probes": options.probes,
        "sites": len(matrix.sites),
        "seconds_per_sample": round(each, 2),
        "float_pass_seconds": round(plain, 3),
        "float_passes": round(each / plain, 2),
        "float_passes_cpu": round(busy / plainly, 2),
        "cpu_seconds_per_sample": round(busy, 2),
        "peak_rss_gb": round(analysis, 2),
        "anonymous_gb": round(max(a for a, _ in memory.values()), 2),
        "seconds": {k: round(v, 1) for k, v in seconds.items()},
        "finite": bool(all(np.isfinite(r).all() for r in matrix.rows)),
    }
    if half:
        predicted = matrix.damage(matrix.select(rounded(units, half))).mean(axis=0)
        result["half_units"] = len(half)
        result["half_db"] = [round(float(decibel(d[0])), 2) for d in (predicted, measured)]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
