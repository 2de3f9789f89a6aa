"""Perplexity against size: bitalloy's plans for a size, beside weight-only models of ONNX Runtime, genai and NNCF.

The model is `mobilevlm-shapes`, and of its three graphs the decoder: vision and embedding stay as they are, in all
models. Sizes are the bytes of the decoder's whole file, over those of the decoder in float32; of NNCF's the .bin, which
holds the constants, and the nodes of the float ONNX file in place of the long .xml. One analysis of each target serves
all plans; every scheme counts as equally fast. Of every peer there is a plan of ours that is at most as large as the
peer, and there are plans for `SIZES`. Perplexity is that of captions of images that neither calibration nor probing has
seen; intervals are bootstraps over images, of ours against a peer on the same images.

    python benchmarks/size_quality.py --out /tmp/size --peers-python PYTHON

Peers on `ort-cpu`: `MatMulNBitsQuantizer` with 4 and 8 bits (accuracy level 4); genai's rule `k_quant_mixed`: 8 bits
for the last product and, in the first and last eighth of the layers and every third one, for `qkv_proj` or `v_proj`
and `down_proj`, else 4 bits, rounded by `k_quant` or to the nearest (ONNX Runtime 1.32 fails to pack zero points of
`k_quant` where a reduction has an odd number of blocks, as 352 has of 32 and 128); `quantize_dynamic`. On
`openvino-cpu`: NNCF's `compress_weights`, INT8_ASYM, and INT4_ASYM with a `ratio` of 0.2 to 1, with and without the
samples of calibration. Without --peers-python, or where it lacks NNCF, that is said and NNCF's are left out. The
same command goes on after a stop. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from rich.console import Console

from bitalloy import Budget, RunDirectory, Settings, Workspace, analyze, plan
from bitalloy.core.errors import BitalloyError, BudgetError
from bitalloy.core.plans import CostTable, Keep, UnitCost
from bitalloy.core.schemes import BASELINE, Plan
from bitalloy.data.images import open_image
from bitalloy.measure.sizes import with_sizes
from bitalloy.model.graphs.joining import Joined
from bitalloy.model.weights import save, to_bytes
from bitalloy.pipeline.prepare import prepare
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.base import Runtime
from bitalloy.runtime.machine import machine_name
from bitalloy.runtime.openvino import OPENVINO
from bitalloy.runtime.ort import ORT, available_cores
from bitalloy.samples.shapes import write_coco
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.tasks.bootstrap import RESAMPLES, resampled_weights
from bitalloy.tasks.captions import QUESTION, CaptionData, read_captions
from bitalloy.tasks.chat import (
    AFTER,
    BEFORE,
    IMAGE_TOKEN,
    MASK,
    POSITIONS,
    empty_cache,
    log_probabilities,
    open_chat,
)
from bitalloy.tasks.open import cache_size, interface_of

SIZES = (0.15, 0.17, 0.2, 0.25, 0.35, 0.5)
"""Sizes of plans over the float32 decoder."""
FOUR_BITS = ("w4", "w4-16", "w4-64", "w4-128")
SCHEMES = {"ort-cpu": (*FOUR_BITS, "w8", "w8-128", "int8-dynamic"), "openvino-cpu": (*FOUR_BITS, "w8", "w8-channel")}
SEED_UNSEEN = 1000
"""Seed of the drawn images that perplexity is measured on; the samples of the analysis have the seed of the run."""
LAYERS = 3
RATIOS = (0.2, 0.4, 0.6, 0.8, 1.0)


def unseen(analysis: Analysis, folder: Path, count: int) -> CaptionData:
    """Captions of fresh images."""
    model = interface_of(analysis.given)
    drawn = write_coco(folder, count=count, seed=SEED_UNSEEN, size=144, split="val")
    return read_captions(drawn / "captions.json", open_chat(model))


def decoder_feeds(analysis: Analysis, data: CaptionData) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray, int]]:
    """Feeds of the decoder for every caption, the tokens of the caption, and the number of its image."""
    given = analysis.given
    assert isinstance(given, Joined), "a vision-language model has several graphs"
    graphs = {name: ORT.open(graph.source) for name, graph in given.program.graphs.items()}
    cache = cache_size(given.info.inputs)
    for number, (file, captions) in enumerate(data.captions):
        image = data.chat.feed(open_image(data.folder / file))
        features = graphs["vision"].run({"pixel_values": image})["image_features"]
        for caption in captions:
            turn = data.chat.turn(QUESTION, caption)
            ids = (*turn.prompt, *turn.answer[:-1])
            at = ids.index(IMAGE_TOKEN)
            tokens = {BEFORE: np.array([ids[:at]], np.int64), AFTER: np.array([ids[at + 1 :]], np.int64)}
            embeds = graphs["embedding"].run({**tokens, "image_features": features})["inputs_embeds"]
            length = embeds.shape[1]
            feeds = {
                "inputs_embeds": embeds,
                MASK: np.ones((1, length), np.int64),
                POSITIONS: np.arange(length, dtype=np.int64)[None],
                **empty_cache(cache),
            }
            yield feeds, np.array(turn.answer), number


Losses = Mapping[str, np.ndarray]
"""Model -> loss of every caption in nats, summed over its tokens."""
Captions = Sequence[tuple[dict[str, np.ndarray], np.ndarray, int]]


def losses(model: ir.Model | Path, runtime: Runtime, captions: Captions, folder: Path) -> np.ndarray:
    """Loss of a model on every caption; it is found again in a folder."""
    digest = hashlib.sha256(f"{runtime.name} {len(captions)}".encode())
    files = [] if isinstance(model, ir.Model) else [model, model.with_suffix(".bin")]
    digest.update(to_bytes(model) if isinstance(model, ir.Model) else b"")
    for path in files:
        digest.update(path.read_bytes() if path.is_file() else b"")
    stored = folder / f"{digest.hexdigest()[:24]}.npy"
    if not stored.is_file():
        session, rows = runtime.open(model), []
        for feeds, answer, _ in captions:
            logits = {"logits": session.run(feeds)["logits"]}
            rows.append(-log_probabilities(logits, len(answer))[np.arange(len(answer)), answer].sum())
        session.close()
        folder.mkdir(exist_ok=True)
        np.save(stored, np.array(rows))
    return np.asarray(np.load(stored))


class Perplexity:
    """Perplexities with intervals, from losses on the same captions."""

    def __init__(self, losses: Losses, tokens: np.ndarray, seed: int) -> None:
        self._losses, self._tokens = losses, tokens
        self._weights = resampled_weights(len(tokens), RESAMPLES, seed)

    def of(self, name: str) -> dict[str, float]:
        """Perplexity of one model."""
        value = float(np.exp(self._losses[name].sum() / self._tokens.sum()))
        return self._interval(value, self._resampled(name))

    def more(self, name: str, other: str) -> dict[str, float]:
        """By how much the first has a higher perplexity than the second."""
        value = self.of(name)["value"] - self.of(other)["value"]
        return self._interval(value, self._resampled(name) - self._resampled(other))

    def _resampled(self, name: str) -> np.ndarray:
        return np.asarray(np.exp((self._weights @ self._losses[name]) / (self._weights @ self._tokens)))

    @staticmethod
    def _interval(value: float, resampled: np.ndarray) -> dict[str, float]:
        low, high = np.percentile(resampled, (2.5, 97.5))
        return {"value": round(value, 5), "low": round(float(low), 5), "high": round(float(high), 5)}


def genai_bits(model: onnx.ModelProto) -> dict[str, dict[str, int]]:
    """Products in 8 bits by genai's rule `k_quant_mixed` (`make_int4_algo_config` of its model builder)."""
    chosen = [i for i in range(LAYERS) if i < LAYERS / 8 or i >= 7 * LAYERS / 8 or (i - round(LAYERS / 8)) % 3 == 2]
    names = [n.name for n in model.graph.node if n.op_type == "MatMul"]
    endings = [f"layers.{i}/{part}/MatMul" for i in chosen for part in ("self_attn/v_proj", "mlp/down_proj")]
    return {name: {"bits": 8} for name in names if name.endswith(("lm_head/MatMul", *endings))}


def onnx_peers(source: Path, folder: Path) -> dict[str, Path]:
    """Models that ONNX Runtime's tools make of the decoder."""
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        KQuantWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
        RTNWeightOnlyQuantConfig,
    )

    def blocks(bits: int, block: int, algorithm: Any = None, *, symmetric: bool = True) -> onnx.ModelProto:
        maker = MatMulNBitsQuantizer(
            onnx.load(source),
            bits=bits,
            block_size=block,
            is_symmetric=symmetric,
            accuracy_level=4,
            algo_config=algorithm,
        )
        with contextlib.redirect_stdout(sys.stderr):
            maker.process()
        return maker.model.model

    mixed = genai_bits(onnx.load(source))
    made = {f"int4 {block}": lambda b=block: blocks(4, b) for block in (16, 32, 64, 128)}
    made |= {f"int4 asym {block}": lambda b=block: blocks(4, b, symmetric=False) for block in (32, 128)}
    made |= {f"int8 {block}": lambda b=block: blocks(8, b) for block in (32, 128)}
    for block in (16, 64):
        made[f"genai k_quant {block}"] = lambda b=block: blocks(
            4, b, KQuantWeightOnlyQuantConfig(customized_weight_config=mixed), symmetric=False
        )
    for block in (32, 128):
        made[f"genai rtn {block}"] = lambda b=block: blocks(
            4, b, RTNWeightOnlyQuantConfig(customized_weight_config=mixed)
        )
    found = {}
    for name, make in made.items():
        found[name] = folder / f"{name}.onnx"
        if not found[name].is_file():
            onnx.save(make(), found[name])
    for name, per_channel in (("dynamic channel", True), ("dynamic tensor", False)):
        found[name] = folder / f"{name}.onnx"
        if not found[name].is_file():
            quantize_dynamic(source, found[name], per_channel=per_channel, op_types_to_quantize=["MatMul"])
    return found


def nncf_peers(
    source: Path, folder: Path, python: Path | None, feeds: Sequence[Mapping[str, np.ndarray]]
) -> tuple[dict[str, Path], str]:
    """Models that NNCF makes of the decoder, and why there are none."""
    if python is None:
        return {}, "no --peers-python"
    probe = subprocess.run([str(python), "-c", "import nncf, openvino"], capture_output=True, text=True)
    if probe.returncode:
        return {}, f"{python}: {probe.stderr.strip().splitlines()[-1]}"
    variants: dict[str, dict[str, object]] = {"nncf int8": {"mode": "INT8_ASYM"}}
    for group in (128, 32):
        for ratio in RATIOS:
            given = {"mode": "INT4_ASYM", "ratio": ratio, "group_size": group}
            variants[f"nncf {group} {ratio}"] = given
            if ratio < 1:
                variants[f"nncf {group} {ratio} data"] = {**given, "data": True}
    found = {name: folder / f"{name}.xml" for name in variants}
    missing = {name: variants[name] for name, path in found.items() if not path.is_file()}
    if missing:
        archive, job = folder / "samples.npz", folder / "nncf.job"
        arrays = {f"{i}/{name}": value for i, feed in enumerate(feeds) for name, value in feed.items()}
        np.savez(archive, **arrays)  # type: ignore[arg-type]
        result = str(folder / "nncf.json")
        job.write_text(
            json.dumps(
                {
                    "model": str(source),
                    "samples": str(archive),
                    "out": str(folder),
                    "variants": missing,
                    "result": result,
                }
            )
        )
        script = Path(__file__).with_name("peer_weights.py")
        subprocess.run([str(python), str(script), str(job)], check=True, stdout=2, env={**os.environ, "PYTHONPATH": ""})
    return found, ""


def sizes_alone(analysis: Analysis) -> CostTable:
    """A cost table that knows sizes, and says that every scheme takes the same time."""
    names = {u.id: (BASELINE, *u.choices) for u in analysis.units.units}
    rows = tuple(
        UnitCost(unit=unit, us=dict.fromkeys(known, 1.0), bytes=dict.fromkeys(known, 0))
        for unit, known in names.items()
    )
    table = CostTable(
        target=analysis.target.name,
        device=machine_name(),
        threads=available_cores(),
        units=rows,
        borders=(),
        fixed_us=0.0,
        pure_us={},
        residual_percent=0.0,
    )
    return with_sizes(table, analysis.units, analysis.artefact)


class Planner:
    """Plans of one target for sizes of the decoder."""

    def __init__(self, analysis: Analysis, work: Workspace) -> None:
        self.analysis, self._work, self._cost = analysis, work, sizes_alone(analysis)
        others = sorted({u.id.split("/")[0] for u in analysis.units.units if u.choices} - {"decoder"})
        self._keep = tuple(Keep(scheme="fp32", pattern=f"{name}/*") for name in others)
        self.float = analysis.artefact(Plan())
        self._rest = self.float.size_bytes - self.float.sizes["decoder"]

    def within(self, size: int) -> tuple[Plan, ir.Model] | None:
        """The least damaging plan whose decoder has at most a size, and that decoder; None where none is so small."""
        asked = size
        for _ in range(4):
            budget = Budget(size_bytes=asked + self._rest, keep=self._keep)
            try:
                made = plan(self.analysis, budget, table=self._cost, front=False, work=self._work)
            except BudgetError:
                return None
            chosen = made.plan.chosen
            artefact = self.analysis.artefact(chosen)
            if (over := artefact.sizes["decoder"] - size) <= 0:
                model = artefact.models["decoder"]
                assert isinstance(model, ir.Model)
                return chosen, model
            asked -= over
        return None


def peer_size(path: Path, nodes: int) -> int:
    """Bytes of a peer's file; of OpenVINO's the constants, with the nodes of the float ONNX file."""
    return path.with_suffix(".bin").stat().st_size + nodes if path.suffix == ".xml" else path.stat().st_size


def nodes_of(path: Path) -> int:
    """Bytes of a file that are no weights."""
    return path.stat().st_size - sum(len(t.raw_data) for t in onnx.load(path).graph.initializer)


def analysed(target: str, options: argparse.Namespace) -> Planner:
    """Analyse the model for one target."""
    settings = Settings(
        targets=(target,),
        schemes=SCHEMES[target],
        samples=options.samples,
        probes=options.probes,
        calibration_samples=options.samples,
        range_method="minmax",
        protect=False,
        equalize=False,
        bias_correction=False,
        seed=options.seed,
    )
    run = options.out / "run"
    prepared = prepare("mobilevlm-shapes", out=run, seed=options.seed)
    work = Workspace(RunDirectory(run))
    return Planner(analyze(prepared.model, prepared.data, settings, work=work), work)


def main() -> None:
    """Run the comparison and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of models and stored results")
    parser.add_argument("--peers-python", type=Path, help="interpreter of an environment with nncf and openvino")
    parser.add_argument("--targets", default="ort-cpu,openvino-cpu")
    parser.add_argument("--samples", type=int, default=16, help="of the probe matrix")
    parser.add_argument("--probes", type=int, default=32, help="reverse passes per sample")
    parser.add_argument("--unseen", type=int, default=300, help="images whose captions are measured")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console(stderr=True, soft_wrap=True)
    options.out.mkdir(parents=True, exist_ok=True)
    logging.disable(logging.WARNING)
    folder = options.out / "decoders"
    folder.mkdir(exist_ok=True)

    targets = options.targets.split(",")
    try:
        OPENVINO.version()
    except BitalloyError as error:
        console.print(f"Without openvino-cpu: {error}")
        targets.remove("openvino-cpu")
    planners = {target: analysed(target, options) for target in targets}
    first = next(iter(planners.values()))
    analysis = first.analysis
    source, decoder = folder / "float.onnx", first.float.models["decoder"]
    assert isinstance(decoder, ir.Model)
    save(decoder, source)
    data = unseen(analysis, options.out / "unseen", options.unseen)
    drawn = list(decoder_feeds(analysis, data))
    tokens = np.array([len(answer) for _, answer, _ in drawn])
    seen = options.out / "run" / "sample" / "drawn" / "captions.json"
    known = decoder_feeds(analysis, read_captions(seen, open_chat(interface_of(analysis.given))))
    calibration = [feeds for feeds, _, _ in islice(known, options.samples)]

    peers = {"ort-cpu": onnx_peers(source, folder)}
    missing = ""
    if "openvino-cpu" in planners:
        peers["openvino-cpu"], missing = nncf_peers(source, folder, options.peers_python, calibration)
        if missing:
            console.print(f"Without NNCF: {missing}")
    whole, nodes = source.stat().st_size, nodes_of(source)

    result: dict[str, Any] = {}
    for target, planner in planners.items():
        runtime = planner.analysis.target.runtime
        sizes = {name: peer_size(path, nodes) for name, path in peers[target].items()}
        models: dict[str, ir.Model | Path] = {"float": source, **peers[target]}
        asked = {f"ours {share}": int(share * whole) for share in SIZES} | {f"ours <= {n}": s for n, s in sizes.items()}
        schemes: dict[str, dict[str, int]] = {}
        for name, size in asked.items():
            if (made := planner.within(size)) is not None:
                chosen, models[name] = made
                schemes[name], sizes[name] = chosen.counts(), Artefact({"": models[name]}).size_bytes
        found = {n: losses(m, runtime, drawn, options.out / "losses") for n, m in models.items()}
        table = Perplexity(found, tokens, options.seed)
        rows = {"float": {"size": 1.0, "perplexity": table.of("float")}}
        for name in [n for n in models if n != "float"]:
            rows[name] = {"size": round(sizes[name] / whole, 4), "perplexity": table.of(name)}
            rows[name] |= {"units": schemes[name]} if name in schemes else {}
            if name.startswith("ours <= "):
                rows[name]["more_than_peer"] = table.more(name, name.removeprefix("ours <= "))
            console.print(target, name, rows[name], highlight=False)
        result[target] = rows

    pairs = {
        (t, n): r["more_than_peer"] for t, rows in result.items() for n, r in rows.items() if "more_than_peer" in r
    }
    unreached = [
        f"{t} {n}" for t, rows in peers.items() if t in result for n in rows if (t, f"ours <= {n}") not in pairs
    ]
    print(
        json.dumps(
            {
                "benchmark": "size_quality",
                "model": "mobilevlm-shapes, decoder",
                "machine": machine_name(),
                "threads": available_cores(),
                "versions": {
                    "python": platform.python_version(),
                    "onnxruntime": onnxruntime.__version__,
                    **(json.loads(found.read_text()) if (found := folder / "nncf.json").is_file() else {}),
                },
                "seed": options.seed,
                "samples": options.samples,
                "probes": options.probes,
                "captions": len(drawn),
                "tokens": int(tokens.sum()),
                "float_bytes": whole,
                "without": missing,
                "peers": len(pairs) + len(unreached),
                "worse": sum(p["low"] > 0 for p in pairs.values()),
                "higher": sum(p["value"] > 0 for p in pairs.values()),
                "better": sum(p["high"] < 0 for p in pairs.values()),
                "too_small_for_us": unreached,
                "models": result,
            }
        )
    )


if __name__ == "__main__":
    main()
