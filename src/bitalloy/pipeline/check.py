"""Gates on finished runs: whether one keeps limits or is worse than another, and how two differ."""

from __future__ import annotations

from pathlib import Path

import msgspec

from bitalloy.core.checked import CHANGE_VERDICTS, CheckedRun, Difference, RunDifference
from bitalloy.core.errors import BudgetError, RunDirectoryError
from bitalloy.core.outcome import Summary
from bitalloy.core.plans import Budget, PlanReport
from bitalloy.core.status import LimitStatus, Verdict, worst_verdict
from bitalloy.core.summaries import read_summary
from bitalloy.report.text import difference_text, limit_text
from bitalloy.search.choice import check_heads
from bitalloy.search.planning import read_record
from bitalloy.verify.compare import compare_numbers, counting, moved_units
from bitalloy.verify.status import status_of


def check_run(
    run: str | Path,
    *,
    budget: Budget | None = None,
    baseline: str | Path | None = None,
    allow_undecided: bool = False,
) -> CheckedRun:
    """Judge a finished run from its files alone: nothing is measured.

    Args:
        run: directory of a finished run.
        budget: limits, each in place of that of the run on the same; what else the run was made for counts too.
        baseline: directory of another finished run. Beside the limits, if there are any, the run may then not be worse
            than that one by more than noise: in latency over float, size, or the drops of its metrics, or without
            metrics in SQNR.
        allow_undecided: whether what cannot be decided counts as passed.

    Raises:
        RunDirectoryError: a directory holds no finished run.
        BudgetError: there is nothing to check, or a metric is limited that the run has not measured.
    """
    summary = finished_summary(run)
    asked = budget is not None and budget.limited
    if budget is not None and asked:
        check_heads(budget, list(summary.sqnr_db))
        summary = msgspec.structs.replace(summary, budget=_joined(summary.budget, budget))
    status = status_of(summary)
    unknown = [one.metric for one in status.limits if one.metric and one.metric not in summary.metrics]
    if unknown and asked:
        known = f"It measured: {', '.join(summary.metrics)}." if summary.metrics else "It measured none."
        raise BudgetError(f"'{run}' did not measure the metric '{unknown[0]}'. {known}")
    against: tuple[Difference, ...] = ()
    limits = status.limits
    if baseline is not None:
        other = finished_summary(baseline)
        if other.target != summary.target:
            raise RunDirectoryError(
                f"'{run}' is for {summary.target} and '{baseline}' for {other.target}. Compare runs for one target."
            )
        if lacking := sorted(other.metrics.keys() - summary.metrics.keys()):
            raise RunDirectoryError(f"'{run}' did not measure '{lacking[0]}', which its baseline '{baseline}' did.")
        against = counting(compare_numbers(other, summary), other, summary)
        limits = () if status.verdict == Verdict.NO_LIMITS else limits
    elif status.verdict == Verdict.NO_LIMITS:
        raise BudgetError(
            f"'{run}' was made without limits, so there is nothing to check. Give --max-latency, --max-drop or "
            "--baseline."
        )
    verdict = worst_verdict([*(one.verdict for one in limits), *(CHANGE_VERDICTS[one.change] for one in against)])
    allowed = (Verdict.MISSED,) if allow_undecided else (Verdict.MISSED, Verdict.UNDECIDED)
    passed = verdict not in allowed
    return CheckedRun(
        run=str(run),
        baseline="" if baseline is None else str(baseline),
        verdict=verdict,
        limits=limits,
        against=against,
        passed=passed,
        reason=_reason(limits, against, verdict),
    )


def diff_runs(first: str | Path, second: str | Path) -> RunDifference:
    """Tell how two finished runs differ, from their files alone: numbers, plans, versions and data.

    Raises:
        RunDirectoryError: a directory holds no finished run.
    """
    before, after = finished_summary(first), finished_summary(second)
    plans = [read_record(Path(run) / "plan.json", PlanReport) for run in (first, second)]
    packages = sorted(before.versions.keys() | after.versions.keys())
    versions = {name: (before.versions.get(name, ""), after.versions.get(name, "")) for name in packages}
    data = {"calibration": (before.calibration, after.calibration), "analysis": (before.analysis, after.analysis)}
    return RunDifference(
        first=str(first),
        second=str(second),
        same_model=before.model_sha256 == after.model_sha256,
        same_target=before.target == after.target,
        numbers=compare_numbers(before, after),
        units=moved_units(*plans),
        versions={name: pair for name, pair in versions.items() if pair[0] != pair[1]},
        data={name: pair for name, pair in data.items() if pair[0] != pair[1]},
    )


def finished_summary(run: str | Path) -> Summary:
    """Read the summary of a finished run.

    Raises:
        RunDirectoryError: the directory holds none.
    """
    file = Path(run) / "summary.json"
    if not file.is_file():
        raise RunDirectoryError(f"'{run}' holds no finished run: there is no '{file.name}' in it. Give `bitalloy run`.")
    return read_summary(file.read_bytes())


def _reason(limits: tuple[LimitStatus, ...], against: tuple[Difference, ...], verdict: Verdict) -> str:
    """The worst in one line."""
    told = [limit_text(one) for one in limits if one.verdict == verdict]
    told += [difference_text(one) for one in against if CHANGE_VERDICTS[one.change] == verdict]
    return f"{verdict}: {told[0]}" if told else str(verdict)


def _joined(made_for: Budget, asked: Budget) -> Budget:
    """The limits of a run with those that are asked for beside them, or in their place where they limit the same."""
    base, usual = Budget(confidence=made_for.confidence) if made_for.by_default else made_for, Budget()
    fields = {name: getattr(asked, name) for name in Budget.__struct_fields__}
    changed = {name: value for name, value in fields.items() if value != getattr(usual, name)}
    for name in ("max_drop", "head_sqnr_db"):
        changed[name] = {**getattr(base, name), **getattr(asked, name)}
    if {"latency_ratio", "latency_ms"} & changed.keys():
        changed = {"latency_ratio": None, "latency_ms": None} | changed
    return msgspec.structs.replace(base, **changed)
