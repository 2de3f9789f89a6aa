"""Files that ONNX Runtime's `quantize_static` made, as input: which rounding lost the accuracy, and the repaired model.

Each float network is quantized as its documentation says (QDQ, all operators, per channel, uint8 activations). Then

- the file's roundings are ranked by bitalloy, and the worst of the activations are checked against execution: the float
  network with the QuantizeLinear and DequantizeLinear of that one tensor, as they stand in the file, in ONNX Runtime
  without optimizations, on the same samples;
- `bitalloy.run` repairs the file under a floor on every head, and says how fast it is.

    python benchmarks/quantized_files.py --out OUT [--models yolo11n-shapes segformer-b0-shapes] [--floor 20]

The last line is JSON: by model the largest difference `off_db` of `checked` roundings, and of the run `given_db`,
`repaired_db` (the worst head of each), `given_ratio` and `repaired_ratio` (latency over float).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

import bitalloy
from bitalloy.core.records import Head
from bitalloy.core.work import Workspace
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.verify.given import GIVEN_SAMPLES, examine_given

MODELS = ("yolo11n-shapes", "yolo11n-seg-shapes", "segformer-b0-shapes")
SAMPLES = Path(bitalloy.__file__).parent / "samples"
CALIBRATED, CHECKED = 16, 5
ort.set_default_logger_severity(3)


class Samples(CalibrationDataReader):
    """Feeds of the calibration, one after the other."""

    def __init__(self, feeds: Sequence[dict[str, np.ndarray]]) -> None:
        self._left = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    """The model as it is written, node by node."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def with_one_rounding(given: onnx.ModelProto, plain: onnx.ModelProto, tensor: str) -> onnx.ModelProto | None:
    """The float network with the rounding of one tensor; None where the file rounds no activation of that name."""
    pair = [n for n in given.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == tensor]
    known = {v.name for v in plain.graph.input} | {name for n in plain.graph.node for name in n.output}
    if len(pair) != 1 or tensor not in known:
        return None
    model = onnx.ModelProto()
    model.CopyFrom(plain)
    down = pair[0]
    up = next(n for n in given.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == down.output[0])
    values = {i.name: i for i in given.graph.initializer}
    model.graph.initializer.extend(values[name] for name in {*down.input[1:], *up.input[1:]})
    nodes, rounded = [], f"{tensor}/rounded"
    for node in plain.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [rounded if name == tensor else name for name in node.input]
        nodes.append(copy)
    here = next((i + 1 for i, n in enumerate(plain.graph.node) if tensor in n.output), 0)
    for number, (source, target) in enumerate(((down, down.output[0]), (up, rounded))):
        copy = onnx.NodeProto()
        copy.CopyFrom(source)
        copy.output[:] = [target]
        nodes.insert(here + number, copy)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for output in model.graph.output:
        if output.name == tensor:
            output.name = rounded
    return model


def executed_db(
    given: onnx.ModelProto,
    plain: onnx.ModelProto,
    tensor: str,
    head: Head,
    feeds: Sequence[dict[str, np.ndarray]],
) -> float | None:
    """SQNR in dB of one head with the rounding of one tensor, over all feeds."""
    model = with_one_rounding(given, plain, tensor)
    if model is None or head.scores or head.kind:
        return None
    place = [o.name for o in plain.graph.output].index(head.output)
    exact, one = session(plain), session(model)
    error = signal = 0.0
    for feed in feeds:
        first, second = (np.asarray(s.run(None, feed)[place], np.float64) for s in (exact, one))
        if head.axis is not None:
            first, second = (np.take(a, range(head.start, head.stop or 0), head.axis) for a in (first, second))
        error, signal = error + float(((first - second) ** 2).sum()), signal + float((first**2).sum())
    return 10 * np.log10(signal / error) if error else None


def checked(analysis: Analysis, given: onnx.ModelProto, plain: onnx.ModelProto) -> list[dict[str, float | str]]:
    """SQNR of the worst roundings of activations as bitalloy tells it and as they execute here."""
    found = examine_given(analysis, Workspace(), timed=False)
    assert found is not None, "the file is quantized"
    heads = {head.name: head for head in analysis.heads}
    feeds = [analysis.data.feeds(i) for i in analysis.parts.probe[:GIVEN_SAMPLES]]
    rows: list[dict[str, float | str]] = []
    for rounding in found.worst:
        if len(rows) == CHECKED:
            break
        executed = executed_db(given, plain, rounding.tensor, heads[rounding.head], feeds)
        if executed is not None:
            rows.append({"tensor": rounding.tensor, "told": rounding.sqnr_db, "executed": round(executed, 2)})
    return rows


def main() -> None:
    """Quantize, rank, check and repair every network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--floor", type=float, default=20.0, help="dB on every head")
    options = parser.parse_args()
    result = {}
    for name in options.models:
        folder = options.out / name
        folder.mkdir(parents=True, exist_ok=True)
        graph = bitalloy.load(name)
        data = bitalloy.open_data(graph, None, limit=64, sample_folder=folder / "sample")
        float_file, int8_file = SAMPLES / f"{name}.onnx", folder / f"{name}-int8.onnx"
        feeds = [data.feeds(i) for i in range(CALIBRATED)]
        quantize_static(
            float_file,
            int8_file,
            Samples(feeds),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        given, plain = onnx.load(int8_file), onnx.load(float_file)
        images = next((folder / "sample").rglob("images"), folder / "sample")
        read = bitalloy.load(int8_file)
        analysis = bitalloy.analyze(read, bitalloy.open_data(read, images), bitalloy.Settings())
        rows = checked(analysis, given, plain)
        for row in rows:
            print(
                f"{name}: {row['tensor']}: predicted {row['predicted']} dB, executed {row['executed']} dB", flush=True
            )
        budget = bitalloy.Budget(min_sqnr_db=options.floor)
        summary = bitalloy.run(int8_file, out=folder / "run", data=images, budget=budget).summary
        print(f"{name}: {summary.headline}", flush=True)
        before, after = summary.given, [pair.mixed.measured for pair in summary.sqnr_db.values()]
        assert before is not None and before.measured_db is not None and before.latency_ratio is not None
        result[name] = {
            "checked": len(rows),
            "off_db": max((abs(float(r["told"]) - float(r["executed"])) for r in rows), default=None),
            "given_db": min(e.value for e in before.measured_db.values()),
            "repaired_db": min(after),
            "given_ratio": before.latency_ratio.value,
            "repaired_ratio": summary.latency_ratio,
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
