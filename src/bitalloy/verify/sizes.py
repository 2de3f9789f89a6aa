"""The shipped model of a file that leaves sizes open, at other sizes than those of the analysis."""

from __future__ import annotations

import msgspec

from bitalloy.core.encoding import to_json
from bitalloy.core.errors import BitalloyError, ModelError
from bitalloy.core.outcome import VerifiedSize
from bitalloy.core.schemes import Plan
from bitalloy.core.store import StageInputs
from bitalloy.core.work import Workspace
from bitalloy.data.fitted import Fitted
from bitalloy.measure.sqnr import artefact_sqnr
from bitalloy.model.heads import find_heads, is_divergence
from bitalloy.model.load import load_graph
from bitalloy.model.sizes import OpenSizes, Shapes
from bitalloy.rewrite.calibrated import Calibrated, ExecutedNetwork, as_given
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.base import ONLY

SIZES, SIZE_SAMPLES = 3, 4
"""Least number of sizes at which a model is verified, those of the analysis among them, and samples at each other."""


class SizeInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides what is measured at other sizes."""

    network: ExecutedNetwork
    plan: tuple[tuple[str, str], ...]
    samples: tuple[int, ...]
    sizes: tuple[Shapes, ...]


def verify_sizes(analysis: Calibrated, mixed: Artefact, plan: Plan, work: Workspace) -> tuple[VerifiedSize, ...]:
    """Compare the shipped model with the float one at the other sizes that are asked for, and at one more at least.

    Samples are cut or repeated to each size. Sizes that are not asked for, and that the float model does not take, are
    passed over. Nothing is compared where no size is open in the shipped model, and of a large one only what is asked.

    Args:
        analysis: what is known about the model.
        mixed: the shipped model.
        plan: its plan.
        work: where to keep and show results.
    """
    graph = analysis.given
    if not graph.is_open or mixed.bound:
        return ()
    sizes = OpenSizes(graph)
    asked = [sizes.completed(shapes) for shapes in analysis.settings.sizes]
    samples = analysis.parts.verification[:SIZE_SAMPLES]

    def make() -> bytes:
        found: list[VerifiedSize] = []
        wanted = len(asked) if graph.large else max(len(asked) + 1, SIZES - 1)
        with work.stage("sizes", wanted) as progress:
            for shapes in [*asked, *(s for s in sizes.others() if s not in asked)]:
                if len(found) == wanted:
                    break
                try:
                    found.append(_verified(analysis, mixed, shapes, samples))
                except BitalloyError:
                    if shapes in asked:
                        raise
                    continue
                progress.advance(1)
        return to_json(found)

    inputs = SizeInputs(network=analysis.executed, plan=tuple(plan.listed), samples=tuple(samples), sizes=tuple(asked))
    return msgspec.json.decode(work.cached("sizes", inputs, make), type=tuple[VerifiedSize, ...])


def _verified(analysis: Calibrated, mixed: Artefact, shapes: Shapes, samples: tuple[int, ...]) -> VerifiedSize:
    """Measure the model at one size.

    Raises:
        BitalloyError: the float model does not run at that size.
    """
    graph = load_graph(analysis.given.source, shapes=shapes, fixed=analysis.given.fixed)
    data = Fitted(analysis.data, shapes)
    shipped, heads = analysis.executable(mixed), find_heads(graph)
    reference = Artefact({ONLY: as_given(graph, analysis.target)}, runtime=analysis.target.runtime)
    session = reference.session()
    session.run(data.feeds(samples[0]))
    session.close()
    try:
        found = artefact_sqnr(
            reference, {ONLY: shipped}, heads, (data.feeds(i) for i in samples), seed=analysis.settings.seed
        )
    except ModelError as error:
        return VerifiedSize(shapes=shapes, failed=str(error))
    sqnr = {h.name: e.value for h, e in zip(heads, found[ONLY], strict=True) if not is_divergence(h.name)}
    return VerifiedSize(shapes=shapes, sqnr_db=sqnr)
