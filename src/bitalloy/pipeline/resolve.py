"""What labelled data resolve for a model, before any plan is made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bitalloy.core.limits import limited
from bitalloy.core.outcome import Resolution
from bitalloy.core.plans import Budget
from bitalloy.core.work import Workspace
from bitalloy.pipeline.prepare import RunOptions, load
from bitalloy.rewrite.calibrated import original_artefact
from bitalloy.targets import target
from bitalloy.tasks.base import Seen, TaskResult
from bitalloy.tasks.observing import Observer, open_labelled
from bitalloy.tasks.open import image_spec
from bitalloy.tasks.resolution import resolution_of, with_limit
from bitalloy.verify.judging import limits_of


def resolve_drops(
    model: str | Path,
    labels: str | Path,
    *,
    max_drop: Mapping[str, float] | None = None,
    seed: int = 0,
    options: RunOptions | None = None,
) -> tuple[Resolution, ...]:
    """Estimate the smallest drop of each task metric that labelled images tell from noise, from the float model alone.

    Args:
        model: an .onnx file, a folder with a `program.json`, or a name among the embedded samples.
        labels: labels of the model's task, e.g. a COCO annotation file.
        max_drop: limits on drops, as in `Budget`; how many images each needs is estimated too.
        seed: seed of the choice of images, of the disturbances and of the bootstrap.
        options: shapes, preparation of images, largest number of images, where to show progress.

    Raises:
        BitalloyError: the model or the labels cannot be used, or a limit is on none of the task's metrics.
    """
    options = options or RunOptions()
    with limited(options.memory_limit):
        graph = load(model, shapes=options.shapes)
    image = options.image
    spec = image_spec(graph, **image) if isinstance(image, Mapping) else image
    task, (data,) = open_labelled(graph, [Path(labels)], spec)
    samples, work = data.choose(options.limit, seed), Workspace(progress=options.progress)
    artefact = original_artefact(graph, graph, target("ort-cpu"))
    with limited(options.memory_limit), work.stage("resolution", len(samples)) as progress, work.scratch() as scratch:
        observer = Observer(
            graph, data, {"reference": artefact, "model": artefact} if data.paired else {"model": artefact}, scratch
        )
        try:
            seen: list[Seen] = []
            for sample in samples:
                seen += observer.observe([sample])
                progress.advance()
        finally:
            observer.close()
    found = resolution_of(task, seen, data, samples, seed=seed)
    if not max_drop:
        return found
    judged = task.judge(seen, data, samples)
    result: TaskResult = task.measure({"float": judged, "same": judged}, data, samples, seed=seed, resamples=1)
    return with_limit(found, limits_of(Budget(max_drop=dict(max_drop)), {m.name: m for m in result.metrics}))
