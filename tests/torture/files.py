"""Mutated files of every kind that is read."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from PIL import Image
from tests import fuzz
from tests.conftest import classifier, detector, save_images
from tests.small_programs import write_promptable

from bitalloy.samples import shapes

SECONDS = 120
"""Time after which a case counts as a hang."""
MOST = 2000
"""Number of cases at most."""
PACKAGES = {"safetensors": "safetensors", "pt": "torch"}
"""Kind of file -> package that reads it."""
Work = Sequence[str] | Callable[[], object]
STRANGE: tuple[Any, ...] = (
    *(None, True, 0, -1, 1e308, 2**63, -(2**70), "", "x", "../../etc/passwd", "/dev/zero", "a\0b"),
    *("é" * 3000, "\ud800", [], {}, [[]], {"x": []}, "[" * 3000, "1e999"),
)
"""Values for fields of JSON."""


def suffer(seconds: float, seed: int) -> dict[str, Any]:
    """Try cases of all kinds in turn until the time is over or all are done."""
    import bitalloy.pipeline.check
    import bitalloy.pipeline.evaluate
    import bitalloy.pipeline.plan
    import bitalloy.pipeline.run
    import bitalloy.pipeline.sensitivity  # noqa: F401  imported once, for all children

    end, faults = time.monotonic() + seconds, []
    tried: Counter[str] = Counter()
    codes: Counter[str] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        base = Path(name) / "base"
        base.mkdir()
        _prepare(base)
        absent = [kind for kind, package in PACKAGES.items() if find_spec(package) is None]
        kinds = [*(kind for kind in KINDS if kind not in absent), *("onnx",) * 4]
        for number in range(MOST):
            if time.monotonic() > end:
                break
            kind = kinds[number % len(kinds)]
            rng, folder = random.Random(f"{seed} {kind} {number}"), Path(name) / "case"
            folder.mkdir()
            outcome = fuzz.attempt(KINDS[kind](rng, folder, base), folder, seconds=SECONDS)
            tried[kind] += 1
            codes[str(outcome.code)] += 1
            slowest = max(slowest, outcome.seconds)
            if outcome.fault and not (kind == "run" and outcome.fault.startswith("spoiled")):  # by us
                faults.append(f"{kind} {number}: {outcome.fault}: {outcome.text[-1500:]}")
            shutil.rmtree(folder)
    return {
        "cases": sum(tried.values()),
        "by_kind": dict(tried),
        "not_installed": absent,
        "exit_codes": dict(codes),
        "slowest_s": round(slowest, 1),
        "faults": faults,
    }


def _prepare(base: Path) -> None:
    """Sound files of all kinds, and a finished run."""
    fuzz.write_feeds(base / "feeds")
    for name, model in {**fuzz.bases(), "classifier": classifier(), "detector": detector()}.items():
        onnx.save(model, base / f"{name}.onnx")
    onnx.save(fuzz.bases()["two"], base / "apart.onnx", save_as_external_data=True, location="w", size_threshold=64)
    save_images(base / "images", count=2)
    shapes.write_coco(base / "labelled", count=2, seed=0, size=64)
    write_promptable(base / "program")
    words = ["run", str(base / "two.onnx"), "--data", str(base / "feeds" / "two"), *fuzz.QUICK, "--effort", "quick"]
    done = fuzz.attempt([*words, "--size", "0.9x", "--out", "run"], base)
    assert done.code == 0, done.text


def _spoiled(path: Path, rng: random.Random) -> None:
    """Change the bytes of a file."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 3)):
        fuzz.mutate_bytes(data, rng)
    path.write_bytes(bytes(data))


def _spoiled_json(path: Path, rng: random.Random) -> None:
    """Change the bytes of a JSON file, or some of its values."""
    if rng.random() < 0.3:
        _spoiled(path, rng)
        return
    content = json.loads(path.read_text())
    for _ in range(rng.randint(1, 3)):
        places: list[tuple[Any, Any]] = []
        waiting: list[Any] = [content]
        while waiting:
            part = waiting.pop()
            if isinstance(part, (dict, list)):
                entries: Any = part.items() if isinstance(part, dict) else enumerate(part)
                places += [(part, key) for key, _ in entries]
                waiting += [inside for _, inside in entries]
        if not places:
            return
        part, key = rng.choice(places)
        if rng.random() < 0.2 and isinstance(part, dict):
            del part[key]
        else:
            part[key] = rng.choice(STRANGE)
    path.write_text(json.dumps(content))


def _onnx(rng: random.Random, folder: Path, base: Path) -> Work:
    return fuzz.file_case(rng.randrange(10**6), 0, folder, base / "feeds")


def _external(rng: random.Random, folder: Path, base: Path) -> Work:
    shutil.copy(base / "apart.onnx", folder)
    shutil.copy(base / "w", folder)
    if rng.random() < 0.5:
        _spoiled(folder / "w", rng)
    else:
        proto = onnx.load(folder / "apart.onnx", load_external_data=False)
        entry = rng.choice(rng.choice([t for t in proto.graph.initializer if t.external_data]).external_data)
        entry.value = str(rng.choice([v for v in STRANGE if not isinstance(v, str) or v.isprintable()]))
        (folder / "apart.onnx").write_bytes(proto.SerializeToString())
    return ["sensitivity", "apart.onnx", "--data", str(base / "feeds" / "two"), *fuzz.QUICK, "--out", "run"]


def _checkpoint(suffix: str) -> Callable[[random.Random, Path, Path], Work]:
    def make(rng: random.Random, folder: Path, base: Path) -> Work:
        import torch

        from bitalloy.zoo.checkpoints import read

        path = folder / f"weights.{suffix}"
        tensors = {"a": torch.arange(200.0), "b": torch.zeros(3, 4, dtype=torch.float16)}
        if suffix == "pt":
            torch.save(tensors, path)
        else:
            from safetensors.torch import save_file

            save_file(tensors, path)
        _spoiled(path, rng)
        return lambda: read(path)

    return make


def _program(rng: random.Random, folder: Path, base: Path) -> Work:
    import bitalloy

    shutil.copytree(base / "program", folder / "program")
    files = sorted((folder / "program").glob("*.onnx"))
    if rng.random() < 0.6:
        _spoiled_json(folder / "program" / "program.json", rng)
    else:
        path = rng.choice(files)
        path.write_bytes(fuzz.mutated(onnx.load(path), rng))
    return lambda: bitalloy.load(folder / "program")


def _run_files(rng: random.Random, folder: Path, base: Path) -> Work:
    shutil.copytree(base / "run", folder / "run")
    names = ("summary.json", "plan.json", "units.json", "cost.json", "planning.json", "planning.npz", "mixed.onnx")
    path = folder / "run" / rng.choice(names)
    (_spoiled_json if path.suffix == ".json" else _spoiled)(path, rng)
    lines = (
        ["plan", "run"],
        ["check", "run"],
        ["report", "run"],
        ["diff", "run", str(base / "run")],
        ["audit", "run"],
        ["clean", "run"],
    )
    return rng.choice(lines)


def _coco(rng: random.Random, folder: Path, base: Path) -> Work:
    shutil.copytree(base / "labelled", folder / "labelled")
    _spoiled_json(folder / "labelled" / "instances.json", rng)
    task = rng.choice(("detector.onnx", "program"))
    if task == "program":
        words = ["evaluate", str(base / task), "--eval", "labelled/instances.json"]
        return [*words, "--limit", "1"]
    return ["evaluate", str(base / task), "--eval", "labelled/instances.json"]


def _label(rng: random.Random, folder: Path, base: Path) -> Work:
    from bitalloy.tasks.ade import find_pairs, read_label

    labels = np.arange(64, dtype=np.uint8).reshape(8, 8) % 4
    Image.fromarray(labels, rng.choice(("L", "P"))).save(folder / "a.png")
    Image.new("RGB", (8, 8)).save(folder / "a.jpg")
    _spoiled(folder / "a.png", rng)
    return lambda: [read_label(pair, (8, 8), 4, reduce_zero_label=False) for pair in find_pairs(folder)]


def _image(rng: random.Random, folder: Path, base: Path) -> Work:
    import bitalloy

    suffix = rng.choice(("png", "jpg", "bmp", "webp"))
    pixels = np.random.default_rng(rng.randrange(100)).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    (folder / "images").mkdir()
    Image.fromarray(pixels).save(folder / "images" / f"a.{suffix}")
    _spoiled(folder / "images" / f"a.{suffix}", rng)

    def use() -> object:
        model = bitalloy.load(base / "classifier.onnx")
        return bitalloy.open_data(model, folder / "images", image={"fit": rng.choice(("crop", "letterbox"))}).feeds(0)

    return use


def _feeds(rng: random.Random, folder: Path, base: Path) -> Work:
    shutil.copytree(base / "feeds" / "two", folder / "feeds")
    _spoiled(folder / "feeds" / "000.npz", rng)
    return ["sensitivity", str(base / "two.onnx"), "--data", "feeds", *fuzz.QUICK, "--out", "run"]


KINDS: dict[str, Callable[[random.Random, Path, Path], Work]] = {
    "onnx": _onnx,
    "external": _external,
    "safetensors": _checkpoint("safetensors"),
    "pt": _checkpoint("pt"),
    "program": _program,
    "run": _run_files,
    "coco": _coco,
    "label": _label,
    "image": _image,
    "feeds": _feeds,
}
"""Kind of file -> what makes a case of it in a folder from sound files."""
