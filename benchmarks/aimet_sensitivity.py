"""AIMET's side of `sensitivity_vs_aimet.py`: runs inside an interpreter that has aimet-onnx, and nothing of bitalloy.

    AIMET_PYTHON benchmarks/aimet_sensitivity.py JOB.json

The job names the model, the feeds (.npz), the parts of the outputs, the operators (null: all) and where to write the
result: per operator the quantizers that were switched on and the energies of the output errors; the scales of all these
quantizers; the time of each step; and as a yardstick of how busy the machine was the mean time of a plain float pass,
one after every operator.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import aimet_onnx
import numpy as np
import onnx
import onnxruntime
from aimet_onnx.common import quantsim_config


def main() -> None:
    """Do the job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    feeds = []
    for file in job["feeds"]:
        with np.load(file) as arrays:
            feeds.append({name: arrays[name] for name in arrays.files})

    start = time.perf_counter()
    config = Path(quantsim_config.__file__).parent / "default_config_per_channel.json"
    model = onnx.load(job["model"])
    names = [o.name for o in model.graph.output]
    sim = aimet_onnx.QuantizationSimModel(
        model,
        param_type=aimet_onnx.int8,
        activation_type=aimet_onnx.int8,
        quant_scheme="min_max",
        config_file=str(config),
        providers=["CPUExecutionProvider"],
    )
    built = time.perf_counter()
    sim.compute_encodings(feeds)
    calibrated = time.perf_counter()

    switches = sim.qc_quantize_op_dict
    wanted = None if job["operators"] is None else set(job["operators"])
    operators = {}
    for op in sim.connected_graph.ordered_ops:
        if wanted is not None and op.name_op not in wanted:
            continue
        inputs = [p.name for p in op.inputs if not p.producer and not p.is_parm]
        outputs = [p.name for p in op.outputs]
        on = {
            kind: [n for n in names if n in switches and switches[n].enabled]
            for kind, names in (("inputs", inputs), ("outputs", outputs), ("weights", list(op.parameters)))
        }
        if any(on.values()):
            operators[op.name_op] = on
    used = {n for on in operators.values() for names in on.values() for n in names}
    for name, switch in switches.items():
        if name not in used:
            switch.enabled = False  # of operators that were not asked for

    scales = {n: [float(e.delta) for e in switches[n].get_encodings()] for n in sorted(used)}

    exact: list[list[np.ndarray]] = []
    energies: list[list[list[float]]] = []
    plain = onnxruntime.InferenceSession(job["model"], providers=["CPUExecutionProvider"])
    plain.run(None, feeds[0])
    passes: list[float] = []

    def heads(session) -> list[list[np.ndarray]]:
        found = []
        for sample in feeds:
            outputs = dict(zip(names, session.run(None, sample), strict=True))  # the simulation renames its outputs
            found.append([cut(outputs[h["output"]].astype(np.float64), h) for h in job["heads"]])
        return found

    def score(session) -> float:
        rows = [
            [float(np.square(a - b).sum()) for a, b in zip(y, x, strict=True)]
            for y, x in zip(heads(session), exact, strict=True)
        ]
        energies.append(rows)
        started = time.perf_counter()
        plain.run(None, feeds[len(energies) % len(feeds)])
        passes.append(time.perf_counter() - started)
        damage = np.sum(rows, axis=0) / np.sum([[np.square(x).sum() for x in y] for y in exact], axis=0)
        return float(np.mean(-10 * np.log10(np.maximum(damage, 1e-16))))

    with aimet_onnx.utils.disable_quantizers(sim, set(switches)):
        exact = heads(sim.session)
    begun = time.perf_counter()
    scores = aimet_onnx.analyze_per_layer_sensitivity(sim, score)
    done = time.perf_counter()
    result = {
        "version": aimet_onnx.__version__,
        "build_seconds": built - start,
        "calibration_seconds": calibrated - built,
        "analysis_seconds": done - begun - sum(passes),
        "float_pass_seconds": float(np.mean(passes)),
        "scales": scales,
        "operators": {
            name: {**operators[name], "score": scores[name], "errors": rows}
            for name, rows in zip(scores, energies, strict=True)
            if name in operators
        },
        "energy": [[float(np.square(x).sum()) for x in y] for y in exact],
    }
    Path(job["result"]).write_text(json.dumps(result))


def cut(value: np.ndarray, head: dict[str, Any]) -> np.ndarray:
    """The part of an output that belongs to a head."""
    if head["axis"] is None:
        return value
    return value[(slice(None),) * head["axis"] + (slice(head["start"], head["stop"]),)]


if __name__ == "__main__":
    main()
