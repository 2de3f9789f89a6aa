"""Conversion of the texts of command-line options to values."""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from bitalloy.core.errors import BitalloyError, did_you_mean
from bitalloy.core.plans import FIRST, Keep, number_with_unit
from bitalloy.core.records import Workload
from bitalloy.core.schemes import BASELINE

BYTE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
MOST_BYTES = 2**62
LARGEST_FLOOR_DB = 160
"""No floor on the SQNR is higher or, below zero, lower: equal outputs have this much."""
RANGE_METHODS = ("auto", "minmax", "extended", "moving", "percentile", "entropy", "mse")
WEIGHT_ROUNDINGS = ("auto", "nearest", "search", "gptq", "weighted")
Text = TypeVar("Text", str, str | None)


def latency(text: str | None, option: str = "--latency") -> tuple[float | None, float | None]:
    """Read a latency budget: (ratio to the float model, milliseconds), one of which is None.

    >>> latency("0.7x"), latency("12ms"), latency(None)
    ((0.7, None), (None, 12.0), (None, None))
    """
    if text is None:
        return None, None
    number, unit = number_with_unit(text, option, "0.7x or 12ms", ("x", "ms"))
    return (number, None) if unit == "x" else (None, number)


def size(text: str | None, float_bytes: int) -> int | None:
    """Read a size budget, in bytes; a ratio is to the `float_bytes` of the float model.

    >>> size("8MB", 10_000_000), size("0.5x", 10_000_000)
    (8000000, 5000000)
    """
    if text is None:
        return None
    number, unit = number_with_unit(text, "--size", "8MB or 0.5x", ("x", *BYTE_UNITS))
    return int(min(number * (float_bytes if unit == "x" else BYTE_UNITS[unit]), MOST_BYTES))


def targets(text: str) -> tuple[str, ...]:
    """Read comma-separated names of targets.

    >>> targets("ort-cpu, tensorrt")
    ('ort-cpu', 'tensorrt')
    """
    return tuple(name.strip() for name in text.split(","))


def device(text: str | None, names: Sequence[str]) -> str:
    """Read the id of a device, for targets of which one at least is estimated.

    >>> device("L4", ["tensorrt"]), device(None, ["ort-cpu"])
    ('l4', '')
    """
    if text is None:
        return ""
    from bitalloy.targets import chosen_targets
    from bitalloy.targets.devices import find_device

    chosen_targets(names, text)
    return find_device(text).id


def floors(texts: Sequence[str]) -> tuple[float | None, dict[str, float]]:
    """Read floors on the SQNR in dB: one for every head, and those of single heads by name.

    >>> floors(["20", "boxes=30"])
    (20.0, {'boxes': 30.0})
    """
    found = _named("--max-drop-db", texts, "a number of dB such as 20, or one for a head such as boxes=30")
    for value in found.values():
        if abs(value) > LARGEST_FLOOR_DB:
            raise BitalloyError(
                f"--max-drop-db is {value:g}; expected at most {LARGEST_FLOOR_DB} dB, where outputs are equal."
            )
    return found.pop("", None), found


def drops(texts: Sequence[str]) -> dict[str, float]:
    """Read the largest drops of task metrics, by name; a bare number is in points of the first metric.

    >>> drops(["AP50-95=0.003"]), drops(["0.3"])
    ({'AP50-95': 0.003}, {'(first)': 0.003})
    """
    found = _named("--max-drop", texts, "a metric and its drop such as AP50-95=0.003, or points such as 0.3")
    if any(value < 0 for value in found.values()):
        raise BitalloyError(
            f"--max-drop is '{' '.join(texts)}'; expected a drop of at least 0, which is how much worse."
        )
    return {name or FIRST: value if name else round(value / 100, 9) for name, value in found.items()}


def keeps(texts: Sequence[str]) -> tuple[Keep, ...]:
    """Read which patterns are kept in which scheme, in the order given.

    >>> keeps(["fp32:neck*"])
    (Keep(scheme='fp32', pattern='neck*'),)
    """
    if not texts:
        return ()  # what knows the schemes takes a while to load
    from bitalloy.targets import TARGETS

    offers = sorted((target.offers for target in TARGETS.values()), key=len, reverse=True)  # the longest has the order
    known = list(dict.fromkeys([BASELINE, *(offer.scheme.name for some in offers for offer in some)]))
    found = []
    for text in texts:
        name, colon, pattern = text.partition(":")
        if name.lower() not in known or not colon or not pattern:
            raise BitalloyError(
                f"--keep is '{text}'; expected a scheme ({', '.join(known)}) and a pattern, such as fp32:'neck*' or "
                f"int8:'model.{{4..8}}'.{did_you_mean(name, known)}"
            )
        found.append(Keep(scheme=name.lower(), pattern=pattern))
    return tuple(found)


def schemes(text: str | None) -> tuple[str, ...]:
    """Read names of schemes; whether the targets have them is known to those alone.

    >>> schemes("w4, INT8"), schemes(None)
    (('w4', 'int8'), ())
    """
    if text is None:
        return ()
    names = tuple(name.strip().lower() for name in text.split(","))
    if not all(names) or len(set(names)) != len(names):
        raise BitalloyError(f"--schemes is '{text}'; expected names with commas between, each once, such as w4,int8.")
    return names


def workload(text: str | None) -> Workload | None:
    """Read the prompt and the new tokens of a language model's answer.

    >>> workload("prompt=256,new=64")
    Workload(prompt=256, new=64)
    """
    if text is None:
        return None
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if name not in Workload.__struct_fields__ or name in found or not number.isdecimal() or len(number) > 6:
            raise BitalloyError(
                f"--workload is '{text}'; expected positions of the prompt and new tokens, such as prompt=256,new=64."
            )
        found[name] = int(number)
    if found.get("prompt") == 0:
        raise BitalloyError(f"--workload is '{text}'; a prompt has at least one position.")
    return Workload(**found)


def image_size(text: str | None) -> tuple[int, int] | None:
    """Read a height and width in pixels.

    >>> image_size("480x640")
    (480, 640)
    """
    if text is None:
        return None
    found = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", text.strip())
    if not found:
        raise BitalloyError(f"--image-size is '{text}'; expected height and width, such as 480x640.")
    return int(found[1]), int(found[2])


def samples(text: str) -> int | None:
    """Read a number of samples; None stands for `auto`.

    >>> samples("auto"), samples("16")
    (None, 16)
    """
    if text == "auto":
        return None
    if not re.fullmatch("0*[1-9][0-9]{0,8}", text):
        raise BitalloyError(f"--samples is '{text}'; expected a whole number of at least 1 and below 10^9, or auto.")
    return int(text)


def shapes(texts: Sequence[str]) -> list[dict[str, tuple[int, ...]]]:
    """Read input shapes: name of the input -> sizes. The second shapes of inputs make the second entry, and so on.

    >>> shapes(["x=1x3x64x64", "mask=1x64", "x=1x3x32x32"])
    [{'x': (1, 3, 64, 64), 'mask': (1, 64)}, {'x': (1, 3, 32, 32)}]
    """
    found: list[dict[str, tuple[int, ...]]] = [{}]
    for text in texts:
        name, _, dims = text.rpartition("=")
        if not name or not re.fullmatch(r"[1-9][0-9]{0,8}([x,][1-9][0-9]{0,8})*", dims):
            raise BitalloyError(f"--shape is '{text}'; expected an input and its sizes, such as images=1x3x640x640.")
        free = next((one for one in found if name not in one), None)
        if free is None:
            found.append(free := {})
        free[name] = tuple(int(d) for d in re.split("[x,]", dims))
    return found


def numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """Read comma-separated numbers.

    >>> numbers("--mean", "0.5,0.25")
    (0.5, 0.25)
    """
    if text is None:
        return None
    try:
        found = tuple(float(t) for t in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(map(math.isfinite, found)):
        raise BitalloyError(f"{option} is '{text}'; expected numbers such as 0.485,0.456,0.406.")
    return found


def choice(option: str, text: Text, among: Sequence[str]) -> Text:
    """Check that a text is one of a few words, and return it.

    >>> choice("--layout", "NHWC", ("NCHW", "NHWC"))
    'NHWC'
    """
    if text is None or text in among:
        return text
    raise BitalloyError(f"{option} is '{text}'; expected one of: {', '.join(among)}.{did_you_mean(text, among)}")


def finite(option: str, value: float | None, *, positive: bool = False) -> float | None:
    """Check that a number is neither NaN nor infinite, and return it.

    >>> finite("--scale", 0.5, positive=True)
    0.5
    """
    if value is None or (math.isfinite(value) and (value > 0 or not positive)):
        return value
    raise BitalloyError(f"{option} is {value}; expected a finite number{' above 0' * positive}.")


def image(
    scale: float | None, mean: str | None, std: str | None, layout: str | None, fit: str | None
) -> dict[str, object]:
    """Collect the given options on the preparation of images; what is not given is inferred.

    >>> image(None, "0.5", None, "NHWC", None)
    {'mean': (0.5,), 'layout': 'NHWC'}
    """
    given = {
        "scale": finite("--scale", scale, positive=True),
        "mean": numbers("--mean", mean),
        "std": numbers("--std", std),
        "layout": choice("--layout", layout, ("NCHW", "NHWC")),
        "fit": choice("--fit", fit, ("letterbox", "stretch", "crop")),
    }
    return {name: value for name, value in given.items() if value is not None}


def named_object(option: str, text: str | None) -> Any:
    """Import what `module:name` stands for, with the current folder searched too; the module's code is executed.

    >>> named_object("--metric", "math:sqrt")(9.0)
    3.0
    """
    if text is None:
        return None
    module, colon, name = text.partition(":")
    if not colon or not module or not name:
        raise BitalloyError(f"{option} is '{text}'; expected module:function, such as my_metrics:accuracy.")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and one that it imports is not
        raise BitalloyError(
            f"{option} is '{text}', and there is no module '{error.name}', neither installed nor in '{here}'."
        ) from error
    finally:
        sys.path.remove(here)
    if not hasattr(found, name):
        raise BitalloyError(f"{option} is '{text}', and the module '{module}' ({found.__file__}) has no '{name}'.")
    return getattr(found, name)


def shard(text: str | None, store: object) -> tuple[int, int] | None:
    """Read which part of how many is done, which needs a store; None where all is done.

    >>> shard("2/8", "store")
    (2, 8)
    """
    if text is None and store is None:
        return None
    if text is None or store is None:
        raise BitalloyError("--shard and --store belong together: which part is done, and where its results are kept.")
    found = re.fullmatch(r"([1-9][0-9]{0,4})/([1-9][0-9]{0,4})", text)
    if not found or int(found[1]) > int(found[2]):
        raise BitalloyError(f"--shard is '{text}'; expected a part and the number of parts, such as 2/8.")
    return int(found[1]), int(found[2])


def together(*, exact: bool, mode: str | None, confirm: int | None, metric: bool, evaluate: bool) -> None:
    """Refuse options of `sensitivity` that contradict each other."""
    if metric != evaluate:
        missing = "--eval with a COCO annotation file" if metric else "--metric"
        raise BitalloyError(f"{'--metric' if metric else '--eval'} needs {missing} beside it.")
    if mode is not None and not exact and not metric:
        raise BitalloyError(f"--mode {mode} is a way to measure. Add --method exact, or leave it out.")
    if confirm is not None and (exact or metric):
        raise BitalloyError("--confirm measures what --method probe predicted; here everything is measured already.")


def _named(option: str, texts: Sequence[str], expected: str) -> dict[str, float]:
    """Numbers by the name before the last `=`; one without a name has the empty one."""
    found: dict[str, float] = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise BitalloyError(f"{option} is '{text}'; expected {expected}, with a finite number.")
        if name in found:
            raise BitalloyError(f"{option} is given twice for the same: '{text}' is the second. Give it once.")
        found[name] = value
    return found


def evaluated_with(metric: str | None, labels: Sequence[Path] | None) -> Any:
    """Return files of labels, or the metric of the user's own.

    Raises:
        BitalloyError: both are given, or the metric is not found.
    """
    if metric is not None and labels:
        raise BitalloyError("--metric and --eval both say what is evaluated. Give one of them.")
    if metric is None:
        return labels
    from bitalloy.tasks.own import Metric

    found = named_object("--metric", metric)
    return replace(found, name=metric.partition(":")[2]) if isinstance(found, Metric) and not found.name else found
