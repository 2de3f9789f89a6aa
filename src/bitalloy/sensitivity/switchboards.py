"""Switchboards that the stages of a run share."""

from __future__ import annotations

from bitalloy.core.store import key_of
from bitalloy.core.work import Workspace
from bitalloy.rewrite.calibrated import Calibrated
from bitalloy.runtime.ort import available_cores
from bitalloy.sensitivity.exact import Switchboard


def switchboard(ready: Calibrated, at_once: int, work: Workspace) -> Switchboard:
    """The model with a gate at every site, for so many samples at the same time; one for all stages of a run.

    Of a large model every stage makes its own, so that its memory is free afterwards.
    """
    at_once = min(at_once, available_cores())
    key = key_of(
        model=ready.graph.identity,
        shapes=ready.graph.info.inputs,
        target=ready.target.name,
        units=ready.units,
        ranges=ready.calibration.ranges,
        offsets=ready.offsets,
        at_once=at_once,
    )
    board: Switchboard | None = work.shared.get(key)
    if board is None:
        board = Switchboard(ready.graph, ready.recipe(), at_once=at_once)
        if not ready.graph.large:
            work.shared[key] = board
    return board
