"""Versions of a model in a cell of a study: float, FP16, all in the lowest format, the best single one, and mixed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from bitalloy.core.outcome import Summary
from bitalloy.core.plans import SingleFormat
from bitalloy.core.records import Estimate
from bitalloy.core.studies import MeasuredVariant

PUBLISHED, FLOAT, ALL_LOWEST, BEST_SINGLE, ALL_MIXED = "published", "float", "all lowest", "best single format", "mixed"
"""Names of versions; half precision has the name of its scheme."""
HALF_SCHEME = "fp16"
"""Scheme of half precision."""
VERSION_FIELDS = {FLOAT: "reference", ALL_LOWEST: "lowest", BEST_SINGLE: "single", ALL_MIXED: "mixed"}
"""Version -> the field of the records of a summary."""


def cell_variants(summary: Summary, published: Mapping[str, float]) -> tuple[MeasuredVariant, ...]:
    """Return the versions of a model that a finished run knows, in the order of a reader's interest.

    Args:
        summary: the result of the run.
        published: metric -> figure of the model's authors; empty where there is none.
    """
    return tuple(_variants(summary, published))


def _variants(summary: Summary, published: Mapping[str, float]) -> Iterator[MeasuredVariant]:
    if published:
        note = "figures of the authors, on their data, not measured here"
        yield MeasuredVariant(name=PUBLISHED, published=dict(published), note=note)
    yield _measured(summary, FLOAT, Estimate(value=1.0, low=1.0, high=1.0))
    yield _half(summary)
    yield _measured(summary, ALL_LOWEST, summary.lowest_latency_ratio)
    if summary.size_bytes.single is not None:
        yield _measured(summary, BEST_SINGLE, summary.single_latency_ratio)
    else:
        best = next((one for one in summary.single_formats if one.best), None)
        if best is not None:
            yield _predicted(BEST_SINGLE, best)
        else:
            note = "the same as all in the lowest format: plans had no choice between several"
            yield MeasuredVariant(name=BEST_SINGLE, note=note)
    yield _measured(summary, ALL_MIXED, summary.latency_ratio_interval)


def _half(summary: Summary) -> MeasuredVariant:
    found = next((one for one in summary.single_formats if one.scheme == HALF_SCHEME), None)
    if found is None:
        note = f"not among the formats of {summary.target} in this cell: neither measured nor predicted"
        return MeasuredVariant(name=HALF_SCHEME, note=note)
    return _predicted(HALF_SCHEME, found)


def _predicted(name: str, one: SingleFormat) -> MeasuredVariant:
    ratio = Estimate(value=one.predicted_ratio, low=one.predicted_ratio, high=one.predicted_ratio)
    return MeasuredVariant(
        name=name,
        latency_ratio=ratio,
        estimated=True,
        size_bytes=one.predicted_size_bytes,
        sqnr_db=dict(one.predicted_db),
        note=f"{one.scheme}: predicted by probe matrix and cost table, not executed",
    )


def _measured(summary: Summary, name: str, ratio: Estimate | None) -> MeasuredVariant:
    field = VERSION_FIELDS[name]
    times = summary.latency_ms
    value = getattr(times, field)
    if ratio is None and value is not None and times.reference:
        known = round(value / times.reference, 4)
        ratio = Estimate(value=known, low=known, high=known)
    size = getattr(summary.size_bytes, field)
    metrics = {n: v for n, m in summary.metrics.items() if (v := getattr(m, field)) is not None}
    drops = {n: d for n, m in summary.metrics.items() if (d := getattr(m, f"drop_{field}", None)) is not None}
    heads = {h: getattr(pair, field, None) for h, pair in summary.sqnr_db.items()}
    return MeasuredVariant(
        name=name,
        metrics=metrics,
        drops={n: d if summary.metrics[n].higher_is_better else d.negated for n, d in drops.items()},
        latency_ratio=ratio,
        estimated=summary.latency_estimated,
        size_bytes=None if size is None else int(size),
        sqnr_db={h: c.measured for h, c in heads.items() if c is not None},
    )
