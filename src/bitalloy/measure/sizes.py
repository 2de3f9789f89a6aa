"""Sizes of models as files: the one that was given, and those that are written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import zip_longest

import msgspec
import numpy as np
import onnx_ir as ir
from scipy.optimize import nnls

from bitalloy.core.plans import CostTable
from bitalloy.core.schemes import BASELINE, Plan
from bitalloy.core.units import UnitGraph
from bitalloy.model.graphs.joining import Joined
from bitalloy.model.load import Graph
from bitalloy.model.metadata import TAG
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.base import ONLY
from bitalloy.targets.placement import Conversion, borders

_MIXTURES = 6
"""Random plans that are written to learn what a border takes in a file."""


def float_bytes(graph: Graph) -> int:
    """Return the size of the float model's files as they were given, with external data."""
    return sum(float_sizes(graph).values())


def float_sizes(graph: Graph) -> dict[str, int]:
    """Return the size of each file as it was given, by the name of its graph."""
    return {name: part.info.size_bytes for name, part in _parts(graph).items()}


def _parts(graph: Graph) -> dict[str, Graph]:
    return dict(graph.program.graphs) if isinstance(graph, Joined) else {ONLY: graph}


def with_sizes(table: CostTable, units: UnitGraph, write: Callable[[Plan], Artefact], *, seed: int = 0) -> CostTable:
    """Return a cost table with the bytes that units and borders take in a file, learned from models that are written.

    Of the model with all it can in one scheme every node, weight and scale belongs to a unit. What a border takes
    follows from a few random plans, whose bytes beyond those of their units are shared out among their borders
    (non-negative least squares).

    Args:
        table: the table.
        units: the model's units.
        write: makes the model of a plan.
        seed: the seed of the random plans.
    """
    names = [s.name for s in units.schemes if s.name == BASELINE or units.able(s.name)]
    pure = [Plan.of(name, *units.able(name)) if name != BASELINE else Plan() for name in names]
    generator = np.random.default_rng([seed, 29])
    mixed = [
        Plan(
            (u.id, s) for u in units.units if u.choices and (s := generator.choice([BASELINE, *u.choices])) != BASELINE
        )
        for _ in range(_MIXTURES)
    ]
    weighed, totals = {}, []
    for name, plan in zip_longest(names, (*pure, *mixed)):
        written = write(plan)
        totals.append(float(written.size_bytes))
        if name is not None:
            weighed[name] = _unit_bytes(written)
    rows = tuple(
        msgspec.structs.replace(c, bytes={name: round(weighed[name].get(c.unit, 0.0)) for name in c.bytes})
        for c in table.units
    )
    known = {c.unit: c for c in rows}
    kinds = [Conversion(b.source, b.sink) for b in table.borders]
    counts, left = [], []
    for plan, total in zip((*pure, *mixed), totals, strict=True):
        crossed = borders(units, plan)
        counts.append([crossed.get(kind, (0.0, 0))[1] for kind in kinds])
        left.append(total - totals[0] + sum(known[unit].saved_bytes(scheme) for unit, scheme in plan.items()))
    found = nnls(np.array(counts, np.float64), np.array(left))[0] if kinds else ()
    priced = tuple(
        msgspec.structs.replace(b, bytes=round(float(size), 1)) for b, size in zip(table.borders, found, strict=True)
    )
    return msgspec.structs.replace(table, units=rows, borders=priced, float_bytes=int(totals[0]))


def _unit_bytes(artefact: Artefact) -> dict[str, float]:
    """Return the bytes of the nodes of each unit, their results' types, and the weights that they read.

    A weight that several nodes read is shared out among them.
    """
    found: dict[str, float] = defaultdict(float)
    for model in artefact.models.values():
        assert isinstance(model, ir.Model), "what is weighed lies in memory"
        for node in model.graph:
            owner = node.metadata_props.get(TAG, "")
            found[owner] += _framed(ir.serde.serialize_node(node).ByteSize()) + sum(_own_bytes(node))
    return dict(found)


def _own_bytes(node: ir.Node) -> Iterator[float]:
    for value in node.inputs:
        if value is not None and value.producer() is None and value.const_value is not None:
            name = len(str(value.name).encode())
            size = value.const_value.nbytes + name + 2 * len(value.const_value.shape.numpy()) + 8
            yield _framed(size) / max(len(value.uses()), 1)
    for value in node.outputs:
        if value.name and not value.is_graph_output():
            yield _framed(ir.serde.serialize_value(value).ByteSize())


def _framed(size: int) -> int:
    """Add to the size of a message what protobuf writes in front of it: its number and its length."""
    return size + 1 + max(1, -(-size.bit_length() // 7))
