"""Data sets: their samples, the files that they are read from, and the choice of a subset."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from bitalloy.core.errors import DataError
from bitalloy.core.files import is_text, walk
from bitalloy.core.jobs import Contexts, Opening, Resident
from bitalloy.core.records import DataInfo, Record, TensorSpec
from bitalloy.core.store import key_of
from bitalloy.data.arrays import Feeds, check_feeds, check_headers, read_arrays, stored_headers, unstack
from bitalloy.data.images import IMAGE_SUFFIXES, ImageSpec, file_hash, image_feed, no_image_input, open_image

ARRAY_SUFFIXES = frozenset({".npz", ".npy"})
"""Suffixes of files of arrays."""


class Dataset(Protocol):
    """Samples for one model, in a fixed order."""

    @property
    def info(self) -> DataInfo:
        """Name, number and fingerprint that identify the samples; computing them may read all samples."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return the identifier of a sample, e.g. its path inside the folder."""
        ...

    def feeds(self, index: int) -> Feeds:
        """Return the feeds of a sample: input name -> array, for one inference."""
        ...


class Samples(ABC):
    """Base class of data sets: derives `info` from the names, feeds and fingerprints of the samples."""

    label: str
    """Name of the data set, e.g. that of its folder."""
    preprocessing: str
    """How inputs were prepared, in words."""
    decisive: str = ""
    """What decides how inputs are prepared, beside what the fingerprints of samples cover."""
    seed: int = 0
    """Seed of the choice of samples; 0 where all are used."""
    origin: Opening | None = None
    """How the same samples are opened in another process; None where they were made in memory."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str: ...

    @abstractmethod
    def feeds(self, index: int) -> Feeds: ...

    @abstractmethod
    def fingerprint(self, index: int) -> str:
        """Return the SHA-256 over the name and the contents of a sample, in hexadecimal."""

    def source(self, index: int) -> str:
        """Return the name of what a sample is taken from, e.g. its image; samples of one source are alike."""
        return self.name(index)

    def files(self, index: int) -> tuple[Path, ...]:
        """Return the files with which a sample shows what another data set may show too, e.g. its image."""
        return ()

    @cached_property
    def info(self) -> DataInfo:
        digest = _digest(self.decisive)
        for index in range(len(self)):
            digest.update(self.fingerprint(index).encode())
        return DataInfo(
            name=self.label,
            count=len(self),
            seed=self.seed,
            sha256=digest.hexdigest(),
            preprocessing=self.preprocessing,
        )


class Subset(Samples):
    """Some samples of another data set, in the order of `indices`."""

    def __init__(self, base: Dataset, indices: Sequence[int], *, seed: int = 0) -> None:
        self._base, self._indices, self.seed = base, tuple(indices), seed
        if isinstance(base, Samples):
            self.label, self.preprocessing, self.decisive = base.label, base.preprocessing, base.decisive
            if base.origin is not None:
                self.origin = Opening(
                    kind="subset", spec=SubsetParts(base=base.origin, indices=self._indices, seed=seed)
                )
        else:
            self.label, self.preprocessing, self.decisive = base.info.name, base.info.preprocessing, base.info.sha256

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        return self._base.name(self._indices[index])

    def feeds(self, index: int) -> Feeds:
        return self._base.feeds(self._indices[index])

    def fingerprint(self, index: int) -> str:
        """Return that of the sample in the other data set; one of a user's own kind tells its samples by `info`."""
        if isinstance(self._base, Samples):
            return self._base.fingerprint(self._indices[index])
        return _digest(f"{self._indices[index]}\0{self.name(index)}").hexdigest()

    def source(self, index: int) -> str:
        own = self._indices[index]
        return self._base.source(own) if isinstance(self._base, Samples) else self._base.name(own)

    def files(self, index: int) -> tuple[Path, ...]:
        return self._base.files(self._indices[index]) if isinstance(self._base, Samples) else ()


class ArrayDataset(Samples):
    """Feeds in memory.

    Args:
        samples: input name -> array, for each sample.
        inputs: inputs of the model; where they are given, the samples are checked against them.
        names: one name per sample; by default 0, 1, 2 ...
        label: name of the data set.
        preprocessing: description of how the arrays were made.

    Raises:
        DataError: there are no samples, or one does not fit `inputs`.
    """

    def __init__(
        self,
        samples: Sequence[Mapping[str, np.ndarray]],
        *,
        inputs: tuple[TensorSpec, ...] | None = None,
        names: Sequence[str] | None = None,
        label: str = "arrays",
        preprocessing: str = "as given",
    ) -> None:
        if not samples:
            raise DataError(f"The data set '{label}' holds no samples. Give at least one.")
        self.label, self.preprocessing = label, preprocessing
        self._samples = [dict(sample) for sample in samples]
        self._names = tuple(names) if names is not None else tuple(map(str, range(len(samples))))
        if len(self._names) != len(self._samples):
            raise DataError(f"'{label}' has {len(self._samples)} samples but {len(self._names)} names. Give one each.")
        if inputs is not None:
            for name, sample in zip(self._names, self._samples, strict=True):
                check_feeds(sample, inputs, f"sample '{name}' of '{label}'")

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, index: int) -> str:
        return self._names[index]

    def feeds(self, index: int) -> Feeds:
        return dict(self._samples[index])

    def fingerprint(self, index: int) -> str:
        digest = _digest(self._names[index])
        for key, value in sorted(self._samples[index].items()):
            digest.update(f"{key}\0{value.dtype.str}{value.shape}\0".encode())
            digest.update(np.ascontiguousarray(value).data)
        return digest.hexdigest()


class _Files(Samples):
    """One file a sample, perhaps with a companion; `files` lie in `root`."""

    def __init__(self, root: Path, files: Sequence[Path], inputs: tuple[TensorSpec, ...], preprocessing: str) -> None:
        self.label, self.preprocessing = root.resolve().name, preprocessing
        self._root, self._files, self._inputs = root, tuple(files), inputs

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        file = self._files[index]
        return file.relative_to(self._root).as_posix() if file != self._root else file.name

    def fingerprint(self, index: int) -> str:
        digest = _digest(self.name(index))
        for file in self._parts(index):
            digest.update(file_hash(file).encode())
        return digest.hexdigest()

    def files(self, index: int) -> tuple[Path, ...]:
        return (self._files[index],)

    def _parts(self, index: int) -> tuple[Path, ...]:
        """List all files of a sample."""
        return self.files(index)


class ImageFolder(_Files):
    """A folder of images (subfolders included, in the order of their names), or a single image.

    Where the model has more inputs than the image, `name.npz` beside `name.jpg` holds them by name. A model with a
    batch of n gets n images at a time, the last of them filled up with the first images; a sample has the name, and the
    other inputs, of the first of its images.

    Raises:
        DataError: the folder has no images, or images lack the .npz file that the model needs.
    """

    def __init__(self, path: Path, inputs: tuple[TensorSpec, ...], spec: ImageSpec) -> None:
        batch = next((i.shape[0] for i in inputs if i.name == spec.input), 1)
        self._batch = batch if isinstance(batch, int) else 1
        self._images = list_files(path, IMAGE_SUFFIXES)
        super().__init__(path, self._images[:: self._batch], inputs, spec.describe())
        self._spec, self.decisive = spec, key_of(spec)
        self._others = [i.name for i in inputs if i.name != spec.input]
        if not self._files:
            raise DataError(f"No images in '{path}'; expected {_kinds(IMAGE_SUFFIXES)}, also in subfolders.")
        alone = [f for f in self._files if self._others and not f.with_suffix(".npz").is_file()]
        if alone:
            raise DataError(
                f"{len(alone)} images of '{path}' have no .npz beside them, the first is '{alone[0].name}'. The model "
                f"also takes {self._others}: put these into '{alone[0].with_suffix('.npz').name}' under their names."
            )

    def feeds(self, index: int) -> Feeds:
        file = self._files[index]
        images = [image_feed(open_image(f, self._spec.channels), self._spec)[0] for f in self.files(index)]
        image = np.concatenate(images)
        others = read_arrays(file.with_suffix(".npz"), self._others) if self._others else {}
        return check_feeds({self._spec.input: image, **others}, self._inputs, f"'{file}'")

    def files(self, index: int) -> tuple[Path, ...]:
        first = index * self._batch
        return tuple(self._images[i % len(self._images)] for i in range(first, first + self._batch))

    def _parts(self, index: int) -> tuple[Path, ...]:
        others = (self._files[index].with_suffix(".npz"),) if self._others else ()
        return (*self.files(index), *others)


class FeedFolder(_Files):
    """A folder of .npz files, one per sample, with the input names as keys; .npy for models with one input.

    Raises:
        DataError: the folder has no such files, or the arrays of one are not those of the inputs.
    """

    def __init__(self, path: Path, inputs: tuple[TensorSpec, ...]) -> None:
        super().__init__(path, list_files(path, ARRAY_SUFFIXES), inputs, "as stored")
        if not self._files:
            raise DataError(f"No arrays in '{path}'; expected {_kinds(ARRAY_SUFFIXES)}, also in subfolders.")
        for file in self._files:
            check_headers(stored_headers(file, [i.name for i in inputs]), inputs, f"'{file}'")

    def feeds(self, index: int) -> Feeds:
        file = self._files[index]
        return check_feeds(read_arrays(file, [i.name for i in self._inputs]), self._inputs, f"'{file}'")


def open_dataset(
    path: str | Path, inputs: tuple[TensorSpec, ...], *, image: ImageSpec | None, limit: int | None, seed: int
) -> Samples:
    """Open what lies at `path` as samples for a model.

    1. A folder with images, or an image: `ImageFolder`, prepared by `image`.
    2. A folder with .npz or .npy files: `FeedFolder`.
    3. A single .npz or .npy: many samples, stacked along the first axis (see `unstack`), or one.

    Args:
        path: file or folder.
        inputs: inputs of the model.
        image: how images are prepared; None where the model takes none.
        limit: largest number of samples; None takes all.
        seed: seed of the choice where there are more samples than `limit`.

    Raises:
        DataError: the path does not exist, holds no usable samples, or its samples do not fit the model.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"'{path}' does not exist. Give a folder of images, a folder of .npz files, or one .npz file.")
    data: Samples
    if path.is_file() and path.suffix.lower() in ARRAY_SUFFIXES:
        data = _stacked(path, inputs)
    elif path.is_file() and path.suffix.lower() not in IMAGE_SUFFIXES:
        raise DataError(
            f"'{path}' is neither an image nor an array; expected {_kinds(IMAGE_SUFFIXES | ARRAY_SUFFIXES)}."
        )
    elif list_files(path, IMAGE_SUFFIXES) and image is not None:
        data = ImageFolder(path, inputs, image)
    elif list_files(path, ARRAY_SUFFIXES):
        data = FeedFolder(path, inputs)
    elif list_files(path, IMAGE_SUFFIXES):
        raise DataError(f"'{path}' holds images. {no_image_input(inputs)}")
    else:
        raise DataError(
            f"'{path}' holds no samples; expected {_kinds(IMAGE_SUFFIXES | ARRAY_SUFFIXES)}, also in subfolders."
        )
    names = [data.name(i) for i in range(len(data))]
    chosen = choose_samples(names, limit=limit, seed=seed)
    found = data if len(chosen) == len(names) else Subset(data, chosen, seed=seed)
    spec = SampleFiles(path=str(path.absolute()), inputs=inputs, image=image, limit=limit, seed=seed)
    found.origin = Opening(kind="files", spec=spec)
    return found


class SampleFiles(Record, frozen=True, kw_only=True):
    """Arguments of `open_dataset`."""

    path: str
    inputs: tuple[TensorSpec, ...]
    image: ImageSpec | None
    limit: int | None
    seed: int


class SubsetParts(Record, frozen=True, kw_only=True):
    """Arguments of `Subset`."""

    base: Opening
    indices: tuple[int, ...]
    seed: int


def open_subset(spec: SubsetParts, contexts: Contexts) -> Samples:
    """Open some samples of a data set."""
    return Subset(contexts.open(spec.base), spec.indices, seed=spec.seed)


class SamplesAgain(Record, frozen=True, kw_only=True):
    """Samples to be opened again, with what identifies them."""

    origin: Opening
    info: DataInfo
    """What the opened samples must match."""


def data_opening(data: Dataset, info: DataInfo) -> Opening:
    """Describe how jobs open samples; a data set made in memory, or by a user, works in this process only.

    Args:
        data: the samples.
        info: what identifies all of these samples.
    """
    if isinstance(data, Samples) and data.origin is not None:
        return Opening(kind="samples", spec=SamplesAgain(origin=data.origin, info=info))
    return Opening(kind="resident", spec=Resident(what=f"the data set '{info.name}'", key=info.sha256))


def open_files(spec: SampleFiles, _: Contexts) -> Samples:
    """Open samples in files without a check that the files are unchanged."""
    return open_dataset(spec.path, spec.inputs, image=spec.image, limit=spec.limit, seed=spec.seed)


def open_samples_again(spec: SamplesAgain, contexts: Contexts) -> Samples:
    """Open samples again and make sure that they have not changed.

    Raises:
        DataError: the files are missing, or have changed.
    """
    data: Samples = contexts.open(spec.origin)
    if data.info != spec.info:
        raise DataError(
            f"The samples of '{spec.info.name}' have changed since this job was made: {data.info.count} of them have "
            f"the fingerprint {data.info.sha256[:12]}..., not the {spec.info.count} with {spec.info.sha256[:12]}.... "
            "Put the old files back, or start the run again."
        )
    return data


def choose_samples(names: Sequence[str], *, limit: int | None, seed: int) -> list[int]:
    """Return the indices of at most `limit` samples, ascending; the same on every machine.

    Samples are drawn by the order of SHA-256(seed, name), so a smaller limit gives a part of the larger one's choice.
    """
    if limit is not None and limit < 1:
        raise DataError(f"The limit on samples is {limit}; expected at least 1.")
    return sorted(drawn_order(names, seed)[:limit])


def drawn_order(names: Sequence[str], seed: int) -> list[int]:
    """Return the indices of samples in a random order, by SHA-256(seed, name): the same on every machine."""
    return sorted(range(len(names)), key=lambda i: _digest(f"{seed}\0{names[i]}").digest())


def _stacked(path: Path, inputs: tuple[TensorSpec, ...]) -> ArrayDataset:
    samples = unstack(read_arrays(path, [i.name for i in inputs]), inputs, f"'{path}'")
    names = [f"{path.name}[{i}]" for i in range(len(samples))]
    return ArrayDataset(samples, inputs=inputs, names=names, label=path.name, preprocessing="as stored")


def list_files(path: Path, suffixes: frozenset[str]) -> list[Path]:
    """List files of some kinds in a folder and its subfolders, hidden ones left out; a single file is its own listing.

    Raises:
        DataError: the name of one is not UTF-8 text.
    """
    files = [path] if path.is_file() else walk(path)
    found = [
        file
        for file in files
        if file.suffix.lower() in suffixes
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    wrong = next((file for file in found if not is_text(file)), None)
    if wrong is not None:
        raise DataError(f"The name of the file {str(wrong)!a} is not UTF-8 text. Rename it.")
    return sorted(found, key=lambda file: file.relative_to(path).as_posix())


def _kinds(suffixes: frozenset[str]) -> str:
    return ", ".join(sorted(suffixes))


def _digest(name: str) -> hashlib._Hash:
    return hashlib.sha256(f"{name}\0".encode())
