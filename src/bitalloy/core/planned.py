"""What passes between the delivering stages."""

from __future__ import annotations

import html
from dataclasses import dataclass

import msgspec

from bitalloy.core.outcome import LOWEST, LatencySpread, MetricComparison, StepLatency
from bitalloy.core.plans import Budget, CostTable, PlanReport
from bitalloy.core.records import Estimate, Record
from bitalloy.core.tabular import Listing, Tabular


@dataclass(frozen=True, repr=False)
class Planned(Tabular):
    """A plan with the cost table that it rests on."""

    plan: PlanReport
    cost: CostTable
    protected: tuple[str, ...] = ()
    """Units that stay in float because the model's family advises it and measurement bears it out."""

    def listing(self) -> Listing:
        """Return the scheme of each unit as a table, see `PlanReport.listing`."""
        return self.plan.listing()

    def front(self) -> Listing:
        """Return the plans of the Pareto front as a table, see `PlanReport.front`."""
        return self.plan.front()

    def __repr__(self) -> str:
        told = ", ".join(f"{count} {scheme}" for scheme, count in self.plan.chosen.counts().items()) or "float"
        return f"Planned({told} of {len(self.plan.choices)} units, {self.predicted_ratio:.3f}x of float predicted)"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>{self.listing().as_html()}{self.front().as_html()}"

    @property
    def predicted_ratio(self) -> float:
        """Predicted latency over that of the float model."""
        return self.plan.predicted_latency_us / self.cost.float_us

    @property
    def predicted_ratio_interval(self) -> Estimate | None:
        """The same with its 95 % prediction interval."""
        found = self.plan.predicted_latency_interval_us
        if found is None:
            return None
        value, low, high = (round(us / self.cost.float_us, 4) for us in (found.value, found.low, found.high))
        return Estimate(value=value, low=low, high=high)


class Measured(Record, frozen=True, kw_only=True):
    """What one round measured on the real runtime."""

    latency: LatencySpread
    ratio_lowest: Estimate
    """Latency of the model with all that it can in its lowest scheme over float."""
    ratio_mixed: Estimate
    """Latency of the mixed model over float, with the 95 % interval of `measure.bench.paired_ratio`."""
    sqnr_lowest: tuple[Estimate, ...]
    sqnr_mixed: tuple[Estimate, ...]
    float32: tuple[Estimate, ...]
    """The highest SQNR per head that can be told from the rounding of the outputs themselves."""
    steps: tuple[StepLatency, ...] = ()
    """What each step of the workload takes by itself, where there are several."""
    ratio_single: Estimate | None = None
    """Latency over float of the best model of one scheme; None where it is one of the others, or there is none."""
    sqnr_single: tuple[Estimate, ...] | None = None
    ratio_rewritten: Estimate | None = None
    """Latency over float of the float model after the graph rewrites of the mixed one; None where it was not made."""
    sqnr_rewritten: tuple[Estimate, ...] | None = None
    sittings_ms: tuple[float, ...] = ()
    """Median time of the float model in each sitting, in order; empty where latency is estimated."""

    @property
    def ratio(self) -> float:
        """Latency of the mixed model over float."""
        return self.ratio_mixed.value


def as_mixed(found: Measured, column: str) -> Measured:
    """Return a measurement with `LOWEST` or `ONE_SCHEME`, another column of it, in place of the mixed model."""
    ratio, sqnr = (
        (found.ratio_lowest, found.sqnr_lowest) if column == LOWEST else (found.ratio_single, found.sqnr_single)
    )
    assert ratio is not None and sqnr is not None, "the model was measured"
    name = "lowest" if column == LOWEST else "single"

    def moved(spread: LatencySpread) -> LatencySpread:
        return msgspec.structs.replace(spread, mixed=getattr(spread, name), single=None)

    return msgspec.structs.replace(
        found,
        latency=moved(found.latency),
        ratio_mixed=ratio,
        sqnr_mixed=sqnr,
        steps=tuple(msgspec.structs.replace(s, latency_ms=moved(s.latency_ms)) for s in found.steps),
        ratio_single=None,
        sqnr_single=None,
    )


class Metrics(Record, frozen=True, kw_only=True):
    """Task metrics of the three models."""

    metrics: dict[str, MetricComparison]
    confidence_shift: dict[str, Estimate]
    box_overlap: dict[str, Estimate] = msgspec.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def ratio_limit(budget: Budget, planned: Planned) -> float | None:
    """Return the tightest latency limit of a budget as a part of the float model's latency; None without one."""
    limits = [budget.latency_ratio] if budget.latency_ratio is not None else []
    if budget.latency_ms is not None:
        limits.append(budget.latency_ms * 1e3 / planned.cost.float_us)
    return min(limits) if limits else None
