"""bitalloy's plans beside those of NNCF, OpenVINO and ONNX Runtime, on the same images, in one interleaved run.

Peers make their models in an environment of their own (`peer_models.py`; `pip install nncf openvino onnxruntime` and
what bitalloy needs). bitalloy runs its whole job per target, with the same limit on the drop of AP50-95 as NNCF's
accuracy control. Then one process times all models in turns, and measures AP50-95 of all through one evaluation
(`peer_runtimes.py`).

    python benchmarks/plans_vs_peers.py --model yolo11n.onnx --images coco128-calib/images \
        --eval coco-val-94/instances.json --out /tmp/peers --peers-python PYTHON

What a peer or a run of bitalloy has made is found again in --out; wall seconds are those of the first time. With
`--half 0` or `1` bitalloy and NNCF's accuracy control see one half of the labelled images (every other one), and all
models are judged on the other. The last line is JSON. Per model: `ap`, `drop_points` against the float model with its
interval, `ms` and `ratio` over float of the same runtime; `against` compares bitalloy's plans with each peer of the
runtime: ratio of latencies and difference of drops.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bitalloy import load
from bitalloy.runtime.ort import available_cores
from bitalloy.tasks.open import image_spec

HERE = Path(__file__).resolve().parent
RUNTIMES = {"ort-cpu": "ort", "openvino-cpu": "openvino"}
PEERS = {
    "ort-cpu": {"ort-conv": ".onnx", "ort-all": ".onnx"},
    "openvino-cpu": {"nncf": ".xml", "nncf-scope": ".xml", "nncf-control": ".xml"},
}
LIMIT = 0.003
"""Largest drop of AP50-95, for NNCF's accuracy control and for bitalloy."""


def peer(kind: str, suffix: str, options: argparse.Namespace, image: dict[str, Any]) -> dict[str, Any]:
    """Figures of a peer's model, which is made where it is not there."""
    out, result = options.out / f"{kind}{suffix}", options.out / f"{kind}.json"
    if not (out.is_file() and result.is_file()):
        job = {
            "kind": kind,
            "model": str(options.model),
            "images": str(options.images),
            "labels": str(options.eval),
            "samples": options.samples,
            "seed": options.seed,
            "image": image,
            "out": str(out),
            "result": str(result),
        }
        call(options.peers_python, "peer_models.py", job, options.out / f"{kind}.job")
    return json.loads(result.read_text())


def halves(labels: Path, half: int, out: Path) -> tuple[Path, Path]:
    """Write the labels of every other image, and of the others; each beside a link to the folder of images."""
    content, written = json.loads(labels.read_text()), []
    for name, first in (("seen", half), ("unseen", 1 - half)):
        images = sorted(content["images"], key=lambda image: image["id"])[first::2]
        known = {image["id"] for image in images}
        objects = [o for o in content["annotations"] if o["image_id"] in known]
        folder = out / name
        folder.mkdir(exist_ok=True)
        if not (folder / "images").exists():
            (folder / "images").symlink_to(labels.parent / "images")
        written.append(folder / labels.name)
        written[-1].write_text(json.dumps({**content, "images": images, "annotations": objects}))
    return written[0], written[1]


def call(python: Path | str, script: str, job: dict[str, Any], path: Path) -> None:
    """Run a script beside this one on a job."""
    path.write_text(json.dumps(job))
    source = str(HERE.parent / "src")
    subprocess.run(
        [str(python), str(HERE / script), str(path)], check=True, env={**os.environ, "PYTHONPATH": source}, stdout=2
    )


def own(target: str, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of bitalloy's run on a target."""
    folder, result = options.out / f"bitalloy-{target}", options.out / f"bitalloy-{target}.json"
    if not result.is_file():
        start = time.perf_counter()
        command = [sys.executable, "-m", "bitalloy", "run", str(options.model), "--data", str(options.images)]
        command += ["--target", target, "--eval", str(options.eval), "--out", str(folder), "--seed", str(options.seed)]
        command += ["--max-drop", f"AP50-95={LIMIT}", "--effort", options.effort]
        subprocess.run(command, check=True, stdout=2)
        seconds = round(time.perf_counter() - start, 2)
        summary = json.loads((folder / "summary.json").read_text())
        kept = {k: summary[k] for k in ("latency_ratio", "predicted_latency_ratio", "schemes", "units", "sqnr_db")}
        load_ = round(os.getloadavg()[2], 2)
        result.write_text(json.dumps({"wall_seconds": seconds, "load_15_minutes": load_, "summary": kept}))
    return json.loads(result.read_text())


def interval(drop: dict[str, float] | None) -> list[float] | None:
    """The 95 % interval of a drop, in points; None of the model that others are compared with."""
    return None if drop is None else [round(100 * drop["low"], 2), round(100 * drop["high"], 2)]


def main() -> None:
    """Run the comparison and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a YOLO11 detector as .onnx")
    parser.add_argument("--images", type=Path, required=True, help="folder of images for calibration")
    parser.add_argument("--eval", type=Path, required=True, help="COCO annotation file")
    parser.add_argument("--out", type=Path, required=True, help="folder that keeps the models")
    parser.add_argument("--peers-python", type=Path, required=True, help="interpreter of the peers' environment")
    parser.add_argument("--targets", default="ort-cpu,openvino-cpu", help="of bitalloy, separated by commas")
    parser.add_argument("--skip", default="", help="peers to leave out, separated by commas, such as nncf-control")
    parser.add_argument("--samples", type=int, default=128, help="images for the calibration of peers")
    parser.add_argument("--repeats", type=int, default=60, help="timed rounds")
    parser.add_argument("--limit", type=int, help="evaluate at most so many images")
    parser.add_argument("--half", type=int, choices=(0, 1), help="search on one half of the images, judge on the other")
    parser.add_argument("--effort", default="default", help="effort of bitalloy's runs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("model", "images", "eval", "out"):
        setattr(options, name, getattr(options, name).resolve())
    judged = options.eval
    if options.half is not None:
        options.eval, judged = halves(options.eval, options.half, options.out)
    model = load(options.model)
    spec = image_spec(model)
    assert spec is not None, "a detector takes images"
    image = {"input": spec.input, "height": spec.height, "width": spec.width}

    models, made = [], {}
    for target in options.targets.split(","):
        runtime = RUNTIMES[target]
        entry = {"runtime": runtime, "precision": "f32"}
        models.append({"name": f"{runtime} float", "path": str(options.model), **entry})
        for kind, suffix in PEERS[target].items():
            if kind in options.skip.split(","):
                continue
            made[kind] = peer(kind, suffix, options, image)
            models.append({"name": kind, "path": str(options.out / f"{kind}{suffix}"), **entry})
        name = f"bitalloy {target}"
        made[name] = own(target, options)
        models.append({"name": name, "path": str(options.out / f"bitalloy-{target}" / "mixed.onnx"), **entry})
    job = {
        "models": models,
        "image": image,
        "labels": str(judged),
        "threads": available_cores(),
        "repeats": options.repeats,
        "limit": options.limit,
        "seed": options.seed,
        "result": str(options.out / "side-by-side.json"),
    }
    call(sys.executable, "peer_runtimes.py", job, options.out / "side-by-side.job")
    found = json.loads(Path(job["result"]).read_text())

    times = {name: np.array(series) for name, series in found["times_ms"].items()}
    rows: dict[str, dict[str, Any]] = {}
    for entry in models:
        name, reference = entry["name"], f"{entry['runtime']} float"
        rows[name] = {
            "runtime": entry["runtime"],
            "ap": round(found["ap"][name]["value"], 4),
            "drop_points": round(
                100 * (found["ap"][f"{models[0]['runtime']} float"]["value"] - found["ap"][name]["value"]), 2
            ),
            "drop_interval_points": interval(found["drops"].get(name)),
            "ms": round(float(np.median(times[name])), 2),
            "ratio": round(float(np.median(times[name] / times[reference])), 3),
            "wall_seconds": made.get(name, {}).get("wall_seconds"),
        }
    against = {
        f"{name} / {peer_name}": {
            "latency": round(float(np.median(times[name] / times[peer_name])), 3),
            "drop_points": round(row["drop_points"] - other["drop_points"], 2),
            "wall": None if not other["wall_seconds"] else round(row["wall_seconds"] / other["wall_seconds"], 4),
        }
        for name, row in rows.items()
        if name.startswith("bitalloy")
        for peer_name, other in rows.items()
        if other["runtime"] == row["runtime"] and peer_name != name
    }
    table = Table("model", "AP50-95", "drop, points", "ms", "over float", "made in, s")
    for name, row in rows.items():
        seconds = "" if row["wall_seconds"] is None else f"{row['wall_seconds']:.0f}"
        table.add_row(
            name, f"{row['ap']:.4f}", f"{row['drop_points']:.2f}", f"{row['ms']:.1f}", f"{row['ratio']:.3f}", seconds
        )
    Console(stderr=True).print(table)
    result = {
        "benchmark": "plans_vs_peers",
        "model": model.info.name,
        "model_sha256": model.info.sha256[:16],
        "n": found["ap"][models[0]["name"]]["n"],
        "threads": job["threads"],
        "seed": options.seed,
        "limit_points": 100 * LIMIT,
        "half": options.half,
        "effort": options.effort,
        "versions": {**found["versions"], **{k: v for m in made.values() for k, v in m.get("versions", {}).items()}},
        "load_1_minute": found["load_1_minute"],
        "models": rows,
        "against": against,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
