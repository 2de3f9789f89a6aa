"""Latency, memory and damage of a full-size language decoder in each format and mixed, beside ONNX Runtime's own tools.

The decoder is MobileVLM V2's with random weights, exported once. All models are run in turns in one process: one token
behind a past of `--past` tokens (decode), as many tokens at once (prefill), and both as an answer of `--new` tokens has
them. Resident memory is the peak of a process of its own that opens a model and makes one token.

    python benchmarks/decoder_formats.py --layers 4 --out /tmp/decoder

Models: `float`; all products with a constant matrix in one scheme of bitalloy; the plans that bitalloy's search makes;
and as peers `MatMulNBitsQuantizer` (4 bit, block 32, accuracy level 4), `quantize_dynamic` (per channel), and the rule
of onnxruntime-genai for mixed models (8 bits for the last product, and for q, k, v and down projections of the first
and last eighth and of every third layer, 4 bits for others), in the same blocks of 32. Plans of the search: `decode`,
`prefill` and `answer` have the least predicted damage at the latency of the fastest single scheme for that workload,
with 5 % of room; `as genai` at the latency of the genai rule for an answer; and `least` is the fastest for an answer.

Costs are measured on `--cost-layers` layers: those of layer i are taken for all layers i modulo their number. Damage
comes from the probe matrix of all layers, without measuring how the network bends, and is compared with an execution on
a prompt that the probes have not seen. The last line is JSON: `decode_ratio`, `prefill_ratio` and `answer_ratio` (of
the plans made for that), `memory_ratio` (of `answer`), and rows for `plans`, `schemes` and `peers`, with predicted and
measured dB.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from bitalloy.core.plans import Budget, CostTable, UnitCost
from bitalloy.core.records import Head, Secant
from bitalloy.core.schemes import Plan
from bitalloy.core.units import UnitGraph
from bitalloy.measure import cost
from bitalloy.measure.bench import paired_ratio, time_sittings
from bitalloy.model.heads import Reference, find_heads
from bitalloy.model.load import Graph, load_graph
from bitalloy.rewrite.apply import write_plan
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.base import ONLY
from bitalloy.runtime.machine import machine_name
from bitalloy.runtime.ort import OrtSession, available_cores
from bitalloy.runtime.steps import once
from bitalloy.search.choice import search
from bitalloy.search.problem import Problem
from bitalloy.sensitivity.matrix import ProbeMatrix, decibel
from bitalloy.sensitivity.probe import Prober
from bitalloy.targets.base import split
from bitalloy.targets.ort_cpu import ORT_CPU
from bitalloy.targets.placement import rounded
from bitalloy.targets.recipe import Recipe
from large_decoder import LLAMA, sizes_of, status_gb

SCHEMES = ("w4", "w4-128", "w8", "int8-dynamic")
ROOM = 1.05
LAYER = re.compile(r"layers\.(\d+)")


def feeds_of(path: Path, new: int, past: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random embeddings and caches, all positions attended."""
    generator, found = np.random.default_rng(seed), {}
    for name, shape in sizes_of(path, new, past).items():
        if name == "attention_mask":
            found[name] = np.ones(shape, np.int64)
        elif name == "position_ids":
            found[name] = np.arange(past, past + new)[None]
        else:
            found[name] = (0.02 * generator.standard_normal(shape)).astype(np.float32)
    return found


class Decoder:
    """A decoder at some sizes of its inputs, and its products as units."""

    def __init__(self, path: Path, new: int, past: int) -> None:
        self.path, self.new, self.past = path, new, past
        self.graph: Graph = load_graph(path, shapes=sizes_of(path, new, past))
        self.heads: tuple[Head, ...] = tuple(find_heads(self.graph))
        self.units: UnitGraph = split(self.graph, ORT_CPU, self.heads, schemes=SCHEMES)
        self.recipe = Recipe(self.units, ORT_CPU, {})

    def feeds(self, seed: int = 0) -> dict[str, np.ndarray]:
        """One sample."""
        return feeds_of(self.path, self.new, self.past, seed)

    def artefact(self, plan: Plan) -> Artefact:
        """The model of a plan."""
        return Artefact({ONLY: write_plan(self.graph, self.recipe, plan).model})

    def original(self) -> Artefact:
        """The decoder as it was exported."""
        return Artefact({ONLY: self.path})

    def write(self, plan: Plan, path: Path) -> Path:
        """Write the model of a plan, where it is not there yet."""
        if not path.is_file():
            write_plan(self.graph, self.recipe, plan).save(path)
        return path

    def table(self, small: Decoder) -> CostTable:
        """The cost of these units, measured on a decoder of fewer layers."""
        found = cost.measure(small.units, small, [once(small.feeds())], repeats=3)
        known = {c.unit: c for c in found.units}
        layers = 1 + max(int(at[1]) for name in known if (at := LAYER.search(name)))
        nothing = UnitCost(unit="", us={}, bytes={})
        rows = []
        for unit in self.units.units:
            name = LAYER.sub(lambda at: f"layers.{int(at[1]) % layers}", unit.id)
            row = known.get(name, nothing)  # what is made at other sizes alone, such as a Concat with a cache
            us, sizes = ({scheme: part.get(scheme, 0) for scheme in unit.allowed} for part in (row.us, row.bytes))
            rows.append(msgspec.structs.replace(row, unit=unit.id, us=us, bytes=sizes))
        return msgspec.structs.replace(found, units=tuple(rows), borders=(), pure_us={}, given_us=None)


def probed(decoder: Decoder, probes: int) -> ProbeMatrix:
    """The probe matrix of one sample."""
    return Prober(decoder.graph, decoder.heads, [decoder.recipe]).measure(
        decoder.feeds(1), sample=0, probes=probes, seed=0
    )


def genai_rule(units: UnitGraph) -> Plan:
    """8 bits for the parts that onnxruntime-genai's `k_quant_mixed` names, 4 for all others."""
    able = units.able("w4")
    layers = 1 + max(int(found[1]) for name in able if (found := LAYER.search(name)))

    def scheme(name: str) -> str:
        found = LAYER.search(name)
        if found is None:
            return "w8"
        layer = int(found[1])
        chosen = layer < layers / 8 or layer >= 7 * layers / 8 or (layer - int(layers / 8)) % 3 == 2
        return "w8" if chosen and any(part in name for part in ("q_proj", "k_proj", "v_proj", "down_proj")) else "w4"

    return Plan({name: scheme(name) for name in able})


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


def timed(models: Mapping[str, Path], feeds: Mapping[str, np.ndarray], rounds: int) -> dict[str, np.ndarray]:
    """Times of each model in ms, (sittings, rounds), in turns; of large ones a sitting opens one after the other."""
    openers = {name: partial(OrtSession, path) for name, path in models.items()}
    size = sum(size_of(path) for path in models.values())
    found = time_sittings(openers, [once(feeds)], repeats=rounds, together=size < 12 * 10**9)
    return {name: series[..., 0] for name, series in found.items()}


def memory_of(path: Path, source: Path, past: int) -> float:
    """Peak resident memory in MB of a process that makes one token."""
    command = [sys.executable, __file__, "--resident", str(path), "--source", str(source), "--past", str(past)]
    made = subprocess.run([*command, "--out", str(path.parent)], check=True, capture_output=True, text=True)
    return float(made.stdout.split()[-1])


def size_of(path: Path) -> int:
    """Bytes of a model with its weights."""
    data = Path(f"{path}.data")
    return path.stat().st_size + (data.stat().st_size if data.is_file() else 0)


def measured_db(models: Mapping[str, Path], decoder: Decoder, seed: int) -> dict[str, float]:
    """SQNR of the logits on one sample, against the float model."""
    feeds, found = decoder.feeds(seed), {}
    session = OrtSession(models["float"])
    exact = Reference(session.run(feeds), decoder.heads)
    session.close()
    for name, path in models.items():
        if name != "float":
            session = OrtSession(path)
            found[name] = round(float(decibel(exact.error(session.run(feeds)) / exact.energy)[0]), 2)
            session.close()
    return found


def exported(folder: Path, size: str, layers: int) -> Path:
    """The decoder with open sizes and its logits alone."""
    source, whole = folder / "logits.onnx", folder / "decoder.onnx"
    if not source.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        if not whole.is_file():
            arguments = ["--size", size, "--layers", str(layers), "--out", str(whole)]
            subprocess.run([sys.executable, str(LLAMA), *arguments], check=True)
        model = onnx.load(whole)
        del model.graph.output[1:]
        onnx.save(model, source, save_as_external_data=True, location="logits.onnx.data")
        for path in folder.iterdir():
            if path.name not in ("logits.onnx", "logits.onnx.data"):
                path.unlink()
    return source


def problems_of(analysed: Decoder, matrix: ProbeMatrix, costs: Mapping[str, CostTable]) -> dict[str, Problem]:
    """What the search reads for every workload."""
    linear = (1.0,) * len(matrix.heads)
    secant = Secant(heads=matrix.heads, fractions=(1.0,), damage=(linear,), linear=linear, samples=0)
    float_bytes = 4 * analysed.graph.info.parameters
    return {name: Problem(analysed.units, matrix, secant, table, float_bytes) for name, table in costs.items()}


def searched(problems: Mapping[str, Problem], units: UnitGraph) -> dict[str, Plan]:
    """The plans of the search, see above."""

    def plan(workload: str, limit: float) -> Plan:
        problem = problems[workload]
        found = search(problem, Budget(latency_ratio=limit / problem.latency_us(Plan())), front=False)
        return found.chosen

    def fastest(workload: str) -> float:
        problem = problems[workload]
        return min(problem.latency_us(Plan.of(name, *units.able(name))) for name in SCHEMES)

    found = {name: plan(name, ROOM * fastest(name)) for name in problems}
    answer = problems["answer"]
    found["as genai"] = plan("answer", answer.latency_us(genai_rule(units)))
    quickest = {
        unit: min(units.allowed[unit], key=lambda scheme: row.us[scheme])
        for unit, row in {c.unit: c for c in answer.cost.units}.items()
    }
    return found | {"least": Plan(quickest)}


def figures(options: argparse.Namespace) -> dict[str, object]:
    """Make and measure all models."""
    source = exported(options.out, options.size, options.layers)
    small = exported(options.out / "few", options.size, min(options.cost_layers, options.layers))
    analysed = Decoder(source, 32, 32)
    start = time.perf_counter()
    matrix = probed(analysed, options.probes)
    seconds = {"probe": round(time.perf_counter() - start, 1)}
    steps = {"decode": Decoder(small, 1, options.past), "prefill": Decoder(small, options.past, 0)}
    start = time.perf_counter()
    single = {name: analysed.table(decoder) for name, decoder in steps.items()}
    costs = single | {"answer": joined(single["prefill"], single["decode"], options.new)}
    seconds["cost"] = round(time.perf_counter() - start, 1)
    start = time.perf_counter()
    problems = problems_of(analysed, matrix, costs)
    plans = searched(problems, analysed.units)
    seconds["searches"] = round(time.perf_counter() - start, 1)
    ours = {"float": Plan()} | {name: Plan.of(name, *analysed.units.able(name)) for name in SCHEMES}
    ours |= {"genai rule": genai_rule(analysed.units)} | {f"plan {name}": plan for name, plan in plans.items()}
    for name, plan in ours.items():
        print(name, plan.counts(), file=sys.stderr, flush=True)
    peers = write_peers(source, options.out)
    rows: dict[str, dict[str, object]] = {}
    for step, sizes in (("decode", (1, options.past)), ("prefill", (options.past, 0))):
        decoder = Decoder(source, *sizes)
        places = {name: options.out / f"{name.replace(' ', '-')}-{step}.onnx" for name in ours}
        models = {name: decoder.write(plan, places[name]) for name, plan in ours.items()} | peers
        series = timed(models, decoder.feeds(), options.rounds)
        for name, one in series.items():
            ratio = paired_ratio(one, series["float"])
            rows.setdefault(name, {})[f"{step}_ratio"] = [ratio.value, ratio.low, ratio.high]
            rows[name][f"{step}_ms"] = round(float(np.median(one)), 2)
        if step == "decode":
            for name, path in models.items():
                rows[name] |= {"bytes": size_of(path), "peak_mb": round(memory_of(path, source, options.past))}
        else:
            for name, value in measured_db(models, decoder, seed=99).items():
                rows[name]["measured_db"] = value
        for path in places.values():
            path.unlink()
            Path(f"{path}.data").unlink(missing_ok=True)
    whole = {name: row["prefill_ms"] + options.new * row["decode_ms"] for name, row in rows.items()}
    for name, row in rows.items():
        row["answer_ratio"] = round(whole[name] / whole["float"], 4)
        row["memory_ratio"] = round(row["peak_mb"] / rows["float"]["peak_mb"], 4)  # type: ignore[operator]
        if ours.get(name):
            damage = matrix.damage(matrix.select(rounded(analysed.units, ours[name]))).mean(axis=0)
            row["predicted_db"] = round(float(decibel(damage)[0]), 2)
            row["predicted_ratio"] = {
                workload: round(problem.latency_us(ours[name]) / problem.latency_us(Plan()), 4)
                for workload, problem in problems.items()
            }
            row["units"] = ours[name].counts()
        print(name, row, file=sys.stderr, flush=True)
    return {
        "benchmark": "decoder_formats",
        "machine": machine_name(),
        "threads": available_cores(),
        "layers": options.layers,
        "past": options.past,
        "new": options.new,
        "seconds": seconds,
        "decode_ratio": rows["plan decode"]["decode_ratio"],
        "prefill_ratio": rows["plan prefill"]["prefill_ratio"],
        "answer_ratio": rows["plan answer"]["answer_ratio"],
        "memory_ratio": rows["plan answer"]["memory_ratio"],
        "plans": {name: row for name, row in rows.items() if name.startswith("plan ")},
        "schemes": {name: rows[name] for name in ("float", *SCHEMES)},
        "peers": {name: rows[name] for name in ("genai rule", *peers)},
    }


def joined(prompt: CostTable, token: CostTable, times: int) -> CostTable:
    """The cost of a prompt and so many tokens."""
    rows = [
        msgspec.structs.replace(a, us={scheme: us + times * b.us[scheme] for scheme, us in a.us.items()})
        for a, b in zip(prompt.units, token.units, strict=True)
    ]
    return msgspec.structs.replace(prompt, units=tuple(rows))


def main() -> None:
    """Measure all models and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the models; those in it are used again")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--cost-layers", type=int, default=2)
    parser.add_argument("--size", default="1.7b", help="see reference/llama.py")
    parser.add_argument("--past", type=int, default=256)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--resident", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.resident is not None:
        session = OrtSession(options.resident)
        session.run(feeds_of(options.source, 1, options.past))
        print(1e3 * status_gb("VmHWM"))
        return
    print(json.dumps(figures(options)))


if __name__ == "__main__":
    main()
