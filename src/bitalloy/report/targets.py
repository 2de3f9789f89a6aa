"""The compare view: results of one model for several targets, or of several runs, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bitalloy.core.outcome import Summary
from bitalloy.report import formats
from bitalloy.report.text import counted
from bitalloy.report.verdict import ship_answer


def compare_targets(
    summaries: Sequence[Summary], names: Sequence[str] | None = None
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the header with a column for each target, and a line for each quantity of its mixed model.

    Args:
        summaries: results of one model for several targets, or of any runs.
        names: the columns' names of runs; the targets' names without them.
    """
    runs: list[tuple[str, Callable[[Summary], str]]] = [("Model", lambda s: s.model), ("Target", lambda s: s.target)]
    rows: list[tuple[str, Callable[[Summary], str]]] = [
        *(runs if names is not None else ()),
        ("Answer", lambda s: ship_answer(s)[0]),
        ("Why", lambda s: ship_answer(s)[1]),
        ("Device", lambda s: s.device),
        ("Latency, median", _latency),
        ("Latency over float", _ratio),
        ("File size", lambda s: formats.byte_size(s.size_bytes.mixed)),
        ("Units", lambda s: f"{counted(s.schemes)} of {s.units}"),
    ]
    heads = dict.fromkeys(head for s in summaries for head in s.sqnr_db)
    metrics = dict.fromkeys(name for s in summaries for name in s.metrics)
    lines = [(name, *map(cell, summaries)) for name, cell in rows]
    lines += [(f"SQNR {head}", *(_sqnr(s, head) for s in summaries)) for head in heads]
    lines += [(f"Drop of {name}", *(_drop(s, name) for s in summaries)) for name in metrics]
    return ("", *(names if names is not None else (s.target for s in summaries))), lines


def _latency(summary: Summary) -> str:
    known = ", estimated" if summary.latency_estimated else ""
    return f"{formats.milliseconds(summary.latency_spread_ms.mixed.median_ms)}{known}"


def _ratio(summary: Summary) -> str:
    ends = summary.latency_ratio_interval
    known = f" {formats.interval_text(ends, 2)}" if ends is not None else ", estimated" * summary.latency_estimated
    return f"{formats.ratio(summary.latency_ratio)}{known}"


def _sqnr(summary: Summary, head: str) -> str:
    pair, ends = summary.sqnr_db.get(head), summary.sqnr_interval_db.get(head)
    if pair is None:
        return "unknown"
    return formats.decibel_text(pair.mixed.measured) + (
        f" {formats.interval_text(ends, 1)}" if ends is not None else ""
    )


def _drop(summary: Summary, name: str) -> str:
    metric = summary.metrics.get(name)
    if metric is None:
        return "unknown"
    if metric.drop_mixed is None:
        return f"{formats.signed(metric.lost, 4)}, error unknown"
    return f"{formats.signed(metric.drop_mixed.value, 4)} {formats.interval_text(metric.drop_mixed, 4)}"
