"""Switchboards that the stages of a run share."""

from __future__ import annotations

from bitalloy.core.jobs import Contexts, Opening
from bitalloy.core.records import Record
from bitalloy.core.work import Workspace
from bitalloy.model.graphs.again import graph_opening
from bitalloy.rewrite.calibrated import Calibrated
from bitalloy.runtime.ort import available_cores
from bitalloy.sensitivity.exact import Switchboard
from bitalloy.targets.recipe import recipe_opening


class SwitchboardParts(Record, frozen=True, kw_only=True):
    """Arguments of `Switchboard`."""

    graph: Opening
    recipe: Opening
    at_once: int


def switchboard_opening(ready: Calibrated, at_once: int = 1) -> Opening:
    """Describe how jobs open the model with a gate at every site, for `at_once` samples at the same time."""
    at_once = min(at_once, available_cores())
    graph, recipe = graph_opening(ready.graph), recipe_opening(ready.recipe())
    return Opening(kind="switchboard", spec=SwitchboardParts(graph=graph, recipe=recipe, at_once=at_once))


def open_switchboard(spec: SwitchboardParts, contexts: Contexts) -> Switchboard:
    """Open the model with a gate at every site."""
    return Switchboard(contexts.open(spec.graph), contexts.open(spec.recipe), at_once=spec.at_once)


def shared_switchboard(opening: Opening, ready: Calibrated, work: Workspace) -> Switchboard:
    """Return the switchboard of an opening, which all stages of a run share.

    Of a large model every stage makes its own, so that its memory is free afterwards.
    """
    contexts = work.executor.contexts
    board: Switchboard | None = contexts.find(opening)
    if board is None:
        board = Switchboard(ready.graph, ready.recipe(), at_once=opening.spec.at_once)
        if not ready.graph.large:
            contexts.keep(opening, board)
    return board


def switchboard(ready: Calibrated, at_once: int, work: Workspace) -> Switchboard:
    """Return the model with a gate at every site, for `at_once` samples at a time; all stages of a run share it."""
    return shared_switchboard(switchboard_opening(ready, at_once), ready, work)
