"""Sizes of models as files: the one that was given, and those that are written."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest

import msgspec
import numpy as np
import onnx_ir as ir
from scipy.optimize import nnls

from bitalloy.core.plans import CostTable, SharedWeight
from bitalloy.core.schemes import BASELINE, Plan, Scheme
from bitalloy.core.units import UnitGraph, WeightSite
from bitalloy.formats import find_format
from bitalloy.formats.base import cast_type
from bitalloy.measure.prices import saved_bytes
from bitalloy.model.graphs.joining import Joined
from bitalloy.model.load import Graph
from bitalloy.model.metadata import SOURCE, TAG
from bitalloy.model.read import Consumer, consumers, is_float, name_of, static_shape
from bitalloy.model.twins import twins
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.base import ONLY
from bitalloy.targets.placement import Conversion, borders
from bitalloy.targets.recipe import PACKED, Recipe, stored_form

_MIXTURES = 6
"""Random plans that are written to learn what a border takes in a file."""
LEAST_SHARED = 1024
"""Numbers from which on it counts who else reads a constant."""


def float_bytes(graph: Graph) -> int:
    """Return the size of the float model's files as they were given, with external data."""
    return sum(float_sizes(graph).values())


def float_sizes(graph: Graph) -> dict[str, int]:
    """Return the size of each file as it was given, by the name of its graph."""
    return {name: part.info.size_bytes for name, part in _parts(graph).items()}


def _parts(graph: Graph) -> dict[str, Graph]:
    return dict(graph.program.graphs) if isinstance(graph, Joined) else {ONLY: graph}


def with_sizes(
    table: CostTable,
    units: UnitGraph,
    write: Callable[[Plan], Artefact],
    *,
    shared: Sequence[SharedWeight] = (),
    seed: int = 0,
) -> CostTable:
    """Return a cost table with the bytes that units and borders take in a file, learned from models that are written.

    Of the model with all it can in one scheme every node, weight and scale belongs to a unit. What a border takes
    follows from a few random plans, whose bytes beyond those of their units are shared out among their borders
    (non-negative least squares).

    Args:
        table: the table.
        units: the model's units.
        write: makes the model of a plan.
        shared: constants that several units read, without their bytes: see `shared_weights`.
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
    scales = _Scales(shared)
    weighed, totals = {}, []
    for name, plan in zip_longest(names, (*pure, *mixed)):
        written = write(plan)
        totals.append(float(written.size_bytes))
        if name is not None:
            weighed[name] = scales.weigh(written)
    rows = tuple(
        msgspec.structs.replace(c, bytes={name: round(weighed[name].get(c.unit, 0.0)) for name in c.bytes})
        for c in table.units
    )
    table = msgspec.structs.replace(table, units=rows, shared=scales.shared())
    kinds = [Conversion(b.source, b.sink) for b in table.borders]
    counts, left = [], []
    for plan, total in zip((*pure, *mixed), totals, strict=True):
        crossed = borders(units, plan)
        counts.append([crossed.get(kind, (0.0, 0))[1] for kind in kinds])
        left.append(total - totals[0] + saved_bytes(table, plan))
    found = nnls(np.array(counts, np.float64), np.array(left))[0] if kinds else ()
    priced = tuple(
        msgspec.structs.replace(b, bytes=round(float(size), 1)) for b, size in zip(table.borders, found, strict=True)
    )
    return msgspec.structs.replace(table, borders=priced, float_bytes=int(totals[0]))


class _Scales:
    """Weighs what is written: what belongs to units, and the forms of what several of them share."""

    def __init__(self, shared: Sequence[SharedWeight]) -> None:
        self._shared = shared
        self._number = {tensor: number for number, found in enumerate(shared) for tensor in found.tensors}
        self._forms: dict[tuple[int, str], dict[str, float]] = defaultdict(dict)
        """Shared constant and form -> name of what is stored -> bytes."""

    def weigh(self, artefact: Artefact) -> dict[str, float]:
        """Return the bytes of the nodes of each unit, their results' types, and the weights that they alone read.

        A small constant that several nodes read is shared out among them.
        """
        found: dict[str, float] = defaultdict(float)
        for model in artefact.models.values():
            assert isinstance(model, ir.Model), "what is weighed lies in memory"
            for node in model.graph:
                owner = node.metadata_props.get(TAG, "")
                found[owner] += _framed(ir.serde.serialize_node(node).ByteSize()) + sum(self._own_bytes(node))
        return dict(found)

    def shared(self) -> tuple[SharedWeight, ...]:
        """Return the shared constants with the bytes of their forms, after all that was weighed."""
        sizes: list[dict[str, int]] = [{} for _ in self._shared]
        for (number, form), parts in self._forms.items():
            sizes[number][form] = round(sum(parts.values()))
        return tuple(msgspec.structs.replace(s, bytes=found) for s, found in zip(self._shared, sizes, strict=True))

    def _own_bytes(self, node: ir.Node) -> Iterator[float]:
        for value in node.inputs:
            if value is not None and value.producer() is None and value.const_value is not None:
                name = len(str(value.name).encode())
                size = _framed(value.const_value.nbytes + name + 2 * len(value.const_value.shape.numpy()) + 8)
                tensor, form = value.meta.get(SOURCE, ("", ""))
                if tensor in self._number:
                    number, part = self._number[tensor], str(value.name)
                    if form == BASELINE:  # one of equals
                        tensor, part = self._shared[number].tensors[0], ""
                    self._forms[number, _form(tensor, form)][part] = size
                else:
                    yield size / max(len(value.uses()), 1)
        for value in node.outputs:
            if value.name and not value.is_graph_output():
                yield _framed(ir.serde.serialize_value(value).ByteSize())


def shared_weights(graph: Graph, recipe: Recipe) -> tuple[SharedWeight, ...]:
    """Find the constants that several units read, and the form in which each reads them in its schemes.

    A table and its transpose count as one, see `model.twins`. Small ones are left out.
    """
    units = recipe.units
    owner = {name: unit for unit in units.units for name in (*unit.core, *unit.tail)}
    sites = {(w.node, w.slot): w for unit in units.units for w in unit.weights}
    readers: dict[str, list[Consumer]] = {}
    for name, value in graph.model.graph.initializers.items():
        uses = list(consumers(value))
        if uses and is_float(value) and math.prod(static_shape(value)) >= LEAST_SHARED:
            readers[name] = uses
    groups: dict[str, list[str]] = defaultdict(list)
    same = twins(graph.model.graph)
    for name in readers:
        groups[same.get(name, name)].append(name)
    found = []
    for table, names in groups.items():
        forms: dict[str, dict[str, tuple[str, ...]]] = {}
        for name in names:
            for use in readers[name]:
                unit = owner[name_of(use.node)]
                site = sites.get((name_of(use.node), use.slot))
                for scheme in map(units.scheme, unit.allowed):
                    known = forms.setdefault(unit.id, {})
                    form = _read_form(recipe, scheme, use, site)
                    form = _form(table if form == BASELINE else name, form)
                    known[scheme.name] = tuple(dict.fromkeys((*known.get(scheme.name, ()), form)))
        if len(forms) > 1:
            found.append(SharedWeight(tensors=(table, *(n for n in names if n != table)), forms=forms))
    return tuple(found)


def _read_form(recipe: Recipe, scheme: Scheme, use: Consumer, site: WeightSite | None) -> str:
    """Name the form in which a node reads a constant in a scheme."""
    if scheme.cast and (site is None or not scheme.weights_only):
        return cast_type(find_format(scheme.activation)).name
    if scheme.weight is None or site is None:
        return BASELINE
    return stored_form(scheme, recipe.weight(scheme.name, use.node, site), use.node, site)


def _form(tensor: str, form: str) -> str:
    return form if form.endswith(PACKED) else f"{form} of {tensor}"


def _framed(size: int) -> int:
    """Add to the size of a message what protobuf writes in front of it: its number and its length."""
    return size + 1 + max(1, -(-size.bit_length() // 7))
