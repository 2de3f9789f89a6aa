"""How much a run measures beyond what its plan needs."""

from __future__ import annotations

from bitalloy.core.errors import BitalloyError, did_you_mean
from bitalloy.core.records import Record

USUAL_EFFORT = "default"


class Effort(Record, frozen=True, kw_only=True):
    """What a run spends its time on."""

    name: str
    mixtures: int
    """Number of random variants of the model behind the prices of units and borders."""
    probes: int
    """Reverse passes per sample, where the settings do not say it."""
    confirmed: int
    """Number of the worst units that are measured by execution before planning."""
    rounds: int
    """Largest number of rounds of search, measurement and correction."""
    repairs: bool
    """Whether the units behind a wrong prediction are measured, and the tables corrected."""
    neighbours: bool
    """Whether the neighbours of a plan on the front are measured where they may take its place."""
    shown: bool
    """Whether what decides nothing is measured because it is shown: under a limit on the task alone, which plans are
    judged by, the neighbours of the plan and the units behind a wrong prediction of its SQNR."""
    details: bool
    """Whether peak memory is measured, and what the optimization of the runtime changes."""


EFFORTS = {
    one.name: one
    for one in (
        Effort(
            name="quick",
            mixtures=3,
            probes=4,
            confirmed=0,
            rounds=1,
            repairs=False,
            neighbours=False,
            shown=False,
            details=False,
        ),
        Effort(
            name=USUAL_EFFORT,
            mixtures=6,
            probes=8,
            confirmed=12,
            rounds=3,
            repairs=True,
            neighbours=True,
            shown=False,
            details=True,
        ),
        Effort(
            name="thorough",
            mixtures=8,
            probes=16,
            confirmed=24,
            rounds=5,
            repairs=True,
            neighbours=True,
            shown=True,
            details=True,
        ),
    )
}
"""Name -> effort, the least first."""


def effort_named(name: str) -> Effort:
    """Return an effort by its name.

    Raises:
        BitalloyError: there is none of that name.
    """
    if name not in EFFORTS:
        hint = did_you_mean(name, EFFORTS)
        raise BitalloyError(f"--effort '{name}' is unknown; expected one of {', '.join(EFFORTS)}.{hint}")
    return EFFORTS[name]
