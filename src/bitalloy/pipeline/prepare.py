"""Preparation of a run: find or export the model that the user names, and open its data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import onnx

from bitalloy import zoo
from bitalloy.core.effort import EFFORTS, USUAL_EFFORT, Effort
from bitalloy.core.errors import BitalloyError, DataError
from bitalloy.core.files import lasting_in, walk
from bitalloy.core.jobs import Executor, LocalExecutor
from bitalloy.core.store import RunDirectory, StageInputs, key_of
from bitalloy.core.work import Progress, Workspace, usual_progress
from bitalloy.data.datasets import Dataset, ImageFolder, open_dataset
from bitalloy.data.handed import HandedSample, Preprocess, handed_samples, store_feeds
from bitalloy.data.images import ImageOptions, ImageSpec, infer_image_spec
from bitalloy.model import load as graph
from bitalloy.model.decide import deciding_inputs
from bitalloy.model.file import parse
from bitalloy.model.graphs.joining import Joined, join
from bitalloy.model.graphs.outline import Outline, declared_interface, is_program, read_interface, read_outline
from bitalloy.model.graphs.wiring import load_program
from bitalloy.model.load import Graph
from bitalloy.samples.shapes import write_coco
from bitalloy.tasks import find_task, semantic
from bitalloy.tasks.open import (
    ImageChoice,
    holds_arrays,
    image_facts,
    image_spec,
    interface_of,
    open_samples,
    speaks,
    takes_prompts,
)

if TYPE_CHECKING:
    from bitalloy.tasks.own import Metric, OwnData

SAMPLE_NOTE = (
    "Measured on the embedded sample `shapes` (drawn images), not on your data: give --data for numbers that mean "
    "something for your deployment."
)
SAMPLE_IMAGES, DRAWN_IMAGES = 100, 96
"""Images of the embedded sample that are evaluated, and those from which calibration, probing and verification draw."""
MOST_SAMPLES = 512
"""Largest number of samples that are read of data in memory."""
SMALLEST, LARGEST = 64, 640
"""Sides of the images of the embedded sample, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A loaded model, its data, and the run directory for its results."""

    model: Graph
    data: Dataset
    image: ImageSpec | None
    """Preparation of images as the user gave it; None where the model's file or its task decides."""
    labels: tuple[Path, ...]
    """Files or folders of labels for the task metric; none where the metric is not measured."""
    own: OwnData | None = None
    """What a metric of the user's own is measured on; None without one."""
    images: tuple[Path, ...]
    """Folder of the images that the user gave as data, on which agreement with float is measured without labels; empty
    where there is none, or no task that measures it."""
    notes: tuple[str, ...]
    """Sentences that a reader of the results must know."""
    work: Workspace
    store: RunDirectory


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of a run that are seldom given: how the model is opened, evaluated and reported on."""

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Input name -> shape (for a program `graph:input` -> shape), for open sizes that neither the model's file nor the
    samples tell."""
    image: ImageChoice = None
    """Preparation of images; what is not given comes from the model's file, or is inferred."""
    checkpoint: str | Path | None = None
    """Checkpoint of a model to be exported: file, folder, hub repository or `random`; None for the published one."""
    trust_checkpoint: bool = False
    """Whether a checkpoint with pickled objects may be opened."""
    limit: int | None = None
    """Largest number of labelled images that are evaluated; None for all."""
    example_inputs: object = None
    """Inputs with which a torch module is exported: a tensor, a tuple of its arguments, or a dict by their names."""
    effort: Effort = EFFORTS[USUAL_EFFORT]
    """How much a run measures beyond what its plan needs; its number of probes is that of the settings."""
    progress: Progress = field(default_factory=usual_progress)
    """Where the progress of the stages is shown; by default in a notebook alone."""
    memory_limit: int | None = None
    """Largest number of bytes that what files declare may take; None for the environment's, or 80 % of the machine."""
    executor: Executor | None = None
    """What does the jobs of the stages, such as a `RayExecutor` that is open; None for this process."""


def prepare(
    model: object,
    *,
    out: str | Path,
    data: object = None,
    evaluate: object = None,
    preprocess: Preprocess | None = None,
    seed: int = 0,
    options: RunOptions | None = None,
) -> Prepared:
    """Find or export a model, open its data, fix its sizes and load it.

    What is given in memory is written into the run directory first, so that everything behind reads files.

    Args:
        model: an .onnx file, a folder with a `program.json`, or a name from `bitalloy models`; a model family's is
            exported into the run directory, once for each checkpoint. Or a model in memory: the bytes of a file, an
            `onnx.ModelProto`, an `onnx_ir.Model`, or a torch module with `example_inputs` among the options.
        out: run directory.
        data: samples that look like the real ones: images or .npz feeds, for a program also labels of its task; or
            samples in memory, see `bitalloy.data.handed`. The embedded sample without it.
        evaluate: files of labels for the task metric, or a metric of the user's own: a function of a session, or a
            `Metric`. The labels of the embedded sample where `model` is one of its models and there is neither this nor
            data.
        preprocess: function that makes of an item of the data what the model takes; of a folder of images it gets RGB
            images of Pillow. It serves the labels of a `Metric` too.
        seed: seed of random weights and of choices among samples.
        options: shapes, preparation of images, checkpoint, and where to show progress.

    Raises:
        BitalloyError: the model, data or run directory cannot be used; the message says what to do.
    """
    options = options or RunOptions()
    metric, files = evaluation_of(evaluate, preprocess)
    source, image = _source(model, out, seed, options), options.image
    notes: tuple[str, ...] = (SAMPLE_NOTE,) if data is None else ()
    if data is not None and not (isinstance(data, (str, Path)) and preprocess is None):
        work = Workspace(RunDirectory(out), options.progress)
        data, notes = _stored(data, source.path, work, preprocess, seed, options.shapes)
    assert data is None or isinstance(data, (str, Path)), "data in memory lies in files now"
    given, folder = dict(options.shapes), Path(out) / "sample"
    drawn = source.sample and data is None and not files and metric is None
    if is_program(source.path):
        outline = read_outline(source.path)
        spec = _program_image(outline, image)
        store = RunDirectory(out)
        paths = [Path(data)] if data is not None else _drawn(outline, spec, folder / "drawn", seed, "train")
        samples: Dataset = open_samples(outline, paths, image=spec, limit=None, seed=seed)
        loaded: Graph = join(load_program(source.path, shapes={**outline.shapes(samples.feeds(0)), **given}))
        files = _drawn(outline, spec, folder / "validation", seed, "val") if drawn else files
    else:
        loaded = _load_file(source.path, data, given)
        store = RunDirectory(out)
        spec = image if image is None or isinstance(image, ImageSpec) else image_spec(loaded, **image)
        samples = open_data(loaded, data, image=spec, seed=seed, sample_folder=folder)
        if drawn:
            files = [_drawn_labels(loaded, folder / "validation", seed)]
        samples.feeds(0)  # what cannot be fed is refused before anything is measured
    own = None if metric is None else _own(metric, loaded, store, options.limit, seed, preprocess)
    return Prepared(
        model=loaded,
        data=samples,
        image=spec if image else None,
        labels=tuple(files),
        own=own,
        images=() if files or own or loaded.large else _unlabelled(loaded, data, samples, spec),
        notes=notes,
        work=Workspace(store, options.progress, executor=options.executor or LocalExecutor()),
        store=store,
    )


def evaluation_of(evaluate: object, preprocess: Preprocess | None) -> tuple[Metric | None, list[Path]]:
    """Tell a metric of the user's own from files of labels.

    Args:
        evaluate: what the user evaluates with.
        preprocess: function that prepares samples; labels in files do not go with it.

    Raises:
        DataError: it is neither of both.
    """
    if evaluate is None:
        return None, []
    listed = [evaluate] if isinstance(evaluate, (str, Path)) else evaluate
    if not isinstance(listed, (list, tuple)) or not all(isinstance(one, (str, Path)) for one in listed):
        from bitalloy.tasks.own import as_metric  # imports scipy, which refusals do not wait for

        return as_metric(evaluate), []
    if preprocess is not None and listed:
        raise DataError(
            "preprocess prepares samples for the model alone, and labels in files are read with their own images. Give "
            "a metric of your own to evaluate with, or leave out preprocess and describe the images by options."
        )
    return None, [Path(one) for one in listed]


def _own(
    metric: Metric, loaded: Graph, store: RunDirectory, limit: int | None, seed: int, preprocess: Preprocess | None
) -> OwnData:
    from bitalloy.tasks.own import open_own

    return open_own(metric, loaded, store.cache, most=limit, seed=seed, preprocess=preprocess)


def _source(model: object, out: str | Path, seed: int, options: RunOptions) -> zoo.Source:
    """Find the file or folder of a model, which is exported or written into the run directory where it is not there."""
    if not isinstance(model, (str, Path)):
        from bitalloy.zoo.handed import write_handed

        path = write_handed(model, RunDirectory(out).cache, example_inputs=options.example_inputs)
        return zoo.Source(name=path.stem, path=path, sample=False)
    found = _find(model, options.checkpoint)
    if found is not None:
        return found
    export = zoo.Options(seed=seed, trust_checkpoint=options.trust_checkpoint)
    return _export(str(model), options.checkpoint, export, Workspace(RunDirectory(out), options.progress))


def _stored(
    data: object,
    source: Path,
    work: Workspace,
    preprocess: Preprocess | None,
    seed: int,
    shapes: Mapping[str, Sequence[int]],
) -> tuple[Path, tuple[str, ...]]:
    """Store samples in memory as feeds, with a note where there were more of them."""
    store = work.store
    assert store is not None, "samples go into a run directory"
    inputs = read_outline(source).open_inputs if is_program(source) else read_interface(source)[0]
    inputs = tuple(msgspec.structs.replace(i, shape=tuple(shapes.get(i.name, i.shape))) for i in inputs)
    data = Path(data) if isinstance(data, str) else data
    samples = handed_samples(data, inputs, most=MOST_SAMPLES, seed=seed, preprocess=preprocess)
    with work.stage("data", None) as progress:
        folder = store_feeds((_counted(sample, progress).feeds for sample in samples), store.cache)
    count = sum(1 for _ in folder.iterdir())
    if count < MOST_SAMPLES:
        return folder, ()
    return folder, (f"Of the data at most {MOST_SAMPLES} samples were read, from which all parts of the run draw.",)


def _counted(sample: HandedSample, progress: Progress) -> HandedSample:
    progress.advance()
    return sample


def _drawn_labels(loaded: Graph, folder: Path, seed: int) -> Path:
    """The labels of the embedded sample for a model of one graph."""
    size = int(loaded.info.inputs[0].shape[-1])
    drawn = write_coco(folder, count=SAMPLE_IMAGES, seed=seed, size=size)
    return drawn if find_task(interface_of(loaded)) is semantic.SEMANTIC else drawn / "instances.json"


def _unlabelled(loaded: Graph, data: str | Path | None, samples: Dataset, image: ImageSpec | None) -> tuple[Path, ...]:
    """Find the folder of images on which agreement can be measured without labels; of a program there is none."""
    if data is None or not isinstance(samples, ImageFolder) or isinstance(loaded, Joined) or not Path(data).is_dir():
        return ()
    from bitalloy.tasks.observing import open_labelled  # imports scipy, which refusals do not wait for

    try:
        open_labelled(loaded, [Path(data)], image)
    except DataError:
        return ()
    return (Path(data),)


def load(model: str | Path, *, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Graph:
    """Read a model by path or by its name among the samples; a program's graphs are joined into one.

    Sizes that a file leaves open are those given, or else the usual ones that its exporter noted. See
    `bitalloy.model.load.load_graph` for what is refused, and `bitalloy.run` for models that must be exported first.
    """
    path = zoo.resolve(model).path
    if is_program(path):
        return join(load_program(path, shapes={**read_outline(path).shapes(), **(shapes or {})}))
    return graph.load_graph(path, shapes={**_usual(parse(path)[0], None), **(shapes or {})})


def open_data(
    model: Graph, data: object = None, *, image: ImageChoice = None, limit: int | None = None, seed: int = 0,
    sample_folder: Path | None = None, preprocess: Preprocess | None = None,
) -> Dataset:  # fmt: skip
    """Open samples for a model from a folder or file, from memory, or the embedded sample where nothing is given.

    Args:
        model: the model whose inputs the samples must fit.
        data: path of images, .npz or .npy; or an array, a dict of arrays, or a list, generator, DataLoader or data set
            of samples, see `bitalloy.data.handed`, which are stored as files first. None draws the embedded sample.
        image: preparation of images; what is not given comes from the model's file, or is inferred.
        limit: largest number of samples, which `seed` chooses; None for all, of data in memory at most `MOST_SAMPLES`.
        seed: seed of the choice of samples.
        sample_folder: folder for the images of the embedded sample, where it is needed, or for the samples in memory,
            which otherwise lie in a temporary folder as long as they are used.
        preprocess: function that makes of an item of the data what the model takes; of a folder of images it gets RGB
            images of Pillow.
    """
    spec = image if isinstance(image, ImageSpec) else image_spec(model, **(image or {}))
    if isinstance(data, (str, Path)) and preprocess is None:
        return open_dataset(data, model.info.inputs, image=spec, limit=limit, seed=seed)
    if data is not None:
        data = Path(data) if isinstance(data, str) else data
        most = MOST_SAMPLES if limit is None else limit
        samples = handed_samples(data, model.info.inputs, most=most, seed=seed, preprocess=preprocess)
        return _kept(samples, model, sample_folder)
    if spec is None or sample_folder is None:
        raise DataError(
            "The model has no image input, so the embedded sample does not fit. Give --data with .npz feeds."
        )
    folder = write_coco(
        sample_folder / "drawn",
        count=limit or DRAWN_IMAGES,
        seed=seed,
        size=max(spec.height, SMALLEST),
        split="train",
    )
    return open_dataset(folder / "images", model.info.inputs, image=spec, limit=limit, seed=seed)


def _kept(samples: Iterable[HandedSample], model: Graph, folder: Path | None) -> Dataset:
    """Store samples in a folder, or in a temporary one that is removed when they are no longer used."""

    def stored(place: Path) -> Dataset:
        place.mkdir(parents=True, exist_ok=True)
        feeds = store_feeds((sample.feeds for sample in samples), place)
        return open_dataset(feeds, model.info.inputs, image=None, limit=None, seed=0)

    return lasting_in(folder, stored)


def _find(model: str | Path, checkpoint: str | Path | None) -> zoo.Source | None:
    """The file or folder behind what the user named; None where it must be exported first."""
    if zoo.is_variant(str(model)) and not Path(model).exists():
        return None
    if checkpoint is not None:
        raise BitalloyError(
            f"--checkpoint belongs to a model that is exported first, and '{model}' is none of those. Leave it out, or "
            "give a name from `bitalloy models`."
        )
    return zoo.resolve(model)


def _export(name: str, checkpoint: str | Path | None, options: zoo.Options, work: Workspace) -> zoo.Source:
    """Export a model of a family into the run directory, or find it there."""
    assert work.store is not None, "exports go into a run directory"
    key = key_of(
        ExportInputs(
            name=name,
            checkpoint=_identity(checkpoint),
            size=options.size,
            open_size=options.open_size,
            seed=options.seed,
            packages=zoo.find(name)[0].installed,
        )
    )
    folder = work.store.cache / f"export-{key[:24]}"
    done = folder / "complete"
    if not done.is_file():
        with work.stage("export", None):
            zoo.export_model(name, checkpoint=checkpoint, folder=folder, options=options)
        done.touch()
    path = folder if is_program(folder) else folder / f"{name}.onnx"
    return zoo.Source(name=name, path=path, sample=False)


class ExportInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides the files of an export."""

    name: str
    checkpoint: tuple[object, ...]
    """Name of the checkpoint, with names, sizes and times of its files."""
    size: tuple[int, int] | None
    open_size: bool
    seed: int
    packages: dict[str, str]
    """Packages of the family, with their versions."""


def _identity(checkpoint: str | Path | None) -> tuple[object, ...]:
    """What tells a checkpoint from another: names, sizes and times of its files."""
    path = Path(str(checkpoint))
    files = sorted(f for f in walk(path) if f.is_file()) if path.is_dir() else [path] if path.is_file() else []
    return (str(checkpoint), *((str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files))


def _usual(proto: onnx.ModelProto, data: str | Path | None) -> dict[str, tuple[int, ...]]:
    """Shapes of inputs with open sizes: those of the first sample where it is a .npz, or what the file notes."""
    inputs, usual = declared_interface(proto)
    opened = {i.name for i in inputs if any(isinstance(d, str) for d in i.shape)}
    found = {name: shape for name, shape in usual.items() if name in opened}
    if opened and data is not None and holds_arrays(Path(data)):
        feeds = open_dataset(data, inputs, image=None, limit=None, seed=0).feeds(0)
        found |= {name: feeds[name].shape for name in opened}
    return found


def _load_file(path: Path, data: str | Path | None, given: Mapping[str, tuple[int, ...]]) -> Graph:
    """Load a file with the sizes that were asked for, or those of the samples."""
    proto, _ = parse(path)
    return graph.load_graph(path, shapes={**_usual(proto, data), **given}, fixed=_fixed(proto, data))


def _fixed(proto: onnx.ModelProto, data: str | Path | None) -> dict[str, int]:
    """Inputs that decide what a file does, and have one and the same value in every sample, such as a sampling rate."""
    if data is None or not holds_arrays(Path(data)) or not (names := deciding_inputs(proto)):
        return {}
    samples = open_dataset(data, declared_interface(proto)[0], image=None, limit=None, seed=0)
    found: dict[str, int] = {}
    for index in range(len(samples)):
        feeds = samples.feeds(index)
        single = {name: int(feeds[name].item()) for name in names if feeds[name].size == 1}
        found = single if not index else {k: v for k, v in found.items() if single.get(k) == v}
        if not found:
            break
    return found


def _program_image(outline: Outline, given: ImageChoice) -> ImageSpec | None:
    """Preparation of a program's images; None leaves it to its task."""
    if isinstance(given, ImageSpec):
        return given
    known = {**image_facts(outline.facts), **(given or {})}
    options = ImageOptions(**known)  # type: ignore[arg-type]
    return infer_image_spec(outline.open_inputs, task=None, options=options) if known else None


def _drawn(outline: Outline, spec: ImageSpec | None, folder: Path, seed: int, split: str) -> list[Path]:
    """The embedded sample for a program: labels of its task, with the images beside them."""
    inputs = outline.open_inputs
    image = spec or infer_image_spec(inputs, task=None)
    if image is None or not (speaks(inputs) or takes_prompts(inputs)):
        raise DataError(
            f"The embedded sample does not fit the program's inputs {[i.name for i in inputs]}. Give --data with .npz "
            "feeds under these names."
        )
    size = min(max(image.height, SMALLEST), LARGEST)
    count = DRAWN_IMAGES if split == "train" else SAMPLE_IMAGES
    drawn = write_coco(folder, count=count, seed=seed, size=size, split=split)
    return [drawn / n for n in (("questions.jsonl", "captions.json") if speaks(inputs) else ("instances.json",))]
