"""Tokenizers of byte pairs, read without the `sentencepiece` package, and compared with it where it is installed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tests.small_programs import sentencepiece_model, write_tokenizer

from bitalloy.core.errors import ModelError
from bitalloy.tasks.pieces import read_pieces

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
BASE = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]


def stored(folder: Path, pieces: list[tuple[str, float, int]], **normalizer: bool) -> Path:
    path = folder / "tokenizer.model"
    path.write_bytes(sentencepiece_model(pieces, **normalizer))
    return path


def test_the_best_pair_is_joined_first(tmp_path: Path) -> None:
    """Ab is better than bc, so `abc` becomes ab + c; without it, a + bc."""
    letters = [("\u2581", -9.0, NORMAL), ("a", -9.0, NORMAL), ("b", -9.0, NORMAL), ("c", -9.0, NORMAL)]
    first = read_pieces(stored(tmp_path, [*BASE, *letters, ("ab", -1.0, NORMAL), ("bc", -2.0, NORMAL)]))
    assert first is not None and first.encode("abc") == [3, 7, 6]
    second = read_pieces(stored(tmp_path, [*BASE, *letters, ("ab", -2.0, NORMAL), ("bc", -1.0, NORMAL)]))
    assert second is not None and second.encode("abc") == [3, 4, 8]
    assert second.encode("") == [] and second.decode([3, 4, 8, 2, 99]) == "abc"
    assert second.encode("d") == [3, 0]  # unknown, without bytes
    squeezed = read_pieces(stored(tmp_path, [*BASE, *letters], remove_extra_whitespaces=True, add_dummy_prefix=False))
    assert squeezed is not None and squeezed.encode("  a  b ") == [4, 3, 5]


def test_unknown_letters_are_bytes(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    pieces = read_pieces(tmp_path)
    assert pieces is not None and (pieces.bos, pieces.eos) == (1, 2)
    ids = pieces.encode("circle é")
    assert [i - 3 for i in ids[-2:]] == list("é".encode())
    assert pieces.decode(ids) == "circle é"
    assert len(pieces.encode("Is there a circle in the image?")) == 7


def test_other_kinds_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No tokenizer at"):
        read_pieces(tmp_path)
    path = stored(tmp_path, BASE)
    path.write_bytes(path.read_bytes().replace(b"\x18\x02\x98\x02", b"\x18\x01\x98\x02"))  # unigram
    assert read_pieces(path) is None
    for content in (b"nonsense", b"", b"\x0a\x7f"):
        path.write_bytes(content)
        with pytest.raises(ModelError, match="is no SentencePiece model"):
            read_pieces(path)


def test_ids_are_those_of_sentencepiece(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    write_tokenizer(tmp_path)
    ours = read_pieces(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    generator = random.Random(0)
    words = ["circle", "image", "Is", "there", "a", "red", "é", "世界", "  ", "\n", "12", "question.", "</s>"]
    for _ in range(500):
        text = "".join(generator.choice(words) + generator.choice(["", " "]) for _ in range(generator.randint(0, 9)))
        ids = theirs.encode(text)
        assert ours is not None and ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids), text
