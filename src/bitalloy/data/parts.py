"""Which samples serve what: calibration, probing and verification draw theirs at random, each its own.

A prediction rests on ranges that were not fitted to its samples, so it includes what unseen values lose by clipping;
and what is measured in the end was seen by neither. Samples of one source, such as questions about one image, are
alike: they serve one part. Where there are fewer sources than the parts ask for:

1. From `APART` sources on, each part has a share of its own: probing and verification a fifth or less, calibration the
   rest, because a range that misses what is large in the data costs the shipped model most.
2. Of fewer a third serves verification, and probing too where it is too small to be divided; the rest calibrates.
3. A single source serves all parts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest

import numpy as np

from bitalloy.core.errors import DataError
from bitalloy.core.records import SampleParts
from bitalloy.data.datasets import Dataset, Samples, Subset, drawn_order
from bitalloy.data.images import file_hash

APART = 16
"""Least number of sources from which every part has samples of its own."""
LOOKED_AT = 8
"""Samples that are read to tell whether samples differ."""
LEAST_OF_A_SIGNAL = 64
"""Values from which an input is an image or another signal, so that equal ones are no choice of the user."""


@dataclass(frozen=True, kw_only=True)
class WantedSamples:
    """Largest number of samples of each part."""

    calibration: int
    probe: int
    verification: int


def draw_parts(
    data: Dataset, wanted: WantedSamples, *, seed: int, avoid: Collection[str] = frozenset()
) -> tuple[Subset, SampleParts]:
    """Draw the samples of each part.

    Args:
        data: all samples.
        wanted: largest number of samples of each part.
        seed: seed of the draw; samples keep their place in it when others are added.
        avoid: SHA-256 of files, such as the images of an evaluation; what is made of them is drawn last.

    Returns:
        The samples that were drawn, those of calibration first, and the parts as indices into them.

    Raises:
        DataError: there are no samples.
    """
    if not len(data):
        raise DataError("The data has no samples. Give at least one.")
    sources = _sources(data)
    order = [list(sources.values())[i] for i in drawn_order(list(sources), seed)]
    count = wanted.calibration + wanted.probe + wanted.verification
    drawn = list(islice(_avoiding(data, order, avoid), count))
    chosen = tuple(
        _spread(drawn[start:stop], most, data, seed)
        for (start, stop), most in zip(
            _shares(len(drawn), wanted), (wanted.calibration, wanted.probe, wanted.verification), strict=True
        )
    )
    place = {index: i for i, index in enumerate(dict.fromkeys(chain(*chosen)))}
    calibration, probe, verification = (tuple(place[index] for index in part) for part in chosen)
    parts = SampleParts(available=len(data), calibration=calibration, probe=probe, verification=verification)
    return Subset(data, list(place), seed=seed), parts


def doubtful(data: Dataset) -> tuple[str, ...]:
    """Tell what is wrong with samples that can be read, from the first `LOOKED_AT`: they are equal, or inputs constant.

    Args:
        data: the samples that were drawn.

    Returns:
        Sentences for the reader of the results; none for usual samples.
    """
    found = [data.feeds(i) for i in range(min(len(data), LOOKED_AT))]
    first, notes = found[0], []
    if len(found) > 1 and all(np.array_equal(first[name], one[name]) for one in found[1:] for name in first):
        notes.append(
            f"The first {len(found)} samples are equal, so the ranges and all figures are those of one sample. Give "
            "samples as different as those of the deployment."
        )
    for name, array in first.items():
        signal = array.dtype.kind == "f" and array.size >= LEAST_OF_A_SIGNAL
        if signal and all((one[name] == array.flat[0]).all() for one in found):
            told = f"All values of input '{name}' are {array.flat[0]:g} in the samples."
            notes.append(f"{told} Is it read as it should be?")
    return tuple(notes)


def _sources(data: Dataset) -> dict[str, list[int]]:
    """Return source -> its samples."""
    found: dict[str, list[int]] = {}
    for index in range(len(data)):
        source = data.source(index) if isinstance(data, Samples) else data.name(index)
        found.setdefault(source, []).append(index)
    return found


def _avoiding(data: Dataset, order: Sequence[list[int]], avoid: Collection[str]) -> Iterator[list[int]]:
    """Give the sources in their order, those with a file to be avoided last; files are read as sources are taken."""
    last = []
    for source in order:
        files = chain.from_iterable(data.files(i) for i in source) if avoid and isinstance(data, Samples) else ()
        if any(file_hash(file) in avoid for file in dict.fromkeys(files)):
            last.append(source)
        else:
            yield source
    yield from last


def _shares(count: int, wanted: WantedSamples) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Return the sources of calibration, probing and verification as ranges (start, stop)."""
    enough = count >= wanted.calibration + wanted.probe + wanted.verification
    if not enough and count < APART:
        calibration = min(wanted.calibration, count - count // 3 if count > 2 else 1)
        first = min(calibration, count - 1)
        last = min(first + wanted.probe, count)
        start = last if count - last >= last - first else first
        return (0, calibration), (first, last), (start, min(start + wanted.verification, count))
    probe, verification = (n if enough else min(n, count // 5) for n in (wanted.probe, wanted.verification))
    calibration = min(wanted.calibration, count - probe - verification)
    seen = calibration + probe
    return (0, calibration), (calibration, seen), (seen, min(seen + wanted.verification, count))


def _spread(sources: Sequence[list[int]], most: int, data: Dataset, seed: int) -> list[int]:
    """Return samples of sources: one of each, then a second of each, and so on."""
    drawn = [[source[i] for i in drawn_order([data.name(i) for i in source], seed)] for source in sources]
    found = (index for turn in zip_longest(*drawn) for index in turn if index is not None)
    return list(islice(found, most))
