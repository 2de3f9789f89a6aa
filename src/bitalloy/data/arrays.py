"""Arrays as feeds: reading, checking against the model's inputs, cutting stacks into samples."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitalloy.core.errors import DataError
from bitalloy.core.limits import refuse_contents
from bitalloy.core.records import TensorSpec
from bitalloy.data.images import describe_spec

Feeds = dict[str, np.ndarray]
Headers = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
"""Name -> shape and type of an array."""

NUMPY_NAMES = {"FLOAT": "float32", "DOUBLE": "float64"}
"""Where numpy's name is more than the ONNX name in lower case."""


def check_feeds(feeds: Feeds, inputs: tuple[TensorSpec, ...], where: str) -> Feeds:
    """Return `feeds` if names, shapes, dtypes and values fit `inputs`.

    Raises:
        DataError: they do not; the message contains `where`.
    """
    check_headers({name: (array.shape, array.dtype) for name, array in feeds.items()}, inputs, where)
    for name, array in feeds.items():
        if array.dtype.kind == "f" and np.isnan(array).any():
            raise DataError(
                f"'{name}' of {where} holds NaN in {int(np.isnan(array).sum())} places. Repair or remove it."
            )
    return feeds


def check_headers(headers: Headers, inputs: tuple[TensorSpec, ...], where: str) -> None:
    """Refuse arrays whose names, dtypes or shapes do not fit `inputs`.

    Raises:
        DataError: the message contains `where`.
    """
    expected = {i.name: i for i in inputs}
    if headers.keys() != expected.keys():
        raise DataError(f"The keys of {where} are {sorted(headers)}; expected the model's inputs {sorted(expected)}.")
    for name, spec in expected.items():
        shape, kind = headers[name]
        dtype = NUMPY_NAMES.get(spec.dtype, spec.dtype.lower())
        if kind.name != dtype or not kind.isnative:
            raise DataError(f"'{name}' of {where} is {kind}, expected {dtype}. Store it with .astype('{dtype}').")
        fits = [have == want for have, want in zip(shape, spec.shape, strict=False) if isinstance(want, int)]
        if len(shape) != len(spec.shape) or not all(fits):
            raise DataError(
                f"'{name}' of {where} has shape {list(shape)}, expected {describe_spec(spec)}. Store all samples in "
                "one shape; where the model leaves sizes open, that of the first sample or of --shape counts, and "
                "further --shape are tried as well."
            )


def unstack(arrays: Feeds, inputs: tuple[TensorSpec, ...], where: str) -> list[Feeds]:
    """Cut arrays that hold many samples.

    An array of the input's rank is cut along its first axis into pieces of the model's batch (1 where symbolic);
    an array with one axis more is indexed along it. Example: (50, 3, 8, 8) for an input (1, 3, 8, 8), or
    (50, 1, 3, 8, 8), are 50 samples.

    Raises:
        DataError: names or ranks differ from `inputs`, or the arrays hold no or not equally many samples.
    """
    pieces = {spec.name: _pieces(arrays[spec.name], spec) for spec in inputs if spec.name in arrays}
    counts = {len(p) for p in pieces.values()}
    if arrays.keys() != {i.name for i in inputs} or len(counts) != 1 or 0 in counts:
        came = {name: list(array.shape) for name, array in arrays.items()}
        expected = ", ".join(f"'{i.name}' {describe_spec(i)}" for i in inputs)
        raise DataError(
            f"The arrays of {where} have the shapes {came}; expected {expected}, each with the same number of "
            "samples stacked along the first axis."
        )
    return [{name: p[i] for name, p in pieces.items()} for i in range(counts.pop())]


def _pieces(array: np.ndarray, spec: TensorSpec) -> list[np.ndarray]:
    """Empty where the array cannot be cut."""
    rank = len(spec.shape)
    if array.ndim == rank + 1:
        return list(array)
    if array.ndim != rank or rank == 0:
        return []
    batch = spec.shape[0] if isinstance(spec.shape[0], int) else 1
    return [] if len(array) % batch else [array[i : i + batch] for i in range(0, len(array), batch)]


def stored_headers(path: Path, names: Sequence[str]) -> Headers:
    """Return shapes and types of the arrays of a .npz or .npy file, from their headers alone.

    Raises:
        DataError: as `read_arrays`.
    """
    try:
        if path.suffix.lower() == ".npy" and len(names) == 1:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            return {names[0]: (array.shape, array.dtype)}
        found, known = {}, np.lib.format
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    version = known.read_magic(file)
                    read = known.read_array_header_1_0 if version == (1, 0) else known.read_array_header_2_0
                    shape, _, kind = read(file)
                if kind.hasobject:
                    raise TypeError("it holds Python objects")
                found[member.removesuffix(".npy")] = shape, kind
    except Exception:  # zip, zlib and header errors of many types, which it tells
        return {name: (array.shape, array.dtype) for name, array in read_arrays(path, names).items()}
    return found


def read_arrays(path: Path, names: Sequence[str]) -> Feeds:
    """Read the arrays of a .npz file, or of a .npy file as the only feed in `names`.

    Raises:
        DataError: the file is damaged, holds Python objects, or holds one array where several are needed.
    """
    try:
        refuse_contents(path, DataError)
        with path.open("rb") as file:
            content = np.load(file, allow_pickle=False)
            if not isinstance(content, np.ndarray):
                return {key: content[key] for key in content.files}
    except DataError:
        raise
    except Exception as error:  # zip, zlib and header errors of many types
        raise DataError(f"Cannot read the arrays of '{path}': {error}. Repair or remove it.") from error
    if len(names) != 1:
        raise DataError(f"'{path}' holds one array, but the model takes {list(names)}. Store a .npz with these keys.")
    return {names[0]: content}


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as a .npz file, whose bytes follow from them alone; their names may be any text."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)
