"""SegFormer, on a small network of its architecture."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitalloy import zoo
from bitalloy.core.errors import ModelError
from bitalloy.model import load as graph
from bitalloy.model.regions import path_of, region_id
from bitalloy.zoo import segformer
from bitalloy.zoo.base import Options

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {"hidden_sizes": (8, 16, 20, 32), "depths": (1, 1, 2, 1), "decoder_hidden_size": 24}
TINY = replace(segformer.SEGFORMER_VARIANTS[0], name="tiny", size=(64, 64), architecture=SIZES)
CLASSES = 7


@pytest.fixture(scope="module")
def network() -> Any:
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        num_labels=CLASSES,
        num_attention_heads=(1, 2, 5, 8),
        **{k: list(v) if k != "decoder_hidden_size" else v for k, v in SIZES.items()},
    )
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    model.decode_head.batch_norm.running_mean.uniform_(-1, 1)
    return model


@pytest.fixture(scope="module")
def saved(network: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published: a folder with the tensor names of 2021."""
    folder = tmp_path_factory.mktemp("published")
    network.save_pretrained(folder)
    return folder


def test_published_folder_gives_the_outputs_of_transformers(
    network: Any, saved: Path, tmp_path: Path, onnx_run: Any
) -> None:
    from safetensors.torch import load_file

    assert "segformer.encoder.block.0.0.attention.self.query.weight" in load_file(saved / "model.safetensors")
    exported = segformer.export_segformer(TINY, saved, Options(), tmp_path)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = network(pixels).logits.numpy()
    got = onnx_run(exported.graphs["tiny"], {"pixel_values": pixels.numpy()})["logits"]
    assert got.shape == (1, CLASSES, 16, 16)
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
    assert any("64x64" in n and "official" in n for n in exported.notes)


def test_open_size_runs_images_of_any_aspect(network: Any, saved: Path, tmp_path: Path, onnx_run: Any) -> None:
    exported = segformer.export_segformer(TINY, saved, Options(open_size=True), tmp_path)
    for size in ((96, 64), (64, 160)):
        pixels = torch.randn(1, 3, *size)
        with torch.no_grad():
            want = network(pixels).logits.numpy()
        got = onnx_run(exported.graphs["tiny"], {"pixel_values": pixels.numpy()})["logits"]
        assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
    loaded = graph.load_graph(exported.graphs["tiny"], shapes={"pixel_values": (1, 3, 96, 64)})
    assert loaded.info.outputs[0].shape == (1, CLASSES, 24, 16)
    assert json.loads(loaded.metadata["bitalloy.shapes"]) == {"pixel_values": [1, 3, 64, 64]}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_state_dict_in_a_file_of_its_own(network: Any, saved: Path, tmp_path: Path, onnx_run: Any, suffix: str) -> None:
    from safetensors.torch import load_file

    file = tmp_path / f"weights.{suffix}"
    if suffix == "pt":
        torch.save(load_file(saved / "model.safetensors"), file)
    else:
        shutil.copy(saved / "model.safetensors", file)
    path = segformer.export_segformer(TINY, file, Options(), tmp_path).graphs["tiny"]
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = network(pixels).logits.numpy()
    got = onnx_run(path, {"pixel_values": pixels.numpy()})["logits"]
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def test_regions_and_protected_parts(saved: Path, tmp_path: Path) -> None:
    loaded = graph.load_graph(segformer.export_segformer(TINY, saved, Options(), tmp_path).graphs["tiny"])
    regions = {str(n.name): region_id(path_of(n)) for n in loaded.nodes}
    assert regions["/segformer/stages.2/blocks.1/attention/q_proj/MatMul"] == "encoder/stage 2/block 1/attention/q_proj"
    assert regions["/segformer/stages.0/blocks.0/mlp/fc1/MatMul"] == "encoder/stage 0/block 0/MLP/fc1"
    assert regions["/segformer/stages.3/patch_embeddings/proj/Conv"] == "encoder/stage 3/patch embedding/proj"
    assert regions["/decode_head/linear_projections.1/proj/MatMul"] == "decoder/projection of stage 1/proj"
    assert regions["/decode_head/linear_fuse/Conv"] == "decoder/fusion"
    kept = {
        n.op_type
        for n in loaded.nodes
        if any(fnmatchcase(str(n.name), p.pattern) for p in segformer.SEGFORMER_PROTECTION)
    }
    assert kept == {"Softmax", "LayerNormalization"}
    assert all(
        any(fnmatchcase(str(n.name), p.pattern) for p in segformer.SEGFORMER_PROTECTION)
        for n in loaded.nodes
        if n.op_type in ("Softmax", "LayerNormalization")
    )


def test_folder_of_another_size_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no checkpoint of segformer-b0: hidden_sizes is \[8, 16, 20, 32\]"):
        zoo.export_model("segformer-b0", checkpoint=saved, folder=tmp_path)


def test_tensors_that_differ_are_named(saved: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(saved / "model.safetensors")
    state.pop("decode_head.linear_c.0.proj.bias")
    state["decode_head.linear_fuse.weight"] = torch.zeros(3, 3, 1, 1)
    state["nonsense"] = torch.zeros(1)
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(ModelError) as caught:
        segformer.export_segformer(TINY, tmp_path / "bad.safetensors", Options(), tmp_path)
    text = str(caught.value)
    assert "1 missing (decode_head.linear_projections.0.proj.bias)" in text and "1 unexpected (nonsense)" in text
    assert "decode_head.linear_fuse.weight is [3, 3, 1, 1] in place of [24, 96, 1, 1]" in text


def test_size_that_is_no_multiple_of_32_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="multiples of 32"):
        segformer.export_segformer(TINY, "random", Options(size=(64, 50)), tmp_path)


# Sizes by hand: short side 512 unless the long one would pass 2048, then up to the next multiple of 32.
def on_meta(variant: Any) -> Any:
    """The network without memory behind its tensors."""
    from bitalloy.zoo.networks.segformer import Segmenter

    config = transformers.SegformerConfig(num_labels=150, num_attention_heads=(1, 2, 5, 8), **variant.architecture)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        return Segmenter(transformers.SegformerForSemanticSegmentation(config)).eval()


@pytest.mark.parametrize("variant", segformer.SEGFORMER_VARIANTS, ids=lambda v: v.name)
def test_parameters_of_the_network_are_those_of_the_listing(variant: Any) -> None:
    parameters = sum(p.numel() for p in on_meta(variant).parameters())
    assert parameters / 1e6 == pytest.approx(variant.parameters_m, abs=6e-4)


@pytest.mark.parametrize("variant", segformer.SEGFORMER_VARIANTS[:3], ids=lambda v: v.name)
def test_products_of_the_network_are_those_of_the_listing(variant: Any) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    network = on_meta(variant)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.randn(1, 3, *variant.size, device="meta"))
    assert counter.get_total_flops() / 1e9 == pytest.approx(variant.flops_b, rel=1e-3)
    published = 2 * variant.published.flops_b / variant.published.flops_per_mac
    assert variant.flops_b == pytest.approx(published, rel=0.02)
