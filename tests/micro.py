"""Small models from lists of nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bitalloy.model.load import Graph, load_graph

Node = tuple[str, Sequence[str], str, Mapping[str, Any]]
"""Operator, inputs, output, attributes. The node is named after its output."""


def build(
    path: Path,
    nodes: Sequence[Node],
    inputs: Mapping[str, Sequence[int]],
    output: tuple[str, Sequence[int]],
    weights: Mapping[str, Sequence[int] | np.ndarray],
) -> Graph:
    """A model in normal form; weights given by shape are drawn from a fixed seed."""
    rng = np.random.default_rng(4)
    arrays = {
        name: given if isinstance(given, np.ndarray) else rng.standard_normal(given) * 0.3
        for name, given in weights.items()
    }
    graph = helper.make_graph(
        [helper.make_node(op, list(read), [made], name=made, **kept) for op, read, made, kept in nodes],
        "micro",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(s)) for n, s in inputs.items()],
        [helper.make_tensor_value_info(output[0], TensorProto.FLOAT, list(output[1]))],
        [numpy_helper.from_array(np.asarray(a, np.float32), n) for n, a in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return load_graph(path)
