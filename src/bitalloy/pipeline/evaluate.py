"""Evaluation of model files side by side, without an analysis: what users call to compare what they have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import msgspec

from bitalloy.core.errors import DataError
from bitalloy.core.limits import limited
from bitalloy.core.ownership import temporary
from bitalloy.core.work import Workspace
from bitalloy.model.graphs.joining import Joined
from bitalloy.model.load import Graph
from bitalloy.pipeline.prepare import RunOptions, evaluation_of, load
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.base import ONLY, Session
from bitalloy.tasks.base import RunModel, Task, TaskData, TaskMetric, TaskResult
from bitalloy.tasks.observing import open_labelled
from bitalloy.tasks.open import image_spec, runner
from bitalloy.tasks.own import open_own


def evaluate_models(
    models: Sequence[str | Path], evaluate: object, *, seed: int = 0, options: RunOptions | None = None
) -> tuple[TaskResult, ...]:
    """Measure the metrics of several models on the same samples, with drops from the first that are paired.

    The files are executed as they are, by ONNX Runtime: quantized ones with their roundings.

    Args:
        models: .onnx files, folders with a `program.json`, or names among the embedded samples; the first is what the
            others are compared with.
        evaluate: files of labels for the models' task, or a metric of the user's own, see `run`.
        seed: seed of the choice of samples and of the bootstrap.
        options: shapes, preparation of images, largest number of samples, where to show progress.

    Returns:
        The results for each file of labels; one for a metric of the user's own.

    Raises:
        BitalloyError: a model or the labels cannot be used, or the models are not for one task.
    """
    options = options or RunOptions()
    names = [str(model) for model in models]
    if not names or len(set(names)) != len(names):
        raise DataError(f"The models are {names}; expected one or more, each once.")
    metric, files = evaluation_of(evaluate, None)
    with ExitStack() as stack:
        stack.enter_context(limited(options.memory_limit))
        graphs = {name: load(name, shapes=options.shapes) for name in names}
        first, work = graphs[names[0]], Workspace(progress=options.progress)
        task: Task[Any]
        opened: list[TaskData]
        if metric is not None:
            folder = stack.enter_context(temporary())
            data = open_own(metric, first, folder, most=options.limit, seed=seed)
            task, opened = data.task, [data]
            _refuse_others(graphs)
        else:
            if not files:
                raise DataError("There is nothing to evaluate on. Give --eval with labels, or --metric.")
            image = options.image
            spec = image_spec(first, **image) if isinstance(image, Mapping) else image
            task, opened = open_labelled(first, files, spec)
            for name, graph in list(graphs.items())[1:]:
                if open_labelled(graph, files, spec)[0] is not task:
                    raise DataError(f"'{name}' is for another task than '{names[0]}' ({task.name}). Compare alike.")
        runs: dict[str, RunModel] = {}
        for name, graph in graphs.items():
            session = stack.enter_context(open_original(graph))
            runs[name] = session.run if task.plain else runner(graph, session)
        found = []
        for one in opened:
            with work.stage("evaluate", len(one.choose(options.limit, seed)) * len(runs)) as progress:
                result = task.evaluate(runs, one, limit=options.limit, seed=seed, progress=progress.advance)
            found.append(msgspec.structs.replace(result, metrics=tuple(map(without_draws, result.metrics))))
    return tuple(found)


def open_original(graph: Graph) -> closing[Session]:
    """Open a session of a model's files as they are; where other outputs are compared, of its normal form."""
    if isinstance(graph, Joined):
        program = graph.program
        return closing(Artefact({name: part.source for name, part in program.graphs.items()}, program).session())
    return closing(Artefact({ONLY: graph.model if graph.shown else graph.source}).session())


def _refuse_others(graphs: Mapping[str, Graph]) -> None:
    """Refuse models whose inputs or outputs are called otherwise: a metric of the user's own names them."""
    (first, known), *others = ((name, (g.input_names, g.output_names)) for name, g in graphs.items())
    for name, found in others:
        if found != known:
            raise DataError(f"'{name}' has the inputs and outputs {found}, '{first}' {known}. Compare alike.")


def without_draws(metric: TaskMetric) -> TaskMetric:
    """Return a metric without the drops of its resamples, which only a judge of plans needs."""
    return msgspec.structs.replace(metric, draws={})
