"""Rounding of weights that are stored in blocks: by what enters their layers, tried and kept where it gains.

The numbers are fitted on some samples and judged on others, before the network is probed, so that every prediction and
every plan rests on them. Tried is the model with every unit in its lowest scheme of blocks. Ways to round, beside each
weight to its nearest number:

- `search`: ranges of blocks by the error of what the layer makes;
- `gptq`: errors compensated by weights behind (`calibrate.blocks`);
- `weighted`: the same, with rows of what enters weighted by how much an error there matters at the outputs
  (`sensitivity.importance`), so that what does not matter gets little care.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import msgspec
import numpy as np
import onnx_ir as ir

from bitalloy.calibrate.blocks import compensated, searched
from bitalloy.calibrate.moments import second_moments
from bitalloy.core.encoding import to_json
from bitalloy.core.errors import BitalloyError
from bitalloy.core.outcome import Correction
from bitalloy.core.records import Record
from bitalloy.core.schemes import Granularity, Plan, Scheme
from bitalloy.core.store import StageInputs
from bitalloy.core.units import UnitGraph, WeightSite
from bitalloy.core.work import Workspace
from bitalloy.corrections.debiasing import WORSE_DB
from bitalloy.corrections.trials import BETTER_DB, JUDGING_SAMPLES, sqnr_gains, untried_correction
from bitalloy.data.datasets import Dataset
from bitalloy.formats import find_format
from bitalloy.measure.sqnr import artefact_sqnr
from bitalloy.model.load import Graph
from bitalloy.model.read import constant, static_shape
from bitalloy.model.twins import twins
from bitalloy.rewrite.calibrated import Calibrated, ExecutedNetwork
from bitalloy.sensitivity.importance import RowWeights
from bitalloy.targets.placement import weight_site
from bitalloy.targets.recipe import reduction_axis
from bitalloy.targets.stored import ChosenRounding, ChosenRoundings, read_roundings, write_roundings

WEIGHT_ROUNDING = "weight-rounding"
NEAREST, AUTOMATIC = "nearest", "auto"
BY_ROWS = "weighted"
"""The way with weighted rows."""
ROUNDING_WAYS = {"search": searched, "gptq": compensated, BY_ROWS: compensated}
"""Name of a way to round -> function of a weight, second moments, a format and a block."""
TRIED_WAYS = ("gptq", BY_ROWS)
"""Those that `auto` tries: ranges alone gain little (docs/design.md)."""
EVEN_SHARE = 0.2
"""Part of the moments in which all rows count alike, where rows are weighted: otherwise the few that matter, such as
the last position of a prompt, would be all that is known of what enters."""
MOMENT_SAMPLES, LEAST_MOMENT_SAMPLES = 16, 4
"""Samples that second moments are taken from, and the fewest that will do."""


@dataclass(frozen=True)
class BlockLayer:
    """A layer whose weight may be stored in blocks."""

    node: ir.Node
    site: WeightSite
    schemes: tuple[Scheme, ...]
    """The schemes that do so, the lowest one last."""

    @property
    def across(self) -> bool:
        """Whether the rows of its matrix are the outputs."""
        assert self.site.axis is not None, "weights are stored by channel"
        return reduction_axis(self.node, self.site.axis, 2) == 1

    @property
    def ends(self) -> tuple[str, str]:
        """The tensors that enter it and that it makes."""
        return str(self.node.inputs[0].name), str(self.node.outputs[0].name)  # type: ignore[union-attr]


class RoundingInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides the stored numbers of weights."""

    network: ExecutedNetwork
    """The network, with every weight at its nearest number."""
    way: str
    sites: tuple[str, ...]
    stops: tuple[str, ...]
    """Nodes through which no gradient is taken."""
    samples: tuple[int, ...]
    seed: int


class RoundingTrialInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides how weights in blocks are rounded."""

    networks: tuple[ExecutedNetwork, ...]
    """The network on each target."""
    ways: tuple[str, ...]
    stops: tuple[str, ...]
    """Nodes through which no gradient is taken."""
    fitted: tuple[int, ...]
    judged: tuple[int, ...]
    seed: int


class RoundingTrial(Record, frozen=True, kw_only=True):
    """What the trial of ways to round found."""

    correction: Correction
    way: str = ""
    """The way that is kept; empty for none."""


def round_blocks(
    parts: Sequence[Calibrated], data: Dataset, samples: Sequence[int], work: Workspace
) -> tuple[tuple[ChosenRoundings, ...], Correction | None]:
    """Choose the stored numbers of all weights that may be stored in blocks, and say whether it pays.

    With `auto` that one of `TRIED_WAYS` is kept, on all targets, with which the mean over the heads, divergences
    included, rises most on the first target with such weights: by more than `BETTER_DB`, while none falls by more than
    `WORSE_DB`. A way that is asked for is kept as it is.

    Args:
        parts: the model on each target, with the settings that say which ways are tried.
        data: samples.
        samples: indices of those that the ranges come from; these are used.
        work: where to keep and show results.

    Returns:
        The roundings on each target, empty where none are kept; and the report, None where no weight is so stored.
    """
    none, asked = tuple(ChosenRoundings() for _ in parts), parts[0].settings.weight_rounding
    layers = [block_layers(p.graph, p.units) for p in parts]
    at = next((i for i, found in enumerate(layers) if found), None)
    if at is None or asked == NEAREST:
        return none, None
    places, count = len(layers[at]), len(samples)
    start = count - min(JUDGING_SAMPLES, count // 2)
    fitted, judged = tuple(samples[: min(MOMENT_SAMPLES, start)]), tuple(samples[start:])
    if parts[at].graph.large:
        return none, untried_correction(WEIGHT_ROUNDING, places, "not tried on large models")
    if len(fitted) < LEAST_MOMENT_SAMPLES:
        reason = f"needs {LEAST_MOMENT_SAMPLES} samples beside the {len(judged)} on which it is judged, of {count}"
        return none, untried_correction(WEIGHT_ROUNDING, places, reason)
    every = {layer.site.id: layer for found in layers for layer in found}
    rounder = _Rounder(parts[at], tuple(every.values()), data, fitted, work)
    ways = TRIED_WAYS if asked == AUTOMATIC else (asked,)

    def make() -> bytes:
        return to_json(_try(parts[at], layers[at], rounder, ways, judged))

    inputs = RoundingTrialInputs(
        networks=tuple(p.executed for p in parts),
        ways=ways,
        stops=tuple(sorted(parts[at].excluded)),
        fitted=fitted,
        judged=judged,
        seed=parts[at].settings.seed,
    )
    trial = msgspec.json.decode(work.cached("rounding-trial", inputs, make), type=RoundingTrial)
    if not trial.way:
        return none, trial.correction
    kept = tuple(
        rounder.rounded(part, trial.way, {layer: layer.schemes for layer in found})
        for part, found in zip(parts, layers, strict=True)
    )
    return kept, trial.correction


def check_rounding(way: str) -> None:
    """Refuse a name that is no way to round weights.

    Raises:
        BitalloyError: the message says which there are.
    """
    known = (AUTOMATIC, NEAREST, *ROUNDING_WAYS)
    if way not in known:
        raise BitalloyError(f"--weight-rounding has no '{way}'. Choose among {', '.join(known)}.")


def block_layers(graph: Graph, units: UnitGraph) -> tuple[BlockLayer, ...]:
    """Find the products whose constant matrix may be stored in blocks, in the order of the units.

    A matrix that others than products may store in blocks, too, perhaps transposed, is left out: one copy serves all
    while its numbers are the nearest.
    """
    blocks, found, others = _block_schemes(units), [], set[str]()
    for unit in units.units:
        schemes = tuple(blocks[name] for name in unit.allowed if name in blocks)
        for site in unit.weights if schemes else ():
            node = graph.node[site.node]
            weight, entering = constant(node.inputs[site.slot]), node.inputs[0]
            known = entering is not None and constant(entering) is None and 0 not in static_shape(entering)
            if weight is not None and weight.ndim == 2 and site.slot == 1 and known:
                found.append(BlockLayer(node, site, schemes))
            else:
                others.add(site.tensor)
    same = twins(graph.model.graph)
    return tuple(layer for layer in found if same.get(layer.site.tensor, layer.site.tensor) not in others)


def lowest_blocks(units: UnitGraph) -> Plan:
    """Return the plan that puts every unit that can into its lowest scheme of blocks."""
    blocks = _block_schemes(units)
    found = ((u.id, next((name for name in u.choices if name in blocks), "")) for u in units.units)
    return Plan((unit, scheme) for unit, scheme in found if scheme)


def _block_schemes(units: UnitGraph) -> dict[str, Scheme]:
    """The schemes of blocks, but for those of units that compute in another format, which decides their scales."""
    blocks = (s for s in units.schemes if s.weight is not None and s.granularity is Granularity.BLOCK)
    return {s.name: s for s in blocks if not s.cast}


def _try(
    part: Calibrated, layers: Sequence[BlockLayer], rounder: _Rounder, ways: Sequence[str], judged: Sequence[int]
) -> RoundingTrial:
    """Execute the model with all that can in blocks, rounded in every way."""
    plan, lowest = lowest_blocks(part.units), {layer: layer.schemes[-1:] for layer in layers}
    models = {NEAREST: part} | {way: part.stored(rounder.rounded(part, way, lowest)) for way in ways}
    artefacts = {name: model.executable(model.artefact(plan)) for name, model in models.items()}
    feeds = (part.data.feeds(i) for i in judged)
    with rounder.work.stage("rounding-trial", len(judged)) as progress:
        found = artefact_sqnr(part.original(), artefacts, part.heads, feeds, progress=progress.advance)
    told = {
        name: {h.name: round(e.value, 3) for h, e in zip(part.heads, found[name], strict=True)} for name in artefacts
    }
    gains = {way: sqnr_gains(told[NEAREST], told[way]) for way in ways}
    best = max(ways, key=lambda way: (gains[way][1] >= -WORSE_DB, gains[way][0]))
    gain, worst = gains[best]
    words = "; ".join(f"{way} {mean:+.2f} dB, worst head {least:+.2f} dB" for way, (mean, least) in gains.items())
    asked = part.settings.weight_rounding != AUTOMATIC
    kept = asked or (gain > BETTER_DB and worst >= -WORSE_DB)
    reason = f"mean SQNR of the model with all it can in blocks: {words}"
    correction = Correction(
        name=WEIGHT_ROUNDING,
        places=len(layers),
        kept=kept,
        reason=f"{reason}; {best} is used" if kept else reason,
        without_db=told[NEAREST],
        with_db=told[best],
        fitted_samples=len(rounder.samples),
        samples=len(judged),
    )
    return RoundingTrial(correction=correction, way=best if kept else "")


@dataclass(frozen=True)
class _Rounder:
    """Rounds weights by the second moments of what enters their layers, which are taken when they are first needed."""

    part: Calibrated
    layers: tuple[BlockLayer, ...]
    """Those of all targets."""
    data: Dataset
    samples: tuple[int, ...]
    work: Workspace
    _known: dict[bool, dict[str, np.ndarray]] = field(default_factory=dict)
    """Whether rows are weighted -> second moments by layer."""

    def rounded(self, part: Calibrated, way: str, wanted: Mapping[BlockLayer, Sequence[Scheme]]) -> ChosenRoundings:
        """Round weights in some schemes, or take what is stored of that."""
        sites = {weight_site(one.site, s.name).id: (one, s) for one, schemes in wanted.items() for s in schemes}
        inputs = RoundingInputs(
            network=part.executed,
            way=way,
            sites=tuple(sites),
            stops=tuple(sorted(part.excluded)),
            samples=self.samples,
            seed=part.settings.seed,
        )

        def make() -> bytes:
            moments = self._moments(way == BY_ROWS)
            with self.work.stage("rounding", len(sites)) as progress:
                found = {}
                for name, (layer, scheme) in sites.items():
                    found[name] = round_layer(layer, scheme, moments[layer.site.node], way)
                    progress.advance()
            return write_roundings(found)

        place = self.work.place("rounding", inputs)
        return read_roundings(self.work.cached("rounding", inputs, make), "" if place is None else str(place))

    def _moments(self, weighted: bool) -> dict[str, np.ndarray]:
        if weighted not in self._known:
            found = self._measure(self._weights if weighted else None)
            if weighted:
                found = {layer: _blended(own, self._moments(False)[layer]) for layer, own in found.items()}
            self._known[weighted] = self._joined(found)
        return self._known[weighted]

    def _joined(self, moments: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Add up the moments of layers that read one constant alike: one copy of its numbers serves them all."""
        groups: dict[tuple[str, bool], list[str]] = {}
        for layer in self.layers:
            groups.setdefault((layer.site.tensor, layer.across), []).append(layer.site.node)
        sums = {key: sum(moments[n] for n in some) if some[1:] else moments[some[0]] for key, some in groups.items()}
        return {layer.site.node: np.asarray(sums[layer.site.tensor, layer.across]) for layer in self.layers}

    def _measure(
        self, weights: Callable[[int, Mapping[str, np.ndarray]], Mapping[str, np.ndarray]] | None
    ) -> dict[str, np.ndarray]:
        entering = {layer.site.node: layer.ends[0] for layer in self.layers}
        feeds = (self.data.feeds(i) for i in self.samples)
        with self.work.stage("moments", len(self.samples)) as progress:
            return second_moments(self.part.graph.model, entering, feeds, weights=weights, progress=progress.advance)

    def _weights(self, number: int, sample: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = self._rows.measure(sample, sample=self.samples[number], seed=self.part.settings.seed)
        made = {layer.site.node: layer.ends[1] for layer in self.layers}
        return {node: found[output] for node, output in made.items() if output in found}

    @cached_property
    def _rows(self) -> RowWeights:
        outputs = list(dict.fromkeys(layer.ends[1] for layer in self.layers))
        return RowWeights(self.part.graph, self.part.heads, outputs, stops=self.part.excluded)


def _blended(weighted: np.ndarray, even: np.ndarray) -> np.ndarray:
    """Mix second moments of weighted rows with those of all alike, each relative to its trace."""
    parts = (weighted, 1 - EVEN_SHARE), (even, EVEN_SHARE)
    energy = [float(m.sum() if m.ndim == 1 else np.trace(m)) for m, _ in parts]
    if not all(energy):
        return even
    return np.asarray(sum(np.float32(share / e) * m for (m, share), e in zip(parts, energy, strict=True)))


def round_layer(layer: BlockLayer, scheme: Scheme, moments: np.ndarray, way: str) -> ChosenRounding:
    """Choose the stored numbers of one weight in a scheme of blocks.

    Args:
        layer: the layer.
        scheme: how its weight is stored.
        moments: second moments of what enters it.
        way: a name from `ROUNDING_WAYS`.
    """
    weight, stored = constant(layer.node.inputs[layer.site.slot]), find_format(scheme.weight)
    assert weight is not None, "weight sites are constants"
    values, params = ROUNDING_WAYS[way](weight.T if layer.across else weight, moments, stored, scheme.block)
    if layer.across:
        values = values.T
        params = replace(params, scale=params.scale.T, zero_point=np.asarray(params.zero_point).T, axis=1)
    return ChosenRounding.of(stored, values, params)
