"""How weights are stored: each at its nearest number, or as an analysis of what enters their layers has decided.

Roundings of the latter kind belong to sites, as offsets of biases do: probe matrix, exact measurement and rewritten
model ask the recipe, which asks this record. Their integers lie in a file, whose hash stands for them in plain data.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitalloy.core.errors import ModelError
from bitalloy.core.records import Record
from bitalloy.formats.base import Format, QuantParams

_FIELDS = ("numbers", "scale", "zero_point")


@dataclass(frozen=True, kw_only=True, eq=False)
class ChosenRounding:
    """Stored numbers of one weight that are not all the nearest."""

    numbers: NDArray[np.generic]
    """In the shape of the weight, in integers of 8 bits."""
    scale: NDArray[np.float32]
    zero_point: NDArray[np.generic]
    """As in `QuantParams`, in integers of 8 bits."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all its numbers."""
        found = hashlib.sha256()
        for array in (self.numbers, self.scale, self.zero_point):
            found.update(f"{array.dtype} {array.shape} ".encode())
            found.update(array.tobytes())
        return found.hexdigest()

    @classmethod
    def of(cls, stored: Format, values: NDArray[np.floating], params: QuantParams) -> ChosenRounding:
        """Take the numbers behind values that the format can hold, as they are, with these parameters."""
        numbers, zeros = stored.encode(values, params), np.asarray(params.zero_point)
        signed = np.int8 if params.qmin < 0 else np.uint8
        return cls(numbers=numbers.astype(signed), scale=params.scale, zero_point=zeros.astype(signed))


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredWeight:
    """How one weight is stored: its format and parameters, and the values that the stored numbers are made from."""

    format: Format
    params: QuantParams | None
    values: NDArray[np.floating]
    """The weight, or what the format can hold of it already."""
    digest: str = ""
    """Tells chosen numbers from others; empty where each is the nearest."""

    @property
    def numbers(self) -> NDArray[np.generic]:
        """The numbers as they are stored."""
        return self.format.encode(self.values, self.params)

    @property
    def rounded(self) -> NDArray[np.float32]:
        """What is left of the weight."""
        return self.format.reference(self.values, self.params)

    def chosen(self, rounding: ChosenRounding | None) -> StoredWeight:
        """Return the same weight with numbers that were chosen."""
        if rounding is None:
            return self
        assert self.params is not None, "numbers are chosen in formats with scales"
        kind = np.asarray(self.params.zero_point).dtype
        params = replace(self.params, scale=rounding.scale, zero_point=rounding.zero_point.astype(kind))
        values = self.format.decode(rounding.numbers.astype(kind), params)
        return replace(self, params=params, values=values, digest=rounding.digest)


class RoundingFile(Record, frozen=True, kw_only=True):
    """Where chosen roundings lie."""

    path: str
    """Empty in keys, which depend on the contents alone, and of what is in memory only."""
    sha256: str


@dataclass(frozen=True)
class ChosenRoundings:
    """Roundings of weights by the ids of their sites; of the others every number is the nearest."""

    sha256: str = ""
    """Of the file; empty where there are none."""
    sites: Mapping[str, ChosenRounding] = field(default_factory=dict, compare=False, repr=False)
    path: str = field(default="", compare=False)
    """Of the file; empty where they are in memory only."""

    @property
    def file(self) -> RoundingFile | None:
        """Say where they lie; None where there are none."""
        return RoundingFile(path=self.path, sha256=self.sha256) if self.sha256 else None


def write_roundings(sites: Mapping[str, ChosenRounding]) -> bytes:
    """Write roundings as a compressed .npz without pickled objects."""
    buffer, names = io.BytesIO(), list(sites)
    arrays = {f"{name}_{i}": getattr(sites[site], name) for i, site in enumerate(names) for name in _FIELDS}
    np.savez_compressed(buffer, allow_pickle=False, sites=np.array(names, np.str_), **arrays)
    return buffer.getvalue()


def read_roundings(data: bytes, path: str = "") -> ChosenRoundings:
    """Read what `write_roundings` wrote, from the file of that path."""
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        names = [str(site) for site in file["sites"]]
        sites = {
            site: ChosenRounding(**{name: file[f"{name}_{i}"] for name in _FIELDS}) for i, site in enumerate(names)
        }
    return ChosenRoundings(hashlib.sha256(data).hexdigest() if sites else "", sites, path)


def open_roundings(spec: RoundingFile | None) -> ChosenRoundings:
    """Read roundings again, and make sure that they are unchanged.

    Raises:
        ModelError: the file is missing, or has changed.
    """
    if spec is None:
        return ChosenRoundings()
    path = Path(spec.path)
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != spec.sha256:
        raise ModelError(
            f"'{path}', which holds the rounded weights of this job, is missing or has changed. Start the run again."
        )
    return read_roundings(data, spec.path)
