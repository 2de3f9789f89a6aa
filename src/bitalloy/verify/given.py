"""A quantized file beside the float model that it rounds: which of its roundings lost the accuracy."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np

from bitalloy.core.encoding import to_json
from bitalloy.core.outcome import GivenModel, GivenRounding
from bitalloy.core.records import Estimate, Record
from bitalloy.core.store import StageInputs
from bitalloy.core.work import Workspace
from bitalloy.measure import bench
from bitalloy.measure.sqnr import output_sqnr
from bitalloy.measure.workload import priced
from bitalloy.model.heads import is_divergence
from bitalloy.model.load import Graph
from bitalloy.model.read import name_of
from bitalloy.rewrite.calibrated import ExecutedNetwork
from bitalloy.runtime.artefact import Artefact, reopeners
from bitalloy.runtime.base import ONLY, Session
from bitalloy.runtime.ort import ORT, OrtSession
from bitalloy.runtime.steps import total
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.sensitivity.given import given_columns
from bitalloy.sensitivity.matrix import ProbeMatrix, decibel
from bitalloy.sensitivity.probe import Prober
from bitalloy.verify.beside_float import OUTCOME_SITTINGS, REPEATS

GIVEN_SAMPLES = 8
"""Samples on which its roundings are probed."""


class GivenInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides what is measured of a quantized file."""

    network: ExecutedNetwork
    samples: tuple[int, ...]
    seed: int
    probes: int = 0


class _Executed(Record, frozen=True, kw_only=True):
    measured_db: dict[str, Estimate]
    written_db: dict[str, Estimate] | None
    latency_ratio: Estimate


def examine_given(analysis: Analysis, work: Workspace, *, timed: bool) -> GivenModel | None:
    """Say what a quantized file loses, and where; None for a float file.

    Args:
        analysis: analysis of its float form.
        work: where to keep and show results.
        timed: whether the file can be executed by the target here. One that gives integers alone is not compared.
    """
    quantization = analysis.graph.quantization
    if not quantization:
        return None
    matrix = _probe(analysis, work)
    every = matrix.damage(np.ones(len(matrix.sites))).mean(axis=0)
    found = _execute(analysis, work) if timed and not analysis.graph.shown else None
    return GivenModel(
        tensors=len(quantization.tensors) + len(quantization.at_run_time),
        weights=len(quantization.weights),
        predicted_db={
            head: round(float(decibel(value)), 3)
            for head, value in zip(matrix.heads, every, strict=True)
            if not is_divergence(head)
        },
        measured_db=None if found is None else found.measured_db,
        written_db=None if found is None else found.written_db,
        latency_ratio=None if found is None else found.latency_ratio,
        worst=_worst(analysis.graph, matrix),
    )


def _probe(analysis: Analysis, work: Workspace) -> ProbeMatrix:
    """The probe matrix of the file's own roundings, on the first samples of the analysis."""
    samples, settings = analysis.parts.probe[:GIVEN_SAMPLES], analysis.settings

    def make() -> bytes:
        prober = Prober(
            analysis.graph, analysis.heads, (), stops=analysis.excluded, beside=given_columns(analysis.graph)
        )
        with work.stage("given roundings", len(samples)) as progress:
            parts = []
            for sample in samples:
                feeds = analysis.data.feeds(sample)
                parts.append(prober.measure(feeds, sample=sample, probes=settings.probes, seed=settings.seed))
                progress.advance()
        return ProbeMatrix.concatenate(parts).to_bytes()

    inputs = GivenInputs(network=analysis.executed, samples=tuple(samples), seed=settings.seed, probes=settings.probes)
    return ProbeMatrix.from_bytes(work.cached("given-roundings", inputs, make))


def _execute(analysis: Analysis, work: Workspace) -> _Executed:
    """Run the file and the float model in turns, and compare their outputs."""
    samples, runtime, source = analysis.parts.verification, analysis.target.runtime, analysis.graph.source

    def make() -> bytes:
        models = {"float": analysis.original(), "given": Artefact({ONLY: source}, runtime=runtime)}
        found: dict[str, dict[str, Estimate]] = {}

        def compare(sessions: Mapping[str, Session]) -> None:
            others = {"given": sessions["given"]}
            written = OrtSession(source, optimize=False) if runtime is ORT else None
            if written is not None:
                others["written"] = written
            sqnr = output_sqnr(
                sessions["float"],
                others,
                analysis.heads,
                (analysis.data.feeds(i) for i in samples),
                seed=analysis.settings.seed,
                progress=progress.advance,
            )
            if written is not None:
                written.close()
            names = [head.name for head in analysis.heads]
            for model in others:
                rows = zip(names, sqnr[model], strict=True)
                found[model] = {name: value for name, value in rows if not is_divergence(name)}

        steps = priced(analysis)
        with work.stage("given file", OUTCOME_SITTINGS * REPEATS + len(samples)) as progress:
            series = bench.time_sittings(
                dict(zip(models, reopeners(list(models.values())), strict=True)),
                steps,
                repeats=REPEATS,
                sittings=OUTCOME_SITTINGS,
                progress=progress.advance,
                then=compare,
            )
        times = {name: total(part, steps) for name, part in series.items()}
        return to_json(
            _Executed(
                measured_db=found["given"],
                written_db=found.get("written"),
                latency_ratio=bench.paired_ratio(times["given"], times["float"]),
            )
        )

    inputs = GivenInputs(network=analysis.executed, samples=tuple(samples), seed=analysis.settings.seed)
    return msgspec.json.decode(work.cached("given", inputs, make), type=_Executed)


def _worst(graph: Graph, matrix: ProbeMatrix) -> tuple[GivenRounding, ...]:
    """All roundings by the damage of each alone, worst first."""
    told = [i for i, head in enumerate(matrix.heads) if not is_divergence(head)]
    alone = {site: matrix.damage(matrix.select([site])).mean(axis=0) for site in matrix.sites}
    every = np.sum(list(alone.values()), axis=0)
    found = []
    for site, damage in alone.items():
        head = max(told, key=lambda i: damage[i])
        producer = graph.value[site].producer()
        found.append(
            GivenRounding(
                tensor=site,
                node="" if producer is None else name_of(producer),
                head=matrix.heads[head],
                sqnr_db=round(float(decibel(damage[head])), 3),
                share=round(float(damage[head] / every[head]), 4) if every[head] > 0 else 0.0,
            )
        )
    return tuple(sorted(found, key=lambda rounding: rounding.sqnr_db))
