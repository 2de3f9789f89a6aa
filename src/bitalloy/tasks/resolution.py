"""What labelled data can resolve: the smallest drop of a metric that is told from noise.

The float model's own answers are disturbed a little, as careful rounding disturbs them, and the paired bootstrap says
how wide the interval of the drop is. No other model is needed for that. With n times as many images the interval is
sqrt(n) times as narrow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from bitalloy.core.outcome import Resolution
from bitalloy.core.status import NORMAL_95, least_error
from bitalloy.tasks.base import Seen, Task, TaskData

__all__ = ["resolution_of", "tell_resolution", "with_limit"]

DISTURBANCES, RESAMPLES_EACH = 2, 400
"""Number of disturbances over which the width of the interval is averaged, and of resamples of each."""


def resolution_of(
    task: Task[Any], seen: Sequence[Seen], data: TaskData, samples: Sequence[int], *, seed: int
) -> tuple[Resolution, ...]:
    """Estimate the half-width of the 95 % interval of a drop, for every metric that needs labels.

    Args:
        task: the task of the model.
        seen: what was observed of the float model on the samples.
        data: labelled samples.
        samples: numbers of the observed samples.
        seed: seed of the disturbances and of the bootstrap.
    """
    if task.disturb is None or not data.labelled:
        return ()
    reference, rng = task.judge(seen, data, samples), np.random.default_rng(seed)
    widths: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    for _ in range(DISTURBANCES):
        disturbed = task.judge([task.disturb(one, rng) for one in seen], data, samples)
        result = task.measure(
            {"float": reference, "disturbed": disturbed}, data, samples, seed=seed, resamples=RESAMPLES_EACH
        )
        for metric in result.metrics:
            if not metric.agreement and metric.witness:
                drop = metric.drops["disturbed"]
                counts[metric.name] = metric.values["float"].n
                least = NORMAL_95 * least_error(counts[metric.name], *(v.value for v in metric.values.values()))
                widths.setdefault(metric.name, []).append(math.hypot((drop.high - drop.low) / 2, least))
    return tuple(
        Resolution(
            metric=name, images=counts[name], resolved=round(float(np.mean(found)), 6), disturbance=task.disturbance
        )
        for name, found in widths.items()
    )


def with_limit(found: Sequence[Resolution], limits: Mapping[str, float]) -> tuple[Resolution, ...]:
    """Add to each metric that is limited the limit, and the number of images that would resolve it."""
    told = []
    for one in found:
        limit = limits.get(one.metric)
        needed = None
        if limit is not None and limit > 0:
            needed = max(2, math.ceil(one.images * (one.resolved / limit) ** 2))
        told.append(msgspec.structs.replace(one, limit=limit, needed=needed))
    return tuple(told)


def tell_resolution(one: Resolution) -> str:
    """Say in a sentence what the images resolve, and how many a limit needs."""
    line = f"{one.images} images resolve drops of {one.metric} of {one.resolved:.4f}"
    if one.needed is None or one.limit is None:
        return f"{line} (95 % interval, {one.disturbance})."
    if one.needed <= one.images:
        return f"{line}, so the limit of {one.limit:g} is within reach of labels."
    return (
        f"{line}; by labels alone a limit of {one.limit:g} needs about {_about(one.needed)} of them. Agreement with "
        "float decides where they do not."
    )


def _about(count: int) -> str:
    """Round a number to two digits: 523 is `520`."""
    digits = max(0, len(str(count)) - 2)
    return f"{round(count, -digits):,}"
