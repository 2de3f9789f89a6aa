"""A rig that compares an operator's adjoint with finite differences in ONNX Runtime and with torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator

from bitalloy.adjoint.engine import Tap, build
from bitalloy.adjoint.rules import RULES
from bitalloy.core.units import Edge
from bitalloy.model import load as graph
from bitalloy.model.load import Graph
from bitalloy.runtime.ort import OrtSession

Array = np.ndarray[Any, Any]
TorchFunction = Callable[..., Any]
PROBES = 3


def direction(edge: Edge, error: Array, name: str = "") -> Tap:
    """A tap whose error is a fixed array."""
    return Tap(name or edge.id, (edge,), lambda p, _: p.const(np.asarray(error, np.float32)))


def onnx_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Array],
    outputs: Mapping[str, Any],
    constants: Mapping[str, Array] | None = None,
    opset: int = 17,
) -> onnx.ModelProto:
    """Nodes as a model; `outputs` maps a name to its numpy dtype."""
    helper = onnx.helper
    model = helper.make_model(
        helper.make_graph(
            list(nodes),
            "micro",
            [
                helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
                for n, a in inputs.items()
            ],
            [
                helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(np.dtype(d)), None)
                for n, d in outputs.items()
            ],
            [onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in (constants or {}).items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )
    return onnx.shape_inference.infer_shapes(model)


class Rig:
    """Loads models through the normal form, runs their adjoints, and checks them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names = count()

    def load(self, model: onnx.ModelProto) -> Graph:
        path = self._folder / f"{next(self._names)}.onnx"
        path.write_bytes(model.SerializeToString())
        try:
            return graph.load_graph(path)
        finally:
            path.unlink()

    def run(
        self,
        net: Graph,
        feeds: Mapping[str, Array],
        taps: Sequence[Tap],
        cotangents: Mapping[str, Array],
        stops: frozenset[str] = frozenset(),
    ) -> dict[str, dict[str, Array]]:
        """Tensor of the head -> tap id -> (P,) inner products of gradient and error."""
        adjoint = build(net, {t: t for t in cotangents}, taps, RULES, stops=stops)
        primal = OrtSession(adjoint.primal, threads=1).run(feeds)
        result = {}
        for head in adjoint.heads:
            session = OrtSession(head.model, threads=1)
            given = {head.cotangent: cotangents[head.head], **{r: primal[r] for r in head.residuals}}
            a, _ = head.by_tap(session.run(given)[head.output])
            assert a.shape == (len(cotangents[head.head]), len(head.taps))
            result[head.head] = {t: a[:, i] for i, t in enumerate(head.taps)}
        return result

    def check(
        self,
        op: str,
        *inputs: Array | None,
        wanted: Sequence[int] = (0,),
        live: Sequence[int] = (),
        outputs: int = 1,
        heads: Sequence[int] = (0,),
        integers: Sequence[int] = (),
        opset: int = 17,
        linear: bool = False,
        reference: bool = False,
        torch: TorchFunction | None = None,
        tolerance: float = 1e-3,
        seed: int = 0,
        **attributes: Any,
    ) -> None:
        """Compare the gradient of every wanted input with both oracles.

        Inputs that are `wanted` or `live` enter the model from outside, the others are constants. A linear
        operator is differenced with a large step, which float32 represents well; `reference` takes the
        differences in float64 through onnx.reference instead of ONNX Runtime. `torch` gets float64 tensors
        for the wanted inputs, in order, and returns what the first of `heads` is. Outputs in `integers` are int64.
        """
        rng = np.random.default_rng(seed)
        names = ["" if a is None else f"i{n}" for n, a in enumerate(inputs)]
        made = [f"y{n}" for n in range(outputs)]
        given = {f"i{n}": a for n, a in enumerate(inputs) if a is not None}
        feeds = {f"i{n}": given[f"i{n}"] for n in sorted({*wanted, *live})}
        node = onnx.helper.make_node(op, names, made, name="node", **attributes)
        constants = {n: a for n, a in given.items() if n not in feeds}
        kinds = {n: np.int64 if i in integers else np.float32 for i, n in enumerate(made)}
        model = onnx_model([node], feeds, kinds, constants, opset)

        def forward(values: Mapping[str, Array]) -> list[Array]:
            if not reference:
                return [np.asarray(a, np.float64) for a in session.run(made, dict(values))]
            doubled = {n: a.astype(np.float64) if a.dtype == np.float32 else a for n, a in {**given, **values}.items()}
            double = onnx_model([node], doubled, dict.fromkeys(made, np.float64), {}, opset)
            return list(ReferenceEvaluator(double).run(made, doubled))

        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        shapes = [a.shape for a in forward(feeds)]
        cotangents = {made[h]: rng.standard_normal((PROBES, *shapes[h])).astype(np.float32) for h in heads}
        errors = {
            s: (rng.choice([-1.0, 1.0], given[f"i{s}"].shape) * rng.uniform(0.5, 1, given[f"i{s}"].shape))
            for s in wanted
        }
        # every wanted input is tapped, so that the rule has to give all gradients at once
        taps = [direction(Edge(tensor=f"i{s}", node="node", slot=s), e, f"edge{s}") for s, e in errors.items()]
        taps += [direction(Edge(tensor=f"i{s}", node="", slot=0), e, f"tensor{s}") for s, e in errors.items()]
        result = self.run(self.load(model), feeds, taps, cotangents)
        for slot, error in errors.items():
            change = self._difference(forward, feeds, f"i{slot}", error, linear=linear, reference=reference)
            for head in heads:
                v = cotangents[made[head]].reshape(PROBES, -1).astype(np.float64)
                expected = v @ change[head].reshape(-1)
                scale = np.linalg.norm(v, axis=1) * (np.linalg.norm(change[head]) + 0.01 * np.linalg.norm(error))
                got = result[made[head]]
                if not got:
                    assert np.abs(expected).max(initial=0) <= 1e-6
                    continue
                np.testing.assert_allclose(got[f"edge{slot}"], got[f"tensor{slot}"], rtol=1e-6)
                worst = (np.abs(got[f"tensor{slot}"] - expected) / (scale + 1e-6)).max(initial=0)
                assert worst < tolerance, f"{op} input {slot}: differs from finite differences by {worst:.2e}"
        if torch is not None:
            v = cotangents[made[heads[0]]][0]
            for (slot, error), gradient in zip(
                errors.items(), gradients_by_torch(torch, [feeds[f"i{s}"] for s in wanted], v), strict=True
            ):
                scale = np.linalg.norm(gradient) * np.linalg.norm(error) + 1e-6
                worst = np.abs(result[made[heads[0]]][f"tensor{slot}"][0] - (gradient * error).sum()) / scale
                assert worst < tolerance, f"{op} input {slot}: differs from torch by {worst:.2e}"

    @staticmethod
    def _difference(
        forward: Callable[[Mapping[str, Array]], list[Array]],
        feeds: Mapping[str, Array],
        name: str,
        error: Array,
        *,
        linear: bool,
        reference: bool,
    ) -> list[Array]:
        """J * error by central differences; Richardson's extrapolation where the operator is not linear."""

        def central(step: float) -> list[Array]:
            x = feeds[name].astype(np.float64)
            kind = np.float64 if reference else np.float32
            plus, minus = (forward({**feeds, name: np.asarray(x + s * error, kind)}) for s in (step, -step))
            return [(p - m) / (2 * step) for p, m in zip(plus, minus, strict=True)]

        if linear:
            return central(0.5)
        step = 1e-3 if reference else 0.02
        return [(4 * a - b) / 3 for a, b in zip(central(step), central(2 * step), strict=True)]


def gradients_by_torch(function: TorchFunction, inputs: Sequence[Array], cotangent: Array) -> list[Array]:
    torch = pytest.importorskip("torch")
    xs = [torch.from_numpy(np.asarray(x, np.float64)).requires_grad_() for x in inputs]
    y = function(torch, *xs)
    assert tuple(y.shape) == cotangent.shape
    gradients = torch.autograd.grad(y, xs, torch.from_numpy(np.asarray(cotangent, np.float64)))
    return [g.numpy() for g in gradients]


@pytest.fixture(scope="session")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    return Rig(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def tap() -> Callable[..., Tap]:
    """`tap(tensor, error, node="", slot=0, name="")`."""

    def make(tensor: str, error: Array, node: str = "", slot: int = 0, name: str = "") -> Tap:
        return direction(Edge(tensor=tensor, node=node, slot=slot), error, name)

    return make


@pytest.fixture(scope="session")
def micro() -> Callable[..., onnx.ModelProto]:
    """The model builder of this file."""
    return onnx_model


def worst_error(
    rig: Rig,
    net: Any,
    inputs: Sequence[Any],
    dialect: str,
    folder: Path,
    skip: Sequence[int] = (),
    step: float = 1e-6,
) -> float:
    """The largest relative error of the directional derivatives of an exported torch module.

    Every floating-point input not in `skip` gets a random direction, every output `PROBES` random cotangents. The
    oracle differences the module in float64; a module that computes parts in float32 all the same needs a larger
    step. The error is relative to the root mean square over the cotangents.
    """
    torch = pytest.importorskip("torch")
    if dialect == "export":
        pytest.importorskip("onnxscript")
    names = [f"in{i}" for i in range(len(inputs))]
    with torch.no_grad():
        count = len(result) if isinstance(result := net(*inputs), tuple) else 1
    options: dict[str, Any] = {"dynamo": True, "opset_version": 18, "external_data": False, "verbose": False}
    if dialect == "script":
        options = {"dynamo": False, "opset_version": 17}
    made = [f"out{i}" for i in range(count)]
    torch.onnx.export(net, tuple(inputs), folder / "net.onnx", input_names=names, output_names=made, **options)
    loaded = graph.load_graph(folder / "net.onnx")
    feeds = {n: x.numpy() for n, x in zip(names, inputs, strict=True) if n in loaded.input_names}
    rng = np.random.default_rng(0)
    varied = [i for i, x in enumerate(inputs) if x.is_floating_point() and names[i] in feeds and i not in skip]
    errors = {i: rng.standard_normal(feeds[names[i]].shape) for i in varied}
    shapes = {o: tuple(loaded.value[o].shape.numpy()) for o in made}  # type: ignore[union-attr]
    cotangents = {o: rng.standard_normal((PROBES, *s)).astype(np.float32) for o, s in shapes.items()}
    taps = [direction(Edge(tensor=names[i], node="", slot=0), e, names[i]) for i, e in errors.items()]
    found = rig.run(loaded, feeds, taps, cotangents)
    double = net.double()
    doubled = [x.double() if x.is_floating_point() else x for x in inputs]

    def moved(slot: int, error: Array, by: float) -> list[Any]:
        with torch.no_grad():
            result = double(*(x + by * torch.from_numpy(error) if j == slot else x for j, x in enumerate(doubled)))
        return [y.numpy().reshape(-1) for y in (result if isinstance(result, tuple) else (result,))]

    worst = 0.0
    for i, error in errors.items():
        sides = [moved(i, error, by) for by in (step, -step, 2 * step, -2 * step)]
        for o, *y in zip(made, *sides, strict=True):
            change = (8 * (y[0] - y[1]) - (y[2] - y[3])) / (12 * step)
            expected = cotangents[o].reshape(PROBES, -1).astype(np.float64) @ change
            if not np.any(change):
                assert not np.any(found[o].get(names[i], 0.0)), f"{o} does not depend on input {i}"
                continue
            size = np.sqrt(np.mean(expected**2))
            worst = max(worst, float(np.abs(found[o][names[i]] - expected).max() / size))
    return worst


@pytest.fixture
def exported(rig: Rig, tmp_path: Path) -> Callable[..., None]:
    """`exported(module, inputs, dialect)`: the adjoint of a torch module in one of two exporters' dialects is right."""

    def check(net: Any, inputs: Sequence[Any], dialect: str, skip: Sequence[int] = ()) -> None:
        worst = worst_error(rig, net, inputs, dialect, tmp_path, skip)
        print(f"largest relative error {worst:.1e}")
        assert worst < 1e-3

    return check
