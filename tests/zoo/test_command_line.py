"""`bitalloy models` and `bitalloy export`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bitalloy import zoo


def test_models_lists_published_and_counted_figures(inside: Any) -> None:
    out = inside("models").succeeded().out
    row = next(line for line in out.splitlines() if line.startswith("yolo11n-seg "))
    for figure in ("2.9 | 2.87", "9.7 | 9.8", "38.9 32", "65.9 | 1.8"):
        assert figure in row
    for needed in ("https://docs.ultralytics.com/tasks/segment/", "9.66 M", "AGPL-3.0", "arxiv.org/abs/2105.15203"):
        assert needed in out
    assert all(variant in out for family in zoo.families() for variant in family.variants)


def test_models_as_json(inside: Any) -> None:
    found = json.loads(inside("models", "--json").succeeded().out)
    by_name = {v["name"]: v for f in found["families"] for v in f["variants"]}
    assert by_name["segformer-b5"]["size"] == [640, 640]
    assert by_name["mobilevlm-v2-3b"]["remote"]["hub"] == "mtgv/MobileVLM_V2-3B"


def test_the_listing_needs_no_framework(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "transformers", "kornia"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises
    for module in list(sys.modules):
        if module.startswith("bitalloy.zoo"):
            monkeypatch.delitem(sys.modules, module)
    from bitalloy.zoo import listing

    assert len(list(listing.tables())) > 4


def test_export_writes_a_file_that_loads(inside: Any) -> None:
    pytest.importorskip("torch")
    options = ("--checkpoint", "random", "--image-size", "64x64", "--out", "here")
    out = inside("export", "yolo11n", *options).succeeded().out
    assert "here/yolo11n.onnx" in out and "differs from torch by at most" in out
    assert "*/model.23/dfl/*" in out and "https://" in out
    assert inside.files("here") == {"yolo11n.onnx"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("yolo11",), ["'yolo11'", "Did you mean 'yolo11"]),
        (("yolo11n", "--image-size", "64"), ["--image-size", "480x640"]),
        (("yolo11n", "--checkpoint", "random", "--image-size", "64x65"), ["multiples of 32", "64x65"]),
        (("yolo11n", "--checkpoint", "nowhere.pt"), ["nowhere.pt"]),
        (("yolo11n", "--open-size"), ["cannot stay open"]),
    ],
)
def test_mistakes_are_refused(inside: Any, arguments: tuple[str, ...], words: list[str]) -> None:
    pytest.importorskip("torch")
    text = inside("export", *arguments).refused()
    assert all(word in text for word in words)


def test_help_has_examples(inside: Any) -> None:
    text = inside("export", "--help").succeeded().out
    assert text.count("bitalloy export") >= 3 and "--trust-checkpoint" in text


def test_pickled_checkpoint_is_refused_without_permission(inside: Any, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    text = inside("export", "yolo11n", "--checkpoint", str(tmp_path / "model.pt")).refused()
    assert "--trust-checkpoint" in text
