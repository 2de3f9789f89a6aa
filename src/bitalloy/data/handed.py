"""Samples that a program hands over in memory: arrays, sequences, generators, loaders and data sets.

Whatever comes is cut into samples of the model's batch and stored as .npz feeds, once, so that everything behind reads
files. Neither torch nor Hugging Face's packages are imported: a tensor is what turns itself into an array, a loader is
what can be iterated, a data set is what has a length and items.

Case 1. An item that has the fixed shapes of the model's inputs is one sample.
Case 2. Otherwise its arrays hold samples along the first axis, or are one sample without that axis. They are put
        together to the model's batch (1 where it is open), across items too; what is left over at the end is dropped.
Case 3. An array that has the fixed shape of its input, beside others that hold samples, belongs to all of these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bitalloy.core.errors import BitalloyError, DataError
from bitalloy.core.ownership import temporary
from bitalloy.core.plain import one_line
from bitalloy.core.records import TensorSpec
from bitalloy.data.arrays import NUMPY_NAMES, Feeds, check_feeds, read_arrays, write_arrays
from bitalloy.data.datasets import ARRAY_SUFFIXES, drawn_order, list_files
from bitalloy.data.images import IMAGE_SUFFIXES, describe_spec, file_hash, open_image

ACCEPTED = (
    "a path, an array, a dict of arrays by input name, or a list, generator, DataLoader or data set of arrays, of "
    "dicts by input name, or of tuples that start with the inputs"
)
"""What counts as data, in words."""

Preprocess = Callable[[Any], object]
"""Function of the user's that makes of a sample what the model takes: an array, a dict or a tuple."""


@dataclass(frozen=True)
class HandedSample:
    """Feeds of one inference, and what came beside them."""

    feeds: Feeds
    target: Any = None
    """Labels of the sample; None where they were not asked for."""


def handed_samples(
    data: object,
    inputs: tuple[TensorSpec, ...],
    *,
    most: int | None,
    seed: int = 0,
    preprocess: Preprocess | None = None,
    labelled: bool = False,
) -> Iterator[HandedSample]:
    """Give samples for a model from data in memory, or from files that a function of the user's prepares.

    Args:
        data: see `ACCEPTED`; a path only with `preprocess`.
        inputs: inputs of the model; open sizes are names.
        most: largest number of samples; None for all. Of what has a length they are drawn at random, of what can only
            be iterated they are the first.
        seed: seed of that draw.
        preprocess: called with each item before it is read; an item of an array is what lies along its first axis, of a
            folder of images an RGB image of Pillow, of .npz files a dict of arrays.
        labelled: whether items hold labels behind the inputs (of a dict: under other names), which are kept then.

    Raises:
        DataError: the data is of a kind that is not known, or an item does not fit the inputs.
    """
    if preprocess is not None and _is_array(data):
        data = list(_array(data))
    elif preprocess is None and most is not None:
        data = _drawn_rows(data, inputs, most, seed)
    items = (item if preprocess is None else _preprocessed(preprocess, item) for item in _items(data, most, seed))
    named = (_named(item, inputs, labelled, f"sample {i}") for i, item in enumerate(items))
    yield from islice(_batched(named, inputs), most)


def _preprocessed(preprocess: Preprocess, item: Any) -> Any:
    try:
        return preprocess(item)
    except BitalloyError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise DataError(
            f"preprocess fails on an item of the type {type(item).__name__} with {type(error).__name__}: "
            f"{one_line(str(error))[:300]}. Mend the function."
        ) from error


def store_feeds(samples: Iterable[Feeds], folder: Path) -> Path:
    """Write feeds as numbered .npz files, and return their folder, whose name tells their content.

    Args:
        samples: feeds, which are consumed once.
        folder: where that folder is made; what lies there already is used again.

    Raises:
        DataError: there are no samples.
    """
    digest, count = hashlib.sha256(), 0
    with temporary(folder) as scratch:
        made = scratch / "feeds"
        made.mkdir()
        for count, feeds in enumerate(samples, 1):
            file = made / f"{count - 1:06d}.npz"
            write_arrays(file, feeds)
            digest.update(file_hash(file).encode())
        if not count:
            raise DataError(f"The data holds no samples for a whole batch of the model. Give {ACCEPTED}.")
        place = folder / f"data-{digest.hexdigest()[:24]}"
        if not place.is_dir():
            made.rename(place)
    return place


def as_plain(value: object) -> Any:
    """Turn tensors into arrays, inside of dicts, lists and tuples too; anything else stays as it is."""
    match value:
        case Mapping():
            return {name: as_plain(part) for name, part in value.items()}
        case list() | tuple():
            return [as_plain(part) for part in value]
    return _array(value) if _is_array(value) else value


def _items(data: object, most: int | None, seed: int) -> Iterator[object]:
    """The items of the data in order; of a sized one at most `most`, drawn at random."""
    if isinstance(data, Path):
        yield from _of_files(data, most, seed)
    elif _is_array(data) or isinstance(data, Mapping):
        yield data
    elif isinstance(data, (str, bytes)) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise DataError(f"The data is of type {type(data).__name__}; expected {ACCEPTED}.")
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__") and not _only_iterates(data):
        for index in _drawn(len(data), most, seed):
            yield data[index]
    elif hasattr(data, "__iter__"):
        yield from data
    else:
        raise DataError(f"The data ({type(data).__name__}) has items but no length; expected {ACCEPTED}.")


def _only_iterates(data: object) -> bool:
    """Whether a data set inherits a way to get items from torch that only raises."""
    return hasattr(data, "__iter__") and any(kind.__name__ == "IterableDataset" for kind in type(data).mro())


def _of_files(path: Path, most: int | None, seed: int) -> Iterator[object]:
    """Images or arrays of a folder, as a user's function takes them."""
    if not path.exists():
        raise DataError(f"'{path}' does not exist. Give a folder of images or of .npz files.")
    files = list_files(path, IMAGE_SUFFIXES) or list_files(path, ARRAY_SUFFIXES)
    for index in _drawn(len(files), most, seed):
        file = files[index]
        if file.suffix.lower() in IMAGE_SUFFIXES:
            yield open_image(file)
        else:
            arrays = read_arrays(file, [""])
            yield arrays.get("", arrays)


def _drawn_rows(data: object, inputs: tuple[TensorSpec, ...], most: int, seed: int) -> object:
    """Of one array, or of arrays by name, that hold more samples than are wanted, those that are drawn."""
    parts = data if isinstance(data, Mapping) else {inputs[0].name: data} if _is_array(data) else {}
    columns = {name: _array(part) if _is_array(part) else part for name, part in parts.items()}
    first = columns.get(inputs[0].name)
    if not isinstance(first, np.ndarray) or first.ndim < max(1, len(inputs[0].shape)):  # no samples, or a single one
        return data
    wanted = most * (_batch_of(inputs[0]) if first.ndim == len(inputs[0].shape) else 1)
    if len(first) <= wanted:
        return data
    rows = _drawn(len(first), wanted, seed)
    return {
        name: part[rows] if isinstance(part, np.ndarray) and part.ndim and len(part) == len(first)
        else [part[i] for i in rows] if isinstance(part, (list, tuple)) and len(part) == len(first)
        else part
        for name, part in columns.items()
    }  # fmt: skip


def _drawn(count: int, most: int | None, seed: int) -> list[int]:
    if most is None or count <= most:
        return list(range(count))
    return sorted(drawn_order([str(i) for i in range(count)], seed)[:most])


def _named(item: object, inputs: tuple[TensorSpec, ...], labelled: bool, where: str) -> tuple[Feeds, Any]:
    """The arrays of an item by input, and what is beside them."""
    names, rest = [i.name for i in inputs], None
    if isinstance(item, (tuple, list)) and not _is_numbers(item):
        if item and isinstance(item[0], Mapping):
            item, rest = item[0], list(item[1:])
        else:
            rest = list(item[len(names) :])
            item = dict(zip(names, item, strict=False))
    elif isinstance(item, Mapping):
        others = {name: value for name, value in item.items() if name not in names}
        rest = list(others.values()) if len(others) == 1 else [others] if others else []
    elif len(names) == 1:
        item, rest = {names[0]: item}, []
    if not isinstance(item, Mapping) or any(name not in item for name in names):
        came = f"the keys {sorted(map(str, item))}" if isinstance(item, Mapping) else f"type {type(item).__name__}"
        raise DataError(
            f"The item of {where} has {came}; expected the model's inputs {names}: a dict with these keys, or a tuple "
            "that starts with them. Give preprocess=, a function that makes that of an item."
        )
    if labelled and not rest:
        raise DataError(f"The item of {where} has no labels behind the inputs {names}. Give (inputs, labels) pairs.")
    feeds = {i.name: _typed(_array(item[i.name], f"'{i.name}' of {where}"), i, where) for i in inputs}
    if not labelled or not rest:
        return feeds, None
    return feeds, as_plain(rest[0]) if len(rest) == 1 else tuple(map(as_plain, rest))


def _batched(named: Iterable[tuple[Feeds, Any]], inputs: tuple[TensorSpec, ...]) -> Iterator[HandedSample]:
    """Put the samples that the items hold together to the batch of the model."""
    waiting: list[tuple[Feeds, Any]] = []
    for number, (feeds, target) in enumerate(named):
        where = f"sample {number}"
        shared = {i.name for i in inputs if _is_fixed(i.shape, feeds[i.name].shape)}
        if len(shared) == len(inputs):
            yield HandedSample(check_feeds(feeds, inputs, where), _with_axis(target))
            continue
        stacked = [i for i in inputs if i.name not in shared]
        rows = {i.name: _rows(feeds[i.name], i, where) for i in stacked}
        counts, batches = {len(r) for r in rows.values()}, {_batch_of(i) for i in stacked}
        if len(counts) != 1 or len(batches) != 1:
            yield HandedSample(check_feeds(feeds, inputs, where), _with_axis(target))
            continue
        count, batch = counts.pop(), batches.pop()
        is_row = all(feeds[i.name].ndim < len(i.shape) for i in stacked)
        targets = [_with_axis(target, always=True)] if is_row else _target_rows(target, count, where)
        whole = {name: feeds[name] for name in shared}
        waiting += [({**whole, **{n: r[i] for n, r in rows.items()}}, targets[i]) for i in range(count)]
        while len(waiting) >= batch:
            some, waiting = waiting[:batch], waiting[batch:]
            joined = {n: v if n in shared else _stack([f[n] for f, _ in some], n) for n, v in some[0][0].items()}
            yield HandedSample(check_feeds(joined, inputs, where), _join_targets([t for _, t in some]))


def _rows(array: np.ndarray, spec: TensorSpec, where: str) -> np.ndarray:
    """Samples along the first axis."""
    rank, inner = len(spec.shape), spec.shape[1:]
    if rank and abs(array.ndim - rank) <= 1 and _agree(inner, array.shape[array.ndim - rank + 1 :]):
        return array.reshape((-1, *array.shape[array.ndim - rank + 1 :]))
    raise DataError(
        f"'{spec.name}' of {where} has shape {list(array.shape)}, expected {describe_spec(spec)}, or samples of it "
        "along the first axis. Give preprocess=, a function that brings an item to that shape."
    )


def _target_rows(target: Any, count: int, where: str) -> Sequence[Any]:
    """The labels of each of the samples that an item holds."""
    if target is None or count == 1:
        return [_with_axis(target)] * count
    if isinstance(target, tuple):  # of what stands behind the inputs each has a label of every sample
        return list(zip(*(_target_rows(part, count, where) for part in target), strict=True))
    if isinstance(target, dict):
        columns = {name: _target_rows(part, count, where) for name, part in target.items()}
        return [{name: column[i] for name, column in columns.items()} for i in range(count)]
    if isinstance(target, np.ndarray) and target.ndim and len(target) == count:
        return [target[i : i + 1] for i in range(count)]
    if isinstance(target, list) and len(target) == count:
        return [[one] for one in target]
    raise DataError(
        f"The labels of {where} do not belong to its {count} samples: expected an array with that many along the first "
        "axis, or a list with that many entries."
    )


def _with_axis(target: Any, *, always: bool = False) -> Any:
    """Labels of one sample with the axis of the batch first: numbers get it, and `always` whole arrays and lists."""
    if isinstance(target, dict):
        return {name: _with_axis(part, always=always) for name, part in target.items()}
    if isinstance(target, tuple):
        return tuple(_with_axis(part, always=always) for part in target)
    if isinstance(target, (bool, int, float, np.generic)) or (isinstance(target, np.ndarray) and not target.ndim):
        return np.asarray(target)[None]
    if not always or target is None:
        return target
    return target[None] if isinstance(target, np.ndarray) else [target]


def _join_targets(targets: list[Any]) -> Any:
    """The labels of a batch from those of its samples."""
    if len(targets) == 1:
        return targets[0]
    first = targets[0]
    if isinstance(first, dict):
        return {name: _join_targets([t[name] for t in targets]) for name in first}
    if isinstance(first, tuple):
        return tuple(_join_targets(list(part)) for part in zip(*targets, strict=True))
    if isinstance(first, np.ndarray) and first.ndim:
        return np.concatenate(targets)
    return [one for t in targets for one in t] if isinstance(first, list) else targets


def _stack(rows: list[np.ndarray], name: str) -> np.ndarray:
    if len({r.shape for r in rows}) != 1:
        raise DataError(f"'{name}' has samples of different shapes in one batch. Cut or pad them.")
    return np.stack(rows)


def _batch_of(spec: TensorSpec) -> int:
    return spec.shape[0] if isinstance(spec.shape[0], int) else 1


def _is_fixed(wanted: Sequence[int | str], shape: tuple[int, ...]) -> bool:
    """Whether an array is one whole feed: its first size is that of the model, which does not leave it open."""
    return (not wanted or isinstance(wanted[0], int)) and len(wanted) == len(shape) and _agree(wanted, shape)


def _agree(wanted: Sequence[int | str], shape: Sequence[int]) -> bool:
    return all(have == want for have, want in zip(shape, wanted, strict=True) if isinstance(want, int))


def _typed(array: np.ndarray, spec: TensorSpec, where: str) -> np.ndarray:
    """The array in the input's type, where that changes no value but by rounding of floats."""
    wanted = NUMPY_NAMES.get(spec.dtype, spec.dtype.lower())
    if array.dtype.name == wanted:
        return array
    with suppress(TypeError):  # numpy has no type of that name
        kinds = array.dtype.kind + np.dtype(wanted).kind
        cast = array.astype(wanted) if kinds in ("ff", "ii", "iu", "ui", "uu") else None
        if cast is not None and (kinds == "ff" or np.array_equal(cast, array)):
            return cast
    raise DataError(
        f"'{spec.name}' of {where} is {array.dtype}, expected {wanted}. Give preprocess=, a function that scales and "
        "converts an item."
    )


def _is_array(value: object) -> bool:
    return hasattr(value, "__array__") or hasattr(value, "__array_interface__")


def _is_numbers(item: Sequence[object]) -> bool:
    """Whether a list is an array written as numbers."""
    first: object = item
    while isinstance(first, (list, tuple)) and first:
        first = first[0]
    return isinstance(first, (bool, int, float)) and isinstance(item, list)


def _array(value: object, what: str = "an array") -> np.ndarray:
    for step in ("detach", "cpu"):  # of tensors that record gradients, or lie on a device
        value = getattr(value, step)() if hasattr(value, step) else value
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{what} ({type(value).__name__}) cannot be turned into an array: {error}.") from error
    if array.dtype.kind not in "biufV":
        raise DataError(f"{what} holds {array.dtype}, not numbers. Give {ACCEPTED}.")
    return array
