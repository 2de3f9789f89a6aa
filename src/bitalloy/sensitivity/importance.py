"""How much the rows of what layers make matter: the energy that an error there would have in the outputs.

The metric is the probe matrix' own (`probe`): with g the gradient of a random combination of a head's elements, the
mean over combinations of ||g_r||^2 is what independent errors of unit size in row r (a position, a token) add up to at
the head. Of all heads together: relative to the energy of each, divergences in nats. Heads that read one tensor go back
in one pass: their signs are independent, so that on average nothing is added to the sum of their squares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import onnxruntime as ort

from bitalloy.adjoint.engine import build
from bitalloy.adjoint.rules import RULES
from bitalloy.core.records import Head
from bitalloy.model.heads import Reference, needs_values
from bitalloy.model.load import Graph
from bitalloy.runtime.ort import OrtSession
from bitalloy.sensitivity.matrix import LEAST_ENERGY

ROW_PROBES = 2
"""Reverse passes of every tensor with heads in each sample."""


class RowWeights:
    """Sessions that turn a sample into weights of rows.

    Args:
        graph: the model in normal form.
        heads: the parts of the outputs.
        tensors: what layers make; their last axis is that of the channels.
        stops: nodes that hand on no gradient; of what lies before them nothing is known.

    Raises:
        UnsupportedOpError: an operator between a tensor and a head has no adjoint rule.
    """

    def __init__(
        self, graph: Graph, heads: Sequence[Head], tensors: Sequence[str], *, stops: frozenset[str] = frozenset()
    ) -> None:
        self._heads, self._tensors = tuple(heads), tuple(tensors)
        self._own = tuple(dict.fromkeys(h.tensor for h in heads))
        self._kept = tuple(dict.fromkeys(h.output for h in heads))
        self._adjoint = build(graph, {t: t for t in self._own}, [], RULES, stops=stops, keep=self._kept, rows=tensors)
        with ThreadPoolExecutor() as pool:
            models = [self._adjoint.primal, *(h.model for h in self._adjoint.heads)]
            self._primal, *self._reverse = pool.map(partial(OrtSession, shared=True), models)

    def measure(self, feeds: Mapping[str, np.ndarray], *, sample: int, seed: int) -> dict[str, np.ndarray]:
        """Return tensor -> weights of its rows (rows,), where it reaches a head; signs come from (seed, sample)."""
        values = {k: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(v)) for k, v in feeds.items()}
        state = self._primal.run_values(values, self._primal.output_names)
        parts = Reference({name: state[name].numpy() for name in self._kept}, self._heads).parts
        total: dict[str, np.ndarray] = {}
        for position, tensor in enumerate(self._own):
            reverse = self._adjoint.heads[position]
            if not reverse.rows:
                continue
            mixed = np.zeros((ROW_PROBES, *reverse.shape), np.float32)
            for index, (head, part) in enumerate(zip(self._heads, parts, strict=True)):
                if head.tensor == tensor:
                    generator = np.random.default_rng([seed, sample, index])
                    v = generator.integers(0, 2, mixed.shape, dtype=np.int8).astype(np.float32) * 2 - 1
                    v = part.cotangents(v) if needs_values(head) else v
                    mixed += v / np.float32(np.sqrt(max(part.energy, LEAST_ENERGY)))
            feed = {name: state[name] for name in reverse.residuals}
            feed[reverse.cotangent] = ort.OrtValue.ortvalue_from_numpy(mixed)
            found = self._reverse[position].run_values(feed, list(reverse.rows.values()))
            for row, name in reverse.rows.items():
                rows = found[name].numpy().astype(np.float64).mean(axis=0).reshape(-1)
                total[row] = total.get(row, 0.0) + rows
        return total
