"""Plans as NVIDIA's compiler makes engines of them: are all built, and do kernels read the types that were planned.

For each model and GPU: everything in FP16; everything in INT8 that may, the rest in FP16; everything in FP8 that may;
INT8 and FP16 drawn at random; of language models products in INT4 blocks. Ranges are those of a few samples: they
decide no type. TensorRT for RTX (extra `tensorrt-rtx`) compiles without a GPU, and nothing is run: no figure here is a
time of inference.

    python benchmarks/compiled_plans.py --out /tmp/compiled
    python benchmarks/compiled_plans.py --out /tmp/compiled --model yolo11n.onnx --data coco128-calib/images

The last line is JSON: for every model, GPU and plan how many convolutions and products were planned, found, agree and
differ, seconds of the compiler, MB of the engines, their kernels, and those of them that only round, cast or move data.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
from rich.console import Console
from rich.table import Table

from bitalloy import Plan, Settings
from bitalloy.core.audited import Compilation
from bitalloy.measure.compiled import compile_plan
from bitalloy.measure.workload import is_language, optimization_profiles, workload_of
from bitalloy.pipeline.calibrate import calibrate
from bitalloy.pipeline.prepare import prepare
from bitalloy.rewrite.calibrated import Calibrated

MODELS = ("yolo11n-shapes", "yolo11n-seg-shapes", "segformer-b0-shapes", "mobilesam-shapes", "mobilevlm-shapes")
DEVICES = ("sm86", "sm89", "sm120")
LANGUAGE_SCHEMES = ("fp16", "w4", "int8")
SAMPLES = 4


def plans_of(ready: Calibrated, seed: int) -> Iterator[tuple[str, Plan]]:
    """Name -> plan, of those that the target offers on its device."""
    units = ready.units
    offered = {scheme.name for scheme in units.schemes}
    half = Plan.of("fp16", *units.able("fp16"))
    yield "FP16", half
    for name in ("int8", "fp8", "w4"):
        if name in offered:
            lowered = dict(half.listed) | dict.fromkeys(units.able(name), name)
            yield f"all {name.upper()}, rest FP16", Plan(lowered)
    random, chosen = np.random.default_rng(seed), dict(half.listed)
    for unit in units.units:
        if "int8" in unit.allowed and random.random() < 0.5:
            chosen[unit.id] = "int8"
    yield "INT8 or FP16, drawn at random", Plan(chosen)


def compiled(ready: Calibrated, plan: Plan) -> Compilation:
    """Compile the model of a plan as it is shipped."""
    models = {n: m for n, m in ready.artefact(plan).models.items() if isinstance(m, ir.Model)}
    assert ready.target.device is not None
    profiles = optimization_profiles(ready.graph, models, workload_of(ready.graph, ready.settings.workload))
    return compile_plan(models, ready.units, plan, ready.target.device.capability, profiles)


def figures(found: Compilation) -> dict[str, object]:
    """What the table shows of an engine."""
    told, graphs = found.counts, found.graphs
    return {
        "built": told.built,
        "planned": told.planned,
        "found": told.found,
        "agree": told.agree,
        "differ": {u.unit: u.compiled for u in found.units if u.differs},
        "unnamed": [u.unit for u in found.units if u.weighted and not u.compiled],
        "seconds": told.seconds,
        "mb": round(sum(g.size_bytes for g in graphs) / 1e6, 1),
        "kernels": sum(g.kernels for g in graphs),
        "round": sum(g.requantizing for g in graphs),
        "cast": sum(g.casting for g in graphs),
        "move": sum(g.reformatting for g in graphs),
        "write_float32": sum(g.widening for g in graphs),
        "failed": [g.failed for g in graphs if g.failed],
    }


def main() -> None:
    """Compile all plans and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help=f"default: {', '.join(MODELS)}")
    parser.add_argument("--data", type=Path, help="samples; the embedded ones without")
    parser.add_argument("--device", action="append", help=f"default: {', '.join(DEVICES)}")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    found: dict[str, dict[str, dict[str, dict[str, object]]]] = {}
    table = Table("model", "GPU", "plan", "built", "agree / found / planned", "s", "MB", "kernels", "round", "to FP32")
    for model in asked.model or MODELS:
        prepared = prepare(model, out=asked.out / Path(model).stem, data=asked.data)
        for device in asked.device or DEVICES:
            settings = Settings(
                targets=("tensorrt-rtx",),
                device=device,
                calibration_samples=SAMPLES,
                range_method="minmax",
                equalize=False,
                bias_correction=False,
                weight_rounding="nearest",
                schemes=LANGUAGE_SCHEMES if is_language(prepared.model) else (),
            )
            ready = calibrate(prepared.model, prepared.data, settings, work=prepared.work)
            for name, plan in plans_of(ready, asked.seed):
                one = figures(compiled(ready, plan))
                found.setdefault(model, {}).setdefault(device, {})[name] = one
                agree = f"{one['agree']} / {one['found']} / {one['planned']}"
                shown = [one[key] for key in ("seconds", "mb", "kernels", "round", "write_float32")]
                table.add_row(model, device, name, "yes" if one["built"] else "no", agree, *map(str, shown))
    Console(width=160).print(table)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
