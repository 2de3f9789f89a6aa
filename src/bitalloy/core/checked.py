"""Records of what is said about finished runs: whether one keeps limits, and how two differ."""

from __future__ import annotations

from enum import StrEnum

from bitalloy.core.records import DataInfo, Estimate, Record
from bitalloy.core.status import LimitStatus, Verdict
from bitalloy.core.tabular import Listing, Tabular


class Change(StrEnum):
    """What a difference between two runs means."""

    SAME = "same"
    WITHIN = "within noise"
    BETTER = "better"
    """Better by more than its noise."""
    WORSE = "worse"
    """Worse by more than its noise."""
    UNKNOWN = "unknown"
    """The noise of one of the runs is not known, or their numbers do not mean the same."""


CHANGE_VERDICTS = {
    Change.SAME: Verdict.MET,
    Change.WITHIN: Verdict.MET,
    Change.BETTER: Verdict.MET,
    Change.WORSE: Verdict.MISSED,
    Change.UNKNOWN: Verdict.UNDECIDED,
}
"""Change against a baseline -> what it means for a run that may not be worse."""


class Difference(Record, frozen=True, kw_only=True):
    """One number of two runs."""

    name: str
    """What it is, e.g. `latency over float` or `drop of accuracy`."""
    first: float
    second: float
    difference: Estimate | None = None
    """second - first, with the 95 % interval that follows from those of both; None where one has none."""
    change: Change
    reason: str = ""
    """Why nothing is known; empty otherwise."""


class MovedUnit(Record, frozen=True, kw_only=True):
    """A unit that two plans put into different schemes; a scheme is empty where a plan does not have the unit."""

    unit: str
    first: str
    second: str


class RunDifference(Tabular, Record, frozen=True, kw_only=True):
    """How two finished runs differ."""

    first: str
    """Directory of the first run."""
    second: str
    same_model: bool
    same_target: bool
    numbers: tuple[Difference, ...]
    """The numbers of the mixed models."""
    units: tuple[MovedUnit, ...]
    """Units in other schemes, in order of their names."""
    versions: dict[str, tuple[str, str]]
    """Package -> its versions, where they differ; a version is empty where a run does not name the package."""
    data: dict[str, tuple[DataInfo, DataInfo]]
    """`calibration` and `analysis` -> the data of both, where they differ."""

    def listing(self) -> Listing:
        """Return the numbers of both runs as a table."""
        rows = [(one.name, one.first, one.second, str(one.change)) for one in self.numbers]
        return Listing(f"{self.first} and {self.second}", ("number", "first", "second", "change"), rows)


class CheckedRun(Record, frozen=True, kw_only=True):
    """Whether a finished run keeps limits, and is no worse than another one."""

    run: str
    baseline: str = ""
    """Directory of the other run; empty without one."""
    verdict: Verdict
    """The worst of all."""
    limits: tuple[LimitStatus, ...]
    against: tuple[Difference, ...] = ()
    """What counts against the baseline."""
    passed: bool
    """Whether nothing is missed, and nothing undecided unless that was allowed."""
    reason: str
    """The result in one line: the first of the worst where it did not pass."""
