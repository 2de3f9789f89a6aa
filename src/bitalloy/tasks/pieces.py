"""Reading and applying SentencePiece models of Llama's kind, without the `sentencepiece` package.

A `tokenizer.model` is a protobuf message: pieces with scores, and two records of settings. Covered is byte-pair
encoding without a normalization table (Llama, Vicuna, MobileVLM, the embedded sample):

1. Spaces become `▁`, and one is put in front of the text where the model says so.
2. Of all neighbouring symbols whose union is a piece, those with the best score are joined, the leftmost first,
   until none is left; symbols that the model defines as a whole are never taken apart.
3. A symbol that is no piece is written byte by byte.

https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto has the layout.
"""

from __future__ import annotations

import heapq
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bitalloy.core.errors import ModelError
from bitalloy.zoo.mobilevlm_chat import TOKENIZER_FILE

__all__ = ["Pieces", "read_pieces"]

SPACE = "\u2581"
UNKNOWN = " \u2047 "
"""Text to which an unknown piece is decoded."""
BPE = 2
"""Number of byte-pair encoding among the model types of SentencePiece."""
_NORMAL, _UNKNOWN, _CONTROL, _DEFINED, _UNUSED, _BYTE = range(1, 7)
"""Kinds of pieces."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Wire types of protobuf."""


@dataclass(frozen=True)
class Pieces:
    """A byte-pair tokenizer; see `bitalloy.tasks.base.Tokenizer`."""

    pieces: tuple[tuple[str, float, int], ...]
    """Text, score and kind of every id."""
    unk: int
    bos: int | None
    eos: int
    prefix: bool
    """Whether a space is put in front of a text."""
    squeeze: bool
    """Whether runs of spaces become one, and those at the ends none."""

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """Text of a piece -> its id."""
        return {text: i for i, (text, _, _) in enumerate(self.pieces)}

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without those that start and end it."""
        text = " ".join(part for part in text.split(" ") if part) if self.squeeze else text
        if not text:
            return []
        text = (" " * self.prefix + text).replace(" ", SPACE)
        found: list[int] = []
        for symbol in self._merged(self._symbols(text)):
            number = self.ids.get(symbol)
            if number is not None and self.pieces[number][2] not in (_CONTROL, _UNKNOWN, _BYTE):
                found.append(number)
            else:
                found += [self.ids.get(f"<0x{byte:02X}>", self.unk) for byte in symbol.encode()]
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; ids beyond the vocabulary and those without text are left out."""
        raw = bytearray()
        for number in ids:
            if not 0 <= number < len(self.pieces):
                continue
            text, _, kind = self.pieces[number]
            if kind == _BYTE:
                raw.append(int(text[3:5], 16))
            elif kind == _UNKNOWN:
                raw += UNKNOWN.encode()
            elif kind != _CONTROL:
                raw += text.replace(SPACE, " ").encode()
        found = raw.decode(errors="replace")
        return found.removeprefix(" ") if self.prefix else found

    def _symbols(self, text: str) -> list[str]:
        """Characters, and pieces that are defined as a whole, longest first."""
        whole = self._defined
        symbols, at = [], 0
        while at < len(text):
            symbol = next((w for w in whole if text.startswith(w, at)), text[at])
            symbols.append(symbol)
            at += len(symbol)
        return symbols

    @cached_property
    def _defined(self) -> tuple[str, ...]:
        return tuple(sorted((t for t, _, kind in self.pieces if kind == _DEFINED), key=len, reverse=True))

    @cached_property
    def _scores(self) -> Mapping[str, float]:
        return {text: score for text, score, kind in self.pieces if kind in (_NORMAL, _DEFINED)}

    def _merged(self, symbols: list[str]) -> Iterator[str]:
        frozen = set(self._defined)
        after = [*range(1, len(symbols)), -1]
        before = list(range(-1, len(symbols) - 1))
        queue: list[tuple[float, int, int, str]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right >= 0 and symbols[left] not in frozen and symbols[right] not in frozen:
                union = symbols[left] + symbols[right]
                if union in self._scores:
                    heapq.heappush(queue, (-self._scores[union], left, right, union))

        for left in range(len(symbols) - 1):
            offer(left, left + 1)
        while queue:
            _, left, right, union = heapq.heappop(queue)
            if not symbols[left] or not symbols[right] or symbols[left] + symbols[right] != union:
                continue  # one of them was joined with another since
            symbols[left], symbols[right] = union, ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            offer(before[left], left)
            offer(left, after[left])
        return (s for s in symbols if s)


def read_pieces(path: Path) -> Pieces | None:
    """Read a SentencePiece model; None for one of another kind than is covered here.

    Args:
        path: the file, or the folder with its `tokenizer.model`.

    Raises:
        ModelError: the file is missing or damaged.
    """
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        raise ModelError(f"No tokenizer at '{file}'. Copy `{TOKENIZER_FILE}` of the checkpoint there.")
    try:
        pieces, trainer, normalizer = _model(file.read_bytes())
        numbers = {key: int.from_bytes(trainer.get(key, b""), "little") for key in (3, 40, 41, 42)}
    except (ValueError, IndexError, struct.error) as error:
        raise ModelError(f"'{file}' is no SentencePiece model ({error}). Download it again.") from error
    if not pieces:
        raise ModelError(f"'{file}' is no SentencePiece model: it has no pieces. Download it again.")
    if numbers[3] != BPE or normalizer.get(2):
        return None

    def number(key: int, default: int) -> int:
        return numbers[key] if key in trainer else default

    bos = number(41, 1)
    return Pieces(
        pieces=tuple(pieces),
        unk=number(40, 0),
        bos=bos if bos < len(pieces) else None,
        eos=number(42, 2),
        prefix=normalizer.get(3, b"\x01") != b"\x00",
        squeeze=normalizer.get(4, b"\x01") != b"\x00",
    )


def _model(data: bytes) -> tuple[list[tuple[str, float, int]], dict[int, bytes], dict[int, bytes]]:
    """Pieces, and the fields of the two records of settings; numbers as little-endian bytes."""
    pieces = []
    records: dict[int, dict[int, bytes]] = {2: {}, 3: {}}
    for field, value in _fields(data):
        if field == 1:
            parts = dict(_fields(value))
            (score,) = struct.unpack("<f", parts.get(2, bytes(4)))
            pieces.append((parts.get(1, b"").decode(), score, int.from_bytes(parts.get(3, b"\x01"), "little")))
        elif field in records:
            records[field] = dict(_fields(value))
    return pieces, records[2], records[3]


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, value) of the fields of a message; a varint as little-endian bytes of its value."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise ValueError("a number is too long")

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == _VARINT:
            value = varint()
            yield key >> 3, value.to_bytes(8, "little").rstrip(b"\0") or b"\0"
            continue
        size = varint() if kind == _BYTES else {_FIXED64: 8, _FIXED32: 4}.get(kind, -1)
        if size < 0 or at + size > len(data):
            raise ValueError("a field is cut off or of an unknown type")
        yield key >> 3, data[at : at + size]
        at += size
