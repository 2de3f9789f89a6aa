"""A quantized file beside the float model that it rounds: which of its roundings lost the accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import TopologicalSortPass

from bitalloy.adjoint.builder import Builder
from bitalloy.core.encoding import to_json
from bitalloy.core.outcome import GivenModel
from bitalloy.core.records import Estimate, GivenRounding, Record
from bitalloy.core.store import StageInputs
from bitalloy.core.work import Workspace
from bitalloy.measure import bench
from bitalloy.measure.sqnr import output_sqnr
from bitalloy.measure.workload import priced
from bitalloy.model.dequantizer import GivenTensor
from bitalloy.model.heads import Reference, is_divergence
from bitalloy.model.load import Graph
from bitalloy.model.read import consumers, name_of
from bitalloy.rewrite.calibrated import ExecutedNetwork
from bitalloy.runtime.artefact import Artefact, reopeners
from bitalloy.runtime.base import ONLY, Session
from bitalloy.runtime.ort import ORT, OrtSession
from bitalloy.runtime.steps import total
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.sensitivity.columns import ProbeWriter
from bitalloy.sensitivity.given import given_columns, round_given
from bitalloy.sensitivity.matrix import ProbeMatrix, decibel, relative
from bitalloy.sensitivity.probe import Prober
from bitalloy.verify.beside_float import OUTCOME_SITTINGS, REPEATS

GIVEN_SAMPLES = 8
"""Samples on which its roundings are probed."""
GIVEN_EXECUTED = 8
"""Roundings, the worst by prediction, that are executed: the answer must not rest on what is linear alone."""


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
    alone = {site: matrix.damage(matrix.select([site])).mean(axis=0) for site in dict.fromkeys(matrix.sites)}
    executed = _executed_alone(analysis, alone, work)
    every = matrix.damage(np.ones(len(matrix.sites))).mean(axis=0)
    for site, known in executed.items():
        before = alone.get(site, np.zeros(len(matrix.heads)))
        alone[site] = np.array([known.get(h, old) for h, old in zip(matrix.heads, before, strict=True)])
        every += alone[site] - before
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
        worst=_worst(analysis.graph, matrix.heads, alone, executed),
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


def _executed_alone(
    analysis: Analysis, alone: Mapping[str, np.ndarray], work: Workspace
) -> dict[str, dict[str, float]]:
    """Damage of single roundings, executed: tensor -> head -> damage.

    Case 1. Behind a place where a head is taken no gradient leads back to it, such as at a Concat of boxes and scores.
    Case 2. The `GIVEN_EXECUTED` others that do most damage by prediction; of large models none.

    Args:
        analysis: analysis of the float form.
        alone: predicted damage of each rounding on each head.
        work: where to keep and show results.
    """
    graph, samples = analysis.graph, analysis.parts.probe[:GIVEN_SAMPLES]
    told = [i for i, head in enumerate(analysis.heads) if not is_divergence(head.name)]
    follows = {analysis.heads[i].name: _descendants(graph, analysis.heads[i].tensor) for i in told}
    grids = graph.quantization.tensors
    made = [c.site for c in given_columns(graph) if c.site in grids and graph.value[c.site].producer() is not None]
    behind = [site for site in made if any(site in f for f in follows.values())]
    worst = sorted((s for s in made if s in alone and s not in behind), key=lambda s: -float(alone[s][told].max()))
    sites = [*behind, *(() if graph.large else worst[:GIVEN_EXECUTED])]
    if not sites:
        return {}

    def make() -> bytes:
        exact = OrtSession(graph.model)
        references = [Reference(exact.run(analysis.data.feeds(i)), analysis.heads) for i in samples]
        exact.close()
        energy = np.sum([one.energy for one in references], axis=0)
        found: dict[str, dict[str, float]] = {}
        with work.stage("single roundings", len(sites)) as progress:
            for site in sites:
                session = OrtSession(_with_rounding(graph, site, grids[site]))
                runs = (session.run(analysis.data.feeds(i)) for i in samples)
                error = np.sum([one.error(run) for one, run in zip(references, runs, strict=True)], axis=0)
                session.close()
                damage = relative(error, energy)
                found[site] = {
                    analysis.heads[i].name: float(damage[i])
                    for i in told
                    if site not in behind or site in follows[analysis.heads[i].name]
                }
                progress.advance()
        return to_json(found)

    settings = analysis.settings
    inputs = GivenInputs(network=analysis.executed, samples=tuple(samples), seed=settings.seed, probes=settings.probes)
    return msgspec.json.decode(work.cached("given-alone", inputs, make), type=dict[str, dict[str, float]])


def _descendants(graph: Graph, tensor: str) -> frozenset[str]:
    """Names of all tensors that are made of one."""
    found: set[str] = set()
    waiting = [tensor]
    while waiting:
        for use in consumers(graph.value[waiting.pop()]):
            new = [str(v.name) for v in use.node.outputs if v.name and v.name not in found]
            found.update(new)
            waiting += new
    return frozenset(found)


def _with_rounding(graph: Graph, tensor: str, grid: GivenTensor) -> ir.Model:
    """The float form with one tensor rounded."""
    model = graph.clone()
    value = next(v for node in model.graph for v in node.outputs if v.name == tensor)
    uses, left = list(value.uses()), value.is_graph_output()
    rounded = round_given(ProbeWriter(Builder(model.graph, "bitalloy.given/")), value, grid)
    rounded.type = value.type
    for node, slot in uses:
        node.replace_input_with(slot, rounded)
    if left:
        model.graph.outputs[list(model.graph.outputs).index(value)] = rounded
        value.name, rounded.name = f"{tensor}/exact", tensor
    TopologicalSortPass()(model)
    return model


def _worst(
    graph: Graph, heads: Sequence[str], alone: Mapping[str, np.ndarray], executed: Mapping[str, Mapping[str, float]]
) -> tuple[GivenRounding, ...]:
    """All roundings by the damage of each alone, worst first."""
    told = [i for i, head in enumerate(heads) if not is_divergence(head)]
    every = np.sum(list(alone.values()), axis=0)
    rows = []
    for site, damage in alone.items():
        head = max(told, key=damage.__getitem__)
        producer = graph.value[site].producer()
        rows.append(
            GivenRounding(
                tensor=site,
                node="" if producer is None else name_of(producer),
                head=heads[head],
                sqnr_db=round(float(decibel(damage[head])), 3),
                executed=heads[head] in executed.get(site, {}),
                share=round(float(damage[head] / every[head]), 4) if every[head] > 0 else 0.0,
            )
        )
    return tuple(sorted(rows, key=lambda rounding: rounding.sqnr_db))
