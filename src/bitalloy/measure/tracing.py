"""Which unit each kernel of a runtime belongs to: nodes are renamed before, and names are read in what it reports.

A runtime fuses, splits and renames, but its profile and its graph still hold the names of the nodes and tensors that it
started from. In a copy of the model every name begins with the number of its unit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from bitalloy import ops
from bitalloy.core.errors import ModelError
from bitalloy.model.metadata import TAG
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.base import Kernel, Reopener
from bitalloy.runtime.optimized import Rewritten, match
from bitalloy.runtime.steps import Step

PROFILE_RUNS, WARM_UP = 8, 2
QUIET = 25
"""Percentile of repeated times that stands for a kernel: other work on the machine only ever adds time."""
_TOKEN = re.compile(r"(?:u(?P<unit>\d+)|border)~(?P<node>\d+)(?:\.\d+)?")
_COPY = "_original"
"""OpenVINO gives the name of an output to the node that makes it, and this ending to the one that did before."""


@dataclass(frozen=True)
class TracedModel:
    """A model whose names tell the units of its nodes."""

    artefact: Artefact
    units: tuple[str, ...]
    outputs: Mapping[str, int]
    """Graph outputs, which keep their names -> number of the unit that makes them."""
    nodes: Mapping[int, tuple[str, str]]
    """Number of a node -> its name before, and its operator."""

    def units_in(self, kernel: Kernel) -> tuple[str, ...]:
        """Return all units that a kernel works for, main one first; none where it only passes between units."""
        tokens = [t for text in (*kernel.layers, kernel.name) for t in _TOKEN.finditer(text)]
        found = [self.units[int(t["unit"])] for t in tokens if t["unit"]]
        names = {name.removesuffix(_COPY) for name in kernel.layers}
        found += [self.units[index] for output, index in self.outputs.items() if output in names]
        return tuple(dict.fromkeys(found))

    def units_of(self, nodes: Iterable[str]) -> tuple[str, ...]:
        """Return the units of nodes by their names in here; rounding counts only where there is nothing else."""
        found: dict[bool, dict[str, None]] = {False: {}, True: {}}
        for token in map(_TOKEN.match, nodes):
            if token and token["unit"]:
                found[self.nodes[int(token["node"])][1] in ops.CONVERTERS][self.units[int(token["unit"])]] = None
        return tuple(found[False] or found[True])

    def operator(self, node: str) -> str:
        """Return the operator of a node by its name in here; empty for one that is not from there."""
        token = _TOKEN.match(node)
        return self.nodes[int(token["node"])][1] if token else ""

    def name_before(self, node: str) -> str:
        """Return the name of a node in the model as it was; a node that is not from there keeps its own."""
        token = _TOKEN.match(node)
        return self.nodes[int(token["node"])][0] if token else node

    def placed(self, folder: Path) -> TracedModel:
        """Return the same model with its large graphs in files in a folder."""
        return replace(self, artefact=self.artefact.placed(folder))


@dataclass(frozen=True)
class TimedKernel:
    """A kernel with its unit and its time."""

    kernel: Kernel
    units: tuple[str, ...]
    """Units that it works for, as far as the runtime says, main one first."""
    us: float
    """Microseconds that it takes per run."""

    @property
    def unit(self) -> str | None:
        """The unit that it runs for; None where it only passes between units."""
        return self.units[0] if self.units else None


def trace(artefact: Artefact, units: Iterable[str]) -> TracedModel:
    """Rename nodes and tensors, in place; the models must lie in memory and carry their units (`metadata.TAG`)."""
    ids = tuple(units)
    index = {unit: i for i, unit in enumerate(ids)}
    made: dict[str, int] = {}
    before: dict[int, tuple[str, str]] = {}
    number = 0
    for model in artefact.models.values():
        assert isinstance(model, ir.Model), "what is traced lies in memory"
        outputs = set(model.graph.outputs)
        for node in model.graph:
            number += 1
            before[number] = str(node.name), node.op_type
            unit = index.get(node.metadata_props.get(TAG, ""))
            prefix = f"u{unit}~" if unit is not None else "border~"
            node.name = f"{prefix}{number}"
            for slot, value in enumerate(node.outputs):
                if value not in outputs:
                    value.name = f"{prefix}{number}.{slot}"
                elif unit is not None:
                    made[str(value.name)] = unit
    return TracedModel(artefact, ids, made, before)


def profile(traced: TracedModel, step: Step, folder: Path, opener: Reopener | None = None) -> list[TimedKernel]:
    """Make a step a few times and tell what was executed, in order.

    Args:
        traced: the model.
        step: what is run; of a program perhaps one graph alone.
        folder: an existing one, in which the runtime may write.
        opener: opens a session of the model; the artefact's own way without it.
    """
    session = (opener or traced.artefact.session)(profile=folder / "profile")
    try:
        for _ in range(PROFILE_RUNS + WARM_UP):
            step.run(session)
        kernels = session.kernels()
    finally:
        session.close()
    found = []
    for kernel in kernels:
        # a kernel that runs several times under one name shares it
        times = max(1, round(len(kernel.us) / (PROFILE_RUNS + WARM_UP)))
        found.append(TimedKernel(kernel, traced.units_in(kernel), float(np.percentile(kernel.us, QUIET)) * times))
    return found


def rewritten_graphs(traced: TracedModel, folder: Path) -> dict[str, Rewritten | str]:
    """Read what the runtime makes of each graph before it runs it, or why that is not known.

    Nothing is returned of a runtime whose kernels tell what they were made from.

    Args:
        traced: the model.
        folder: an existing one, in which the runtime may write.
    """
    rewrite = traced.artefact.runtime.rewrite
    found: dict[str, Rewritten | str] = {}
    if rewrite is None:
        return found
    for name, model in traced.artefact.models.items():
        graph = (ir.load(model) if isinstance(model, Path) else model).graph
        try:
            found[name] = match(graph, rewrite(model, folder).graph, _origin)
        except ModelError as error:
            found[name] = str(error)
    return found


def _origin(name: str) -> str | None:
    token = _TOKEN.search(name)
    return token.group() if token else None
