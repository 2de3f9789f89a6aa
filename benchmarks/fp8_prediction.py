"""Predicted against executed SQNR of plans with FP8 (E4M3), head by head, on the embedded samples.

Target `tensorrt` on a device that has FP8. Two plans of every model: all units in FP8 that may run in it and the rest
in FP16, and one with schemes drawn at random, among them FP8 and INT8. Measured: the models as they are shipped,
executed by ONNX Runtime on the CPU with every rounding as the graphs say, on the samples of the probe matrix.

    python benchmarks/fp8_prediction.py --out /tmp/fp8
    python benchmarks/fp8_prediction.py --out /tmp/fp8 --models segformer-b0-shapes --samples 4

The last line is JSON: model -> plan -> `units` by scheme, `opset`, and `heads` with [predicted, executed] dB; with the
mean and the largest error of all heads of all plans. Of heads named `... KL` dB are below 1 nat.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from rich.console import Console

from bitalloy import Plan, RunDirectory, Settings, Workspace, analyze
from bitalloy.measure.sqnr import artefact_sqnr
from bitalloy.pipeline.prepare import prepare
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.sensitivity.matrix import bend, decibel
from bitalloy.targets.placement import rounded

MODELS = ("yolo11n-shapes", "yolo11n-seg-shapes", "segformer-b0-shapes", "mobilesam-shapes", "mobilevlm-shapes")


def plans_of(analysis: Analysis, seed: int) -> dict[str, Plan]:
    """Return name -> plan: all in FP8 that can be and the rest in FP16, and a mixture drawn at random."""
    random = np.random.default_rng(seed)
    units = analysis.units.units
    lowest = [(u.id, scheme) for scheme in ("fp16", "fp8") for u in units if scheme in u.allowed]
    return {
        "all FP8": Plan(lowest),
        "mixed": Plan({u.id: u.allowed[int(random.integers(len(u.allowed)))] for u in units}),
    }


def measure(analysis: Analysis, plans: dict[str, Plan]) -> dict[str, object]:
    """Predictions beside executions; the models pass the ONNX checker."""
    feeds = [analysis.data.feeds(i) for i in analysis.parts.probe[: analysis.matrix.samples]]
    shipped = {name: analysis.artefact(p) for name, p in plans.items()}
    opsets: dict[str, int] = {}
    for name, artefact in shipped.items():
        protos = [ir.to_proto(m) for m in artefact.models.values() if isinstance(m, ir.Model)]
        for proto in protos:
            onnx.checker.check_model(proto, full_check=True)
        opsets[name] = max(o.version for proto in protos for o in proto.opset_import if o.domain == "")
    models = {name: analysis.executable(artefact) for name, artefact in shipped.items()}
    found = artefact_sqnr(analysis.original(), models, analysis.heads, feeds)
    result: dict[str, object] = {}
    for name, lowered in plans.items():
        linear = analysis.matrix.damage(analysis.matrix.select(rounded(analysis.units, lowered))).mean(axis=0)
        predicted = decibel(linear * bend(analysis.secant, linear))
        result[name] = {
            "units": lowered.counts() | {"all": len(analysis.units.units)},
            "opset": opsets[name],
            "heads": {
                head.name: [round(float(p), 2), round(m.value, 2)]
                for head, p, m in zip(analysis.heads, predicted, found[name], strict=True)
            },
        }
    return result


def main() -> None:
    """Run the comparison and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="names of embedded samples, with commas")
    parser.add_argument("--device", default="l4", help="device of the target, one with FP8")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run directories")
    parser.add_argument("--samples", type=int, default=8, help="of the probe matrix and of the measurement")
    parser.add_argument("--probes", type=int, default=8, help="reverse passes per sample")
    parser.add_argument("--calibration-samples", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console(stderr=True, soft_wrap=True)
    settings = Settings(
        targets=("tensorrt",),
        device=options.device,
        samples=options.samples,
        probes=options.probes,
        calibration_samples=options.calibration_samples,
        range_method="minmax",
        seed=options.seed,
        protect=False,
        equalize=False,
        bias_correction=False,
    )
    models: dict[str, object] = {}
    errors: list[float] = []
    for name in options.models.split(","):
        prepared = prepare(name, out=options.out / name)
        work = Workspace(RunDirectory(options.out / name))
        analysis = analyze(prepared.model, prepared.data, settings, work=work)
        found = models[name] = measure(analysis, plans_of(analysis, options.seed))
        for plan, entry in found.items():
            console.print(f"{name} {plan}: {entry}", highlight=False)
            errors += [abs(p - m) for p, m in entry["heads"].values()]  # type: ignore[index]
    print(
        json.dumps(
            {
                "benchmark": "fp8_prediction",
                "device": options.device,
                "samples": options.samples,
                "seed": options.seed,
                "models": models,
                "mean_error_db": round(float(np.mean(errors)), 2),
                "largest_error_db": round(max(errors), 2),
            }
        )
    )


if __name__ == "__main__":
    main()
