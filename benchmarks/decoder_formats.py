"""Latency and memory of a full-size language decoder in each format, beside float and ONNX Runtime's own tools.

The decoder is MobileVLM V2's with random weights, exported once. Every model answers one token after a past of
`--past` tokens, and reads a prompt of as many at once; all in turns in one process. Resident memory is the peak of a
process of its own that opens a model and makes one token.

    python benchmarks/decoder_formats.py --layers 4 --out /tmp/decoder

Models: `float`; all products with a constant matrix in `w4`, `w4-128`, `w8` or `int8-dynamic` by bitalloy; and as
peers `MatMulNBitsQuantizer` (4 bit, block 32, accuracy level 4) and `quantize_dynamic` (per channel). The last line is
JSON: `decode_ratio`, `prefill_ratio` and `memory_ratio` of bitalloy's `w4` to float, `schemes` and `peers` with the
same of the others and their size in bytes. Plans that mix formats are not measured here, nor are the caches that the
decoder also returns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from bitalloy.core.schemes import Plan
from bitalloy.measure.bench import paired_ratio, time_sittings
from bitalloy.model.heads import find_heads
from bitalloy.model.load import load_graph
from bitalloy.rewrite.apply import write_plan
from bitalloy.runtime.machine import machine_name
from bitalloy.runtime.ort import OrtSession, available_cores
from bitalloy.runtime.steps import once
from bitalloy.targets.base import split
from bitalloy.targets.ort_cpu import ORT_CPU
from bitalloy.targets.recipe import Recipe
from large_decoder import LLAMA, sizes_of, status_gb

SCHEMES = ("w4", "w4-128", "w8", "int8-dynamic")


def feeds_of(path: Path, new: int, past: int) -> dict[str, np.ndarray]:
    """Random embeddings and caches, all positions attended."""
    generator, found = np.random.default_rng(0), {}
    for name, shape in sizes_of(path, new, past).items():
        if name == "attention_mask":
            found[name] = np.ones(shape, np.int64)
        elif name == "position_ids":
            found[name] = np.arange(past, past + new)[None]
        else:
            found[name] = (0.02 * generator.standard_normal(shape)).astype(np.float32)
    return found


def write_ours(source: Path, folder: Path, new: int, past: int) -> dict[str, Path]:
    """Write the decoder with all stored products in each scheme, at given sizes."""
    graph = load_graph(source, shapes=sizes_of(source, new, past))
    units = split(graph, ORT_CPU, find_heads(graph), schemes=SCHEMES)
    recipe, found = Recipe(units, ORT_CPU, {}), {}
    for scheme in ("float", *SCHEMES):
        path = folder / f"{scheme}-{new}.onnx"
        if not path.is_file():
            plan = Plan() if scheme == "float" else Plan.of(scheme, *units.able(scheme))
            write_plan(graph, recipe, plan).save(path)
        found[scheme] = path
    return found


def write_peers(source: Path, folder: Path) -> dict[str, Path]:
    """Write what ONNX Runtime's tools make of the file; sizes stay open."""
    found = {"MatMulNBitsQuantizer": folder / "nbits.onnx", "quantize_dynamic": folder / "dynamic.onnx"}
    if not found["MatMulNBitsQuantizer"].is_file():
        maker = MatMulNBitsQuantizer(onnx.load(source), bits=4, block_size=32, is_symmetric=True, accuracy_level=4)
        maker.process()
        maker.model.save_model_to_file(str(found["MatMulNBitsQuantizer"]), use_external_data_format=True)
    if not found["quantize_dynamic"].is_file():
        quantize_dynamic(
            source,
            found["quantize_dynamic"],
            per_channel=True,
            op_types_to_quantize=["MatMul"],
            use_external_data_format=True,
        )
    return found


def timed(models: Mapping[str, Path], feeds: Mapping[str, np.ndarray], rounds: int) -> dict[str, float]:
    """Latency of each model over that of float, in turns."""
    openers = {name: partial(OrtSession, path) for name, path in models.items()}
    found = time_sittings(openers, [once(feeds)], repeats=rounds)
    times = {name: series[..., 0] for name, series in found.items()}
    return {name: round(paired_ratio(one, times["float"]).value, 4) for name, one in times.items()}


def memory_of(path: Path, source: Path, past: int) -> float:
    """Peak resident memory in MB of a process that makes one token."""
    command = [sys.executable, __file__, "--resident", str(path), "--source", str(source), "--past", str(past)]
    made = subprocess.run([*command, "--out", str(path.parent)], check=True, capture_output=True, text=True)
    return float(made.stdout.split()[-1])


def main() -> None:
    """Measure all models and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the models; those in it are used again")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--size", default="1.7b", help="see reference/llama.py")
    parser.add_argument("--past", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--resident", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.resident is not None:
        session, feeds = OrtSession(options.resident), feeds_of(options.source, 1, options.past)
        session.run(feeds)
        print(1e3 * status_gb("VmHWM"))
        return
    source, exported = options.out / "logits.onnx", options.out / "decoder.onnx"
    if not source.is_file():
        options.out.mkdir(parents=True, exist_ok=True)
        arguments = ["--size", options.size, "--layers", str(options.layers), "--out", str(exported)]
        subprocess.run([sys.executable, str(LLAMA), *arguments], check=True)
        model = onnx.load(exported)
        del model.graph.output[1:]
        onnx.save(model, source, save_as_external_data=True, location="logits.onnx.data")
    peers = write_peers(source, options.out)
    decode = write_ours(source, options.out, 1, options.past) | peers
    prefill = write_ours(source, options.out, options.past, 0) | peers
    ratios = {
        "decode_ratio": timed(decode, feeds_of(source, 1, options.past), options.rounds),
        "prefill_ratio": timed(prefill, feeds_of(source, options.past, 0), options.rounds),
    }
    memory = {name: memory_of(path, source, options.past) for name, path in decode.items()}
    ratios["memory_ratio"] = {name: round(value / memory["float"], 4) for name, value in memory.items()}
    size = {
        name: path.stat().st_size + (data.stat().st_size if (data := Path(f"{path}.data")).is_file() else 0)
        for name, path in decode.items()
    }
    rows = {name: {k: v[name] for k, v in ratios.items()} | {"bytes": size[name]} for name in decode}
    for name, row in rows.items():
        print(name, row, file=sys.stderr)
    print(
        json.dumps(
            {
                "benchmark": "decoder_formats",
                "machine": machine_name(),
                "threads": available_cores(),
                "layers": options.layers,
                "past": options.past,
                **{k: rows["w4"][k] for k in ratios},
                "schemes": {name: rows[name] for name in ("float", *SCHEMES)},
                "peers": {name: rows[name] for name in peers},
            }
        )
    )


if __name__ == "__main__":
    main()
