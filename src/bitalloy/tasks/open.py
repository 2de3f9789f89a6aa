"""Programs as tasks see them: which graphs read an image or a prompt, and how samples are made.

Two kinds are known by what they take:

1. Promptable segmentation: an image, `point_coords` and `point_labels`. A sample is an image with one prompt.
2. Language: an image, the token ids `before` and `after` it, and a decoder with an empty cache. A sample is an image
   with the tokens of a question, or of a question with its answer. The graph that embeds the tokens puts the image's
   features between their vectors, so the joined graph leads from the image to the logits.

Any other program is fed from .npz files with the names of its free inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from bitalloy.core.errors import DataError, ModelError
from bitalloy.core.jobs import Contexts, Opening
from bitalloy.core.records import Record, TensorSpec
from bitalloy.data.datasets import Samples, open_dataset
from bitalloy.data.images import Fit, ImageOptions, ImageSpec, Layout, infer_image_spec
from bitalloy.model.graphs.joining import Joined
from bitalloy.model.graphs.outline import Outline, read_outline, usual_shapes
from bitalloy.model.graphs.wiring import GraphProgram
from bitalloy.model.load import Graph
from bitalloy.model.metadata import IMAGE, SHAPES, read_fact
from bitalloy.runtime.artefact import Chain
from bitalloy.runtime.base import Session
from bitalloy.tasks import chat, promptable
from bitalloy.tasks.base import Interface, RunModel, Tokenizer, image_input
from bitalloy.tasks.chat_samples import ChatSamples
from bitalloy.tasks.pieces import read_pieces
from bitalloy.tasks.prompt_samples import PromptSamples
from bitalloy.tasks.yolo import looks_like_yolo
from bitalloy.zoo.mobilevlm_chat import sentence_pieces

_Above = Annotated[float, msgspec.Meta(gt=0)]
_Side = Annotated[int, msgspec.Meta(gt=0, le=2**20)]
_Sides = Annotated[tuple[_Side, ...], msgspec.Meta(min_length=2, max_length=2)]
"""Not `tuple[_Side, _Side]`: msgspec 0.22 corrupts memory where that may also be a `_Side`."""


class _ImageFacts(msgspec.Struct, forbid_unknown_fields=True):
    """The metadata `IMAGE`: fields of `ImageOptions`."""

    size: _Side | _Sides | None = None
    scale: _Above | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[_Above, ...] | None = None
    layout: Layout | None = None
    fit: Fit | None = None


def image_facts(metadata: Mapping[str, str]) -> dict[str, object]:
    """Read what a file's metadata say about the preparation of images.

    Raises:
        ModelError: the entry is damaged.
    """
    found = msgspec.structs.asdict(read_fact(metadata, IMAGE, _ImageFacts, _ImageFacts()))
    return {name: value for name, value in found.items() if value is not None}


def speaks(inputs: Sequence[TensorSpec]) -> bool:
    """Return whether a program takes an image and the tokens around it."""
    return {chat.BEFORE, chat.AFTER, chat.MASK, chat.POSITIONS} <= {i.name for i in inputs} and _takes_image(inputs)


def takes_prompts(inputs: Sequence[TensorSpec]) -> bool:
    """Return whether a program takes an image and points."""
    return {promptable.COORDINATES, promptable.LABELS} <= {i.name for i in inputs} and _takes_image(inputs)


def interface(
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    metadata: Mapping[str, str],
    folder: Path,
    image: ImageSpec | None = None,
) -> Interface:
    """Describe a model as its task sees it.

    Args:
        inputs: inputs without a wire.
        outputs: outputs without a wire.
        metadata: metadata of its files.
        folder: folder of its files, which for a language program holds the tokenizer.
        image: preparation of images; None takes what the files say, or else the task's own.
    """
    facts = image_facts(metadata)
    if image is None and facts:
        image = infer_image_spec(inputs, task=None, options=ImageOptions(**facts))  # type: ignore[arg-type]
    if not speaks(inputs):
        return Interface(inputs=inputs, outputs=outputs, metadata=metadata, image=image)
    picture = image_input(Interface(inputs=inputs, outputs=outputs))
    assert picture is not None, "a program that speaks takes an image"
    asked = (picture, TensorSpec(name=chat.IDS, dtype="INT64", shape=(1, "ids")))
    return Interface(inputs=asked, outputs=outputs, metadata=metadata, image=image, tokenizer=tokenizer(folder))


def interface_of(graph: Graph, image: ImageSpec | None = None) -> Interface:
    """Describe a loaded model as its task sees it; `image` says how images are prepared, as in `interface`."""
    folder = graph.source if isinstance(graph, Joined) else graph.source.parent
    return interface(graph.info.inputs, graph.info.outputs, graph.metadata, folder, image)


def tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer that lies beside the graphs of a language program.

    Raises:
        ModelError: the tokenizer is missing or damaged.
        MissingExtraError: reading this kind of tokenizer needs a package that is not installed.
    """
    if (pieces := read_pieces(folder)) is not None:
        return pieces
    return chat.SentencePieces(sentence_pieces(folder))


def runner(graph: Graph, session: Session) -> RunModel:
    """Return the function from a task's feeds to outputs; it encodes an image once for all prompts about it."""
    if not isinstance(session, Chain) or not isinstance(graph, Joined):
        return session.run
    inputs, program = graph.info.inputs, graph.program
    if speaks(inputs):
        owner = {t: session.part(name) for name, g in program.graphs.items() for t in g.input_names}
        picture = image_input(Interface(inputs=inputs, outputs=()))
        assert picture is not None
        return chat.join_chat(owner[picture.name].run, owner[chat.BEFORE].run, owner[chat.MASK].run, cache_size(inputs))
    if takes_prompts(inputs) and len(program.graphs) == 2:
        return _prompted(program, session)
    return session.run


def cache_size(inputs: Sequence[TensorSpec]) -> tuple[int, int, int]:
    """Return layers, heads and width per head of a decoder's cache, from its inputs."""
    keys = [i for i in inputs if i.name.startswith("past.") and i.name.endswith(".key")]
    if not keys or any(not isinstance(d, int) for k in keys for d in (k.shape[1], k.shape[3])):
        raise ModelError(
            f"The decoder has no cache of keys and values (1, heads, past, width) called 'past.0.key'; its inputs are "
            f"{[i.name for i in inputs]}. Export it as `bitalloy export` does."
        )
    return len(keys), int(keys[0].shape[1]), int(keys[0].shape[3])


def open_samples(
    outline: Outline, paths: Sequence[Path], *, image: ImageSpec | None, limit: int | None, seed: int
) -> Samples:
    """Open the samples of a program, which all have the same shapes.

    Args:
        outline: outline of the program.
        paths: for a promptable program a COCO annotation file with masks, or images (asked over a grid). For one that
            speaks: questions (JSON lines) or captions (COCO), or images (asked for a caption); several are mixed. Of
            any: .npz feeds.
        image: preparation of images; None takes what the files say.
        limit: largest number of samples, which `seed` chooses; None for all.
        seed: seed of the choice of samples.

    Raises:
        DataError: the paths hold nothing usable, or samples do not fit the program.
    """
    inputs = outline.open_inputs
    is_feeds = all(holds_arrays(path) for path in paths)
    if is_feeds or not (speaks(inputs) or takes_prompts(inputs)):
        if len(paths) != 1:
            raise DataError(f"Give one folder or file of .npz feeds, not {len(paths)}.")
        return _alike(open_dataset(paths[0], inputs, image=image, limit=limit, seed=seed))
    known = interface(inputs, outline.free_outputs, outline.facts, outline.folder, image)
    found: Samples
    if speaks(inputs):
        found = ChatSamples.open(paths, known, cache_size(inputs), _image_tokens(outline), limit=limit, seed=seed)
    elif len(paths) != 1:
        raise DataError(f"Give one annotation file or folder of images, not {len(paths)}.")
    else:
        found = PromptSamples.open(paths[0], known, limit=limit, seed=seed)
    spec = ProgramFiles(
        folder=str(outline.folder.absolute()),
        paths=tuple(str(path.absolute()) for path in paths),
        image=image,
        limit=limit,
        seed=seed,
    )
    found.origin = Opening(kind="program-files", spec=spec)
    return found


class ProgramFiles(Record, frozen=True, kw_only=True):
    """Arguments of `open_samples`."""

    folder: str
    """Folder of the program."""
    paths: tuple[str, ...]
    image: ImageSpec | None
    limit: int | None
    seed: int


def open_program_files(spec: ProgramFiles, _: Contexts) -> Samples:
    """Open samples of a program without a check that the files are unchanged."""
    paths = [Path(path) for path in spec.paths]
    return open_samples(read_outline(spec.folder), paths, image=spec.image, limit=spec.limit, seed=spec.seed)


def _image_tokens(outline: Outline) -> int:
    """Vectors that stand for an image: the second size of what the graph that embeds tokens gets by its wire."""
    for wire in outline.wires:
        if chat.BEFORE in {i.name for i in outline.inputs[wire.target]}:
            shapes = [o.shape for o in outline.outputs[wire.source] if o.name == wire.output]
            shapes.append(usual_shapes(outline.metadata[wire.target]).get(wire.input, ()))
            for shape in shapes:
                if len(shape) == 3 and isinstance(shape[1], int):
                    return int(shape[1])
    raise ModelError(
        f"The graphs do not say how many vectors stand for an image. Export them as `bitalloy export` does, or write "
        f"the shape of the features into the metadata '{SHAPES}'."
    )


def _prompted(program: GraphProgram, session: Chain) -> RunModel:
    encoder, decoder = program.order
    names = {w.output: w.input for w in program.wires}

    def encode(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = session.part(encoder).run(feeds)
        return {names[name]: value for name, value in found.items() if name in names}

    return promptable.join_promptable(encode, session.part(decoder).run)


def _takes_image(inputs: Sequence[TensorSpec]) -> bool:
    return image_input(Interface(inputs=tuple(inputs), outputs=())) is not None


def holds_arrays(path: Path) -> bool:
    """Return whether a path is a file of arrays or a folder with some."""
    suffixes = {".npz", ".npy"}
    if path.is_file():
        return path.suffix.lower() in suffixes
    return path.is_dir() and any(f.suffix.lower() in suffixes for f in path.iterdir())


def _alike(samples: Samples) -> Samples:
    """The samples, if all have the shapes of the first: the analysis runs at one size."""
    first = {name: value.shape for name, value in samples.feeds(0).items()}
    for index in range(1, len(samples)):
        for name, value in samples.feeds(index).items():
            if value.shape != first[name]:
                raise DataError(
                    f"'{name}' has shape {list(first[name])} in '{samples.name(0)}' and {list(value.shape)} in "
                    f"'{samples.name(index)}'; all samples need the same shapes. Cut or pad them."
                )
    return samples


ImageChoice = ImageSpec | Mapping[str, object] | None
"""Preparation of images: complete, as some fields of `ImageOptions`, or None to infer it."""


def image_spec(model: Graph, **overrides: object) -> ImageSpec | None:
    """Return how images become feeds for a model, or None where it takes no image.

    What is given overrides what the model's file says, and this overrides what is inferred from the input.
    """
    detector = looks_like_yolo(model.info.inputs, model.info.outputs)
    known = ImageOptions(**{**image_facts(model.metadata), **overrides})  # type: ignore[arg-type]
    return infer_image_spec(model.info.inputs, task="detection" if detector else None, options=known)
