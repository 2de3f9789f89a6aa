"""KL divergences: against scipy and torch, and their probes against the Fisher matrix and against execution."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from scipy.special import expit, log_softmax, softmax
from scipy.stats import entropy

from bitalloy.core.records import Head
from bitalloy.model.divergence import BERNOULLI, CATEGORICAL, LOGARITHMS, LOGITS, PROBABILITIES, Divergence
from bitalloy.model.heads import Reference
from bitalloy.runtime.ort import OrtSession

GIVEN = {LOGITS: lambda x: x, PROBABILITIES: lambda x: softmax(x, axis=1), LOGARITHMS: lambda x: log_softmax(x, axis=1)}


def head(kind: str, given: str) -> Head:
    classes = 1 if kind == CATEGORICAL else None
    return Head(name="y KL", output="y", tensor="y", kind=kind, given=given, classes=classes)


def signs(shape: tuple[int, ...]) -> np.ndarray:
    """Every combination, (2^n, *shape): means over it are expectations."""
    return np.array(list(itertools.product((-1.0, 1.0), repeat=int(np.prod(shape))))).reshape(-1, *shape)


@pytest.mark.parametrize("given", GIVEN)
def test_softmax_divergence_is_the_relative_entropy(given: str) -> None:
    random = np.random.default_rng(0)
    x, moved = random.normal(0, 3, (2, 1, 5, 3, 2))
    exact = Reference({"y": GIVEN[given](x)}, [head(CATEGORICAL, given)])
    want = entropy(softmax(x, axis=1), softmax(moved, axis=1), axis=1)
    assert exact.energy[0] == 2 * want.size
    assert exact.error({"y": GIVEN[given](moved)})[0] / exact.energy[0] == pytest.approx(want.mean(), rel=1e-9)
    assert exact.error({"y": GIVEN[given](x)})[0] == pytest.approx(0, abs=1e-12)


def test_sigmoid_divergence_is_that_of_torch_and_survives_zeros_and_ones() -> None:
    random = np.random.default_rng(1)
    p, q = expit(random.normal(-2, 3, (2, 1, 4, 6)))
    exact = Reference({"y": p}, [head(BERNOULLI, PROBABILITIES)])
    first, second = (torch.distributions.Bernoulli(torch.from_numpy(v)) for v in (p, q))
    want = torch.distributions.kl_divergence(first, second).sum().item()
    assert exact.error({"y": q})[0] / exact.energy[0] == pytest.approx(want, rel=1e-9)
    edges = Reference({"y": np.array([[0.0, 1.0, 0.5]], np.float32)}, [head(BERNOULLI, PROBABILITIES)])
    assert 0 < edges.error({"y": np.array([[1.0, 0.0, 0.5]], np.float32)})[0] < 200
    assert np.isfinite(edges.parts[0].cotangents(np.ones((1, 1, 3), np.float32))).all()


def test_noise_of_sigmoids_in_float32_is_known() -> None:
    """ONNX Runtime's own kernel, on logits that differ by far less than what is measured then."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 50_000]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Sigmoid", ["x"], ["y"])], "g", [x], [y])
    session = OrtSession(
        helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString()
    )
    random = np.random.default_rng(0)
    logits = random.normal(-12, 4, (1, 50_000)).astype(np.float32)
    moved = (logits * (1 + 1e-6 * random.standard_normal(logits.shape))).astype(np.float32)
    exact = Reference(session.run({"x": logits}), [head(BERNOULLI, PROBABILITIES)])
    caused = Reference({"y": expit(logits.astype(np.float64))}, [head(BERNOULLI, PROBABILITIES)])
    found = exact.error(session.run({"x": moved}))[0]
    assert caused.error({"y": expit(moved.astype(np.float64))})[0] < 0.02 * found
    assert 0.5 < found / exact.noise[0] < 2
    flat = Reference({"y": logits}, [Head(name="y", output="y", tensor="y")])
    assert flat.noise[0] == 0


@pytest.mark.parametrize("given", GIVEN)
def test_softmax_probes_have_the_fisher_matrix_as_covariance(given: str) -> None:
    x = np.array([[0.3, -1.0, 2.0, -4.0]])
    part = Divergence(head(CATEGORICAL, given), GIVEN[given](x), None)
    v = part.cotangents(signs(x.shape)).reshape(-1, 4)
    # back through the operator that makes the output, by torch
    logits = torch.from_numpy(x[0])
    operator = {LOGITS: lambda t: t, PROBABILITIES: lambda t: t.softmax(0), LOGARITHMS: lambda t: t.log_softmax(0)}
    jacobian = torch.autograd.functional.jacobian(operator[given], logits).numpy()
    at_logits = v @ jacobian
    p = softmax(x[0])
    np.testing.assert_allclose(at_logits.T @ at_logits / len(v), np.diag(p) - np.outer(p, p), atol=1e-12)


def test_sigmoid_probes_have_the_fisher_matrix_as_covariance() -> None:
    p = expit(np.array([[-9.0, 0.2, 3.0]]))
    at_logits = Divergence(head(BERNOULLI, PROBABILITIES), p, None).cotangents(signs(p.shape)) * p * (1 - p)
    flat = at_logits.reshape(-1, 3)
    np.testing.assert_allclose(flat.T @ flat / len(flat), np.diag((p * (1 - p))[0]), atol=1e-12)


@pytest.mark.parametrize(("kind", "given"), [(CATEGORICAL, g) for g in GIVEN] + [(BERNOULLI, PROBABILITIES)])
def test_probes_predict_the_divergence_of_a_small_error(kind: str, given: str) -> None:
    random = np.random.default_rng(2)
    x = random.normal(0, 2, (1, 3, 4))
    view = GIVEN[given] if kind == CATEGORICAL else expit
    weights = np.array([0.5, 1.5, 2.0, 0.0]) if kind == CATEGORICAL else None  # of positions
    part = Divergence(head(kind, given), view(x), None if weights is None else np.broadcast_to(weights, x.shape))
    found = view(x + random.normal(0, 1e-3, x.shape))
    a = (part.cotangents(signs(x.shape)) * (found - view(x))).reshape(-1, x.size).sum(axis=1)
    assert np.square(a).mean() == pytest.approx(part.error(found), rel=5e-3)
