"""Formatting of numbers in the report, always with their unit.

>>> decibel_text(24.06), ratio(0.684), byte_size(10_734_221), milliseconds(38.84), microseconds(1234.5)
('24.1 dB', '0.68×', '10.73 MB', '38.8 ms', '1,234 µs')
"""

from __future__ import annotations

from collections.abc import Iterable

from bitalloy.core.plans import BorderCost
from bitalloy.core.records import DataInfo, Estimate, MetricValue, RangeChoice
from bitalloy.model.heads import is_divergence
from bitalloy.sensitivity.matrix import CEILING_DB

NONE = "–"
MINUS = "−"


def signed(value: float, digits: int) -> str:
    """Format a number with a sign in front, `+` or a true minus; without one where it rounds to zero.

    >>> signed(0.34, 1), signed(-2.0, 1), signed(-0.01, 1)
    ('+0.3', '−2.0', '0.0')
    """
    text = f"{abs(value):.{digits}f}"
    if not float(text):
        return text
    return ("+" if value > 0 else MINUS) + text


def plain(value: float, digits: int) -> str:
    """Format a number without a plus sign, but with a true minus."""
    return signed(value, digits).removeprefix("+")


def decibel_text(value: float | None) -> str:
    """Format an SQNR in dB; the ceiling of the probe matrix stands for an error of zero."""
    if value is None:
        return NONE
    return "no error" if value >= CEILING_DB else f"{plain(value, 1)} dB"


def bare_decibel_text(value: float | None) -> str:
    """Format an SQNR in dB without its unit, for a column that has the unit in its header."""
    return decibel_text(value).removesuffix(" dB")


def interval_text(estimate: Estimate | MetricValue, digits: int) -> str:
    """Format an interval, e.g. `[23.1, 25.0]`."""
    return f"[{plain(estimate.low, digits)}, {plain(estimate.high, digits)}]"


def ratio(value: float) -> str:
    """Format a ratio to the float model, e.g. `0.68×`."""
    return f"{value:.2f}×"


def milliseconds(value: float) -> str:
    """Format the latency of a model in ms: three significant digits, at most two decimals."""
    return f"{value:,.{_decimals(value)}f} ms"


def microseconds(value: float | None) -> str:
    """Format the time of a part of a model in µs."""
    return NONE if value is None else f"{value:,.{0 if abs(value) >= 100 else 1}f} µs"


def byte_size(value: float) -> str:
    """Format a number of bytes in decimal units."""
    if value < 1e6:
        return f"{value / 1e3:,.1f} kB"
    return f"{value / 1e6:,.{2 if value < 1e8 else 0}f} MB"


def megabytes(value: float | None) -> str:
    """Format a number of MB without its unit; `unknown` where it could not be measured.

    >>> megabytes(59.63), megabytes(4321.0), megabytes(None)
    ('59.6', '4,321', 'unknown')
    """
    return "unknown" if value is None else f"{value:,.{1 if value < 1e3 else 0}f}"


def seconds(value: float) -> str:
    """Format the wall time of a stage, given in seconds.

    >>> seconds(0.0), seconds(12.34), seconds(125.0)
    ('stored result', '12.3 s', '2 min 5 s')
    """
    if value == 0:
        return "stored result"
    if value < 60:
        return f"{value:.1f} s"
    whole = round(value)
    return f"{whole // 60} min {whole % 60} s"


def data_line(info: DataInfo) -> str:
    """Describe in one line which samples were used."""
    return f"{info.name}: {info.count} samples, seed {info.seed}, {info.preprocessing}"


def ranges(choice: RangeChoice | None) -> str:
    """Describe how INT8 ranges were calibrated, and what choosing them tensor by tensor gained.

    >>> ranges(None)
    'one method for all tensors'
    """
    if choice is None:
        return "one method for all tensors"
    counts = ", ".join(f"{count} {method}" for method, count in sorted(choice.methods.items(), key=lambda m: -m[1]))
    gains = ", ".join(
        f"{head} {before.value:.1f} to {after.value:.1f} dB"
        for head, before, after in zip(choice.heads, choice.first_db, choice.chosen_db, strict=True)
        if not is_divergence(head)
    )
    kept = "" if choice.kept else "; they did worse on average, so no range is cut"
    return (
        f"chosen for every tensor by predicted damage ({counts}); with all of INT8, executed on {choice.samples} "
        f"samples, from ranges that cut nothing to these: {gains}{kept}"
    )


def border_prices(borders: Iterable[BorderCost]) -> str:
    """Describe the cost of converting tensors between schemes; directions with one price stand together.

    >>> inwards = BorderCost(source="", sink="int8", us_per_element=2e-4, us=1.5)
    >>> border_prices([inwards, BorderCost(source="int8", sink="", us_per_element=2e-4, us=1.5)])
    'into INT8, out of INT8: 1.50 µs and 200 µs per million elements'
    """
    found: dict[tuple[float, float], list[str]] = {}
    for border in borders:
        source, sink = border.source.upper(), border.sink.upper()
        name = f"{source} to {sink}" if source and sink else f"into {sink}" if sink else f"out of {source}"
        found.setdefault((border.us, border.us_per_element), []).append(name)
    return (
        "; ".join(
            f"{', '.join(names)}: {us:.2f} µs and {each * 1e6:.3g} µs per million elements"
            for (us, each), names in found.items()
        )
        or NONE
    )


def _decimals(value: float) -> int:
    return 2 if value < 10 else 1 if value < 1000 else 0
