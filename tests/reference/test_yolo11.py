"""The reference network equals the published one: same parameter names, same outputs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no real checkpoint beside the repository")


@pytest.fixture(scope="module")
def yolo11() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_yolo11", ROOT / "reference" / "yolo11.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


# Parameters of the networks before and after folding the batch normalisation, 80 classes.
@pytest.mark.parametrize(
    ("scale", "raw", "fused"),
    [
        ("n", 2_624_080, 2_616_248),
        ("s", 9_458_752, 9_443_760),
        ("m", 20_114_688, 20_091_712),
        ("l", 25_372_160, 25_340_992),
        ("x", 56_966_176, 56_919_424),
    ],
)
def test_parameter_counts_of_all_scales(yolo11: ModuleType, scale: str, raw: int, fused: int) -> None:
    with torch.device("meta"):
        model = yolo11.Yolo11(80, scale=scale).eval()
    assert parameters(model) == raw
    folded = sum(m.conv.out_channels for m in model.modules() if isinstance(m, yolo11.Conv))
    assert raw - folded == fused  # weight and bias of each norm become one bias


def test_fuse_changes_no_output(yolo11: ModuleType) -> None:
    torch.manual_seed(0)
    model = yolo11.Yolo11(8).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
    x = torch.rand(2, 3, 96, 64)
    with torch.no_grad():
        before = model(x)
        after = yolo11.fuse(model)(x)
    assert before.shape == (2, 12, 12 * 8 + 6 * 4 + 3 * 2)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-3)


def test_parameter_names_are_those_of_the_published_checkpoints(yolo11: ModuleType) -> None:
    names = set(yolo11.Yolo11(80).state_dict())
    assert len(names) == 499
    assert names >= {
        "model.0.conv.weight",
        "model.0.bn.running_var",
        "model.2.m.0.cv1.conv.weight",
        "model.6.m.0.m.1.cv2.bn.bias",
        "model.9.cv2.conv.weight",
        "model.10.m.0.attn.qkv.conv.weight",
        "model.10.m.0.ffn.1.bn.weight",
        "model.23.cv2.0.2.bias",
        "model.23.cv3.0.0.0.conv.weight",
        "model.23.dfl.conv.weight",
    }


@needs_data
def test_published_checkpoint_gives_the_same_output(yolo11: ModuleType) -> None:
    state = torch.load(DATA / "models" / "yolo11n_state_dict.pt", weights_only=True)
    model = yolo11.Yolo11(80).eval()
    assert len(state) == 499
    model.load_state_dict(state, strict=True)
    model.double()  # so that only the runtime's rounding is left in the difference
    session = ort.InferenceSession(DATA / "models" / "yolo11n.onnx", providers=["CPUExecutionProvider"])
    for path in sorted((DATA / "coco-val-94" / "images").iterdir())[:2]:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB").resize((640, 640)), np.float32) / 255
        feed = pixels.transpose(2, 0, 1)[None]
        want = session.run(None, {"images": feed})[0]
        with torch.no_grad():
            got = model(torch.from_numpy(feed).double()).numpy()
        assert got.shape == want.shape == (1, 84, 8400)
        for part in (np.s_[:, :4], np.s_[:, 4:]):  # boxes in pixels and scores in 0..1 have their own scales
            assert np.abs(got[part] - want[part]).max() <= 1e-5 * np.abs(want[part]).max()
