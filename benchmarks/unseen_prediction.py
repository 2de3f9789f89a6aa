"""Predicted against independently measured SQNR of shipped plans, on samples that no part of a run has seen.

Every model goes through `bitalloy.run` at its default settings. What was shipped is then executed on fresh samples by
an ONNX Runtime session of default options and by one without graph optimization, beside the file that was given. The
models: small nets of different kinds that are made here, the five embedded samples, and what the options add.

    python benchmarks/unseen_prediction.py --out /tmp/unseen
    python benchmarks/unseen_prediction.py --out /tmp/unseen --cases DIR --yolo yolo11n.onnx coco128-calib/images \
        coco-val-94/images

--cases names a folder with NAME/model.onnx, NAME/feeds/*.npz, NAME/fresh/*.npz and perhaps NAME/options.json, whose
`exclude` and `keep` list what these options of `bitalloy run` take. A finished run in --out is used
again. The last line is JSON: model -> plan (`mixed`, the one shipped, or `lowest`) -> head -> `predicted`, `corrected`
(where a measurement changed the prediction), `measured` on the samples of verification, `unseen` and `unoptimized` in
dB, with the share of heads within 3 dB, the worst difference, and the largest one between optimized and unoptimized
execution.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from bitalloy import Budget, Plan, Settings, run
from bitalloy.cli.options import keeps
from bitalloy.model.heads import KL, Reference, is_divergence
from bitalloy.pipeline.prepare import prepare
from bitalloy.pipeline.ship import Verified
from bitalloy.runtime.base import ONLY, Session
from bitalloy.runtime.ort import OrtSession

FEEDS, FRESH = 128, 64
"""Samples of a small net for the run, and unseen ones."""
IMAGES = 24
"""Unseen samples of an image model or a program."""
SAMPLES = ("yolo11n-shapes", "yolo11n-seg-shapes", "segformer-b0-shapes", "mobilesam-shapes", "mobilevlm-shapes")
FRESH_SEED = 90210


@dataclass(frozen=True)
class Entry:
    """A model with the samples of its run and unseen ones."""

    model: str
    data: Path | None
    unseen: Path | None
    """None draws samples with another seed."""
    exclude: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()


class Net:
    """A growing ONNX graph; every method adds a node and returns the name of its result."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node of one output."""
        name = f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, array: np.ndarray | np.generic) -> str:
        """Add an initializer."""
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def weight(self, *shape: int, fan: int = 0) -> str:
        """Heavy-tailed weights with channels of different size, as training leaves them."""
        made = self.random.standard_t(5, shape) * np.sqrt(1.2 / (fan or np.prod(shape[1:])))
        return self.constant((made * self.random.uniform(0.4, 1.6, (shape[0],) + (1,) * (len(shape) - 1))).astype("f4"))

    def conv(self, x: str, inside: int, outside: int, *, k: int = 3, stride: int = 1, group: int = 1) -> str:
        """Add a Conv with bias that keeps the size."""
        bias = self.constant((0.1 * self.random.standard_normal(outside)).astype("f4"))
        weight = self.weight(outside, inside // group, k, k)
        return self.op("Conv", x, weight, bias, pads=[k // 2] * 4, strides=[stride] * 2, group=group)

    def linear(self, x: str, inside: int, outside: int) -> str:
        """Add a MatMul and its bias."""
        y = self.op("MatMul", x, self.weight(inside, outside, fan=inside))
        return self.op("Add", y, self.constant((0.1 * self.random.standard_normal(outside)).astype("f4")))

    def save(self, path: Path, shape: Sequence[int], y: str) -> None:
        """Write the model with the input `x`."""
        self.nodes[-1].output[0] = "y"
        graph = helper.make_graph(
            self.nodes,
            path.stem,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(onnx.shape_inference.infer_shapes(model, strict_mode=True), path)


def grey_classifier(net: Net) -> tuple[tuple[int, ...], str]:
    """Digits: two convolutions on a grey image, two Gemm."""
    x = net.op("MaxPool", net.op("Relu", net.conv("x", 1, 8, k=5)), kernel_shape=[2, 2], strides=[2, 2])
    x = net.op("MaxPool", net.op("Relu", net.conv(x, 8, 16, k=5)), kernel_shape=[2, 2], strides=[2, 2])
    x = net.op("Flatten", x)
    x = net.op("Relu", net.op("Gemm", x, net.weight(64, 16 * 49), net.constant(np.zeros(64, "f4")), transB=1))
    return (1, 1, 28, 28), net.op("Gemm", x, net.weight(10, 64), net.constant(np.zeros(10, "f4")), transB=1)


def inverted_bottlenecks(net: Net) -> tuple[tuple[int, ...], str]:
    """Depthwise convolutions, squeeze and excite, residuals."""
    x = net.op("HardSwish", net.conv("x", 3, 16, stride=2))
    for _ in range(3):
        y = net.op("Clip", net.conv(x, 16, 48, k=1), net.constant(np.float32(0)), net.constant(np.float32(6)))
        y = net.op("HardSwish", net.conv(y, 48, 48, group=48))
        s = net.op("Relu", net.conv(net.op("GlobalAveragePool", y), 48, 12, k=1))
        y = net.op("Mul", y, net.op("HardSigmoid", net.conv(s, 12, 48, k=1)))
        x = net.op("Add", x, net.conv(y, 48, 16, k=1))
    x = net.op("Flatten", net.op("GlobalAveragePool", x))
    return (1, 3, 64, 64), net.op("Gemm", x, net.weight(10, 16), net.constant(np.zeros(10, "f4")), transB=1)


def encoder_decoder(net: Net) -> tuple[tuple[int, ...], str]:
    """A small U-Net with transposed convolutions and skips."""
    a = net.op("Relu", net.conv("x", 3, 16))
    b = net.op("Relu", net.conv(a, 16, 32, stride=2))
    c = net.op("Relu", net.conv(b, 32, 48, stride=2))
    u = net.op("ConvTranspose", c, net.weight(48, 32, 2, 2, fan=48), strides=[2, 2])
    u = net.op("Relu", net.conv(net.op("Concat", u, b, axis=1), 64, 32))
    u = net.op("ConvTranspose", u, net.weight(32, 16, 2, 2, fan=32), strides=[2, 2])
    u = net.op("LeakyRelu", net.conv(net.op("Concat", u, a, axis=1), 32, 16), alpha=0.1)
    return (1, 3, 48, 48), net.conv(u, 16, 5, k=1)


def attention(net: Net) -> tuple[tuple[int, ...], str]:
    """Two transformer blocks with outlier channels before their products."""
    x, width = "x", 64
    for _ in range(2):
        gain = net.random.lognormal(0, 0.8, width).astype("f4")
        y = net.op("LayerNormalization", x, net.constant(gain), net.constant(np.zeros(width, "f4")), axis=-1)
        q, k, v = (net.linear(y, width, width) for _ in range(3))
        to = net.constant(np.array([1, 24, 4, 16]))
        q, v = (net.op("Transpose", net.op("Reshape", t, to), perm=[0, 2, 1, 3]) for t in (q, v))
        k = net.op("Transpose", net.op("Reshape", k, to), perm=[0, 2, 3, 1])
        p = net.op("Softmax", net.op("Mul", net.op("MatMul", q, k), net.constant(np.float32(0.25))), axis=-1)
        o = net.op("Transpose", net.op("MatMul", p, v), perm=[0, 2, 1, 3])
        x = net.op("Add", x, net.linear(net.op("Reshape", o, net.constant(np.array([1, 24, width]))), width, width))
        y = net.op("LayerNormalization", x, net.constant(gain[::-1].copy()), net.constant(np.zeros(width, "f4")))
        h = net.linear(y, width, 128)
        half = net.op("Mul", h, net.constant(np.float32(0.5)))
        erf = net.op("Erf", net.op("Mul", h, net.constant(np.float32(2**-0.5))))
        h = net.op("Mul", half, net.op("Add", erf, net.constant(np.float32(1))))
        x = net.op("Add", x, net.linear(h, 128, width))
    return (1, 24, width), net.linear(x, width, 12)


def perceptron(net: Net) -> tuple[tuple[int, ...], str]:
    """Four Gemm with Tanh and a Softmax head."""
    x = "x"
    for inside, outside in ((40, 96), (96, 96), (96, 64)):
        x = net.op(
            "Tanh", net.op("Gemm", x, net.weight(outside, inside), net.constant(np.zeros(outside, "f4")), transB=1)
        )
    x = net.op("Gemm", x, net.weight(8, 64), net.constant(np.zeros(8, "f4")), transB=1)
    return (1, 40), net.op("Softmax", x, axis=-1)


def waveform(net: Net) -> tuple[tuple[int, ...], str]:
    """Convolutions over time with batch normalization."""
    x, inside = "x", 2
    for outside in (16, 24, 32):
        x = net.op("Conv", x, net.weight(outside, inside, 5), pads=[2, 2], strides=[2])
        scale, mean = net.random.uniform(0.5, 1.5, outside), net.random.standard_normal(outside) * 0.2
        arrays = (scale, mean, mean[::-1], scale[::-1] ** 2)
        x = net.op("BatchNormalization", x, *(net.constant(np.ascontiguousarray(a, "f4")) for a in arrays))
        x, inside = net.op("Relu", x), outside
    return (1, 2, 256), net.op("Conv", x, net.weight(6, 32, 1))


NETS: Sequence[Callable[[Net], tuple[tuple[int, ...], str]]] = (
    grey_classifier,
    inverted_bottlenecks,
    encoder_decoder,
    attention,
    perceptron,
    waveform,
)


def write_net(make: Callable[[Net], tuple[tuple[int, ...], str]], folder: Path, seed: int) -> None:
    """Write a net with samples: smooth noise of different brightness and spread."""
    net = Net(seed)
    shape, y = make(net)
    folder.mkdir(parents=True, exist_ok=True)
    net.save(folder / "model.onnx", shape, y)
    for part, count in (("feeds", FEEDS), ("fresh", FRESH)):
        (folder / part).mkdir(exist_ok=True)
        for i in range(count):
            noise = net.random.standard_normal(shape)
            if len(shape) == 4:
                noise = np.mean([np.roll(noise, (a, b), (2, 3)) for a in range(3) for b in range(3)], axis=0) * 3
            value = noise * net.random.lognormal(0, 0.3) + net.random.normal(0, 0.3)
            np.savez(folder / part / f"{i:03d}.npz", x=value.astype("f4"))


def entries(out: Path, cases: Path | None, yolo: Sequence[str], seed: int) -> Iterator[tuple[str, Entry]]:
    """List the models."""
    for make in NETS:
        folder = out / "nets" / make.__name__
        if not (folder / "fresh").exists():
            write_net(make, folder, seed)
        yield make.__name__, Entry(str(folder / "model.onnx"), folder / "feeds", folder / "fresh")
    for path in sorted(cases.glob("*/model.onnx")) if cases is not None else ():
        file = path.with_name("options.json")
        given = {k: tuple(v) for k, v in json.loads(file.read_text()).items()} if file.is_file() else {}
        yield f"case {path.parent.name}", Entry(str(path), path.parent / "feeds", path.parent / "fresh", **given)
    for name in SAMPLES:
        yield name, Entry(name, None, None)
    if yolo:
        model, data, unseen = yolo
        yield Path(model).name, Entry(model, Path(data), Path(unseen))


def fresh_feeds(entry: Entry, folder: Path) -> list[Mapping[str, np.ndarray]]:
    """Samples that the run has not seen."""
    data = entry.unseen
    prepared = prepare(entry.model, out=folder, data=data, seed=FRESH_SEED)
    small = data is not None and all(path.suffix == ".npz" for path in data.iterdir())
    drawn = np.random.default_rng(FRESH_SEED).permutation(len(prepared.data))
    return [prepared.data.feeds(int(i)) for i in drawn[: FRESH if small else IMAGES]]


def sessions(verified: Verified, plan: Plan) -> Iterator[tuple[str, Session, Session]]:
    """What is compared: name, float and rewritten; a file by plain ONNX Runtime, a program by its own sessions."""
    analysis, artefact = verified.analysis, verified.analysis.artefact(plan)
    if artefact.program is None:
        given, written = analysis.given.to_bytes(), artefact.models[ONLY]
        for name, optimize in (("unseen", True), ("unoptimized", False)):
            yield name, OrtSession(given, optimize=optimize), OrtSession(written, optimize=optimize)
    else:
        yield "unseen", analysis.original().session(), artefact.session()


def compare(
    verified: Verified, feeds: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Predicted beside measured dB of every head, of the plan that was shipped and of all that may be rounded."""
    heads = verified.analysis.heads
    plans = {"mixed": verified.planned.plan.chosen, "lowest": verified.analysis.units.lowest()}
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for column, plan in plans.items():
        if not plan:
            continue
        rows = found[column] = {}
        for head in heads:
            divergence = is_divergence(head.name)
            pairs = verified.summary.kl_nats if divergence else verified.summary.sqnr_db
            pair = pairs[head.name.removesuffix(KL)]
            told = pair.mixed if column == "mixed" else pair.lowest
            values = {"predicted": told.predicted, "corrected": told.corrected, "measured": told.measured}
            rows[head.name] = {k: below_one_nat(v) if divergence else v for k, v in values.items()}
        for name, exact, rewritten in sessions(verified, plan):
            energy, error = np.zeros(len(heads)), np.zeros(len(heads))
            for sample in feeds:
                reference = Reference(exact.run(sample), heads)
                energy += reference.energy
                error += reference.error(rewritten.run(sample))
            for head, e, d in zip(heads, energy, error, strict=True):
                rows[head.name][name] = round(float(10 * np.log10(e / d)), 2) if d else None
    return found


def below_one_nat(nats: float | None) -> float | None:
    """Express a divergence in dB below 1 nat, as heads that diverge are compared."""
    return round(-10 * float(np.log10(nats)), 2) if nats else None


def figures(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Summarize rows of heads; those that nothing disturbs have no figure."""
    gaps = [abs(p - u) for row in rows if (p := row["corrected"] or row["predicted"]) and (u := row["unseen"])]
    kernel = [abs(u - v) for row in rows if (u := row.get("unseen")) and (v := row.get("unoptimized"))]
    return {
        "heads": len(gaps),
        "within_3_db": round(float(np.mean(np.array(gaps) <= 3)), 3) if gaps else None,
        "worst_db": round(max(gaps), 2) if gaps else None,
        "optimized_against_unoptimized_db": round(max(kernel, default=0.0), 2),
    }


def main() -> None:
    """Run all models and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--cases", type=Path, help="folder of further models with feeds")
    parser.add_argument("--yolo", nargs=3, default=(), metavar=("MODEL", "IMAGES", "UNSEEN"), help="a real detector")
    parser.add_argument("--only", help="models whose names hold this")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console(stderr=True, soft_wrap=True)
    result: dict[str, dict[str, dict[str, dict[str, float | None]]]] = {}
    for name, entry in entries(options.out, options.cases, options.yolo, options.seed):
        if options.only and options.only not in name:
            continue
        folder = name.replace(" ", "-")
        budget, settings = Budget(keep=keeps(entry.keep)), Settings(exclude=entry.exclude)
        verified = run(
            entry.model, out=options.out / "runs" / folder, data=entry.data, budget=budget, settings=settings
        )
        result[name] = compare(verified, fresh_feeds(entry, options.out / "fresh" / folder))
        for column, rows in result[name].items():
            for head, row in rows.items():
                console.print(f"{name}: {column}: {head}: {row}", highlight=False)
    columns = {
        column: figures([row for found in result.values() for row in found.get(column, {}).values()])
        for column in ("mixed", "lowest")
    }
    print(json.dumps({"benchmark": "unseen_prediction", "seed": options.seed, **columns, "models": result}))


if __name__ == "__main__":
    main()
