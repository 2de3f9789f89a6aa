"""Files that ONNX Runtime's `quantize_static` made, as input: which rounding lost the accuracy, and the repaired model.

Each float network is quantized as its documentation says (QDQ, all operators, per channel, uint8 activations). Then

- the file's roundings are ranked by bitalloy, and the worst of the activations are checked against execution: the file
  without the QuantizeLinear and DequantizeLinear of all activations beside the file without those of all but that one,
  in ONNX Runtime without optimizations, on the same samples;
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
from onnx import numpy_helper
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


def with_roundings(given: onnx.ModelProto, kept: str = "") -> onnx.ModelProto:
    """The file with integer weights as they are, and without the rounding of any activation but one.

    `quantize_static` removes a Relu before an unsigned rounding whose zero point is 0, which does the same; where such
    a rounding goes, the Relu comes back.
    """
    values = {i.name: numpy_helper.to_array(i) for i in given.graph.initializer}
    moving = {i.name for i in given.graph.input}  # what depends on the inputs: weights may be computed as well
    for node in given.graph.node:
        if moving & set(node.input):
            moving |= set(node.output)
    rounding = [n for n in given.graph.node if n.op_type == "QuantizeLinear" and n.input[0] in moving]
    gone = {n.output[0]: n for n in rounding if n.input[0] != kept}
    model = onnx.ModelProto()
    model.CopyFrom(given)
    del model.graph.node[:]
    for node in given.graph.node:
        if node.output[0] in gone:
            continue
        if node.op_type == "DequantizeLinear" and node.input[0] in gone:
            source = gone[node.input[0]]
            unsigned = not values[source.input[2]].any() and values[source.input[2]].dtype.kind == "u"
            model.graph.node.add(
                op_type="Relu" if unsigned else "Identity", input=[source.input[0]], output=[node.output[0]]
            )
            continue
        model.graph.node.add().CopyFrom(node)
    return model


def executed_db(
    given: onnx.ModelProto, tensor: str, head: Head, feeds: Sequence[dict[str, np.ndarray]]
) -> float | None:
    """SQNR in dB of one head with the rounding of one tensor, over all feeds; None for heads that are weighed."""
    known = {n.input[0] for n in given.graph.node if n.op_type == "QuantizeLinear"}
    if tensor not in known or head.scores or head.kind:
        return None
    place = [o.name for o in given.graph.output].index(head.output)
    exact, one = session(with_roundings(given)), session(with_roundings(given, tensor))
    error = signal = 0.0
    for feed in feeds:
        first, second = (np.asarray(s.run(None, feed)[place], np.float64) for s in (exact, one))
        if head.axis is not None:
            first, second = (np.take(a, range(head.start, head.stop or 0), head.axis) for a in (first, second))
        error, signal = error + float(((first - second) ** 2).sum()), signal + float((first**2).sum())
    return 10 * np.log10(signal / error) if error else None


def checked(analysis: Analysis, given: onnx.ModelProto) -> list[dict[str, float | str]]:
    """SQNR of the worst roundings of activations as bitalloy tells it and as they execute here."""
    found = examine_given(analysis, Workspace(), timed=False)
    assert found is not None, "the file is quantized"
    heads = {head.name: head for head in analysis.heads}
    feeds = [analysis.data.feeds(i) for i in analysis.parts.probe[:GIVEN_SAMPLES]]
    rows: list[dict[str, float | str]] = []
    for rounding in found.worst:
        if len(rows) == CHECKED:
            break
        executed = executed_db(given, rounding.tensor, heads[rounding.head], feeds)
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
        given = onnx.load(int8_file)
        images = next((folder / "sample").rglob("images"), folder / "sample")
        read = bitalloy.load(int8_file)
        analysis = bitalloy.analyze(read, bitalloy.open_data(read, images), bitalloy.Settings())
        rows = checked(analysis, given)
        for row in rows:
            print(f"{name}: {row['tensor']}: told {row['told']} dB, executed {row['executed']} dB", flush=True)
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
