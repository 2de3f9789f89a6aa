"""Whether the machine stayed as it was while a run measured."""

from __future__ import annotations

from bitalloy.core.outcome import Steadiness
from bitalloy.core.planned import Measured
from bitalloy.core.plans import CostTable
from bitalloy.core.records import Estimate
from bitalloy.core.schemes import BASELINE

DRIFT = 0.15
"""Change of the float model's time from which on a reader must know of it; on a quiet machine it stays below 0.05."""


def steadiness_of(cost: CostTable, chosen: Measured, final: Measured) -> Steadiness | None:
    """Compare what the float model took in all measurements of a run; None where latency is estimated.

    Args:
        cost: the prices that the plan was searched with.
        chosen: what was measured of the plan when it was chosen.
        final: what was measured of it at last; the same where it was not measured again.
    """
    if cost.estimated or not final.sittings_ms:
        return None
    priced = (cost.pure_us[BASELINE] if cost.given_us is None else cost.given_us) / 1e3
    again = final is not chosen
    every = (priced, *(chosen.sittings_ms if again else ()), *final.sittings_ms)
    return Steadiness(
        priced_ms=round(priced, 4),
        sittings_ms=final.sittings_ms,
        drift=round(max(every) / min(every) - 1, 4),
        chosen_ratio=chosen.ratio_mixed if again else None,
    )


def told_drift(steadiness: Steadiness | None, ratio: Estimate) -> list[str]:
    """Say that the machine changed, or that the shipped plan is not what it was chosen for.

    Args:
        steadiness: what was found; None where nothing was measured.
        ratio: latency over float of the shipped plan, as measured at last.
    """
    if steadiness is None:
        return []
    notes = []
    if steadiness.drift > DRIFT:
        first, last = steadiness.sittings_ms[0], steadiness.sittings_ms[-1]
        notes.append(
            f"The machine changed while it was measured, by {steadiness.drift:.0%}: the float model took "
            f"{steadiness.priced_ms:.3g} ms when units were priced, {first:.3g} ms in the first sitting of the "
            f"verification and {last:.3g} ms in the last. Ratios are of the same rounds and hold better than "
            "milliseconds; the plan rests on prices of the first."
        )
    chosen = steadiness.chosen_ratio
    if chosen is not None and (ratio.low > chosen.high or ratio.high < chosen.low):
        notes.append(
            f"The plan was chosen at {chosen.value:.2f}x of float's time ({chosen.low:.2f} to {chosen.high:.2f}), and "
            f"takes {ratio.value:.2f}x ({ratio.low:.2f} to {ratio.high:.2f}) in a sitting of its own."
        )
    return notes
