"""Results as lines of text: verdicts on limits, tables of units and fronts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import StrEnum

import numpy as np

from bitalloy.core.checked import Difference, RunDifference
from bitalloy.core.encoding import to_json
from bitalloy.core.order import natural
from bitalloy.core.outcome import Summary
from bitalloy.core.planned import Planned
from bitalloy.core.records import Estimate, GivenRounding, Sensitivity, SensitivityTable
from bitalloy.core.status import LimitStatus, Status, Verdict, of_few_samples
from bitalloy.model.heads import is_divergence
from bitalloy.report.formats import bare_decibel_text, decibel_text
from bitalloy.sensitivity.matrix import CEILING_DB
from bitalloy.sensitivity.measuring import ALL_BUT_ONE, EVERYTHING
from bitalloy.tasks.base import TaskResult
from bitalloy.tasks.metric import MetricTable

WORTH = 0.98
"""Part of the time of the usual scheme of a target below which another plan is worth it."""


def counted(schemes: Mapping[str, int]) -> str:
    """Return how many units run in which scheme, e.g. `12 INT8 and 3 FP16`.

    >>> counted({"int8": 12, "fp16": 3}), counted({})
    ('12 INT8 and 3 FP16', '0 lowered')
    """
    return " and ".join(f"{count} {name.upper()}" for name, count in schemes.items()) or "0 lowered"


def verdict_text(limit: LimitStatus) -> str:
    """Return the verdict on a limit, with the tolerance where it was needed."""
    if limit.verdict == Verdict.NO_LIMITS:
        return "no limit"
    tolerance = f" ({limit.tolerance:.0%})" if limit.verdict == Verdict.WITHIN and limit.tolerance is not None else ""
    return f"{limit.verdict}{tolerance}"


def limit_text(limit: LimitStatus) -> str:
    """Return what was asked for or aimed at and what is there, e.g. `size 4,200 bytes, asked at most 5,000 bytes`."""
    head = f" ({limit.head})" if limit.kind == "min_sqnr_db" and limit.head else ""
    got = "" if limit.got is None else f" {_amount(limit.kind, limit.got)}"
    found = limit.interval
    ends = "" if found is None else f" (95 % interval {_amount(limit.kind, found.low)} to "
    ends += "" if found is None else f"{_amount(limit.kind, found.high)})"
    bound = "at least" if limit.kind in ("min_sqnr_db", "head_sqnr_db") else "at most"
    reason = f": {limit.reason}" if limit.reason else ""
    wanted = "nothing was asked and the search aimed at" if limit.verdict == Verdict.NO_LIMITS else f"asked {bound}"
    return f"{limit.name}{head}{got}{ends}, {wanted} {_amount(limit.kind, limit.asked)}{reason}"


def status_text(status: Status) -> str:
    """Return what a run's status means for its limits: those that are not proven to be kept, or that all are."""
    if status.verdict == Verdict.NO_LIMITS:
        return "no limits were set"
    open_ = [limit for limit in status.limits if limit.verdict in (Verdict.MISSED, Verdict.UNDECIDED)]
    if open_:
        return "; ".join(f"{verdict_text(limit).upper()}: {limit_text(limit)}" for limit in open_)
    worst = next(limit for limit in status.limits if limit.verdict == status.verdict)
    return f"{'its limit is' if len(status.limits) == 1 else 'all its limits are'} {verdict_text(worst)}"


class Speed(StrEnum):
    """What timing tells of the mixed model beside float."""

    FASTER = "faster"
    NOT_FASTER = "not faster"
    UNKNOWN = "unknown"


def speed_of(summary: Summary) -> Speed:
    """Tell whether the mixed model is faster than float, by the interval of the ratio, or an estimate by its value.

    A model in which nothing is lowered, and that is not faster by its graph rewrites alone, is float itself.
    """
    interval, plain = summary.latency_ratio_interval, summary.rewritten_latency_ratio
    low, high = (interval.low, interval.high) if interval is not None else (summary.latency_ratio,) * 2
    if low >= 1 or not (summary.schemes or (plain is not None and plain.high < 1)):
        return Speed.NOT_FASTER
    return Speed.FASTER if high < 1 else Speed.UNKNOWN


def usual_is_kept(summary: Summary) -> bool:
    """Tell whether the scheme that people run on the target anyway is to be kept, because a plan is no win over it.

    That scheme must keep the limits by prediction, and the plan take more than `WORTH` of its time.
    """
    found = summary.usual_latency_ratio
    keeps = any(s.within for s in summary.single_formats if s.scheme == summary.usual_scheme)
    return found is not None and found.value > WORTH and keeps


def difference_text(one: Difference) -> str:
    """Return a number of two runs, and what their difference means, e.g. `size 4200 after 4000: worse`."""
    words = _difference_words(one)
    reason = f", {one.reason}" if one.reason else ""
    first, second = _number_words(one.name, one.first), _number_words(one.name, one.second)
    return f"{one.name} {second} after {first}{f' ({words})' if words else ''}: {one.change}{reason}"


def _number_words(name: str, value: float, sign: str = "") -> str:
    """Write a number of a run with its unit, and as many digits as can be told from noise."""
    if name == "latency in ms":
        return f"{value:{sign}.3g}" if abs(value) < 100 else f"{value:{sign}.0f}"
    kinds = {"latency over float": "latency_ratio", "size": "size_bytes"}
    return _amount(kinds.get(name, "min_sqnr_db" if name.startswith("SQNR of ") else "max_drop"), value, sign)


def _difference_words(one: Difference) -> str:
    """Write second - first with its interval, of a size in percent; empty where nothing is known."""
    if one.difference is None:
        return ""
    if one.name == "size":
        return (
            f"{one.difference.value / one.first:+.1%}".replace("%", " %") if one.first and one.difference.value else ""
        )
    value, low, high = (
        _number_words(one.name, x, "+") for x in (one.difference.value, one.difference.low, one.difference.high)
    )
    return f"{value}, 95 % interval {low} to {high}"


def difference_table(found: RunDifference) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the headers, and a line for each number of two runs."""
    lines: list[tuple[str, ...]] = [
        (
            one.name,
            _number_words(one.name, one.first),
            _number_words(one.name, one.second),
            _difference_words(one),
            f"{one.change}{': ' + one.reason if one.reason else ''}",
        )
        for one in found.numbers
    ]
    return ("number", found.first, found.second, "difference", "change"), lines


def noise_words(drop: Estimate) -> str:
    """Say whether a drop is more than what other samples could make of it."""
    return "beyond noise" if drop.low > 0 or drop.high < 0 else "within noise"


def evaluation_table(found: TaskResult) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the headers, and a line for each metric of each model, with its paired drop from the first model."""
    lines: list[tuple[str, ...]] = []
    for metric in found.metrics:
        for model, value in metric.values.items():
            drop = metric.drops.get(model)
            told, noise = "", ""
            if drop is not None:
                told = f"{drop.value:z.4f} ({interval_words(drop, 4)})"
                first = next(iter(metric.values.values())).value
                noise = noise_words(of_few_samples(drop, value.n, first, value.value))
            spread = interval_words(Estimate(value=value.value, low=value.low, high=value.high), 4) if value.n else ""
            lines.append((metric.name, model, f"{value.value:.4f}", spread, told, noise))
    return ("metric", "model", "value", "interval", "drop", "noise"), lines


def _amount(kind: str, value: float, sign: str = "") -> str:
    """Write a value of a limit, with its unit and as many digits as decide."""
    match kind:
        case "latency_ratio":
            return f"{value:{sign}.3f}x"
        case "latency_ms":
            return time_text(value)
        case "size_bytes":
            return f"{value:{sign},.0f} bytes"
        case "max_drop" | "min_agreement":
            return f"{value:{sign}z.4f}"
    return f"{value:{sign}z.2f} dB"


def interval_words(estimate: Estimate, digits: int) -> str:
    """Write an interval, e.g. `95 % interval 0.68 to 0.71`."""
    return f"95 % interval {estimate.low:z.{digits}f} to {estimate.high:z.{digits}f}"


def time_text(milliseconds: float) -> str:
    """Write a time with three significant digits: small models take microseconds, large ones seconds.

    >>> time_text(0.04817), time_text(73.84), time_text(1234.5)
    ('0.0482 ms', '73.8 ms', '1234 ms')
    """
    digits = 2 - math.floor(math.log10(milliseconds)) if milliseconds > 0 else 0
    return f"{milliseconds:.{max(digits, 0)}f} ms"


def plan_json(planned: Planned) -> str:
    """Write a plan as JSON, as in `plan.json`."""
    return to_json(planned.plan, pretty=True).decode() + "\n"


def front_json(planned: Planned) -> str:
    """Write the Pareto front as JSON, fastest plan first, with the heads and the float latency in µs."""
    plan = planned.plan
    found = {"heads": [h.head for h in plan.heads], "float_us": planned.cost.float_us, "front": plan.pareto}
    return to_json(found, pretty=True).decode() + "\n"


def front_table(planned: Planned) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the headers, and a line for each plan of the front, fastest first; the chosen plan is marked."""
    plan, whole = planned.plan, planned.cost.float_us
    heads = [(i, h.head) for i, h in enumerate(plan.heads) if not is_divergence(h.head)]
    lines = []
    for point in plan.pareto:
        mark = "chosen" if point.chosen == plan.chosen else ""
        lines.append(
            (
                counted(point.chosen.counts()),
                f"{point.predicted_latency_us / 1e3:.2f}",
                f"{point.predicted_latency_us / whole:.3f}x",
                f"{point.size_bytes / 1e6:.2f}",
                *(bare_decibel_text(point.sqnr_db[i]) for i, _ in heads),
                f"{100 * point.optimality_gap:.1f} %",
                mark,
            )
        )
    columns = (*(f"{name}, dB" for _, name in heads), "optimality gap", "choice")
    return ("units", "latency, ms", "over float", "size, MB", *columns), lines


def unit_table(planned: Planned) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the headers, and a line for each unit with its scheme, in graph order."""
    return ("unit", "scheme", "reason"), [(c.unit, c.scheme, c.reason) for c in planned.plan.choices]


def plan_line(planned: Planned) -> str:
    """Describe a plan in one line."""
    plan = planned.plan
    heads = ", ".join(f"{h.head} {decibel_text(h.predicted_db.value)}" for h in plan.heads if not is_divergence(h.head))
    unsolved = "" if plan.solved else " The solver stopped at its limit of nodes: a better plan may exist."
    return (
        f"{counted(plan.chosen.counts())} of {len(plan.choices)} units: {planned.predicted_ratio:.3f}x of float's "
        f"time, {plan.predicted_size_bytes / 1e6:.2f} MB, {heads}. Predicted, not measured.{unsolved}"
    )


def readable(table: SensitivityTable | MetricTable) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the headers, and a line for each unit, region or site, worst first, and for each of several schemes.

    With leave-one-out the worst is the one that gains most when it alone stays in float.
    """
    if isinstance(table, MetricTable):
        best_first = table.method == ALL_BUT_ONE
        order = sorted(table.rows, key=lambda r: r.drop.value if best_first else -r.drop.value)
        cells: list[tuple[str, ...]] = [
            (r.scope, r.id, f"{r.value.value:.4f}", _interval(r.drop, ".4f")) for r in order
        ]
        return ("scope", "name", f"{table.metric} (float {table.reference.value:.4f})", "drop"), cells
    found: dict[tuple[str, str, str], list[Sensitivity]] = {}
    for row in table.rows:
        found.setdefault((row.scope, row.id, row.scheme), []).append(row)
    whole = {r.head: r.sqnr_db.value for r in table.rows if (r.scope, r.id) == ("all", EVERYTHING)}
    several = len({r.scheme for r in table.rows}) > 1

    def badness(rows: list[Sensitivity]) -> float:
        rows = [r for r in rows if not is_divergence(r.head)]
        if table.method == ALL_BUT_ONE:
            return -np.inf if rows[0].scope == "all" else -max(r.sqnr_db.value - whole[r.head] for r in rows)
        return min(r.sqnr_db.value for r in rows)

    lines = []
    for (scope, name, scheme), rows in sorted(
        found.items(), key=lambda item: (badness(item[1]), natural(item[0][1]), item[0])
    ):
        mark = "exact" if rows[0].exact else "flagged" if any(r.flagged for r in rows) else ""
        cell = (scheme.upper(),) if several else ()
        lines.append((scope, name, *cell, *(_decibels(r.sqnr_db) for r in rows), mark))
    heads = [r.head for r in next(iter(found.values()))] if found else []
    without = " without it" if table.method == ALL_BUT_ONE else ""
    column = ("scheme",) if several else ()
    return ("scope", "name", *column, *(f"{head}, dB{without}" for head in heads), "method"), lines


def file_roundings(found: Sequence[GivenRounding]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the headers, and a line for each rounding that a quantized file makes, worst first."""
    lines: list[tuple[str, ...]] = [
        (
            r.tensor,
            r.node,
            r.head,
            bare_decibel_text(r.sqnr_db),
            f"{100 * r.share:.0f} %",
            "exact" if r.executed else "",
        )
        for r in found
    ]
    return ("rounded in the file", "made by", "worst output", "dB", "share of damage", "method"), lines


def _decibels(value: Estimate) -> str:
    """Write an SQNR with its interval; without an error there is neither."""
    return bare_decibel_text(value.value) if value.low >= CEILING_DB else _interval(value, ".1f")


def _interval(value: Estimate, form: str) -> str:
    return f"{value.value:{form}} ({value.low:{form}} to {value.high:{form}})"
