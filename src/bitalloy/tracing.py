"""Which unit each kernel of a runtime belongs to: nodes are renamed before, and names are read in the profile.

A runtime fuses, splits and renames, but what it reports still holds the names of the nodes and tensors that it started
from. In a copy of the model every name begins with the number of its unit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from bitalloy.runtime import Artefact, Kernel, Reopener
from bitalloy.values import TAG

PROFILE_RUNS, WARM_UP = 8, 2
QUIET = 25
"""Percentile of repeated times that stands for a kernel: other work on the machine only ever adds time."""
_TOKEN = re.compile(r"u(\d+)~")
_COPY = "_original"
"""OpenVINO gives the name of an output to the node that makes it, and this ending to the one that did before."""


@dataclass(frozen=True)
class Traced:
    """A model whose names tell the units of its nodes."""

    artefact: Artefact
    units: tuple[str, ...]
    outputs: Mapping[str, int]
    """Graph outputs, which keep their names -> number of the unit that makes them."""

    def unit(self, kernel: Kernel) -> str | None:
        """The unit that a kernel runs for; None where it only passes between units. The first name decides."""
        for text in (*kernel.layers, kernel.name):
            if found := _TOKEN.search(text):
                return self.units[int(found.group(1))]
        names = {name.removesuffix(_COPY) for name in kernel.layers}
        made = [index for output, index in self.outputs.items() if output in names]
        return self.units[made[0]] if made else None

    def placed(self, folder: Path) -> Traced:
        """The same with its large graphs in files in a folder."""
        return replace(self, artefact=self.artefact.placed(folder))


@dataclass(frozen=True)
class Timed:
    """A kernel with its unit and its time."""

    kernel: Kernel
    unit: str | None
    us: float
    """Microseconds per run."""


def trace(artefact: Artefact, units: Iterable[str]) -> Traced:
    """Rename nodes and tensors, in place; the models must lie in memory and carry their units (`values.TAG`)."""
    ids = tuple(units)
    index = {unit: i for i, unit in enumerate(ids)}
    made: dict[str, int] = {}
    number = 0
    for model in artefact.models.values():
        assert isinstance(model, ir.Model), "what is traced lies in memory"
        outputs = set(model.graph.outputs)
        for node in model.graph:
            number += 1
            unit = index.get(node.metadata_props.get(TAG, ""))
            prefix = f"u{unit}~" if unit is not None else "border~"
            node.name = f"{prefix}{number}"
            for slot, value in enumerate(node.outputs):
                if value not in outputs:
                    value.name = f"{prefix}{number}.{slot}"
                elif unit is not None:
                    made[str(value.name)] = unit
    return Traced(artefact, ids, made)


def profile(
    traced: Traced, feeds: Mapping[str, np.ndarray], folder: Path, opener: Reopener | None = None
) -> list[Timed]:
    """Run a model a few times and tell what was executed, in order.

    Args:
        traced: the model.
        feeds: one sample.
        folder: an existing one, in which the runtime may write.
        opener: of the model, where there is one.
    """
    session = (opener or traced.artefact.session)(profile=folder / "profile")
    try:
        for _ in range(PROFILE_RUNS + WARM_UP):
            session.run(feeds)
        kernels = session.kernels()
    finally:
        session.close()
    found = []
    for kernel in kernels:
        # a kernel that runs several times under one name shares it
        times = max(1, round(len(kernel.us) / (PROFILE_RUNS + WARM_UP)))
        found.append(Timed(kernel, traced.unit(kernel), float(np.percentile(kernel.us, QUIET)) * times))
    return found
