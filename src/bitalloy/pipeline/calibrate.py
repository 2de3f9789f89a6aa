"""Calibration of a model on samples: its units on each target, and the ranges of its activations."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import msgspec
import onnx_ir as ir

from bitalloy.adjoint.coverage import uncovered
from bitalloy.adjoint.rules import RULES
from bitalloy.calibrate.gather import gather
from bitalloy.core.errors import BitalloyError
from bitalloy.core.outcome import Correction
from bitalloy.core.records import Calibration, Head, SampleParts, Settings
from bitalloy.core.units import UnitGraph
from bitalloy.core.work import Workspace
from bitalloy.corrections.debiasing import debias
from bitalloy.corrections.kept import keep_weights
from bitalloy.corrections.rounding import check_rounding, round_blocks
from bitalloy.corrections.scaling import scale_channels
from bitalloy.data.datasets import Dataset
from bitalloy.data.fitted import Fitted
from bitalloy.data.parts import WantedSamples, doubtful, draw_parts
from bitalloy.measure.workload import is_language, workload_of
from bitalloy.model.graphs.joining import Joined
from bitalloy.model.heads import find_heads
from bitalloy.model.load import Graph
from bitalloy.model.read import is_float
from bitalloy.model.regions import ancestors, path_of, region_id
from bitalloy.model.sizes import OpenSizes, Shapes
from bitalloy.rewrite.calibrated import Calibrated, environment_of
from bitalloy.rewrite.equalize import at_sizes
from bitalloy.sensitivity.probing import MAX_SAMPLES
from bitalloy.targets import chosen_targets
from bitalloy.targets.base import Target, split
from bitalloy.targets.safety import judge

RANGE_RATIO = 16.0
"""A Concat whose operands' ranges differ by more than this stays in float."""
VERIFY_SAMPLES = 16
"""Samples on which whole models are executed."""


def calibrate(
    model: Graph,
    data: Dataset,
    settings: Settings | None = None,
    *,
    avoid: Collection[str] = frozenset(),
    notes: tuple[str, ...] = (),
    work: Workspace | None = None,
) -> Calibrated:
    """Find what can be rounded, and its ranges: all that exact measurement needs. It takes the arguments of `analyze`.

    The samples of the whole analysis are drawn here, see `bitalloy.data.parts`.

    Raises:
        ModelError: NaN or infinite values inside the model.
        DataError: the data is empty or does not fit the model.
    """
    settings, work = settings or Settings(), work or Workspace()
    devices = chosen_targets(settings.targets, settings.device, settings.schemes)
    check_rounding(settings.weight_rounding)
    workload_of(model, settings.workload)  # what these refuse is refused before any work
    _excluded(model, settings.exclude)
    for device in devices:
        device.runtime.version()  # where it is not installed, that is said before any work
    given, corrections = model, tuple[Correction, ...]()
    wanted = WantedSamples(
        calibration=settings.calibration_samples,
        probe=settings.samples or MAX_SAMPLES,
        verification=VERIFY_SAMPLES,
    )
    drawn = draw_parts(data, wanted, seed=settings.seed, avoid=avoid)
    notes = (*notes, *doubtful(drawn[0]))
    if settings.equalize and not model.quantization:

        def trial(graph: Graph, few: Settings) -> Calibrated:
            first, *others = _on_each(devices, graph, drawn, few, work)
            return replace(first, others=tuple(others))

        model, corrections = scale_channels(model, drawn, settings, trial, work, [environment_of(d) for d in devices])
    parts = [
        replace(part, given=given, corrections=corrections, notes=(*notes, *part.notes))
        for part in _on_each(devices, model, drawn, settings, work)
    ]
    roundings, correction = round_blocks(parts, drawn[0], drawn[1].calibration, work)
    if correction is not None:
        corrections = (*corrections, correction)
        parts = [replace(p.stored(r), corrections=corrections) for p, r in zip(parts, roundings, strict=True)]
    parts = [p.stored(keep_weights(p, work)) for p in parts]
    if settings.bias_correction:
        debiased = debias(parts, drawn[0], drawn[1].calibration, work)
        corrections = (*corrections, debiased.correction)
        offsets = debiased.offsets or ({},) * len(parts)
        parts = [replace(p.corrected(o), corrections=corrections) for p, o in zip(parts, offsets, strict=True)]
    return replace(parts[0], others=tuple(parts[1:]))


def _on_each(
    devices: Sequence[Target],
    model: Graph,
    drawn: tuple[Dataset, SampleParts],
    settings: Settings,
    work: Workspace,
) -> list[Calibrated]:
    """The model on each target, with the ranges that all of them share."""
    heads, excluded = find_heads(model), _excluded(model, settings.exclude)
    units = [
        split(model, device, heads, exclude=excluded, schemes=_offered(model, device, settings)) for device in devices
    ]
    for device, found in zip(devices, units, strict=True):
        if not found.lowest():
            left = " after --exclude" if excluded else ""
            what = " or ".join(scheme.name.upper() for scheme in found.schemes[:0:-1])
            raise BitalloyError(
                f"No unit of the model can run in {what} on {device.name}{left}: there is nothing to plan."
            )
    hidden = _hidden(model, units, heads, excluded)
    data, parts = drawn
    samples = parts.calibration[: settings.calibration_samples]
    others = [(at_sizes(model, shapes), Fitted(data, shapes)) for shapes in _further_sizes(model, settings)]
    calibration = gather(model, units, data, samples, settings.range_method, work, others=others)
    ranges = {r.tensor: r for r in calibration.ranges}
    return [
        Calibrated(
            graph=model,
            target=device,
            units=judge(model, _restrict(found, calibration), ranges),
            heads=heads,
            settings=settings,
            data=data,
            parts=parts,
            info=data.info,
            excluded=excluded | hidden.keys(),
            calibration=calibration,
            given=model,
            notes=_told(hidden, large=model.large),
        )
        for device, found in zip(devices, units, strict=True)
    ]


def _further_sizes(model: Graph, settings: Settings) -> list[Shapes]:
    """Return the further shapes that the settings ask for, of all inputs with open sizes."""
    if settings.sizes and isinstance(model, Joined):
        raise BitalloyError("Further shapes are for models of one graph; give one --shape for each input of a program.")
    return [OpenSizes(model).completed(shapes) for shapes in settings.sizes]


def _hidden(
    model: Graph, targets: Sequence[UnitGraph], heads: Sequence[Head], excluded: frozenset[str]
) -> dict[str, str]:
    """Nodes that gradients do not pass, where something in front of them may be rounded -> why."""
    able = [unit for units in targets for unit in units.units if unit.choices]
    nodes = [model.node[name] for unit in able for name in (*unit.core, *unit.tail)]
    tensors = {
        str(v.name)
        for node in nodes
        for v in (*node.inputs, *node.outputs)
        if v is not None and is_float(v) and not v.is_initializer()
    }
    return uncovered(model, [h.tensor for h in heads], sorted(tensors), RULES, stops=excluded)


def _told(hidden: Mapping[str, str], *, large: bool) -> tuple[str, ...]:
    """Say what follows from nodes without gradients."""
    if not hidden:
        return ()
    few = "; ".join(list(hidden.values())[:3]) + (f"; and {len(hidden) - 3} more" if len(hidden) > 3 else "")
    follows = "stays in float" if large else "is measured by execution"
    where = "one node" if len(hidden) == 1 else f"{len(hidden)} nodes"
    return (f"No gradient passes {where}: {few}. What lies before {follows}.",)


def units_of(model: Graph, settings: Settings) -> tuple[UnitGraph, ...]:
    """Find the units of a model on each target, without samples; calibration may keep more of them in float."""
    excluded, heads = _excluded(model, settings.exclude), find_heads(model)
    devices = chosen_targets(settings.targets, settings.device)
    return tuple(
        split(model, device, heads, exclude=excluded, schemes=_offered(model, device, settings)) for device in devices
    )


def _offered(model: Graph, device: Target, settings: Settings) -> tuple[str, ...]:
    """Names of the schemes plans may use: those asked for, else the usual ones, for language models all but rare."""
    if settings.schemes or not is_language(model):
        return settings.schemes
    return tuple(offer.scheme.name for offer in device.runnable if not offer.rare)


def _excluded(model: Graph, patterns: Sequence[str]) -> frozenset[str]:
    """Names of the nodes that match a pattern by name, region or operator type."""
    found: set[str] = set()
    for pattern in patterns:
        hits = {
            str(n.name)
            for n in model.nodes
            if fnmatch.fnmatchcase(str(n.name), pattern)
            or n.op_type == pattern
            or any(fnmatch.fnmatchcase(r, pattern) for r in _regions(n))
        }
        if not hits:
            raise BitalloyError(f"--exclude '{pattern}' matches no node, region or operator of the model.")
        found |= hits
    return frozenset(found)


def _regions(node: ir.Node) -> tuple[str, ...]:
    """Regions of a node, the root left out."""
    return ancestors(region_id(path_of(node)))[:-1]


def _restrict(units: UnitGraph, calibration: Calibration) -> UnitGraph:
    """Keep in float what would put on one scale tensors of very different range, or numbers that a mask made infinite.

    Case 1. A Concat whose operands differ in range by more than `RANGE_RATIO`.
    Case 2. A unit that reads or makes a masked tensor: the lowest level of a scale is no longer below all scores.
    """
    ranges = {r.tensor: max(abs(r.low), abs(r.high)) for r in calibration.ranges}
    masked = {r.tensor for r in calibration.ranges if r.infinite}
    entering: dict[str, list[float]] = {}
    beside = {str(unit) for e in units.edges if e.root in masked for unit in (e.producer, e.consumer)}
    for edge in units.edges:
        if edge.consumer is not None:
            entering.setdefault(edge.consumer, []).append(ranges.get(edge.root, 0.0))
    rounding = [scheme.name for scheme in units.schemes if scheme.rounds]
    changed = []
    for unit in units.units:
        sizes = [s for s in entering.get(unit.id, []) if s > 0]
        reason = ""
        if unit.kind == "Concat" and sizes and max(sizes) > RANGE_RATIO * min(sizes):
            reason = f"operands' ranges differ by a factor of {max(sizes) / min(sizes):.0f}, too much for one scale"
        if unit.id in beside or not masked.isdisjoint(e.tensor for e in unit.inner):
            reason = "a mask makes scores infinite there, which no scale can hold"
        for name in rounding if reason else ():
            unit = unit.without(name, reason) if name in unit.allowed else unit
        changed.append(unit)
    return msgspec.structs.replace(units, units=tuple(changed))
