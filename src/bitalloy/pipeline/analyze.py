"""From a model that is ready to be rounded to everything that is known before a budget is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import msgspec

from bitalloy.data import Dataset
from bitalloy.graph import Graph
from bitalloy.matrix import ProbeMatrix
from bitalloy.pipeline.calibration import COMPARED, Calibrated, calibrate, part_of, switchboard, unseen
from bitalloy.pipeline.trials import deciding
from bitalloy.pipeline.work import Workspace
from bitalloy.records import RangeChoice, Secant, SensitivityTable, Settings
from bitalloy.sensitivity import Prober, choose, late, picked, secant, sensitivities, settled, views
from bitalloy.sensitivity.exact import FRACTIONS
from bitalloy.verify import artefact_sqnr

MIN_SAMPLES, MAX_SAMPLES = 8, 16
LEAST_PROBES = 2
"""Of a head in every sample."""
SECANT_SAMPLES = 8
RANGE_SAMPLES = 8
"""On which the choice of ranges is measured."""


@dataclass(frozen=True, kw_only=True)
class Analysis(Calibrated):
    """Everything that is known about a model before a budget is given."""

    matrix: ProbeMatrix
    """Columns of this target."""
    secant: Secant
    table: SensitivityTable
    choice: RangeChoice | None = None
    """What choosing the ranges per tensor brought; None where one method was asked for or is all there is."""
    others: tuple[Analysis, ...] = ()
    """The same for the other targets, from the same passes through the network."""

    @property
    def targets(self) -> tuple[Analysis, ...]:
        """This analysis and the others, in the order of the settings."""
        return (self, *self.others)


def analyze(
    model: Graph,
    data: Dataset,
    settings: Settings | None = None,
    *,
    notes: tuple[str, ...] = (),
    work: Workspace | None = None,
) -> Analysis:
    """Calibrate and probe: all that serves every plan for the targets of the settings.

    Args:
        model: in normal form, from `load`.
        data: samples that look like the real ones; no labels needed.
        settings: targets, numbers of samples and probes, seed, exclusions.
        notes: what a reader of the results must know.
        work: where to keep and show results.

    Raises:
        ModelError: NaN or infinite values inside the model.
        UnsupportedOpError: an operator without adjoint rule; the message says how to exclude it.
        DataError: the data is empty or does not fit.
    """
    work = work or Workspace()
    ready = calibrate(model, data, settings, notes=notes, work=work)
    parts, matrices, choice = _probe([ready, *ready.others], work)
    bent = _secant(parts, matrices, work)
    first, *others = (_analysis(part, matrix, bent, choice) for part, matrix in zip(parts, matrices, strict=True))
    return replace(first, others=tuple(others))


def _analysis(ready: Calibrated, matrix: ProbeMatrix, bent: Secant, choice: RangeChoice | None) -> Analysis:
    table = sensitivities(matrix, ready.units, part_of(ready.info, matrix.samples), bent, seed=ready.settings.seed)
    known = {f.name: getattr(ready, f.name) for f in fields(ready) if f.name != "others"}
    return Analysis(**known, matrix=matrix, secant=bent, table=table, choice=choice)


def _probe(
    parts: Sequence[Calibrated], work: Workspace
) -> tuple[list[Calibrated], list[ProbeMatrix], RangeChoice | None]:
    """One matrix for all targets and methods of calibration; of it the columns of each target on the chosen ranges."""
    ready = parts[0]
    settings, data, key = ready.settings, ready.data, ready.key
    most = min(len(data), settings.samples or MAX_SAMPLES)
    plain = sum(not h.kind for h in ready.heads)
    shared = max(LEAST_PROBES, -(-settings.probes // plain))
    probes = [LEAST_PROBES if h.kind else shared for h in ready.heads]
    methods = ["", *(m for m in COMPARED if any(m in r.others for r in ready.calibration.ranges))]
    schemes = [p.scheme(method) for method in methods for p in parts]
    schemes += [replace(s, ranges=late(s.units, ready.ranges, s.ranges)) for s in schemes[len(parts) :]]

    def make() -> bytes:
        prober: Prober | None = None
        rows: list[ProbeMatrix] = []
        with work.stage("probe", most) as progress:
            for index in range(most):

                def shard(n: int = index) -> bytes:
                    nonlocal prober
                    prober = prober or Prober(ready.graph, ready.heads, schemes, stops=ready.excluded)
                    return prober.measure(data.feeds(n), sample=n, probes=probes, seed=settings.seed).to_bytes()

                rows.append(ProbeMatrix.from_bytes(work.shard("probe", key, f"{index:06d}", shard)))
                progress.advance(1)
                enough = settings.samples is None and len(rows) >= MIN_SAMPLES and len(rows) % 4 == 0
                if enough and settled(ProbeMatrix.concatenate(rows), ready.units):
                    break
        return ProbeMatrix.concatenate(rows).to_bytes()

    matrix = ProbeMatrix.from_bytes(work.cached("probe", key, make))
    if len(schemes) == 1:
        return list(parts), [matrix], None
    found = views(ready.graph, schemes)
    by_part = [found[i : len(methods) * len(parts) : len(parts)] for i in range(len(parts))]
    decider = deciding(parts)
    if len(methods) == 1 or decider is None:
        return list(parts), [matrix.view(candidates[0]) for candidates in by_part], None
    best = choose(matrix, by_part[decider], parts[decider].units)
    chosen = [p.on({t: methods[i] for t, i in best.items() if i}) for p in parts]
    choice = _measured_choice(parts[decider], chosen[decider], matrix.samples, work)
    if not choice.kept:
        return list(parts), [matrix.view(candidates[0]) for candidates in by_part], choice
    rest = found[len(methods) * len(parts) :]
    names = [
        picked(candidates, [candidates[0], *rest[i :: len(parts)]], best, p.units)
        for i, (candidates, p) in enumerate(zip(by_part, parts, strict=True))
    ]
    return chosen, [matrix.view(n) for n in names], choice


def _measured_choice(first: Calibrated, chosen: Calibrated, probed: int, work: Workspace) -> RangeChoice:
    """Execute the all-INT8 model on both kinds of ranges."""
    samples = unseen(probed, len(first.data))[:RANGE_SAMPLES]
    plain = [i for i, h in enumerate(first.heads) if not h.kind]

    def make() -> bytes:
        lowered = first.units.quantizable()
        with work.stage("ranges", len(samples)) as progress:
            parts = {"first": first, "chosen": chosen}
            models = {name: p.executable(p.artefact(lowered)) for name, p in parts.items()}
            feeds, seed = (first.data.feeds(i) for i in samples), first.settings.seed
            sqnr = artefact_sqnr(first.original(), models, first.heads, feeds, seed=seed, progress=progress.advance)
        means = {name: sum(sqnr[name][i].value for i in plain) for name in parts}
        record = RangeChoice(
            heads=tuple(h.name for h in first.heads),
            methods=dict(Counter(r.method for r in chosen.calibration.ranges)),
            samples=len(samples),
            first_db=sqnr["first"],
            chosen_db=sqnr["chosen"],
            kept=means["chosen"] > means["first"],
        )
        return msgspec.json.encode(record)

    return msgspec.json.decode(work.cached("ranges", first.key, make), type=RangeChoice)


def _secant(parts: Sequence[Calibrated], matrices: Sequence[ProbeMatrix], work: Workspace) -> Secant:
    """Of the first target with INT8, for all: how far the network bends depends on how large an error is."""
    at = deciding(parts)
    if at is None:
        ones = (1.0,) * len(matrices[0].heads)
        return Secant(heads=matrices[0].heads, fractions=(1.0,), damage=(ones,), linear=ones, samples=0)
    ready, matrix = parts[at], matrices[at]
    count = min(SECANT_SAMPLES, matrix.samples)

    def make() -> bytes:
        with work.stage("secant", count * len(FRACTIONS)) as progress:
            board = switchboard(ready, count, work)
            feeds = [ready.data.feeds(i) for i in range(count)]
            sites = ready.units.rounded(ready.units.quantizable())
            return msgspec.json.encode(secant(board, matrix, sites, ready.heads, feeds, progress=progress.advance))

    return msgspec.json.decode(work.cached("secant", ready.key, make), type=Secant)
