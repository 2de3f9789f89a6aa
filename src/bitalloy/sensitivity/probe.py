"""The probe matrix: one measurement that serves every sensitivity, plan and target.

For a random cotangent v with independent signs (Rademacher) over the elements of one head, and g = J^T v the
gradient at a rounding site with local error e, the product a = <g, e> satisfies E[a^2] = ||J e||^2, and for a plan
that rounds several sites E[(sum a)^2] = ||sum J e||^2 (Hutchinson, "A stochastic estimator of the trace of the
influence matrix", 1990). For a head that gives a distribution the signs are shaped so that a^2 estimates twice the KL
divergence (`bitalloy.model.divergence`). One reverse pass gives a for every site at once. Rows of the matrix are pairs
(sample, probe) for each head; columns are sites in the formats of the targets (`columns`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import onnxruntime as ort

from bitalloy.adjoint.engine import Adjoint, build
from bitalloy.adjoint.rules import RULES
from bitalloy.core.errors import DataError
from bitalloy.core.records import Head
from bitalloy.model.heads import Reference, needs_values
from bitalloy.model.load import Graph
from bitalloy.model.opset import raised_graph
from bitalloy.runtime.ort import USUAL, Execution, OrtSession
from bitalloy.sensitivity.columns import Column, columns, merge
from bitalloy.sensitivity.matrix import ProbeMatrix
from bitalloy.targets.recipe import Recipe

AT_ONCE = 2
"""Number of probes per reverse execution, which read the errors together; more of them exceed the cache."""


class Prober:
    """Sessions that turn a sample into rows of the probe matrix.

    Args:
        graph: the model in normal form.
        heads: the parts of the outputs.
        schemes: recipes of one target or several. Every site that an INT8 plan could round gets a column; what two
            recipes round alike is measured once. The passes through the network are the same.
        stops: nodes that hand on no gradient; see `bitalloy.sensitivity.blind` for what lies before them.
        beside: roundings that no recipe has.
        execution: how the passes are executed, such as on which provider.

    Raises:
        UnsupportedOpError: an operator between a site and a head has no adjoint rule.
    """

    def __init__(
        self,
        graph: Graph,
        heads: Sequence[Head],
        schemes: Sequence[Recipe],
        *,
        stops: frozenset[str] = frozenset(),
        beside: Sequence[Column] = (),
        execution: Execution = USUAL,
    ) -> None:
        self._heads = tuple(heads)
        graph = raised_graph(graph, max((scheme.opset for scheme in schemes), default=0))
        wanted = [*(columns(graph, scheme) for scheme in schemes), beside]
        taps = [c.tap(name) for name, c in merge(wanted).items()]
        tensors = tuple(dict.fromkeys(h.tensor for h in heads))
        self.sites = tuple(t.id for t in taps)
        self._kept = tuple(dict.fromkeys(h.output for h in heads if needs_values(h)))
        adjoint = build(graph, {t: t for t in tensors}, taps, RULES, stops=stops, keep=self._kept)
        self._adjoint: Adjoint = adjoint
        with ThreadPoolExecutor() as pool:
            models = [adjoint.primal, *(h.model for h in adjoint.heads)]
            self._primal, *self._reverse = pool.map(partial(OrtSession, shared=True, execution=execution), models)
        self.executions = 0
        """Number of executions of a network so far, forward and reverse."""
        column = {s: i for i, s in enumerate(self.sites)}
        self._columns = [np.array([column[t] for t in h.taps], np.int64) for h in adjoint.heads]
        self._of = [tensors.index(h.tensor) for h in heads]
        """Reverse pass of each head."""

    def measure(
        self, feeds: Mapping[str, np.ndarray], *, sample: int, probes: int | Sequence[int], seed: int
    ) -> ProbeMatrix:
        """Measure the rows of one sample, with signs drawn from (seed, sample, head).

        `probes` is one number, or one for every head.

        Raises:
            DataError: the float model's output is NaN or infinite.
        """
        values = {k: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(v)) for k, v in feeds.items()}
        state = self._primal.run_values(values, self._primal.output_names)
        self.executions += 1
        weighted = [h for h in self._heads if needs_values(h)]
        found = Reference({name: state[name].numpy() for name in self._kept}, weighted).parts
        parts = {h.name: part for h, part in zip(weighted, found, strict=True)}
        counts = [probes] * len(self._heads) if isinstance(probes, int) else probes
        energy, rows, own = [], [], []
        for index, (head, count) in enumerate(zip(self._heads, counts, strict=True)):
            part, position = parts.get(head.name), self._of[index]
            energy.append(part.energy if part else float(state[self._adjoint.energies[position]].numpy()))
            if not np.isfinite(energy).all():
                raise DataError(f"The float model's output is NaN or infinite on sample {sample}.")
            reverse, columns = self._adjoint.heads[position], self._columns[position]
            generator = np.random.default_rng([seed, sample, index])
            residuals = {name: state[name] for name in reverse.residuals}
            sums, squares = np.zeros((2, 1, count, len(self.sites)), np.float32)
            for start in range(0, count, AT_ONCE):
                some = slice(start, min(start + AT_ONCE, count))
                shape = (some.stop - start, *reverse.shape)
                v = generator.integers(0, 2, shape, dtype=np.int8).astype(np.float32) * 2 - 1
                v = part.cotangents(v) if part else v
                feed = {**residuals, reverse.cotangent: ort.OrtValue.ortvalue_from_numpy(v)}
                result = self._reverse[position].run_values(feed, [reverse.output])[reverse.output].numpy()
                self.executions += 1
                total, squared = reverse.by_tap(result)
                sums[0, some, columns] = total.T
                squares[0, some, columns] = squared.T
            rows.append(sums)
            own.append(squares)
        names = tuple(h.name for h in self._heads)
        return ProbeMatrix(names, self.sites, tuple(rows), tuple(own), np.array([energy]))
