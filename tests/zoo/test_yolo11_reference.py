"""Our YOLO11 networks equal those of the ultralytics package, where that is installed."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def tasks() -> Any:
    try:
        from ultralytics.nn import tasks
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"ultralytics cannot be imported: {error}")
    return tasks


@pytest.mark.parametrize("scale", "nm")
@pytest.mark.parametrize("masks", [False, True], ids=["detect", "segment"])
def test_network_equals_that_of_ultralytics(tasks: Any, scale: str, masks: bool) -> None:
    """Sizes n and m differ in depth, width and the kind of their blocks."""
    from bitalloy.zoo.networks.yolo11 import Yolo11

    torch.manual_seed(0)
    kind, name = (tasks.SegmentationModel, "-seg") if masks else (tasks.DetectionModel, "")
    theirs = kind(f"yolo11{scale}{name}.yaml", verbose=False).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
    ours = Yolo11(80, scale=scale, masks=masks).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    image = torch.rand(1, 3, 128, 96)
    with torch.no_grad():
        got, want = ours(image), theirs(image)[0]
    got, want = (got, want) if masks else ((got,), (want,))
    assert len(got) == len(want)
    for mine, other in zip(got, want, strict=True):
        assert mine.shape == other.shape
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
