"""Files that are written from torch: what is refused, what they say about themselves, and how large ones lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from bitalloy.core.errors import ModelError
from bitalloy.model import load as graph
from bitalloy.model import regions
from bitalloy.zoo import exporting
from bitalloy.zoo.base import ProtectionAdvice
from bitalloy.zoo.exporting import ExportFacts, Signature, export_graph

torch = pytest.importorskip("torch")
Module: Any = torch.nn.Module

SIGNATURE = Signature(inputs=("x",), outputs=("y",))
FACTS = ExportFacts(
    family="family",
    variant="variant",
    regions=((r"trunk\.(\d)", r"encoder/stage \1"), (r"trunk", "encoder")),
    protect=(ProtectionAdvice(pattern="*/head/*", reason="because", source="somewhere"),),
    heads=("y",),
    shapes={"x": (1, 8)},
)


class Net(Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.trunk = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(2))
        self.head = torch.nn.Linear(width, 3)

    def forward(self, x: Any) -> Any:
        for layer in self.trunk:
            x = torch.relu(layer(x))
        return self.head(x)


class Shaky(Net):
    """Drops even in evaluation."""

    def forward(self, x: Any) -> Any:
        return torch.nn.functional.dropout(super().forward(x), 0.5, training=True)


class Drifting(Net):
    """Each call gives another result, so that a trace differs from the call before it."""

    calls = 0

    def forward(self, x: Any) -> Any:
        self.calls += 1
        return super().forward(x) * self.calls


def test_regions_and_facts_are_in_the_file_and_survive_loading(tmp_path: Path) -> None:
    export_graph(Net(), [(torch.randn(1, 8),)], tmp_path / "net.onnx", SIGNATURE, FACTS)
    loaded = graph.load_graph(tmp_path / "net.onnx")
    paths = {regions.region_id(regions.path_of(n)) for n in loaded.nodes if n.op_type == "Gemm"}
    assert paths == {"encoder/stage 0", "encoder/stage 1", "head"}  # a module without words keeps its own path
    assert loaded.metadata["bitalloy.family"] == "family"
    assert json.loads(loaded.metadata["bitalloy.heads"]) == ["y"]
    assert json.loads(loaded.metadata["bitalloy.shapes"]) == {"x": [1, 8]}
    assert json.loads(loaded.metadata["bitalloy.protect"])[0]["pattern"] == "*/head/*"


def test_exporting_leaves_a_module_in_evaluation_mode(tmp_path: Path) -> None:
    module = Net().train()
    export_graph(module, [(torch.randn(1, 8),)], tmp_path / "net.onnx", SIGNATURE, FACTS)
    assert not any(m.training for m in module.modules())


def test_operators_of_training_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="still holds Dropout"):
        export_graph(Shaky(), [(torch.randn(1, 8),)], tmp_path / "net.onnx", SIGNATURE, FACTS)
    assert not any(tmp_path.iterdir())


def test_file_that_differs_from_torch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="differs from torch by"):
        export_graph(Drifting(), [(torch.randn(1, 8),)], tmp_path / "net.onnx", SIGNATURE, FACTS)


def test_parts_are_compared_on_their_own_scale() -> None:
    want = np.array([[[600.0]], [[0.5]]], np.float32).reshape(1, 2, 1)
    got = want + np.array([0.0, 0.01], np.float32).reshape(1, 2, 1)
    assert max(exporting._differences(got, want, ())) == pytest.approx(0.01 / 600, rel=1e-3)
    assert max(exporting._differences(got, want, (1,))) == pytest.approx(0.02, rel=1e-3)


def test_large_weights_lie_in_one_aligned_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, onnx_run: Any) -> None:
    monkeypatch.setattr(exporting, "INLINE_BYTES", 20_000)
    module, x = Net(64), torch.randn(1, 64)
    path = tmp_path / "net.onnx"
    export_graph(module, [(x,)], path, SIGNATURE, FACTS)
    assert {f.name for f in tmp_path.iterdir()} == {"net.onnx", "net.onnx.data"}
    stored = [t for t in onnx.load(path, load_external_data=False).graph.initializer if t.external_data]
    offsets = [int(e.value) for t in stored for e in t.external_data if e.key == "offset"]
    assert len(stored) == 2 and all(o % 4096 == 0 for o in offsets)
    with torch.no_grad():
        want = module(x).numpy()
    np.testing.assert_allclose(onnx_run(path, {"x": x.numpy()})["y"], want, rtol=1e-5, atol=1e-6)
    assert graph.load_graph(path).info.parameters == sum(p.numel() for p in module.parameters())
    # a smaller model under the same name leaves nothing of the larger one
    monkeypatch.setattr(exporting, "INLINE_BYTES", 10**9)
    export_graph(module, [(x,)], path, SIGNATURE, FACTS)
    assert {f.name for f in tmp_path.iterdir()} == {"net.onnx"}
    np.testing.assert_allclose(onnx_run(path, {"x": x.numpy()})["y"], want, rtol=1e-5, atol=1e-6)


def test_weights_that_the_exporter_put_into_many_files_become_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the exporter does for models above 2 GB: one file per tensor."""
    source, weights = tmp_path / "traced", np.random.default_rng(0).standard_normal((2, 64, 64)).astype(np.float32)
    source.mkdir()
    nodes = [onnx.helper.make_node("MatMul", [a, w], [b]) for a, w, b in (("x", "w0", "h"), ("h", "w1", "y"))]
    specs = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 64]) for n in "xy"]
    tensors = [onnx.numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)]
    traced = onnx.helper.make_graph(nodes, "g", specs[:1], specs[1:], tensors)
    model = onnx.helper.make_model(traced, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(
        model, str(source / "m.onnx"), save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=0
    )
    assert len(list(source.iterdir())) == 3
    for limit, files in ((10**9, {"m.onnx"}), (1000, {"m.onnx", "m.onnx.data"})):
        monkeypatch.setattr(exporting, "INLINE_BYTES", limit)
        target = tmp_path / f"limit{limit}"
        target.mkdir()
        proto = onnx.load(str(source / "m.onnx"), load_external_data=False)
        exporting._write(proto, source, target / "m.onnx")
        assert {f.name for f in target.iterdir()} == files
        found = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(target / "m.onnx")).graph.initializer}
        assert np.array_equal(found["w0"], weights[0]) and np.array_equal(found["w1"], weights[1])
