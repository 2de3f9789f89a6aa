"""MobileSAM: prompts, both graphs against kornia's own predictor, the program file."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitalloy import zoo
from bitalloy.core.errors import ModelError
from bitalloy.model import load as graph
from bitalloy.model.regions import path_of
from bitalloy.targets.base import macs
from bitalloy.zoo import mobilesam
from bitalloy.zoo.base import Exported, Options

torch = pytest.importorskip("torch")
models = pytest.importorskip("kornia.models.sam")
networks = pytest.importorskip("bitalloy.zoo.networks.mobilesam")
BOX = (100.0, 200.0, 600.0, 700.0)
POINTS, LABELS = np.array([[300.0, 400.0], [20.0, 900.0]]), np.array([1, 0])


@pytest.fixture(scope="module")
def sam() -> Any:
    torch.manual_seed(1)
    model = models.Sam.from_name("mobile_sam").eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
    return model


@pytest.fixture(scope="module")
def exported(sam: Any, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """From a file of the published kind: a plain state dict."""
    folder = tmp_path_factory.mktemp("sam")
    torch.save(sam.state_dict(), folder / "mobile_sam.pt")
    return zoo.export_model("mobilesam", checkpoint=folder / "mobile_sam.pt", folder=folder)


@pytest.fixture(scope="module")
def loaded(exported: Exported) -> dict[str, graph.Graph]:
    shapes = {"point_coords": (1, 2, 2), "point_labels": (1, 2)}
    return {n: graph.load_graph(p, shapes=shapes if n == "decoder" else None) for n, p in exported.graphs.items()}


def test_state_dict_has_the_published_number_of_tensors_and_parameters(sam: Any) -> None:
    state = sam.state_dict()
    assert len(state) == 439
    assert sum(p.numel() for p in sam.parameters()) == 10_130_092  # not 9.66 M
    assert {"image_encoder.patch_embed.seq.0.c.weight", "mask_decoder.iou_token.weight"} <= state.keys()


@pytest.mark.parametrize("case", ["box", "points", "both"])
def test_decoder_equals_the_predictor_of_kornia(
    sam: Any, exported: Exported, onnx_run: Any, tmp_path: Path, case: str
) -> None:
    """Kornia encodes the points and the box of an image of 1024 x 1024 by its own prompt encoder."""
    embeddings = torch.randn(1, 256, 64, 64, generator=torch.Generator().manual_seed(0))
    points = (torch.tensor(POINTS)[None].float(), torch.tensor(LABELS)[None].float()) if case != "box" else None
    boxes = torch.tensor([BOX]) if case != "points" else None
    with torch.no_grad():
        sparse, dense = sam.prompt_encoder(points=points, boxes=boxes, masks=None)
        want = sam.mask_decoder.predict_masks(embeddings, sam.prompt_encoder.get_dense_pe(), sparse, dense)
    given: dict[str, Any] = {"points": POINTS, "labels": LABELS} if points else {}
    given |= {"box": BOX} if boxes is not None else {}
    coords, labels = mobilesam.prompts((1024, 1024), **given)
    feeds = {"image_embeddings": embeddings.numpy(), "point_coords": coords, "point_labels": labels}
    got = onnx_run(exported.graphs["decoder"], feeds)
    for name, tensor in zip(("low_res_masks", "iou_predictions"), want, strict=True):
        assert np.abs(got[name] - tensor.numpy()).max() <= 1e-4 * float(tensor.abs().max())


def test_encoder_equals_that_of_kornia(sam: Any, exported: Exported, onnx_run: Any) -> None:
    image = torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = sam.image_encoder(image).numpy()
    got = onnx_run(exported.graphs["encoder"], {"image": image.numpy()})["image_embeddings"]
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def test_program_wires_the_encoder_to_the_decoder(exported: Exported) -> None:
    folder = exported.graphs["encoder"].parent
    assert json.loads((folder / "program.json").read_text()) == {
        "graphs": {"encoder": "encoder.onnx", "decoder": "decoder.onnx"},
        "wires": ["encoder:image_embeddings -> decoder:image_embeddings"],
    }


def test_counts_are_those_of_the_listing(sam: Any, loaded: dict[str, graph.Graph]) -> None:
    _, variant = zoo.find("mobilesam")
    assert 2 * sum(macs(n) for g in loaded.values() for n in g.nodes) / 1e9 == pytest.approx(variant.flops_b, rel=1e-4)
    unused = ("image_encoder.norm_head", "image_encoder.head", "prompt_encoder.mask_downscaling")
    live = sum(p.numel() for n, p in sam.named_parameters() if not n.startswith(unused))
    assert live / 1e6 == pytest.approx(variant.parameters_m, abs=6e-4)


def test_regions_and_protected_parts(loaded: dict[str, graph.Graph]) -> None:
    for name, parts in (("encoder", {"image encoder"}), ("decoder", {"prompt encoder", "mask decoder"})):
        weighted = [n for n in loaded[name].nodes if n.op_type in ("Conv", "MatMul", "Gemm", "ConvTranspose")]
        assert {path_of(n)[0] for n in weighted} == parts
        kept = [any(fnmatchcase(str(n.name), p.pattern) for p in mobilesam.MOBILESAM_PROTECTION) for n in weighted]
        assert all(kept) if name == "decoder" else not any(kept)


def test_prompts_are_scaled_to_the_padded_image_and_closed() -> None:
    coords, labels = mobilesam.prompts((480, 640), points=np.array([[320, 240]]))
    np.testing.assert_allclose(coords, [[[512, 384], [0, 0]]])
    assert labels.tolist() == [[1, -1]]
    coords, labels = mobilesam.prompts(
        (640, 480), points=np.array([[0, 0]]), labels=np.array([0]), box=(10, 20, 30, 40)
    )
    np.testing.assert_allclose(coords, [[[0, 0], [16, 32], [48, 64]]])
    assert labels.tolist() == [[0, 2, 3]]


def test_other_size_and_other_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="padded to 1024x1024"):
        zoo.export_model("mobilesam", checkpoint="random", folder=tmp_path, options=Options(size=(512, 512)))
    torch.save({"image_encoder.x": torch.zeros(1)}, tmp_path / "bad.pt")
    with pytest.raises(ModelError, match=r"439 missing .* 1 unexpected \(image_encoder\.x\)"):
        zoo.export_model("mobilesam", checkpoint=tmp_path / "bad.pt", folder=tmp_path)


def test_the_published_numbers_give_the_network_of_kornia(sam: Any) -> None:
    built = networks.build_sam(mobilesam.MOBILESAM_VARIANTS[0].architecture, 1024).state_dict()
    assert {k: v.shape for k, v in built.items()} == {k: v.shape for k, v in sam.state_dict().items()}


def test_a_resized_network_is_one_of_that_size() -> None:
    numbers = mobilesam.MOBILESAM_SHAPES.architecture
    small, resized = networks.build_sam(numbers, 64).eval(), networks.build_sam(numbers, 224).eval()
    resized.load_state_dict(small.state_dict())
    networks.resize_sam(resized, 64)
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(small.image_encoder(image), resized.image_encoder(image))
        assert torch.equal(small.prompt_encoder.get_dense_pe(), resized.prompt_encoder.get_dense_pe())
        boxes = torch.tensor([[5.0, 6.0, 40.0, 50.0]])
        one, other = (s.prompt_encoder(points=None, boxes=boxes, masks=None)[0] for s in (small, resized))
        assert torch.equal(one, other)


def test_the_sample_variant_is_exported_from_a_file_of_the_published_layout(tmp_path: Path, onnx_run: Any) -> None:
    torch.manual_seed(2)
    small = networks.build_sam(mobilesam.MOBILESAM_SHAPES.architecture, 224).eval()
    torch.save(small.state_dict(), tmp_path / "small.pt")
    done = mobilesam.export_mobilesam(mobilesam.MOBILESAM_SHAPES, tmp_path / "small.pt", Options(), tmp_path)
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        want = small.image_encoder(image).numpy()
    got = onnx_run(done.graphs["encoder"], {"image": image.numpy()})["image_embeddings"]
    assert got.shape == (1, 128, 14, 14)
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
    with pytest.raises(ModelError, match="224x224"):
        mobilesam.export_mobilesam(mobilesam.MOBILESAM_SHAPES, "random", Options(size=(1024, 1024)), tmp_path)
