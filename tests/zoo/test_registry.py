"""Names, the listing, and what is said where a name, a package or a checkpoint is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bitalloy import zoo
from bitalloy.core.errors import BitalloyError, MissingExtraError, ModelError
from bitalloy.zoo import listing
from bitalloy.zoo.base import Family, Variant

ALL = [(family, variant) for family in zoo.families() for variant in family.variants.values()]
SEED = {
    "yolo11n": (2.6, 6.5), "yolo11s": (9.4, 21.5), "yolo11m": (20.1, 68.0), "yolo11l": (25.3, 86.9),
    "yolo11x": (56.9, 194.9), "yolo11n-seg": (2.9, 9.7), "yolo11s-seg": (10.1, 33.0), "yolo11m-seg": (22.4, 113.2),
    "yolo11l-seg": (27.6, 132.2), "yolo11x-seg": (62.1, 296.4),
}  # fmt: skip
"""Published parameters in millions and FLOPs in 10^9 of the folded networks at 640 x 640."""


def test_every_family_is_listed_by_name() -> None:
    names = {v.name for _, v in ALL}
    assert names >= set(SEED)
    assert names >= {f"segformer-b{i}" for i in range(6)}
    assert names >= {"mobilesam", "mobilevlm-v2-1.7b", "mobilevlm-v2-3b", "mobilevlm-v2-7b"}
    assert len(names) == len(ALL)


@pytest.mark.parametrize("name", SEED)
def test_counted_figures_are_within_two_percent_of_the_published(name: str) -> None:
    _, variant = zoo.find(name)
    assert (variant.published.parameters_m, variant.published.flops_b) == SEED[name]
    assert variant.parameters_m == pytest.approx(SEED[name][0], rel=0.02)
    assert variant.flops_b == pytest.approx(SEED[name][1], rel=0.02)


@pytest.mark.parametrize(("family", "variant"), ALL, ids=[v.name for _, v in ALL])
def test_every_variant_says_where_its_weights_and_figures_come_from(family: Family, variant: Variant) -> None:
    assert variant.remote.hub or variant.remote.url
    assert variant.remote.licence and variant.published.source and variant.published.accuracy
    assert variant.parameters_m and variant.flops_b
    if variant.published.parameters_m:
        assert variant.parameters_m == pytest.approx(variant.published.parameters_m, rel=0.02)


def test_json_listing_holds_the_same_names_and_what_is_missing() -> None:
    found = json.loads(json.dumps(listing.as_json()))
    assert [v["name"] for f in found["families"] for v in f["variants"]] == [v.name for _, v in ALL]
    assert found["samples"][0]["name"] == "yolo11n-shapes"
    for family in found["families"]:
        assert family["installed"] == (not family["missing"])
        assert family["install"].startswith("pip install 'bitalloy[")


@pytest.mark.parametrize(("wrong", "right"), [("yolo11n-sag", "yolo11n-seg"), ("Segformer-B0", "segformer-b0")])
def test_unknown_name_gets_a_suggestion(wrong: str, right: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"Did you mean '{right}'"):
        zoo.export_model(wrong, checkpoint="random", folder=tmp_path)
    with pytest.raises(ModelError, match=f"Did you mean '{right}'"):
        zoo.resolve(wrong)


def test_name_that_must_be_exported_first_says_how() -> None:
    with pytest.raises(ModelError, match="bitalloy export segformer-b0"):
        zoo.resolve("segformer-b0")


@pytest.mark.parametrize("package", ["no_such_package", "numpy"], ids=["absent", "too old"])
def test_missing_package_gives_the_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    family, variant = zoo.find("mobilesam")
    monkeypatch.setattr(
        zoo, "find", lambda name: (Family(**{**fields(family), "packages": {package: (999, 1)}}), variant)
    )
    with pytest.raises(MissingExtraError, match=rf"{package}>=999\.1.*pip install 'bitalloy\[mobilesam\]'"):
        zoo.export_model("mobilesam", checkpoint="random", folder=tmp_path)


def fields(family: Family) -> dict[str, Any]:
    return {name: getattr(family, name) for name in Family.__slots__}


def test_open_size_is_refused_where_a_graph_has_one_size(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot stay open"):
        zoo.export_model("yolo11n", checkpoint="random", folder=tmp_path, options=zoo.Options(open_size=True))


def test_onnx_file_is_no_checkpoint_of_other_families(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="give it to `bitalloy run`"):
        zoo.export_model("segformer-b0", checkpoint="model.onnx", folder=tmp_path)


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "file").write_text("")
    with pytest.raises(BitalloyError, match="cannot be written"):
        zoo.export_model("yolo11n", checkpoint="random", folder=tmp_path / "file" / "inner")


def test_protection_patterns_and_sources_are_complete() -> None:
    from bitalloy.zoo import mobilesam, mobilevlm, segformer, yolo11

    for protection in (
        *yolo11.YOLO11_PROTECTION,
        *segformer.SEGFORMER_PROTECTION,
        *mobilesam.MOBILESAM_PROTECTION,
        *mobilevlm.MOBILEVLM_PROTECTION,
    ):
        assert protection.pattern.startswith("*/") and protection.reason.endswith(".")
        assert protection.source.startswith("https://")


@pytest.mark.parametrize("size", ["mobilevlm-v2-1.7b", "mobilevlm-v2-3b", "mobilevlm-v2-7b", "mobilevlm-shapes"])
def test_counts_of_mobilevlm_are_those_of_the_networks(size: str) -> None:
    """Parameters and products are counted by torch on networks without memory behind their tensors."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from torch.utils.flop_counter import FlopCounterMode

    from bitalloy.zoo import mobilevlm
    from bitalloy.zoo.networks import mobilevlm as networks

    (variant,) = (v for v in (*mobilevlm.MOBILEVLM_VARIANTS, mobilevlm.MOBILEVLM_SHAPES) if v.name == size)
    numbers: dict[str, Any] = dict(variant.architecture)
    side = variant.size[0]
    with torch.device("meta"), torch.no_grad():
        vision = networks.Vision(mobilevlm.clip(numbers, side), numbers["hidden_size"]).eval()
        decoder = networks.Decoder(mobilevlm.llama(numbers)).eval()
        tower = vision.vision_tower
        unused = [*tower.encoder.layers[-1].parameters(), *tower.post_layernorm.parameters()]
        every = [*vision.parameters(), *decoder.parameters()]
        with FlopCounterMode(display=False) as last:
            tower.encoder.layers[-1](
                torch.randn(1, (side // numbers["clip_patch"]) ** 2 + 1, numbers["clip_hidden_size"]), None
            )
        with FlopCounterMode(display=False) as all_:
            vision(torch.randn(1, 3, side, side))
            decoder(*networks.example(numbers["layers"], numbers["heads"], numbers["hidden_size"], past=0, new=256))
    assert (sum(p.numel() for p in every) - sum(p.numel() for p in unused)) / 1e6 == pytest.approx(variant.parameters_m)
    assert (all_.get_total_flops() - last.get_total_flops()) / 1e9 == pytest.approx(variant.flops_b, rel=1e-4)
