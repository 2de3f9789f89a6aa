"""Preparation of a run: find or export the model that the user names, and open its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bitalloy import zoo
from bitalloy.core.effort import EFFORTS, USUAL_EFFORT, Effort
from bitalloy.core.errors import BitalloyError, DataError
from bitalloy.core.store import RunDirectory, StageInputs, key_of
from bitalloy.core.work import Progress, Silent, Workspace
from bitalloy.data.datasets import Dataset, ImageFolder, open_dataset
from bitalloy.data.images import ImageOptions, ImageSpec, infer_image_spec
from bitalloy.model import load as graph
from bitalloy.model.graphs.joining import Joined, join
from bitalloy.model.graphs.outline import Outline, is_program, read_interface, read_outline
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

SAMPLE_NOTE = (
    "Measured on the embedded sample `shapes` (drawn images), not on your data: give --data for numbers that mean "
    "something for your deployment."
)
SAMPLE_IMAGES, DRAWN_IMAGES = 100, 96
"""Images of the embedded sample that are evaluated, and those from which calibration, probing and verification draw."""
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
    effort: Effort = EFFORTS[USUAL_EFFORT]
    """How much a run measures beyond what its plan needs; its number of probes is that of the settings."""
    progress: Progress = field(default_factory=Silent)
    """Where the progress of the stages is shown."""


def prepare(
    model: str | Path,
    *,
    out: str | Path,
    data: str | Path | None = None,
    labels: str | Path | Sequence[str | Path] | None = None,
    seed: int = 0,
    options: RunOptions | None = None,
) -> Prepared:
    """Find or export a model, open its data, fix its sizes and load it.

    Args:
        model: an .onnx file, a folder with a `program.json`, or a name from `bitalloy models`; a model family's is
            exported into the run directory, once for each checkpoint.
        out: run directory.
        data: samples that look like the real ones: images or .npz feeds; for a program also labels of its task. The
            embedded sample without it.
        labels: labels for the task metric; those of the embedded sample where `model` is one of its models and there is
            neither data nor labels.
        seed: seed of random weights and of choices among samples.
        options: shapes, preparation of images, checkpoint, and where to show progress.

    Raises:
        BitalloyError: the model, data or run directory cannot be used; the message says what to do.
    """
    options = options or RunOptions()
    source, given, image = _find(model, options.checkpoint), dict(options.shapes), options.image
    progress = options.progress
    if source is None:
        export = zoo.Options(seed=seed, trust_checkpoint=options.trust_checkpoint)
        source = _export(str(model), options.checkpoint, export, Workspace(RunDirectory(out), progress))
    files = [] if labels is None else [Path(labels)] if isinstance(labels, (str, Path)) else [Path(p) for p in labels]
    folder = Path(out) / "sample"
    if is_program(source.path):
        outline = read_outline(source.path)
        spec = _program_image(outline, image)
        store = RunDirectory(out)
        paths = [Path(data)] if data is not None else _drawn(outline, spec, folder / "drawn", seed, "train")
        samples: Dataset = open_samples(outline, paths, image=spec, limit=None, seed=seed)
        loaded: Graph = join(load_program(source.path, shapes={**outline.shapes(samples.feeds(0)), **given}))
        if data is None and not files and source.sample:
            files = _drawn(outline, spec, folder / "validation", seed, "val")
    else:
        loaded = graph.load_graph(source.path, shapes={**_usual(source.path, data), **given})
        store = RunDirectory(out)
        spec = image if image is None or isinstance(image, ImageSpec) else image_spec(loaded, **image)
        samples = open_data(loaded, data, image=spec, seed=seed, sample_folder=folder)
        if data is None and not files and source.sample:
            size = int(loaded.info.inputs[0].shape[-1])
            drawn = write_coco(folder / "validation", count=SAMPLE_IMAGES, seed=seed, size=size)
            task = find_task(interface_of(loaded))
            files = [drawn if task is semantic.SEMANTIC else drawn / "instances.json"]
        samples.feeds(0)  # what cannot be fed is refused before anything is measured
    return Prepared(
        model=loaded,
        data=samples,
        image=spec if image else None,
        labels=tuple(files),
        images=() if files or loaded.large else _unlabelled(loaded, data, samples, spec),
        notes=(SAMPLE_NOTE,) if data is None else (),
        work=Workspace(store, progress),
        store=store,
    )


def _unlabelled(loaded: Graph, data: str | Path | None, samples: Dataset, image: ImageSpec | None) -> tuple[Path, ...]:
    """Find the folder of images on which agreement can be measured without labels; of a program there is none."""
    if data is None or not isinstance(samples, ImageFolder) or isinstance(loaded, Joined) or not Path(data).is_dir():
        return ()
    from bitalloy.tasks.evaluate import open_labelled  # imports scipy, which refusals do not wait for

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
    return graph.load_graph(path, shapes={**_usual(path, None), **(shapes or {})})


def open_data(
    model: Graph, path: str | Path | None, *, image: ImageChoice = None, limit: int | None = None, seed: int = 0,
    sample_folder: Path | None = None,
) -> Dataset:  # fmt: skip
    """Open samples for a model from a folder or file, or the embedded sample where no path is given.

    Args:
        model: the model whose inputs the samples must fit.
        path: images, .npz or .npy; None draws the embedded sample.
        image: preparation of images; what is not given comes from the model's file, or is inferred.
        limit: largest number of samples, which `seed` chooses; None for all.
        seed: seed of the choice of samples.
        sample_folder: folder for the images of the embedded sample; needed where no path is given.
    """
    spec = image if isinstance(image, ImageSpec) else image_spec(model, **(image or {}))
    if path is not None:
        return open_dataset(path, model.info.inputs, image=spec, limit=limit, seed=seed)
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
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path] if path.is_file() else []
    return (str(checkpoint), *((str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files))


def _usual(path: Path, data: str | Path | None) -> dict[str, tuple[int, ...]]:
    """Shapes of inputs with open sizes: those of the first sample where it is a .npz, or what the file notes."""
    inputs, usual = read_interface(path)
    opened = {i.name for i in inputs if any(isinstance(d, str) for d in i.shape)}
    found = {name: shape for name, shape in usual.items() if name in opened}
    if opened and data is not None and holds_arrays(Path(data)):
        feeds = open_dataset(data, inputs, image=None, limit=None, seed=0).feeds(0)
        found |= {name: feeds[name].shape for name in opened}
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
