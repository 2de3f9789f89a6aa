"""What the runtime really ran: every planned unit beside the precision of the kernels that did its work.

Case 1. Planned in INT8, and its work ran in INT8 kernels: as planned. The same for float.
Case 2. Planned in INT8, run in float: the runtime did not fuse the rounding into an integer kernel.
Case 3. Planned in float, run in INT8: the unit only moves or joins integers that its neighbours exchange.
Case 4. No kernel is reported for it: it runs inside the kernel of a neighbour, or was removed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from bitalloy.outcome import Audit, AuditedKernel, AuditedUnit
from bitalloy.records import Precision, UnitGraph
from bitalloy.tracing import Timed

SECONDARY = ("Reorder", "Reshape", "QuantizeLinear", "DequantizeLinear", "Transpose", "Subgraph", "FakeQuantize")
"""Beginnings of kernels that stand beside the work of a unit; they decide only where nothing else ran for it."""


def audit(units: UnitGraph, int8: frozenset[str], kernels: Sequence[Timed], runtime: str, version: str) -> Audit:
    """Compare a plan with a profile of its model.

    Args:
        units: of the plan's target.
        int8: units that the plan puts in INT8.
        kernels: of the rewritten model, in order, with the unit of each (`tracing.profile`).
        runtime: its name.
        version: its version.
    """
    by_unit: dict[str, list[Timed]] = defaultdict(list)
    for timed in kernels:
        if timed.unit is not None:
            by_unit[timed.unit].append(timed)
    found = []
    for unit in units.units:
        planned = Precision.INT8 if unit.id in int8 else Precision.FP32
        own = by_unit.get(unit.id, [])
        executed = _decisive(own)
        found.append(
            AuditedUnit(
                unit=unit.id,
                kind=unit.kind,
                planned=planned,
                executed=executed,
                kernels=tuple(t.kernel.op for t in own),
                us=round(sum(t.us for t in own), 3),
                cause=_cause(planned, executed),
            )
        )
    return Audit(
        runtime=runtime,
        version=version,
        units=tuple(found),
        share_of_time=_shares(kernels),
        kernels=tuple(
            AuditedKernel(op=t.kernel.op, precision=t.kernel.precision, unit=t.unit, us=round(t.us, 3)) for t in kernels
        ),
    )


def _decisive(kernels: Sequence[Timed]) -> str:
    """Precision in which most of the time of a unit's own work was spent; empty where no kernel is known."""
    own = [t for t in kernels if not t.kernel.op.startswith(SECONDARY)] or kernels
    times: dict[str, float] = defaultdict(float)
    for timed in own:
        times[timed.kernel.precision] += timed.us
    return max(times, key=lambda precision: times[precision]) if times else ""


def _cause(planned: Precision, executed: str) -> str:
    if executed in ("", planned):
        return "" if executed else "runs inside a neighbour's kernel, or was removed"
    if planned is Precision.INT8:
        return "the runtime made no integer kernel of it: a pattern that it does not fuse, or an integer one is missing"
    if executed == Precision.INT8:
        return "it handles integers that its neighbours exchange; no rounding of its own"
    return f"the runtime chose {executed} by itself"


def _shares(kernels: Sequence[Timed]) -> dict[str, float]:
    times: dict[str, float] = defaultdict(float)
    for timed in kernels:
        times[timed.kernel.precision or "other"] += timed.us
    total = sum(times.values())
    return {name: round(us / total, 4) for name, us in sorted(times.items())} if total else {}
