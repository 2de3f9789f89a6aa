"""YOLO11: counts, weights of every origin, the exported files."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from bitalloy import zoo
from bitalloy.core.errors import ModelError
from bitalloy.model import load as graph
from bitalloy.model import relevance
from bitalloy.model.heads import find_heads
from bitalloy.model.regions import path_of, region_id
from bitalloy.targets.base import macs
from bitalloy.zoo import yolo11
from bitalloy.zoo.base import Exported, Options

torch = pytest.importorskip("torch")
NAMES = [v.name for v in yolo11.YOLO11_VARIANTS]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """The two smallest at 640 x 640, as random networks."""
    folder = tmp_path_factory.mktemp("yolo")
    return {name: zoo.export_model(name, checkpoint="random", folder=folder) for name in ("yolo11n", "yolo11n-seg")}


@pytest.fixture(scope="module")
def loaded(small: dict[str, Exported]) -> dict[str, graph.Graph]:
    return {name: graph.load_graph(exported.graphs[name]) for name, exported in small.items()}


@pytest.mark.parametrize("name", NAMES)
def test_counts_of_the_network_are_those_of_the_listing(name: str) -> None:
    """Counted by torch, on networks without memory behind their tensors."""
    from torch.utils.flop_counter import FlopCounterMode

    from bitalloy.zoo.networks.yolo11 import Yolo11
    from bitalloy.zoo.networks.yolo11_blocks import Conv

    _, variant = zoo.find(name)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        network = Yolo11(80, scale=name[6], masks=name.endswith("seg")).eval()
        network(torch.randn(1, 3, 640, 640))
    # a norm has a weight and a bias per channel; folded, only the bias is left
    folded = sum(m.conv.out_channels for m in network.modules() if isinstance(m, Conv))
    parameters = sum(p.numel() for p in network.parameters()) - folded
    assert parameters / 1e6 == pytest.approx(variant.parameters_m, abs=6e-4)
    assert counter.get_total_flops() / 1e9 == pytest.approx(variant.flops_b, abs=6e-4)


@pytest.mark.parametrize("name", ["yolo11n", "yolo11n-seg"])
def test_counts_of_the_graph_are_those_of_the_listing(loaded: dict[str, graph.Graph], name: str) -> None:
    _, variant = zoo.find(name)
    nodes = loaded[name].nodes
    weights = [v for n in nodes if n.op_type in ("Conv", "ConvTranspose") for v in n.inputs[1:] if v is not None]
    assert sum(np.prod(graph.static_shape(v)) for v in weights) / 1e6 == pytest.approx(variant.parameters_m, abs=6e-4)
    assert 2 * sum(macs(n) for n in nodes) / 1e9 == pytest.approx(variant.flops_b, abs=6e-4)


@pytest.mark.parametrize("name", ["yolo11n", "yolo11n-seg"])
def test_outputs_and_heads(loaded: dict[str, graph.Graph], name: str) -> None:
    info, masks = loaded[name].info, name.endswith("seg")
    assert [(i.name, i.shape) for i in info.inputs] == [("images", (1, 3, 640, 640))]
    want = [("output0", (1, 116, 8400)), ("output1", (1, 32, 160, 160))] if masks else [("output0", (1, 84, 8400))]
    assert [(o.name, o.shape) for o in info.outputs] == want
    heads = [h.name for h in find_heads(loaded[name])]
    assert heads == ["boxes", "scores", *["coefficients"] * masks, "detections", *["output1"] * masks, "scores KL"]


def test_regions_are_the_parts_of_a_detector(loaded: dict[str, graph.Graph]) -> None:
    regions = {n.name: region_id(path_of(n)) for n in loaded["yolo11n-seg"].nodes}
    assert regions["/model.0/conv/Conv"] == "backbone/stem/model.0/conv"
    assert regions["/model.10/m/m.0/attn/Softmax"] == "backbone/model.10/m/m.0/attn"
    assert regions["/model.13/cv1/conv/Conv"] == "neck/model.13/cv1/conv"
    assert regions["/model.23/cv2.1/cv2.1.2/Conv"] == "head/boxes/P4/cv2.1.2"
    assert regions["/model.23/cv3.2/cv3.2.2/Conv"] == "head/scores/P5/cv3.2.2"
    assert regions["/model.23/cv4.0/cv4.0.2/Conv"] == "head/mask coefficients/P3/cv4.0.2"
    assert regions["/model.23/dfl/conv/Conv"] == "head/decode/dfl/conv"
    assert regions["/model.23/proto/upsample/ConvTranspose"] == "head/prototypes/upsample"
    assert {r.split("/")[0] for r in regions.values()} == {"backbone", "neck", "head"}


def test_protected_parts_are_dfl_decoding_and_output_convolutions(loaded: dict[str, graph.Graph]) -> None:
    nodes = [str(n.name) for n in loaded["yolo11n-seg"].nodes]
    dfl, decode, outputs = ([n for n in nodes if fnmatchcase(n, p.pattern)] for p in yolo11.YOLO11_PROTECTION)
    assert "/model.23/dfl/conv/Conv" in dfl and "/model.23/dfl/Softmax" in dfl
    assert not any("/cv" in n or "/proto" in n for n in decode)
    assert any(n.split("/")[-1].startswith("Concat") for n in decode)
    assert sorted(outputs) == sorted(f"/model.23/cv{b}.{i}/cv{b}.{i}.2/Conv" for b in (2, 3, 4) for i in range(3))


def test_real_checkpoint_gives_the_outputs_of_its_onnx_file(real: Path, tmp_path: Path, onnx_run: Any) -> None:
    source = real / "models" / "yolo11n_state_dict.pt"
    exported = zoo.export_model("yolo11n", checkpoint=source, folder=tmp_path)
    path = sorted((real / "coco-val-94" / "images").iterdir())[0]
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB").resize((640, 640)), np.float32) / 255
    feeds = {"images": pixels.transpose(2, 0, 1)[None]}
    got = onnx_run(exported.graphs["yolo11n"], feeds)["output0"]
    want = onnx_run(real / "models" / "yolo11n.onnx", feeds)["output0"]
    assert want[:, 4:].max() > 0.5  # it sees something
    for part in (np.s_[:, :4], np.s_[:, 4:]):
        assert np.abs(got[part] - want[part]).max() <= 1e-4 * np.abs(want[part]).max()


def test_file_of_the_user_is_annotated_and_otherwise_unchanged(real: Path, tmp_path: Path, onnx_run: Any) -> None:
    source = real / "models" / "yolo11n.onnx"
    exported = zoo.export_model("yolo11n", checkpoint=source, folder=tmp_path)
    model = graph.load_graph(exported.graphs["yolo11n"])
    assert {path_of(n)[0] for n in model.nodes if n.op_type == "Conv"} == {"backbone", "neck", "head"}
    feeds = {"images": np.random.default_rng(0).random((1, 3, 640, 640), np.float32)}
    got, want = (onnx_run(p, feeds)["output0"] for p in (exported.graphs["yolo11n"], source))
    assert np.array_equal(got, want)


def test_own_file_is_adopted_in_place_without_double_annotations(small: dict[str, Exported]) -> None:
    path = small["yolo11n"].graphs["yolo11n"]
    before = onnx.load(path)
    zoo.export_model("yolo11n", checkpoint=path, folder=path.parent)
    assert onnx.load(path) == before


def test_state_dict_with_other_classes_before_and_after_folding(tmp_path: Path, onnx_run: Any) -> None:
    from bitalloy.zoo.networks.yolo11 import Yolo11, fuse

    torch.manual_seed(0)
    network = Yolo11(3, masks=True).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        want = network(image)
    torch.save(network.state_dict(), tmp_path / "plain.pt")
    torch.save(fuse(network).state_dict(), tmp_path / "folded.pt")
    for name in ("plain", "folded"):
        options = Options(size=(64, 96))
        exported = zoo.export_model(
            "yolo11n-seg", checkpoint=tmp_path / f"{name}.pt", folder=tmp_path / name, options=options
        )
        got = onnx_run(exported.graphs["yolo11n-seg"], {"images": image.numpy()})
        for tensor, key in zip(want, ("output0", "output1"), strict=True):
            np.testing.assert_allclose(got[key], tensor.numpy(), rtol=1e-4, atol=1e-4 * float(tensor.abs().max()))


def test_random_weights_come_from_the_seed(small: dict[str, Exported], tmp_path: Path) -> None:
    found = [small["yolo11n"].graphs["yolo11n"]]
    for seed in (0, 1):
        options = Options(size=(32, 32), seed=seed)
        exported = zoo.export_model("yolo11n", checkpoint="random", folder=tmp_path / str(seed), options=options)
        found.append(exported.graphs["yolo11n"])
    weights = [
        {t.name: t.raw_data for t in onnx.load(p).graph.initializer if t.name.startswith("model.")} for p in found
    ]
    first, again, other = weights
    assert first == again
    assert first["model.0.conv.weight"] != other["model.0.conv.weight"]


@pytest.mark.parametrize("size", [(640, 650), (0, 32)])
def test_size_that_is_no_multiple_of_32_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    with pytest.raises(ModelError, match="multiples of 32"):
        zoo.export_model("yolo11n", checkpoint="random", folder=tmp_path, options=Options(size=size))


def test_checkpoint_of_another_size_is_refused(tmp_path: Path) -> None:
    from bitalloy.zoo.networks.yolo11 import Yolo11

    torch.save(Yolo11(80).state_dict(), tmp_path / "n.pt")
    with pytest.raises(ModelError, match=r"no checkpoint of yolo11s.*of another shape \(model\.0\.conv\.weight"):
        zoo.export_model("yolo11s", checkpoint=tmp_path / "n.pt", folder=tmp_path)
    with pytest.raises(ModelError, match=r"no checkpoint of yolo11n-seg.*62 missing \(model\.23\.cv4"):
        zoo.export_model("yolo11n-seg", checkpoint=tmp_path / "n.pt", folder=tmp_path)


def test_onnx_file_of_another_size_is_refused(small: dict[str, Exported], tmp_path: Path) -> None:
    path = small["yolo11n"].graphs["yolo11n"]
    for name in ("yolo11s", "yolo11n-seg"):
        with pytest.raises(ModelError, match=f"is no {name}"):
            zoo.export_model(name, checkpoint=path, folder=tmp_path)


def test_published_pickle_is_not_downloaded_without_permission(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="--trust-checkpoint"):
        zoo.export_model("yolo11n", folder=tmp_path)


def test_relevance_follows_the_best_score_of_an_anchor() -> None:
    output = np.zeros((1, 4 + 2 + 32, 3), np.float32)
    output[0, 4:6] = [[0.1, 0.6, 0.2], [0.3, 0.0, 0.0]]
    weights = relevance.yolo11({"output0": output, "output1": np.ones((1, 32, 2, 2))})
    np.testing.assert_allclose(weights["output0"][0, 0], np.array([0.3, 0.6, 0.2]) * 3 / 1.1, rtol=1e-6)
    np.testing.assert_allclose(weights["output0"][0, 37], weights["output0"][0, 0])
    assert (weights["output0"][0, 4:6] == 1).all() and (weights["output1"] == 1).all()
