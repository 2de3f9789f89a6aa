"""A sentence encoder's latency and similarity to float, beside ONNX Runtime's own quantization.

The encoder is all-MiniLM-L6-v2 (or another BERT with mean pooling): a folder with `model.safetensors`, `config.json`
and `vocab.txt`, as sentence-transformers have it. It is written as ONNX (opset 17, pooling and normalization inside),
and reads one sentence per inference, padded to 64 tokens. Sentences are those of Python's own documentation
(`pydoc_data.topics`): some calibrate and serve bitalloy's analysis, others are measured and seen by nothing else.

    python benchmarks/encoder_formats.py --model all-MiniLM-L6-v2/ --out /tmp/encoder

Models on `ort-cpu`: bitalloy's plan with the latency of `quantize_dynamic` as its limit, and its fastest plans with no
more error than `quantize_dynamic`, and than `quantize_static`, on the sentences of the analysis; `quantize_dynamic` per
channel and per tensor, and `quantize_static` (QDQ) with all operators and with MatMul alone, calibrated on the same
sentences. All are timed in turns in one process. Similarity is the cosine to the float embedding of the same sentence,
a mean with its bootstrap interval. Needs torch for the export. The last line is JSON.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pydoc_data.topics
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from rich.console import Console

import bitalloy
from bitalloy.measure.bench import paired_ratio, time_sittings
from bitalloy.runtime.machine import machine_name
from bitalloy.runtime.ort import OrtSession, available_cores
from bitalloy.runtime.steps import once
from bitalloy.tasks.bootstrap import RESAMPLES, resampled_weights

LENGTH = 64
"""Tokens of a sentence, padding included."""
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class WordPieces:
    """BERT's tokenizer for texts in lower case."""

    def __init__(self, path: Path) -> None:
        self._ids = {word: i for i, word in enumerate(path.read_text("utf-8").split("\n"))}

    def feeds(self, text: str) -> dict[str, np.ndarray]:
        """Return the encoder's inputs for a text, padded or cut to `LENGTH`."""
        pieces = [piece for word in self._words(text) for piece in self._pieces(word)][: LENGTH - 2]
        ids = [self._ids["[CLS]"], *pieces, self._ids["[SEP]"]]
        padding = [0] * (LENGTH - len(ids))
        rows = (ids + padding, [1] * len(ids) + padding, [0] * LENGTH)
        return {name: np.array([row], np.int64) for name, row in zip(INPUTS, rows, strict=True)}

    @staticmethod
    def _words(text: str) -> list[str]:
        plain = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
        return re.findall(r"[^\W_]+|[^\w\s]|_", plain)

    def _pieces(self, word: str) -> Iterator[int]:
        """Split a word into the longest known pieces from the left; a word with an unknown rest is `[UNK]`."""
        found, start = [], 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in self._ids:
                    found.append(self._ids[piece])
                    start = end
                    break
            else:
                yield self._ids["[UNK]"]
                return
        yield from found


def sentences(seed: int) -> list[str]:
    """Sentences of Python's documentation that read as English, in random order."""
    found: dict[str, None] = {}
    for text in pydoc_data.topics.topics.values():
        for paragraph in re.split(r"\n\s*\n", text):
            plain = " ".join(paragraph.split())
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", plain):
                letters = sum(c.isalpha() or c == " " for c in sentence)
                if 6 <= len(sentence.split()) <= 45 and sentence[0].isupper() and letters > 0.9 * len(sentence):
                    found[sentence] = None
    order = np.random.default_rng(seed).permutation(len(found))
    every = list(found)
    return [every[i] for i in order]


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Read the float32 tensors of a .safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            start, end = entry["data_offsets"]
            found[name] = np.frombuffer(data[8 + length + start : 8 + length + end], np.float32).reshape(entry["shape"])
    return found


def export(folder: Path, path: Path) -> None:
    """Write the encoder as ONNX: ids in, one normalized embedding out."""
    import torch
    from torch import nn
    from torch.nn import functional as fn

    config = json.loads((folder / "config.json").read_text())
    weights = {k.removeprefix("bert."): torch.tensor(v) for k, v in tensors(folder / "model.safetensors").items()}
    heads, layers, eps = config["num_attention_heads"], config["num_hidden_layers"], config["layer_norm_eps"]

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return fn.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return fn.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    class Encoder(nn.Module):
        def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
            at, count = "embeddings", ids.shape[1]
            x = fn.embedding(ids, weights[f"{at}.word_embeddings.weight"])
            x = x + fn.embedding(types, weights[f"{at}.token_type_embeddings.weight"])
            x = norm(f"{at}.LayerNorm", x + weights[f"{at}.position_embeddings.weight"][:count])
            far = (1.0 - mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
            for i in range(layers):
                name = f"encoder.layer.{i}"
                parts = [linear(f"{name}.attention.self.{part}", x) for part in ("query", "key", "value")]
                q, k, v = (p.reshape(1, count, heads, -1).transpose(1, 2) for p in parts)
                weight = torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + far, -1)
                seen = (weight @ v).transpose(1, 2).reshape(1, count, -1)
                x = norm(f"{name}.attention.output.LayerNorm", x + linear(f"{name}.attention.output.dense", seen))
                inner = fn.gelu(linear(f"{name}.intermediate.dense", x))
                x = norm(f"{name}.output.LayerNorm", x + linear(f"{name}.output.dense", inner))
            shown = mask[:, :, None].to(x.dtype)
            pooled = (x * shown).sum(1) / shown.sum(1).clamp(min=1e-9)
            return fn.normalize(pooled, dim=1)

    traced = path.with_suffix(".traced")
    example = tuple(torch.ones(1, LENGTH, dtype=torch.int64) for _ in INPUTS)
    torch.onnx.export(
        Encoder().eval(),
        example,
        str(traced),
        input_names=list(INPUTS),
        output_names=["embedding"],
        opset_version=17,
        dynamo=False,
    )
    # what the tracer wrote as Constant nodes becomes initializers: ONNX Runtime's tools quantize no others
    model = onnx.load(traced)
    constants = [node for node in model.graph.node if node.op_type == "Constant" and node.attribute[0].name == "value"]
    for node in constants:
        node.attribute[0].t.name = node.output[0]
        model.graph.initializer.append(node.attribute[0].t)
        model.graph.node.remove(node)
    onnx.save(model, path)
    traced.unlink()


def write_feeds(folder: Path, feeds: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Write one .npz for every sentence."""
    folder.mkdir(exist_ok=True)
    for i, feed in enumerate(feeds):
        np.savez(folder / f"{i:04d}.npz", **feed)  # type: ignore[arg-type]


def peers(source: Path, folder: Path, feeds: Sequence[dict[str, np.ndarray]]) -> dict[str, Path]:
    """Models of ONNX Runtime's own tools."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._left = iter(feeds)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._left, None)

    found = {}
    for name, per_channel in (("dynamic channel", True), ("dynamic tensor", False)):
        found[name] = folder / f"{name}.onnx"
        if not found[name].is_file():
            quantize_dynamic(source, found[name], per_channel=per_channel)
    prepared = folder / "prepared.onnx"
    for name, operators in (("static all", None), ("static MatMul", ["MatMul"])):
        found[name] = folder / f"{name}.onnx"
        if not found[name].is_file():
            quant_pre_process(source, prepared)
            quantize_static(
                prepared,
                found[name],
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=operators,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
    return found


def embeddings(path: Path, feeds: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    """Embeddings (sentences, width) of a model, of length 1."""
    session = OrtSession(path)
    found = np.concatenate([session.run(feed)["embedding"] for feed in feeds]).astype(np.float64)
    session.close()
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True))


def mean(values: np.ndarray, seed: int) -> dict[str, float]:
    """A mean over sentences with its bootstrap interval."""
    weights = resampled_weights(len(values), RESAMPLES, seed)
    low, high = np.percentile(weights @ values / len(values), (2.5, 97.5))
    return {k: round(float(v), 6) for k, v in (("value", values.mean()), ("low", low), ("high", high))}


def latency(models: Mapping[str, Path], feed: Mapping[str, np.ndarray], rounds: int) -> dict[str, np.ndarray]:
    """Times in ms of all models, in turns."""
    found = time_sittings({n: partial(OrtSession, p) for n, p in models.items()}, [once(feed)], repeats=rounds)
    return {name: series[..., 0] for name, series in found.items()}


def main() -> None:
    """Run the comparison and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the encoder")
    parser.add_argument("--out", type=Path, required=True, help="folder of models and stored results")
    parser.add_argument("--sentences", type=int, default=96, help="for calibration and analysis")
    parser.add_argument("--unseen", type=int, default=300, help="sentences that are measured")
    parser.add_argument("--schemes", default="w4,w8,int8-dynamic,int8", help="of bitalloy's plans, with commas")
    parser.add_argument("--samples", type=int, default=16, help="of the probe matrix")
    parser.add_argument("--rounds", type=int, default=40, help="timed rounds in each sitting")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console(stderr=True, soft_wrap=True)
    out, source = options.out, options.out / "encoder.onnx"
    out.mkdir(parents=True, exist_ok=True)
    if not source.is_file():
        export(options.model, source)
    pieces, every = WordPieces(options.model / "vocab.txt"), sentences(options.seed)
    feeds = [pieces.feeds(text) for text in every[: options.sentences + options.unseen]]
    known, fresh = feeds[: options.sentences], feeds[options.sentences :]
    write_feeds(out / "feeds", known)

    models = {"float": source, **peers(source, out, known)}
    times = latency({n: models[n] for n in ("float", "dynamic channel", "dynamic tensor")}, fresh[0], options.rounds)
    limit = min(paired_ratio(times[n], times["float"]).value for n in times if n != "float")
    reference = embeddings(source, known)
    error = {n: ((embeddings(models[n], known) - reference) ** 2).sum(1).mean() for n in models if n != "float"}
    floor, static = (-10 * np.log10(min(error[n] for n in error if n.startswith(kind))) for kind in ("dyn", "static"))
    settings = bitalloy.Settings(schemes=tuple(options.schemes.split(",")), samples=options.samples, seed=options.seed)
    made = {}
    for name, budget in (
        ("bitalloy, as fast", bitalloy.Budget(latency_ratio=limit)),
        ("bitalloy, as similar", bitalloy.Budget(min_sqnr_db=floor)),
        ("bitalloy, as similar as static", bitalloy.Budget(min_sqnr_db=static)),
    ):
        verified = bitalloy.run(source, out=out / "run", data=out / "feeds", budget=budget, settings=settings)
        models[name], made[name] = out / f"{name}.onnx", verified.summary
        shutil.copyfile(out / "run" / "mixed.onnx", models[name])
        console.print(name, verified.summary.headline, highlight=False)

    times = latency(models, fresh[0], options.rounds)
    truth, rows = embeddings(source, fresh), {}
    cosine = {name: (embeddings(path, fresh) * truth).sum(1) for name, path in models.items()}
    for name, path in models.items():
        ratio = paired_ratio(times[name], times["float"])
        row: dict[str, Any] = {
            "ms": round(float(np.median(times[name])), 3),
            "ratio": [round(v, 4) for v in (ratio.value, ratio.low, ratio.high)],
            "cosine": mean(cosine[name], options.seed),
            "bytes": path.stat().st_size,
        }
        if name in made:
            others = [n for n in models if n not in made and n != "float"]
            row["cosine_above"] = {n: mean(cosine[name] - cosine[n], options.seed) for n in others}
            over = {n: paired_ratio(times[name], times[n]) for n in others}
            row["time_over"] = {n: [round(v, 4) for v in (r.value, r.low, r.high)] for n, r in over.items()}
            row["schemes"], row["units"] = made[name].schemes, made[name].units
            row["sqnr_db"] = {head: msgspec.to_builtins(one.mixed) for head, one in made[name].sqnr_db.items()}
        rows[name] = row
        console.print(name, row, highlight=False)
    print(
        json.dumps(
            {
                "benchmark": "encoder_formats",
                "machine": machine_name(),
                "threads": available_cores(),
                "load_1_minute": round(os.getloadavg()[0], 2),
                "versions": {p: importlib.metadata.version(p) for p in ("onnxruntime", "onnx", "numpy", "torch")}
                | {"python": sys.version.split()[0]},
                "seed": options.seed,
                "schemes": options.schemes,
                "samples": options.samples,
                "sentences": options.sentences,
                "unseen": len(fresh),
                "limit_ratio": round(limit, 4),
                "floor_db": round(float(floor), 2),
                "models": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
