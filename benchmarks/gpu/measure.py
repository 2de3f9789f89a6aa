"""What a GPU makes of float, FP16, mixed and weight-only models, and of the probe matrix. Started by `run.sh`.

Every part runs in a process of its own with a limit on its time, so that one that fails, hangs or lacks a package costs
itself alone; its reason stands in the result. One JSON file:

    machine     name, driver and memory of the GPU, processor, versions
    onnxruntime per model: milliseconds and ratio over float of the models of plans for `ort-cuda`, in turns in one
                process on the chosen provider, and the SQNR that they lose there
    probe       per model: the probe matrix on the provider beside the one on the CPU: seconds, and the largest
                difference of a site's damage in dB
    torch       FP32 (TF32 where the GPU has it), FP16 and compiled FP16 of the same architectures with random weights
    tensorrt    float, FP16 and mixed models of plans for `tensorrt`, on TensorRT's own engines

    benchmarks/gpu/run.sh --out benchmarks/results/gpu.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bitalloy import Settings, analyze
from bitalloy.core.files import write
from bitalloy.core.schemes import BASELINE, Plan
from bitalloy.measure import bench
from bitalloy.measure.sqnr import output_sqnr
from bitalloy.pipeline.prepare import RunOptions, prepare
from bitalloy.runtime.base import Runtime
from bitalloy.runtime.ort import CPU, CUDA, ORT, ORT_GPU, Execution, available_cores, cuda_missing
from bitalloy.runtime.steps import once
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.sensitivity.probe import Prober

SAMPLES = ("yolo11n-shapes", "segformer-b0-shapes", "mobilesam-shapes", "mobilevlm-shapes")
"""Models that lie in the package; what torch exports on the spot is added where it is installed."""
EXPORTED = ("yolo11n", "segformer-b0", "mobilesam")
PARTS = {"onnxruntime": 140, "probe": 50, "torch": 80, "tensorrt": 60}
"""Part -> seconds that it may take."""
VERSIONS = ("onnxruntime-gpu", "onnxruntime", "onnx", "numpy", "torch", "tensorrt", "tensorrt_rtx", "bitalloy")
PROBED, PROBES, ROUNDS = 2, 2, 20
PAST = 256
"""Tokens before the one that a decoder adds."""


def analysed(name: str, target: str, folder: Path, schemes: tuple[str, ...] = ()) -> Analysis:
    """An analysis with few samples: enough for plans, whose accuracy is not judged here."""
    options = RunOptions(checkpoint="random" if name in EXPORTED else None)
    ready = prepare(name, out=folder / name, options=options)
    settings = Settings(
        targets=(target,), calibration_samples=2, samples=1, probes=2, schemes=schemes, equalize=False,
        bias_correction=False,
    )  # fmt: skip
    return analyze(ready.model, ready.data, settings, work=ready.work)


def plans_of(analysis: Analysis, seed: int) -> dict[str, Plan]:
    """Plans of one scheme each, and one that draws the scheme of every unit."""
    units, random = analysis.units, np.random.default_rng(seed)
    found = {s.name: Plan.of(s.name, *units.able(s.name)) for s in units.schemes if units.able(s.name)}
    found.pop(BASELINE, None)
    found["mixed"] = Plan({u.id: str(random.choice(u.allowed)) for u in units.units if u.choices})
    return found


def timed(analysis: Analysis, plans: Mapping[str, Plan], runtime: Runtime, seed: int) -> dict[str, Any]:
    """Milliseconds, ratio over float with its interval, and SQNR by head, of models in turns."""
    models = {"float": analysis.original(), **{name: analysis.artefact(plan) for name, plan in plans.items()}}
    lost: dict[str, Any] = {}
    feeds = analysis.data.feeds(0)

    def compare(sessions: Mapping[str, Any]) -> None:
        others = {name: session for name, session in sessions.items() if name != "float"}
        lost.update(output_sqnr(sessions["float"], others, analysis.heads, [feeds], seed=seed))

    makers = {name: replace(model, runtime=runtime).session for name, model in models.items()}
    times = bench.time_sittings(makers, [once(feeds)], repeats=ROUNDS, then=compare)
    heads = [head.name for head in analysis.heads]
    rows: dict[str, Any] = {}
    for name, series in times.items():
        ratio = bench.paired_ratio(series[..., 0], times["float"][..., 0])
        rows[name] = {
            "ms": round(float(np.median(series)), 4),
            "over_float": [ratio.value, ratio.low, ratio.high],
            "units": dict(plans[name].counts()) if name in plans else {},
            "sqnr_db": {h: e.value for h, e in zip(heads, lost.get(name, ()), strict=False)},
        }
    return rows


def on_onnxruntime(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Plans for `ort-cuda` on a provider of ONNX Runtime."""
    refuse_without(options.provider)
    runtime = ORT_GPU if options.provider == CUDA else ORT
    found: dict[str, Any] = {}
    for name in options.models:
        schemes = ("fp16", "w4") if "mobilevlm" in name else ()
        analysis = analysed(name, "ort-cuda", folder, schemes)
        found[name] = timed(analysis, plans_of(analysis, options.seed), runtime, options.seed)
        tell(found)
    return found


def on_tensorrt(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Plans for `tensorrt` on its own engines."""
    from bitalloy.runtime.tensorrt import TENSORRT_RUNTIME, missing

    if reason := missing():
        return {"skipped": reason}
    found: dict[str, Any] = {}
    for name in (n for n in options.models if n.startswith("yolo11n")):
        analysis = analysed(name, "tensorrt", folder)
        found[name] = timed(analysis, plans_of(analysis, options.seed), TENSORRT_RUNTIME, options.seed)
        tell(found)
    return found


def on_probe(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The probe matrix on a provider beside that on the CPU."""
    refuse_without(options.provider)
    found: dict[str, Any] = {}
    for name in options.models[:2]:
        analysis = analysed(name, "ort-cpu", folder)
        rows, seconds = {}, {}
        for provider in (CPU, options.provider):
            execution = Execution(provider=provider)
            prober = Prober(analysis.graph, analysis.heads, [analysis.recipe()], execution=execution)
            feeds = analysis.data.feeds(0)
            prober.measure(feeds, sample=0, probes=PROBES, seed=options.seed)
            start = time.perf_counter()
            for sample in range(PROBED):
                rows[provider] = prober.measure(feeds, sample=sample, probes=PROBES, seed=options.seed)
            seconds[provider] = (time.perf_counter() - start) / PROBED
        here, there = (rows[p].site_damage()[0] for p in (CPU, options.provider))
        seen = (here > 1e-12 * here.max()) & (there > 0)
        gap = np.abs(10 * np.log10(np.where(seen, there, 1) / np.where(seen, here, 1)))
        found[name] = {
            "seconds": {provider: round(value, 4) for provider, value in seconds.items()},
            "ratio": round(seconds[options.provider] / seconds[CPU], 4),
            "sites": int(seen.sum()),
            "median_gap_db": round(float(np.median(gap[seen])), 5),
            "largest_gap_db": round(float(gap[seen].max()), 4),
        }
        tell(found)
    return found


def networks() -> dict[str, Callable[[Any], tuple[Any, Any]]]:
    """Name -> function from torch to a network with random weights and its inputs."""

    def yolo(torch: Any) -> tuple[Any, Any]:
        from bitalloy.zoo.networks.yolo11 import Yolo11, fuse

        return fuse(Yolo11(80).eval()), (torch.rand(1, 3, 640, 640),)

    def segformer(torch: Any) -> tuple[Any, Any]:
        from transformers import SegformerConfig, SegformerForSemanticSegmentation

        from bitalloy.zoo.networks.segformer import Segmenter

        network = SegformerForSemanticSegmentation(SegformerConfig(num_labels=150))
        return Segmenter(network).eval(), (torch.rand(1, 3, 512, 512),)

    def sam(torch: Any) -> tuple[Any, Any]:
        from bitalloy.zoo.mobilesam import MOBILESAM_VARIANTS
        from bitalloy.zoo.networks.mobilesam import Encoder, build_sam

        variant = MOBILESAM_VARIANTS[0]
        side = variant.size[0]
        return Encoder(build_sam(dict(variant.architecture), side)).eval(), (torch.rand(1, 3, side, side),)

    def language(torch: Any) -> tuple[Any, Any]:
        from bitalloy.zoo.mobilevlm import MOBILEVLM_VARIANTS, llama
        from bitalloy.zoo.networks.mobilevlm import Decoder, example

        numbers: Any = MOBILEVLM_VARIANTS[0].architecture
        sizes = (numbers[name] for name in ("layers", "heads", "hidden_size"))
        return Decoder(llama(numbers)).eval(), example(*sizes, past=PAST, new=1)

    return {
        "yolo11n": yolo,
        "segformer-b0": segformer,
        "mobilesam encoder": sam,
        "mobilevlm decoder, one token": language,
    }


def on_torch(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Milliseconds of the same architectures in torch."""
    import torch

    device = "cuda" if options.provider == CUDA else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        return {"skipped": "torch sees no GPU"}
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    found: dict[str, Any] = {}
    for name, make in networks().items():
        if device == "cpu" and name not in EXPORTED:
            found[name] = {"skipped": "large networks are not timed on a processor"}
            continue
        try:
            network, inputs = make(torch)
        except ImportError as error:
            found[name] = {"skipped": str(error)}
            continue
        half = torch.float16
        variants = {"fp32": (torch.float32, False), "fp16": (half, False), "fp16, compiled": (half, True)}
        found[name] = {}
        for variant, (kind, compiled) in variants.items():
            if device == "cpu" and kind is half:
                found[name][variant] = {"skipped": "FP16 of torch is not timed on a processor"}
                continue
            model = network.to(device, kind)
            feeds = [x.to(device, kind if x.is_floating_point() else x.dtype) for x in inputs]
            found[name][variant] = {"ms": in_torch(torch, torch.compile(model) if compiled else model, feeds, device)}
            tell(found)
    return found


def in_torch(torch: Any, model: Any, feeds: Sequence[Any], device: str) -> float:
    """Median milliseconds of one inference, the device waited for."""
    times = []
    with torch.inference_mode():
        for turn in range(5 + ROUNDS):
            start = time.perf_counter()
            model(*feeds)
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= 5:
                times.append((time.perf_counter() - start) * 1e3)
    return round(float(np.median(times)), 4)


def refuse_without(provider: str) -> None:
    """Stop a part whose provider is not there."""
    if provider == CUDA and (reason := cuda_missing()):
        raise SystemExit(json.dumps({"skipped": reason}))


def tell(found: Mapping[str, Any]) -> None:
    """Print what a part has so far; the last line counts."""
    print(json.dumps(found), flush=True)


def machine() -> dict[str, Any]:
    """The GPU, the processor and the versions."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader"]
    try:
        gpu = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        gpu = f"none: {error}"
    known = {}
    for package in VERSIONS:
        try:
            known[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            known[package] = "not installed"
    return {
        "gpu": gpu,
        "processor": platform.processor() or platform.machine(),
        "threads": available_cores(),
        "python": platform.python_version(),
        "versions": known,
    }


RUNS = {"onnxruntime": on_onnxruntime, "probe": on_probe, "torch": on_torch, "tensorrt": on_tensorrt}


def part(name: str, arguments: list[str]) -> dict[str, Any]:
    """Run one part in a process of its own, and read the last line that it told."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "--part", name, *arguments]
    reason = ""
    with tempfile.TemporaryFile("w+") as told, tempfile.TemporaryFile("w+") as errors:
        try:
            code = subprocess.run(command, stdout=told, stderr=errors, timeout=PARTS[name], check=False).returncode
            errors.seek(0)
            last = (errors.read().strip().splitlines() or [""])[-1]
            reason = "" if code == 0 else last if last.startswith("{") else f"exit code {code}: {last}"
        except subprocess.TimeoutExpired:
            reason = f"stopped after {PARTS[name]} s"
        told.seek(0)
        lines = told.read().strip().splitlines()
    found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    if reason.startswith("{"):
        found |= json.loads(reason)
    elif reason:
        found["failed"] = reason
    return {**found, "seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    """Run all parts, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--provider", default=CUDA, help="execution provider of ONNX Runtime")
    parser.add_argument("--models", nargs="+", default=list(SAMPLES), help=f"also {', '.join(EXPORTED)} (torch)")
    parser.add_argument("--parts", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", choices=RUNS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        with tempfile.TemporaryDirectory(prefix="bitalloy-gpu-") as folder:
            tell(RUNS[options.part](options, Path(folder)))
        return
    arguments = ["--provider", options.provider, "--seed", str(options.seed), "--models", *options.models]
    result: dict[str, Any] = {"benchmark": "gpu", "provider": options.provider, "machine": machine(), "parts": {}}
    for name in options.parts:
        result["parts"][name] = part(name, arguments)
        write(options.out, json.dumps(result, indent=1).encode())
        print(f"{name}: {result['parts'][name]['seconds']} s", file=sys.stderr, flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
