"""The analysis of a model: calibration and probe matrix, which every budget uses."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, replace

from bitalloy.core.records import RangeChoice, Secant, Settings, part_of
from bitalloy.core.work import Workspace
from bitalloy.corrections.ranges import choose_ranges
from bitalloy.data.datasets import Dataset
from bitalloy.model.load import Graph
from bitalloy.pipeline.calibrate import calibrate
from bitalloy.rewrite.calibrated import Calibrated
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.sensitivity.blind import execute_blind
from bitalloy.sensitivity.matrix import ProbeMatrix
from bitalloy.sensitivity.probing import measured_bend, probe_all
from bitalloy.sensitivity.table import sensitivities


def analyze(
    model: Graph,
    data: Dataset,
    settings: Settings | None = None,
    *,
    avoid: Collection[str] = frozenset(),
    notes: tuple[str, ...] = (),
    work: Workspace | None = None,
) -> Analysis:
    """Calibrate and probe a model: the analysis serves every plan for the targets of the settings.

    Args:
        model: in normal form, from `load`.
        data: samples that look like the real ones; no labels needed. Calibration, probing and verification each draw
            some of their own, see `bitalloy.data.parts`.
        settings: targets, numbers of samples and probes, seed, exclusions.
        avoid: SHA-256 of files, such as the images of an evaluation: no sample is drawn from them where there are
            enough others.
        notes: sentences that a reader of the results must know.
        work: where results are stored and progress is shown.

    Raises:
        ModelError: NaN or infinite values inside the model.
        DataError: the data is empty or does not fit the model.
    """
    work = work or Workspace()
    ready = calibrate(model, data, settings, avoid=avoid, notes=notes, work=work)
    targets = [ready, *ready.others]
    parts, matrices, choice = choose_ranges(targets, probe_all(targets, work), work)
    parts, matrices = execute_blind(parts, matrices, work)
    bent = measured_bend(parts, matrices, work)
    first, *others = (_analysis(part, matrix, bent, choice) for part, matrix in zip(parts, matrices, strict=True))
    return replace(first, others=tuple(others))


def _analysis(ready: Calibrated, matrix: ProbeMatrix, bent: Secant, choice: RangeChoice | None) -> Analysis:
    table = sensitivities(matrix, ready.units, part_of(ready.info, matrix.samples), bent, seed=ready.settings.seed)
    known = {f.name: getattr(ready, f.name) for f in fields(ready) if f.name != "others"}
    return Analysis(**known, matrix=matrix, secant=bent, table=table, choice=choice)
