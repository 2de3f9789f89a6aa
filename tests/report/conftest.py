"""Records of a made-up run, with the structure of a detector, so that the report can be tested without one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import pytest

from bitalloy.core.outcome import Comparison, HeadComparison, LatencySpread, MetricComparison, Round, Summary, Triple
from bitalloy.core.plans import BorderCost, Budget, Choice, CostTable, HeadDamage, ParetoPoint, PlanReport, UnitCost
from bitalloy.core.records import DataInfo, Estimate, Latency, MetricValue, Sensitivity, SensitivityTable
from bitalloy.core.schemes import BASELINE, Plan
from bitalloy.core.status import Status, Verdict
from bitalloy.core.units import Edge, Unit, UnitEdge, UnitGraph, WeightSite
from bitalloy.measure.prices import latency_us, saved_bytes
from bitalloy.report.render import Extras, render_report
from bitalloy.sensitivity.matrix import decibel
from bitalloy.sensitivity.table import groups
from bitalloy.targets import target
from bitalloy.targets.placement import rounded
from bitalloy.verify.status import status_of

SHA = "5f3c" * 16


@dataclass(frozen=True)
class Run:
    """The five records that the report is made of."""

    summary: Summary
    plan: PlanReport
    table: SensitivityTable
    units: UnitGraph
    cost: CostTable

    def render(self, extras: Extras | None = None) -> str:
        return render_report(self.summary, self.plan, self.table, self.units, self.cost, extras)

    def with_summary(self, **changes: object) -> Run:
        """The run with other facts, judged again."""
        facts = msgspec.structs.replace(self.summary, **changes)
        return replace(self, summary=msgspec.structs.replace(facts, status=status_of(facts)))

    def with_plan(self, **changes: object) -> Run:
        return replace(self, plan=msgspec.structs.replace(self.plan, **changes))


def unit_graph(blocks: int, name: Callable[[str], str]) -> UnitGraph:
    """A chain of blocks of two Conv + SiLU pairs and an Add; the last unit has no INT8."""
    units: list[Unit] = []
    edges: list[UnitEdge] = []
    tensor, producer = name("images"), None

    def connect(node: str, slot: int, source: str, maker: str | None, rooted: bool = True) -> None:
        uses = (Edge(tensor=source, node=node, slot=slot),)
        edges.append(
            UnitEdge(
                tensor=source, uses=uses, producer=maker, consumer=node, root=source, rooted=rooted, elements=20_000
            )
        )

    for block in range(blocks):
        skip, skip_maker = tensor, producer
        for half in ("cv1", "cv2"):
            path = f"model.{block}/m.0/{half}" if block % 3 else f"model.{block}/{half}"
            conv, act = name(f"/{path}/conv/Conv"), name(f"/{path}/act/Mul")
            connect(conv, 0, tensor, producer, producer is not None)
            weight = WeightSite(tensor=f"{path}.{half}.weight", node=conv, slot=1, axis=0, elements=9216)
            common: dict[str, Any] = {
                "core": (conv,),
                "tail": (),
                "macs": 10**7,
                "allowed": (BASELINE, "int8"),
            }
            units.append(
                Unit(
                    id=conv,
                    kind="Conv",
                    region=f"{path}/conv",
                    root=f"{conv}_out",
                    inner=(),
                    weights=(weight,),
                    **common,
                )
            )
            connect(act, 0, f"{conv}_out", conv)
            inner = (Edge(tensor=f"{act}_sigmoid", node=act, slot=1),)
            units.append(
                Unit(id=act, kind="SiLU", region=f"{path}/act", root=f"{act}_out", inner=inner, weights=(), **common)
            )
            tensor, producer = f"{act}_out", act
        add = name(f"/model.{block}/Add")
        connect(add, 0, tensor, producer)
        connect(add, 1, skip, skip_maker, skip_maker is not None)
        last = block == blocks - 1
        units.append(
            Unit(
                id=add,
                kind="Add",
                region=f"model.{block}",
                core=(add,),
                tail=(),
                root=f"{add}_out",
                inner=(),
                weights=(),
                allowed=(BASELINE,) if last else (BASELINE, "int8"),
                macs=0,
                reason="operands' ranges differ by a factor of 53, too much for one scale" if last else "",
            )
        )
        tensor, producer = f"{add}_out", add
    schemes = target("ort-cpu").schemes
    return UnitGraph(target="ort-cpu", model_sha256=SHA, units=tuple(units), edges=tuple(edges), schemes=schemes)


def make_run(
    *,
    blocks: int = 8,
    heads: tuple[str, ...] = ("boxes", "scores"),
    metrics: bool = True,
    name: Callable[[str], str] = str,
    seed: int = 0,
) -> Run:
    """A run whose numbers fit together: damages of sites are drawn, everything else follows from them."""
    generator = np.random.default_rng(seed)
    units = unit_graph(blocks, name)
    free = [u.id for u in units.units if "int8" in u.allowed]
    sites = sorted(frozenset[str]().union(*(group.sites for group in groups(units))))
    damage = dict(zip(sites, 10 ** generator.normal(-5.0, 0.7, (len(sites), len(heads))), strict=True))
    if len(heads) > 1:  # the last unit reaches the first head only
        for site in rounded(units, Plan.of("int8", free[-1])):
            damage[site] = damage[site] * np.eye(len(heads))[0]

    def sqnr(chosen: frozenset[str]) -> list[float]:
        total = sum((damage[s] for s in sorted(chosen)), start=np.zeros(len(heads)))
        return [round(float(v), 3) for v in decibel(total)]

    def estimate(value: float, width: float = 0.8) -> Estimate:
        return Estimate(value=value, low=round(value - width, 3), high=round(value + 1.2 * width, 3))

    rows = [
        Sensitivity(
            id=group.id,
            scope=group.scope,
            scheme=group.scheme,
            part=group.part,
            head=head,
            sqnr_db=estimate(value),
            flagged=free[3] in group.id and group.scope == "unit",
        )
        for group in groups(units)
        for head, value in zip(heads, sqnr(group.sites), strict=True)
    ]
    data = DataInfo(name="coco128", count=24, seed=seed, sha256="ab" * 32, preprocessing="letterbox 640x640, RGB, /255")
    table = SensitivityTable(
        model_sha256=SHA, data=data, samples=24, probes=4, seed=seed, settled=True, rows=tuple(rows)
    )
    float_us = {u.id: 20.0 + 300.0 * float(generator.random()) for u in units.units}
    cost = CostTable(
        target="ort-cpu",
        device="Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
        threads=2,
        units=tuple(
            UnitCost(
                unit=u.id,
                us={BASELINE: round(float_us[u.id], 3)}
                | {name: round(float_us[u.id] * float(generator.uniform(0.3, 1.1)), 3) for name in u.choices},
                bytes={BASELINE: 4 * sum(w.elements for w in u.weights)}
                | {name: sum(w.elements for w in u.weights) for name in u.choices},
            )
            for u in units.units
        ),
        borders=(
            BorderCost(source="", sink="int8", us_per_element=2e-4, us=1.5),
            BorderCost(source="int8", sink="", us_per_element=2e-4, us=1.5),
        ),
        fixed_us=900.0,
        pure_us={BASELINE: sum(float_us.values()) + 900.0, "int8": 0.6 * sum(float_us.values()) + 900.0},
        residual_percent=2.4,
    )
    order = sorted(free, key=lambda u: float(sum(damage[s].sum() for s in sorted(rounded(units, Plan.of("int8", u))))))
    fronts = [Plan.of("int8", *order[: round(n)]) for n in np.linspace(0, len(order), 24)]
    size = 400_000 + sum(c.bytes[BASELINE] for c in cost.units)
    points = [
        ParetoPoint(
            schemes=dict(f.listed),
            predicted_latency_us=round(latency_us(cost, units, f), 2),
            size_bytes=size - saved_bytes(cost, f),
            damage=float(sum((damage[s] for s in sorted(rounded(units, f))), start=np.zeros(len(heads))).mean()),
            sqnr_db=tuple(sqnr(rounded(units, f))),
        )
        for f in fronts
    ]
    chosen, everything = fronts[16], Plan.of("int8", *free)
    front = tuple(
        p
        for p in sorted(points, key=lambda p: p.predicted_latency_us)
        if p.chosen == chosen
        or not any(q.predicted_latency_us < p.predicted_latency_us and q.damage < p.damage for q in points)
    )
    predicted, predicted_lowest = sqnr(rounded(units, chosen)), sqnr(rounded(units, everything))
    plan = PlanReport(
        model_sha256=SHA,
        target="ort-cpu",
        budget=Budget(latency_ratio=0.85),
        choices=tuple(
            Choice(
                unit=u.id,
                scheme=chosen.scheme_of(u.id),
                reason=u.reason or f"saves {float_us[u.id] / 2:.0f} us; alone it leaves 41.0 dB on {heads[0]}",
            )
            for u in units.units
        ),
        heads=tuple(
            HeadDamage(head=h, predicted_db=estimate(p), measured_db=estimate(p + 0.4))
            for h, p in zip(heads, predicted, strict=True)
        ),
        predicted_latency_us=latency_us(cost, units, chosen),
        predicted_size_bytes=size - saved_bytes(cost, chosen),
        optimality_gap=0.003,
        pareto=front,
    )
    summary = _summary(heads, predicted, predicted_lowest, plan, units, cost, data, metrics)
    return Run(summary, plan, table, units, cost).with_summary()


def _summary(
    heads: tuple[str, ...],
    predicted: list[float],
    predicted_lowest: list[float],
    plan: PlanReport,
    units: UnitGraph,
    cost: CostTable,
    data: DataInfo,
    metrics: bool,
) -> Summary:
    ratio = round(plan.predicted_latency_us / cost.float_us, 4)
    lowest_ratio = latency_us(cost, units, units.lowest()) / cost.float_us
    reference = cost.pure_us[BASELINE] / 1e3

    def latency(median: float) -> Latency:
        return Latency(median_ms=median, p10_ms=median * 0.97, p90_ms=median * 1.06, count=40)

    spread = LatencySpread(
        reference=latency(reference),
        lowest=latency(reference * lowest_ratio * 1.03),
        mixed=latency(reference * ratio * 1.01),
    )
    measured = round(ratio * 1.01, 4)

    def metric(value: float) -> MetricValue:
        return MetricValue(value=value, low=value - 0.03, high=value + 0.031, n=94)

    return Summary(
        status=Status(verdict=Verdict.NO_LIMITS),
        headline=f"The mixed model runs in {measured:.2f}x of float's time: {spread.mixed.median_ms:.1f} ms against "
        f"{reference:.1f} ms in float.",
        model="yolo11n.onnx",
        model_sha256=SHA,
        target="ort-cpu",
        device=cost.device,
        threads=2,
        budget=plan.budget,
        latency_ms=Triple(reference=reference, lowest=spread.lowest.median_ms, mixed=spread.mixed.median_ms),
        latency_ratio=measured,
        predicted_latency_ratio=ratio,
        latency_spread_ms=spread,
        size_bytes=Triple(
            reference=float(plan.predicted_size_bytes + saved_bytes(cost, plan.chosen)),
            lowest=float(plan.pareto[0].size_bytes),
            mixed=float(plan.predicted_size_bytes),
        ),
        sqnr_db={
            h: HeadComparison(
                lowest=Comparison(predicted=predicted_lowest[i], measured=predicted_lowest[i] - 1.1),
                mixed=Comparison(predicted=predicted[i], measured=predicted[i] + 0.4),
            )
            for i, h in enumerate(heads)
        },
        sqnr_interval_db={
            h: Estimate(value=predicted[i] + 0.4, low=predicted[i] - 0.5, high=predicted[i] + 1.2)
            for i, h in enumerate(heads)
        },
        metrics={
            "AP50-95": MetricComparison(
                reference=metric(0.412),
                lowest=metric(0.371),
                mixed=metric(0.408),
                drop_lowest=Estimate(value=0.041, low=0.022, high=0.06),
                drop_mixed=Estimate(value=0.004, low=-0.003, high=0.011),
            ),
            "AP50": MetricComparison(reference=metric(0.58), lowest=metric(0.55), mixed=metric(0.577)),
        }
        if metrics
        else {},
        confidence_shift={
            "int8": Estimate(value=-0.031, low=-0.036, high=-0.026),
            "mixed": Estimate(value=-0.002, low=-0.004, high=0.0),
        }
        if metrics
        else {},
        units=len(units.lowest()),
        schemes=plan.chosen.counts(),
        samples=24,
        probes=8,
        settled=True,
        flagged_units=(),
        half_margin=88.4,
        calibration=data,
        analysis=data,
        seconds={"calibration": 41.2, "probe": 130.0, "cost": 0.0, "plan": 3.1, "verify": 22.9},
        rounds=(
            Round(
                latency_ratio_limit=0.85,
                min_sqnr_db=None,
                predicted_ratio=ratio,
                measured_ratio=measured,
                sqnr_db=tuple(p + 0.4 for p in predicted),
                schemes=plan.chosen.counts(),
            ),
        ),
        seed=0,
        versions={"bitalloy": "0.1.0", "numpy": "2.4.0", "onnxruntime": "1.24.1"},
        notes=("Measured on the embedded sample `shapes` (drawn images), not on your data.",),
    )


@pytest.fixture(name="make_run")
def make_run_fixture() -> Callable[..., Run]:
    """The factory above, for tests that need more than one run."""
    return make_run
