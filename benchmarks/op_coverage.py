"""Adjoint of the operator tests that the onnx package ships: how many are right, how many are refused, and why.

A test counts where it has a float32 input and a float32 output. Its float32 inputs are varied one at a time, the other
inputs are constants. The gradient at every float32 output is compared with central differences in float64 through
`onnx.reference`, or in float32 through ONNX Runtime where the reference cannot run, or does not give the test's own
outputs or those of ONNX Runtime where the gradient is taken: its LpNormalization sums x for |x|, which the
specification asks for, and differs where an input is moved below 0. Inputs are first moved by a percent or so, off the
corners of functions such as Relu; of ONNX Runtime a smaller step is tried as well, which stays on one side of them.

`passed`: at least one input has a gradient that is right, and none has one that is wrong; inputs that are refused by
name, such as computed weights of a convolution, are counted in `inputs_refused`. `refused`: every input, by name.
`wrong`: a gradient that differs. `failed`: anything else, such as an operator that stopped in an unexpected way.

    python benchmarks/op_coverage.py

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx.reference import ReferenceEvaluator
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bitalloy.adjoint.engine import Tap, build
from bitalloy.adjoint.rules import RULES
from bitalloy.core.errors import BitalloyError, ModelError, UnsupportedOpError
from bitalloy.core.units import Edge
from bitalloy.model.load import Graph, load_graph
from bitalloy.model.standard import OPSETS
from bitalloy.runtime.ort import OrtSession

FLOAT, DOUBLE = onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE
PROBES = 4
TOLERANCE = 2e-3
Feeds = Mapping[str, np.ndarray]
Forward = Callable[[np.ndarray], list[np.ndarray]]


class WrongGradientError(Exception):
    """A gradient that differs from the differences."""


def floats(values: Sequence[onnx.ValueInfoProto]) -> list[str]:
    """Names of the float32 tensors among graph inputs or outputs."""
    return [v.name for v in values if v.type.tensor_type.elem_type == FLOAT]


def lowered(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model under an opset that bitalloy reads; whether it still means the same, the test's outputs tell."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.ir_version = 10
    for item in copy.opset_import:
        if not item.domain:
            item.version = min(max(item.version, OPSETS[0]), OPSETS[-1])
    return copy


def with_constants(model: onnx.ModelProto, feeds: Feeds, varied: str) -> onnx.ModelProto:
    """All inputs but one as initializers, and without the outputs that do not depend on it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value in model.graph.input:
        if value.name != varied:
            array = feeds[value.name]
            tensor = array if isinstance(array, onnx.TensorProto) else onnx.numpy_helper.from_array(array)
            copy.graph.initializer.add().CopyFrom(tensor)
            copy.graph.initializer[-1].name = value.name
            copy.graph.input.remove(value)
    reached = {varied}
    for node in copy.graph.node:
        if reached & set(node.input):
            reached.update(node.output)
    for value in model.graph.output:
        if value.name not in reached:
            copy.graph.output.remove(value)
    return copy


def in_float64(graph: onnx.GraphProto) -> None:
    """Write float64 for float32 in the types, constants and casts of a graph, in place."""
    for value in [*graph.input, *graph.output, *graph.value_info]:
        if value.type.tensor_type.elem_type == FLOAT:
            value.type.tensor_type.elem_type = DOUBLE
    tensors = list(graph.initializer)
    for node in graph.node:
        for item in node.attribute:
            if item.HasField("t"):
                tensors.append(item.t)
            if node.op_type == "Cast" and item.name == "to" and item.i == FLOAT:
                item.i = DOUBLE
            if node.op_type == "Constant" and item.name in ("value_float", "value_floats"):
                array = np.array(item.f if item.name == "value_float" else item.floats, np.float64)
                item.CopyFrom(onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(array)))
    for tensor in tensors:
        if tensor.data_type == FLOAT:
            array = onnx.numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def oracles(
    model: onnx.ModelProto, varied: str, outputs: Sequence[str], x: np.ndarray, expected: Sequence[np.ndarray]
) -> list[tuple[float, Forward]]:
    """Ways to run the model, best first, each with the step that suits its precision.

    Raises:
        ModelError: ONNX Runtime does not give the outputs of the test, so its derivative is another one.
    """
    ways: list[tuple[float, Forward]] = []
    double = onnx.ModelProto()
    double.CopyFrom(model)
    in_float64(double.graph)
    try:
        reference = ReferenceEvaluator(double)
        steps = (1e-6, 1e-3)  # some of its operators compute in float32 inside, where the smallest step drowns
        ways += [(s, lambda x: list(reference.run(list(outputs), {varied: x.astype(np.float64)}))) for s in steps]
    except Exception:
        pass
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    ways += [(s, lambda x: session.run(list(outputs), {varied: x.astype(np.float32)})) for s in (1e-2, 1e-3)]
    found = [w for w in ways if usable(w[1], x, expected)]
    if ways[-1] not in found:
        raise ModelError("The runtime does not reproduce the outputs of the test under a supported opset.")
    return found


def usable(run: Forward, x: np.ndarray, expected: Sequence[np.ndarray]) -> bool:
    """Whether a way to run the model gives the outputs that the test expects."""
    try:
        found = run(x)
    except Exception:
        return False
    return all(
        np.shape(f) == e.shape and np.allclose(f, e, rtol=2e-3, atol=1e-4, equal_nan=True)
        for f, e in zip(found, expected, strict=True)
    )


def moved(run: Forward, x: np.ndarray, error: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The test's input, moved off corners but not out of the function's domain."""
    noise = rng.uniform(0.003, 0.02, x.shape) * rng.choice([-1.0, 1.0], x.shape)
    for candidate in (x + noise, 0.97 * x + noise / 10, 1.03 * x + np.abs(noise), x):
        try:
            sides = [run(candidate + s * error) for s in (2e-2, -2e-2)]
        except Exception:
            continue
        if all(np.isfinite(y).all() for side in sides for y in side):
            return np.asarray(candidate, np.float32)
    return x


def gradient(net: Graph, feeds: Feeds, tap: Tap, cotangents: Feeds) -> dict[str, np.ndarray]:
    """Head -> (P,) inner products of gradient and error."""
    adjoint = build(net, {t: t for t in cotangents}, [tap], RULES)
    primal = OrtSession(adjoint.primal, threads=1).run(feeds)
    result = {}
    for head in adjoint.heads:
        given = {head.cotangent: cotangents[head.head], **{r: primal[r] for r in head.residuals}}
        found, _ = head.by_tap(OrtSession(head.model, threads=1).run(given)[head.output])
        result[head.head] = found[:, 0] if head.taps else np.zeros(PROBES)
    return result


def loaded(model: onnx.ModelProto, folder: Path) -> Graph:
    """Load a model, without the outputs that turn out not to depend on its input; they are removed from `model`."""
    path = folder / "case.onnx"
    while True:
        path.write_bytes(model.SerializeToString())
        try:
            return load_graph(path)
        except ModelError as error:
            constant = re.match(r"Output '(.*)' does not depend", str(error))
            names = [v.name for v in model.graph.output]
            if not constant or len(names) == 1:
                raise
            del model.graph.output[names.index(constant[1])]


def compare(model: onnx.ModelProto, folder: Path, feeds: Feeds, varied: str, expected: Feeds) -> None:
    """Check the gradient of one input: BitalloyError where it is refused, WrongGradientError where it differs."""
    fixed = with_constants(model, feeds, varied)
    net = loaded(fixed, folder)
    rng = np.random.default_rng(0)
    original = feeds[varied].astype(np.float64)
    error = rng.choice([-1.0, 1.0], original.shape) * rng.uniform(0.5, 1.0, original.shape)
    tap = Tap("tap", (Edge(tensor=varied, node="", slot=0),), lambda p, _: p.const(error.astype(np.float32)))
    heads = [o for o in floats(fixed.graph.output) if expected[o].size]
    if not heads:
        raise ModelError("No output of the test depends on this input.")
    try:
        build(net, {o: o for o in heads}, [tap], RULES)
    except UnsupportedOpError:  # a second output, such as the statistics of a norm, that no network reads
        heads = heads[:1]
        build(net, {o: o for o in heads}, [tap], RULES)
    cotangents = {o: rng.standard_normal((PROBES, *expected[o].shape)).astype(np.float32) for o in heads}
    gaps = []
    ways = oracles(fixed, varied, heads, original, [expected[o] for o in heads])
    for step, run in ways:
        x = moved(run, original, error, rng)
        if not usable(run, x, ways[-1][1](x)):
            continue
        found = gradient(net, {varied: x}, tap, cotangents)
        sides = [run(x + s * error) for s in (step, -step, 2 * step, -2 * step)]
        gap = 0.0
        for o, *y in zip(heads, *sides, strict=True):
            a, b, c, d = (np.asarray(v, np.float64).reshape(-1) for v in y)
            change = (8 * (a - b) - (c - d)) / (12 * step)
            product = cotangents[o].reshape(PROBES, -1) @ change
            size = np.sqrt(np.mean(product**2)) + 1e-3 * np.sqrt(np.mean(cotangents[o] ** 2)) * np.linalg.norm(error)
            worst = np.abs(found[o] - product).max() / size
            gap = max(gap, float(worst) if np.isfinite(worst) else np.inf)
        gaps.append(gap)
        if gap < TOLERANCE:
            return
    raise WrongGradientError(f"{varied}: relative error {', '.join(f'{g:.1e}' for g in gaps)}")


def reason(error: BitalloyError) -> str:
    """The operator that an error names, or its first words."""
    named = re.search(r"'\s\((\w+)\)", str(error))
    if named:
        return named[1]
    known = {"domain": "domain", "uses opset": "opset", "sequences": "not tensors", "depend": "constant output",
             "NaN": "NaN", "reproduce": "runtime differs", "valid ONNX": "not valid under opset 23",
             "ONNX Runtime cannot": "runtime cannot run it"}  # fmt: skip
    return next((short for key, short in known.items() if key in str(error)), " ".join(str(error).split()[:4]))


def plain(value: Any) -> Any:
    """A tensor as an array; of a type that numpy lacks, as it is."""
    known = isinstance(value, onnx.TensorProto) and value.data_type in (FLOAT, DOUBLE)
    if known or not isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value) if known else np.asarray(value)
    return value


def examine(case: object, folder: Path) -> tuple[str, list[str]]:
    """Status of a test, and what was refused or went wrong for each input."""
    model: onnx.ModelProto = case.model  # type: ignore[attr-defined]
    inputs, outputs = case.data_sets[0]  # type: ignore[attr-defined]
    present = [v for v in model.graph.input if v.type.WhichOneof("value") == "tensor_type"]
    if len(present) < len(model.graph.input):
        return "refused", ["not tensors"]
    feeds = {v.name: plain(a) for v, a in zip(model.graph.input, inputs, strict=True)}
    expected = {v.name: plain(a) for v, a in zip(model.graph.output, outputs, strict=True)}
    low, right, refused = lowered(model), 0, []
    for varied in floats(model.graph.input):
        if not feeds[varied].size:
            continue
        try:
            compare(low, folder, feeds, varied, expected)
            right += 1
        except BitalloyError as error:
            refused.append(reason(error))
        except WrongGradientError as error:
            return "wrong", [str(error)]
        except Exception as error:
            return "failed", [f"{varied}: {type(error).__name__} {str(error)[:200]}"]
    return ("passed" if right else "refused"), refused or ["empty input"] * (not right)


def main() -> None:
    """Run the tests and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression on the names of tests")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    from onnx.backend.test.loader import load_model_tests  # builds all tests, which takes seconds

    cases = [
        c
        for c in load_model_tests(kind="node")
        if c.model is not None
        and floats(c.model.graph.input)
        and floats(c.model.graph.output)
        and re.search(options.only, c.name)
    ]
    console = Console(stderr=True)
    counts: Counter[str] = Counter()
    inputs_refused: Counter[str] = Counter()
    refused: dict[str, list[str]] = defaultdict(list)
    expanded: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, np.errstate(all="ignore"):
        for case in track(cases, "tests", console=console):
            status, notes = examine(case, Path(folder))
            counts[status] += 1
            expanded[status] += "_expanded" in case.name
            if status == "refused":
                refused[notes[0]].append(case.name)
            elif status == "passed":
                inputs_refused.update(notes)
            else:
                console.print(f"{status}: {case.name}: {notes[0]}", highlight=False, markup=False)
    table = Table("refused for", "tests", "for example")
    for name, tests in sorted(refused.items(), key=lambda item: -len(item[1])):
        table.add_row(name, str(len(tests)), tests[0])
    console.print(table)
    result = {
        "benchmark": "op_coverage",
        "onnx": onnx.__version__,
        "onnxruntime": ort.__version__,
        "rules": len(RULES),
        "tested": len(cases),
        **{k: counts[k] for k in ("passed", "refused", "wrong", "failed")},
        "expanded": {k: expanded[k] for k in ("passed", "refused", "wrong", "failed")},
        "refused_for": {k: len(v) for k, v in sorted(refused.items())},
        "inputs_refused": dict(sorted(inputs_refused.items())),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
