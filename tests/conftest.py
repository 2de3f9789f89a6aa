"""Tiny models and data for everything that runs the whole pipeline, and the command line in a subprocess."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import settings
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from tests.cnn import Case, observed
from tests.small_programs import write_language, write_promptable

from bitalloy.cli.console import out_console
from bitalloy.cli.main import main
from bitalloy.core.units import UnitGraph
from bitalloy.samples import shapes

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

QUICK = ("--samples", "8", "--probes", "2", "--calibration-samples", "8")
"""Options that make a run as small as it can be."""


class Network:
    """A growing ONNX graph: each method adds a node and gives the name of its result."""

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{kind.lower()}{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, list(inputs), [name], name=f"/{name}/{kind}", **attributes))
        return name

    def constant(self, array: np.ndarray) -> str:
        name = f"constant{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, *shape: int) -> str:
        spread = np.sqrt(2 / np.prod(shape[1:]))
        return self.constant((self._random.standard_normal(shape) * spread).astype(np.float32))

    def conv(self, x: str, inside: int, outside: int, kernel: int = 3, stride: int = 1) -> str:
        pad = kernel // 2
        weight, bias = self.weight(outside, inside, kernel, kernel), self.weight(outside)
        return self.op("Conv", x, weight, bias, strides=[stride] * 2, pads=[pad] * 4, kernel_shape=[kernel] * 2)

    def silu(self, x: str) -> str:
        return self.op("Mul", x, self.op("Sigmoid", x))

    def gemm(self, x: str, inside: int, outside: int) -> str:
        return self.op("Gemm", x, self.weight(outside, inside), self.weight(outside), transB=1)

    def model(
        self, inputs: Mapping[str, Sequence[int | str]], outputs: Mapping[str, Sequence[int | str]]
    ) -> onnx.ModelProto:
        """The network with the results in `outputs` renamed: result -> shape."""
        reads, makes = (
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(s)) for n, s in values.items()]
            for values in (inputs, outputs)
        )
        graph = helper.make_graph(self._nodes, "tiny", reads, makes, self._constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        return model


def classifier(*, sides: Sequence[int | str] = (32, 32)) -> onnx.ModelProto:
    """Images 1x3x32x32 -> 10 logits; Conv, SiLU, Add, Concat, Relu, pooling, Gemm. Weights make most of its file."""
    net = Network()
    x = net.silu(net.conv("images", 3, 32, stride=2))
    y = net.op("Add", x, net.silu(net.conv(x, 32, 32)))
    z = net.op("Relu", net.conv(net.op("Concat", x, y, axis=1), 64, 32, stride=2))
    pooled = net.op("Flatten", net.op("GlobalAveragePool", z), axis=1)
    logits = net.op("Identity", net.gemm(pooled, 32, 10))
    return net.model({"images": (1, 3, *sides)}, {logits: (1, 10)})


def two_inputs() -> onnx.ModelProto:
    """`left` (1, 16) and `right` (1, 16) -> (1, 4)."""
    net = Network(1)
    total = net.op("Add", net.gemm("left", 16, 128), net.gemm("right", 16, 128))
    result = net.gemm(net.op("Relu", net.gemm(net.op("Relu", total), 128, 128)), 128, 4)
    return net.model({"left": (1, 16), "right": (1, 16)}, {result: (1, 4)})


def channels_last() -> onnx.ModelProto:
    """Images 1x24x32x3, as TensorFlow stores them -> a map (1, 24, 32, 4)."""
    net = Network(2)
    x = net.op("Transpose", "pixels", perm=[0, 3, 1, 2])
    x = net.conv(net.op("Relu", net.conv(x, 3, 128)), 128, 4)
    return net.model({"pixels": (1, 24, 32, 3)}, {net.op("Transpose", x, perm=[0, 2, 3, 1]): (1, 24, 32, 4)})


def detector() -> onnx.ModelProto:
    """Images 1x3x64x64 -> (1, 4 + classes, 256) as a YOLO writes it: boxes in pixels, scores in 0..1."""
    net = Network(3)
    x = net.silu(net.conv("images", 3, 32, stride=2))
    x = net.silu(net.conv(x, 32, 32, stride=2))
    heads = []
    for rows, factor in ((4, 64.0), (len(shapes.CLASSES), 1.0)):
        y = net.op("Sigmoid", net.conv(x, 32, rows, kernel=1))
        y = net.op("Reshape", y, net.constant(np.array([1, rows, 256])))
        heads.append(y if factor == 1 else net.op("Mul", y, net.constant(np.array(factor, np.float32))))
    return net.model({"images": (1, 3, 64, 64)}, {net.op("Concat", *heads, axis=1): (1, 4 + len(shapes.CLASSES), 256)})


def save_images(folder: Path, *, count: int = 32, size: tuple[int, int] = (32, 32), mode: str = "RGB") -> Path:
    """PNG images of smooth noise; `size` is (width, height)."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(7)
    for index in range(count):
        coarse = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR).convert(mode).save(folder / f"{index:03d}.png")
    return folder


def save_feeds(folder: Path, *, count: int = 32, **shapes_: tuple[int, ...]) -> Path:
    """A .npz per sample with normally distributed arrays of the given shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(8)
    for index in range(count):
        arrays = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes_.items()}
        np.savez(folder / f"{index:03d}.npz", **arrays)  # type: ignore[arg-type]
    return folder


@dataclass(frozen=True)
class Inputs:
    """Models and data on disk, shared by all tests: never write into them."""

    folder: Path
    classifier: Path
    images: Path
    two_inputs: Path
    feeds: Path
    channels_last: Path
    detector: Path
    scenes: Path
    """Images that fit the detector."""
    labels: Path
    """COCO annotations of other scenes, with their images."""

    def command_line(self, folder: Path) -> Process:
        """The command line in another folder, for fixtures that serve several tests."""
        return Process(folder)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    for make in (classifier, two_inputs, channels_last, detector):
        onnx.save(make(), folder / f"{make.__name__}.onnx")
    scenes = shapes.write_coco(folder / "scenes", count=32, seed=0, size=64, split="train")
    labelled = shapes.write_coco(folder / "labelled", count=8, seed=0, size=64)
    return Inputs(
        folder=folder,
        classifier=folder / "classifier.onnx",
        images=save_images(folder / "images"),
        two_inputs=folder / "two_inputs.onnx",
        feeds=save_feeds(folder / "feeds", left=(1, 16), right=(1, 16)),
        channels_last=folder / "channels_last.onnx",
        detector=folder / "detector.onnx",
        scenes=scenes / "images",
        labels=labelled / "instances.json",
    )


@dataclass(frozen=True)
class Command:
    """What a finished command left behind."""

    code: int
    out: str
    err: str

    def succeeded(self) -> Command:
        assert self.code == 0, f"exit code {self.code}\n{self.out}\n{self.err}"
        return self

    def refused(self, code: int = 2) -> str:
        """The message of a command that the user must correct: one message, no traceback.

        Its exit code is 2, or 4 where no plan keeps the limits.
        """
        assert self.code == code, f"exit code {self.code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.out + self.err
        assert self.out == ""
        message = " ".join(line.strip("│ ") for line in self.err.splitlines() if not _is_progress(line))
        assert len(re.findall("^Error: |─ Error ─", self.err, re.MULTILINE)) == 1, self.err
        return message


def _is_progress(line: str) -> bool:
    return "\u2501" in line or not line.strip()


class CommandLine(ABC):
    """The command line in an empty folder of its own."""

    REACHABLE = ("--size", "0.6x")
    """A budget that needs some INT8 and does not depend on how busy the machine is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        """Where it runs."""

    @abstractmethod
    def __call__(self, *arguments: object) -> Command:
        """Run with the arguments."""

    def run(self, model: object, *options: object, out: str = "run") -> Command:
        """`bitalloy run` with settings that make it quick."""
        return self("run", model, *QUICK, *options, "--out", out)

    def files(self, out: str = "run") -> set[str]:
        """All files of a run directory, as relative paths; empty where there is none."""
        root = self.folder / out
        return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}

    def results(self, out: str = "run") -> set[str]:
        """The files that a user reads. Fails where a file is left that was not written to its end."""
        files = self.files(out)
        assert not [f for f in files if "partial" in f]
        return {f for f in files if "/" not in f} - {".bitalloy-run"}

    def contents(self, out: str = "run") -> dict[str, bytes]:
        """The same files with what they hold."""
        return {name: (self.folder / out / name).read_bytes() for name in self.results(out)}

    def summary(self, out: str = "run") -> dict[str, Any]:
        """summary.json of a run directory."""
        content: dict[str, Any] = json.loads((self.folder / out / "summary.json").read_text())
        return content


class Process(CommandLine):
    """As a user runs it: in a process of its own. `start` is the Python that begins it."""

    def __init__(self, folder: Path, start: str = "from bitalloy.cli.main import main; main()") -> None:
        super().__init__(folder)
        self._start = start

    def starting(self, start: str) -> Process:
        """The same folder with another beginning."""
        return Process(self.folder, start)

    def __call__(self, *arguments: object) -> Command:
        environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "PYTHONWARNINGS": "error"}
        words = [sys.executable, "-c", self._start, *map(str, arguments)]
        done = subprocess.run(
            words, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        return Command(done.returncode, done.stdout, done.stderr)


class Inside(CommandLine):
    """In this process: the same entry point without the seconds that a new interpreter takes. For long tables."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        super().__init__(folder)
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> Command:
        with self._monkeypatch.context() as patch:
            patch.chdir(self.folder)
            patch.setattr(out_console, "width", 200)
            patch.setattr(sys, "argv", ["bitalloy", *map(str, arguments)])
            code = 0
            try:
                main()
            except SystemExit as stopped:
                code = int(stopped.code or 0)
        shown = self._capsys.readouterr()
        return Command(code, shown.out, shown.err)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """An empty folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


@pytest.fixture
def bitalloy(here: Path) -> Process:
    return Process(here)


@pytest.fixture
def inside(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Inside:
    return Inside(here, monkeypatch, capsys)


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The small network of `tests/cnn.py` with ranges observed by running it."""
    return observed(tmp_path_factory.mktemp("cnn") / "cnn.onnx")


@pytest.fixture(scope="session")
def case_units(case: Case) -> UnitGraph:
    """Units of the small network."""
    return case.units


@pytest.fixture(scope="session")
def promptable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_promptable(tmp_path_factory.mktemp("promptable"))


@pytest.fixture(scope="session")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language(tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten drawn scenes with labels of all tasks."""
    return shapes.write_coco(tmp_path_factory.mktemp("drawn") / "set", count=10, seed=0, size=64, split="train")
