"""summary.json is read whatever version wrote it, and keeps the names that scripts rely on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bitalloy.core.errors import RunDirectoryError
from bitalloy.core.summaries import read_summary, write_summary

OLD = Path(__file__).parent / "summary_schema_1.json"
"""Of a run of `segformer-b0-shapes` by the version before schemes became data."""


@pytest.fixture
def old() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(OLD.read_text())
    return content


def known(written: Any, old: Any) -> Any:
    """What was written, without the names that the old summary does not know."""
    if isinstance(old, dict):
        return {name: known(written[name], value) for name, value in old.items()}
    if isinstance(old, list):
        assert len(written) == len(old)
        return [known(after, before) for after, before in zip(written, old, strict=True)]
    return written


def test_a_summary_of_schema_1_is_read(old: dict[str, Any]) -> None:
    summary = read_summary(OLD.read_bytes())
    assert old["schema"] == 1 and summary.schema == 2
    assert summary.schemes == {"int8": old["int8_units"]} and old["int8_units"] > 0
    assert [r.schemes.get("int8", 0) for r in summary.rounds] == [r["int8_units"] for r in old["rounds"]]
    assert summary.latency_ms.lowest == old["latency_ms"]["int8"]
    assert summary.headline == old["headline"]


def test_old_names_are_written_beside_the_new_ones(old: dict[str, Any]) -> None:
    written = json.loads(write_summary(read_summary(OLD.read_bytes())))
    assert written["schemes"] == {"int8": old["int8_units"]}
    for name in old.keys() - {"schema"}:
        assert known(written[name], old[name]) == old[name], name


def test_what_was_written_is_read_again() -> None:
    summary = read_summary(OLD.read_bytes())
    assert read_summary(write_summary(summary)) == summary


@pytest.mark.parametrize("damaged", [b"", b"[]", b'{"schema": 1}', b"\xff\xfe", b'{"rounds": [1]}'])
def test_a_damaged_file_is_refused(damaged: bytes) -> None:
    with pytest.raises(RunDirectoryError, match="schema 1 or 2"):
        read_summary(damaged)
