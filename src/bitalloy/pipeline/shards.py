"""Sensitivities by many processes that know nothing of each other, such as the tasks of a job array, and their merge.

    store/
      shards.json          the question that all parts answer
      cache/...            results, as in a run directory

Every part works in a store, its own or one for all, and stores results under the hash of what decides them, as every
run does. The merge gathers the stores in a run directory and goes through the same stages there: what parts share out
it takes as it is stored, and what is missing it names; the little that needs all results at once it computes.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import msgspec

from bitalloy import zoo
from bitalloy.core import files
from bitalloy.core.encoding import from_json, to_json
from bitalloy.core.errors import BitalloyError, RunDirectoryError
from bitalloy.core.limits import limited
from bitalloy.core.ownership import PARTIAL, sweep
from bitalloy.core.plain import one_line
from bitalloy.core.records import DataInfo, Record, SensitivityTable, Settings
from bitalloy.core.shares import NO_PART, JobShare, RestMissingError
from bitalloy.core.store import RunDirectory, claimed, stored_results
from bitalloy.data.images import Fit, Layout, file_hash
from bitalloy.pipeline.prepare import Prepared, RunOptions, prepare
from bitalloy.pipeline.sensitivity import SensitivityQuestion, answer_question, publish_answer
from bitalloy.runtime.cluster.worker import Facts, facts_here
from bitalloy.sensitivity.measuring import Selection
from bitalloy.targets import chosen_targets
from bitalloy.tasks.metric import MetricTable

QUESTION_FILE = "shards.json"
"""File of a store that tells what its results answer."""
MOST_PARTS = 10_000
MOST_NAMED = 8
"""Commands of missing parts that a message repeats."""
PLACES = ("model", "data", "labels")
"""Fields that name files: the contents are compared, and not where they lie."""


class GivenImage(Record, frozen=True, kw_only=True):
    """Preparation of images as it was given, see `ImageOptions`; what is None is inferred."""

    size: tuple[int, int] | int | None = None
    scale: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    layout: Layout | None = None
    fit: Fit | None = None


class ShardedQuestion(Record, frozen=True, kw_only=True):
    """What sensitivities are asked for, and of what, in plain data: see `bitalloy.pipeline.sensitivity.sensitivity`."""

    model: str
    """Absolute path, or name of an embedded model."""
    data: str | None = None
    labels: str | None = None
    settings: Settings = msgspec.field(default_factory=Settings)
    units: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    exact: bool = False
    mode: str = ""
    confirmed: int | None = None
    shapes: dict[str, tuple[int, ...]] = msgspec.field(default_factory=dict)
    image: GivenImage = GivenImage()
    limit: int | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of jobs that are shared out: those that grow with the question, one after the other."""
        if self.labels is not None:
            return ("metric",)
        if self.exact:
            return ("exact",)
        return ("probe",) if self.confirmed is None else ("probe", "exact")

    def question(self) -> SensitivityQuestion:
        """Return what is asked as `sensitivity` takes it."""
        return SensitivityQuestion(
            selection=Selection(self.units, self.regions, self.sites),
            exact=self.exact,
            mode=self.mode,
            confirmed=self.confirmed,
            labels=None if self.labels is None else Path(self.labels),
        )

    def options(self, known: RunOptions) -> RunOptions:
        """Return options of a run with those of the question in them."""
        image = {name: value for name, value in msgspec.structs.asdict(self.image).items() if value is not None}
        return replace(known, shapes=self.shapes, image=image, limit=self.limit)


class ShardedTask(Record, frozen=True, kw_only=True):
    """What all parts have in common, by which those of something else are told."""

    asked: ShardedQuestion
    parts: Annotated[int, msgspec.Meta(ge=1, le=MOST_PARTS)]
    words: tuple[str, ...]
    """The command without its part and store, which a message repeats for parts that are missing."""
    network: str
    """Identity of the model, see `Graph.identity`."""
    samples: DataInfo
    labels: str
    """SHA-256 of the file of labels; empty without one."""
    facts: Facts
    """What decides the bits of results on the machine."""


class ShardReport(Record, frozen=True, kw_only=True):
    """How far the parts of a question are, as one of them saw it when it ended."""

    part: int
    parts: int
    stage: str
    """Stage at which results of other parts are missing; empty where everything is there."""
    there: int
    """Results of that stage that are stored."""
    total: int
    missing: tuple[int, ...]
    """Numbers of the parts that lack results."""


def sharded_question(
    model: str | Path, data: str | Path | None, settings: Settings, question: SensitivityQuestion, options: RunOptions
) -> ShardedQuestion:
    """Write a question in plain data.

    Raises:
        BitalloyError: the model must be exported first, or the preparation of images is not given by single fields.
    """
    if zoo.is_variant(str(model)) and not Path(model).exists():
        raise BitalloyError(
            f"'{model}' is exported first, which every part would do again. Use `bitalloy export {model}`, and give "
            "the file or folder that it writes."
        )
    if options.image is not None and not isinstance(options.image, Mapping):
        raise BitalloyError("Parts of a question take the preparation of images as fields of `ImageOptions` by name.")
    chosen = question.selection
    return ShardedQuestion(
        model=_absolute(model),
        data=None if data is None else _absolute(data),
        labels=None if question.labels is None else _absolute(question.labels),
        settings=settings,
        units=chosen.units,
        regions=chosen.regions,
        sites=chosen.sites,
        exact=question.exact,
        mode=question.mode,
        confirmed=question.confirmed,
        shapes=dict(options.shapes),
        image=GivenImage(**options.image) if options.image else GivenImage(),  # type: ignore[arg-type]
        limit=options.limit,
    )


def run_shard(
    asked: ShardedQuestion,
    part: int,
    parts: int,
    *,
    store: str | Path,
    words: Sequence[str] = (),
    options: RunOptions | None = None,
) -> ShardReport:
    """Do one part of the work of a question, and store its results; what is stored there already is used.

    Parts may run at the same time, in one store or in several, and again after they were killed.

    Args:
        asked: the question.
        part: number of the part, from 1.
        parts: number of parts.
        store: folder of results.
        words: the command without its part and store, for messages about missing parts.
        options: progress, memory limit and executor.

    Raises:
        BitalloyError: the store holds results of something else; or the model, data or question cannot be used.
    """
    if not 1 <= part <= parts <= MOST_PARTS:
        raise BitalloyError(f"--shard is '{part}/{parts}'; expected a part and the number of parts, such as 2/8.")
    options = options or RunOptions()
    chosen_targets(asked.settings.targets, asked.settings.device, asked.settings.schemes)
    share = JobShare(part, parts, asked.kinds)
    with limited(options.memory_limit):
        folder = RunDirectory(store)
        sweep(path for path in files.walk(folder.cache) if path.name.endswith(PARTIAL))
        known = read_task(store) if (folder.path / QUESTION_FILE).exists() else None
        if known is not None:
            _refuse_other(store, known, "here", _asked_differently(known.asked, asked))
        prepared = _prepared(asked, store, options)
        task = _task(asked, parts, words, prepared)
        if known is None:
            folder.publish(QUESTION_FILE, to_json(task, pretty=True))
        else:
            _refuse_other(store, known, "here", task_differences(known, task))
        try:
            _answer(asked, prepared, share)
        except RestMissingError as rest:
            return ShardReport(
                part=part, parts=parts, stage=rest.stage, there=rest.there, total=rest.total, missing=rest.parts
            )
    return ShardReport(part=part, parts=parts, stage="", there=0, total=0, missing=())


def merge_shards(
    stores: Sequence[str | Path], *, out: str | Path, options: RunOptions | None = None
) -> tuple[ShardedQuestion, SensitivityTable | MetricTable]:
    """Gather the results of all parts in a run directory, and write the table that one process would have written.

    Args:
        stores: folders in which parts worked.
        out: run directory; it may be one of the stores.
        options: progress, memory limit and executor.

    Returns:
        The question that the stores answer, and the rows that it asks for.

    Raises:
        BitalloyError: stores answer different questions, results are missing, or this machine would give other bits.
    """
    options, tasks = options or RunOptions(), [read_task(store) for store in stores]
    task = tasks[0]
    for store, other in zip(stores[1:], tasks[1:], strict=True):
        _refuse_other(stores[0], task, f"in '{store}'", task_differences(task, other))
    asked = task.asked
    with limited(options.memory_limit), claimed(out) as run:
        prepared = _prepared(asked, out, options)
        here = _task(asked, task.parts, task.words, prepared)
        _refuse_other(stores[0], task, "here", task_differences(task, here))
        for store in stores:
            _gather(Path(store), run)
        try:
            found = _answer(asked, prepared, JobShare(NO_PART, task.parts, asked.kinds))
        except RestMissingError as rest:
            raise BitalloyError(_told_missing(rest, task, stores[0])) from rest
        publish_answer(run, found)
    return asked, found.shown


def read_task(store: str | Path) -> ShardedTask:
    """Read what the results in a store answer.

    Raises:
        RunDirectoryError: there is no such file, or it is damaged.
    """
    path = Path(store) / QUESTION_FILE
    try:
        return from_json(path.read_bytes(), ShardedTask)
    except OSError as error:
        raise RunDirectoryError(
            f"'{store}' is no store of parts: it has no {QUESTION_FILE}. Name the --store of a `bitalloy sensitivity "
            "--shard`."
        ) from error
    except msgspec.MsgspecError as error:
        raise RunDirectoryError(f"'{path}' is damaged: {error}. Remove the store, and run its parts again.") from error


def task_differences(there: ShardedTask, here: ShardedTask) -> list[str]:
    """Say in what two tasks differ, with both values; empty where their results are those of one question."""
    first, second = there.facts, here.facts
    pairs: dict[str, tuple[object, object]] = {
        "model": (there.network[:12], here.network[:12]),
        "data": (_told_data(there.samples), _told_data(here.samples)),
        "labels": (there.labels[:12], here.labels[:12]),
        "number of parts": (there.parts, here.parts),
        "cores": (first.threads, second.threads),
        "features of the processor": (
            " ".join(sorted(set(first.features) - set(second.features))),
            " ".join(sorted(set(second.features) - set(first.features))),
        ),
        "bits of a product of matrices": (first.products[:12], second.products[:12]),
        **{
            f"version of {name}": (first.versions.get(name), second.versions.get(name))
            for name in sorted({*first.versions, *second.versions})
        },
    }
    found = [f"{name} {a or 'none'} against {b or 'none'}" for name, (a, b) in pairs.items() if a != b]
    return found + _asked_differently(there.asked, here.asked)


def _prepared(asked: ShardedQuestion, out: str | Path, options: RunOptions) -> Prepared:
    known = asked.options(options)
    return prepare(asked.model, out=out, data=asked.data, seed=asked.settings.seed, options=known)


def _answer(asked: ShardedQuestion, prepared: Prepared, share: JobShare) -> Any:
    shared = replace(prepared, work=replace(prepared.work, share=share))
    return answer_question(shared, asked.settings, asked.question(), limit=asked.limit)


def _task(asked: ShardedQuestion, parts: int, words: Sequence[str], prepared: Prepared) -> ShardedTask:
    return ShardedTask(
        asked=asked,
        parts=parts,
        words=tuple(words),
        network=prepared.model.identity,
        samples=prepared.data.info,
        labels="" if asked.labels is None else file_hash(Path(asked.labels)),
        facts=facts_here(),
    )


def _told_data(info: DataInfo) -> str:
    return f"{info.sha256[:12]} ({info.count} samples, {info.preprocessing})"


def _asked_differently(there: ShardedQuestion, here: ShardedQuestion) -> list[str]:
    first, second = _flat(there), _flat(here)
    return [f"{name} {first[name]} against {second[name]}" for name in first if first[name] != second[name]]


def _flat(asked: ShardedQuestion) -> dict[str, object]:
    """What is asked, by the names of the fields, with those of the settings beside the others; files have no name."""
    fields = msgspec.to_builtins(asked)
    settings = fields.pop("settings")
    embedded = {name: fields[name] for name in ("model",) if not Path(fields[name]).is_absolute()}
    return {"model": "a file", **{n: v for n, v in fields.items() if n not in PLACES}, **settings, **embedded}


def _refuse_other(store: str | Path, task: ShardedTask, where: str, found: Sequence[str]) -> None:
    if found:
        raise BitalloyError(
            f"'{store}' holds results of another question ({one_line(_command(task))}) than {where}: "
            f"{one_line('; '.join(found))}. Give every question a store of its own."
        )


def _command(task: ShardedTask) -> str:
    return shlex.join(["bitalloy", *(task.words or ("sensitivity", task.asked.model))])


def _told_missing(rest: RestMissingError, task: ShardedTask, store: str | Path) -> str:
    start, place = _command(task), shlex.quote(str(store))
    commands = [f"{start} --shard {part}/{task.parts} --store {place}" for part in rest.parts[:MOST_NAMED]]
    more = f", and {len(rest.parts) - MOST_NAMED} more" if len(rest.parts) > MOST_NAMED else ""
    named = ", ".join(map(str, rest.parts[:MOST_NAMED])) + more
    which = f"part {named} is missing" if len(rest.parts) == 1 else f"parts {named} are missing"
    told = one_line("; ".join(commands))
    return f"Of the stage '{rest.stage}', {which}: {rest.there} of {rest.total} results are there. Run: {told}"


def _gather(store: Path, run: RunDirectory) -> None:
    """Copy the results of a store into a run directory.

    Raises:
        RunDirectoryError: a result differs from the one of the same name that is there.
    """
    for path, place in _results(store, run):
        if not place.exists():
            run.publish(str(place.relative_to(run.path)), path.read_bytes())
        elif not place.samefile(path) and place.read_bytes() != path.read_bytes():
            raise RunDirectoryError(
                f"'{path}' and '{place}' are results of the same work and differ: one is damaged, or a machine "
                "computes otherwise. Remove the one that you do not trust, and run its part again."
            )


def _results(store: Path, run: RunDirectory) -> Iterator[tuple[Path, Path]]:
    cache = store / run.cache.name
    for _, path in stored_results(cache):
        if not path.is_symlink():
            yield path, run.cache / path.relative_to(cache)


def _absolute(path: str | Path) -> str:
    """An absolute path where there is such a file, or else the name."""
    return str(Path(path).absolute()) if Path(path).exists() else str(path)
