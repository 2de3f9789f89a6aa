"""All errors that bitalloy raises on purpose.

BitalloyError                 a problem that the user can act on; the command line exits with code 2
├── ModelError                the ONNX file cannot be used: broken, unsafe, or with unbound shapes
│   └── UnsupportedOpError    an operator without an adjoint rule on a path that needs one
├── DataError                 images, feeds or labels do not fit the model
├── BudgetError               the budget is contradictory, or names what the model or its task does not have
│   └── UnreachableError      no plan meets the budget; the message names what can be reached; exit code 4
├── RunDirectoryError         the run directory cannot be written or belongs to something else
└── MissingExtraError         an optional dependency is needed; the message gives the install line
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "BitalloyError",
    "BudgetError",
    "DataError",
    "MissingExtraError",
    "ModelError",
    "RunDirectoryError",
    "UnreachableError",
    "UnsupportedOpError",
    "did_you_mean",
]


class BitalloyError(Exception):
    """Root of every error that is the user's to solve. The message says what came and what to do."""


class ModelError(BitalloyError):
    """The model cannot be used as it is."""


class UnsupportedOpError(ModelError):
    """A node on the way from a rounding site to an output has no adjoint rule: its name, and what it lacks."""

    def __init__(self, message: str, node: str = "", what: str = "") -> None:
        super().__init__(message)
        self.node, self.what = node, what


class DataError(BitalloyError):
    """The data does not fit the model or cannot be read."""


class BudgetError(BitalloyError):
    """The budget cannot be used as it is."""


class UnreachableError(BudgetError):
    """No plan satisfies the requested budget; `reachable_ratio` is the lowest latency over float's, where known."""

    def __init__(self, message: str, reachable_ratio: float | None = None) -> None:
        super().__init__(message)
        self.reachable_ratio = reachable_ratio


class RunDirectoryError(BitalloyError):
    """The run directory cannot be used."""


class MissingExtraError(BitalloyError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package '{package}'. Install it with: pip install 'bitalloy[{extra}]'")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest the known name that is nearest to a wrong one, as the end of a message; empty where none is near.

    >>> did_you_mean("ort-cpuu", ["ort-cpu", "tensorrt"]), did_you_mean("x", ["ort-cpu"])
    (" Did you mean 'ort-cpu'?", '')
    """
    import difflib

    by_lower = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f" Did you mean '{by_lower[near[0]]}'?" if near else ""
