"""Predicted against measured damage of random plans.

Each plan puts a random part of the units in INT8, 2 % to 100 % of them, half of the plans scattered over the network,
the others a run of neighbours. Predicted: from the probe matrix, without running anything. Measured: the rewritten
model in ONNX Runtime with its fused INT8 kernels, on the same images. With --eval also box AP of every plan, and how
well each way to sum up the damage of the heads ranks its drop.

    python benchmarks/plan_prediction.py --model yolo11n.onnx --images coco128-calib/images --out /tmp/plans
    python benchmarks/plan_prediction.py --model yolo11n.onnx --images coco128-calib/images --out /tmp/plans \
        --eval coco-val-94/instances.json

Every plan is stored in --out as soon as it is measured; the same command goes on after a stop, and more --plans or
--eval add to what is there. The last line is JSON: `heads` and `whole` have `spearman`, `mean_abs_db` and
`max_abs_db` of the SQNR, `search` the same for the variant that the search works with; `ap` the Spearman correlation
of the drop of AP with measured and predicted damage of each head (`detections` weighed, `... KL` as divergence), of the
whole output, of what the search minimizes (`aims`), and of mean and maximum over the heads with an SQNR.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from scipy.stats import spearmanr

from bitalloy import RunDirectory, Settings, Workspace, analyze, confirm, load, open_data
from bitalloy.core.effort import EFFORTS, USUAL_EFFORT
from bitalloy.core.records import Calibration, Head
from bitalloy.core.schemes import Plan
from bitalloy.core.store import StageInputs, key_of
from bitalloy.model.heads import Reference
from bitalloy.pipeline.run import CONFIRM_SAMPLES
from bitalloy.runtime.ort import OrtSession
from bitalloy.search.problem import Problem
from bitalloy.sensitivity.analysis import Analysis
from bitalloy.sensitivity.matrix import bend, decibel
from bitalloy.targets.placement import rounded
from bitalloy.tasks.coco import read_coco
from bitalloy.tasks.detection import DetectionData, evaluate_detection
from bitalloy.tasks.open import image_spec
from bitalloy.tasks.yolo import class_names


def random_plans(analysis: Analysis, shares: Iterable[float], seed: int | Sequence[int]) -> list[Plan]:
    """Plans that put given shares of the units in INT8, or what is lowest: scattered ones and runs of neighbours."""
    free = list(analysis.units.lowest_gated().items())
    random = np.random.default_rng(seed)
    plans = []
    for number, share in enumerate(shares):
        size = max(1, round(share * len(free)))
        if number % 2:
            start = int(random.integers(0, len(free) - size + 1))
            plans.append(Plan(free[start : start + size]))
        else:
            plans.append(Plan(free[i] for i in random.permutation(len(free))[:size]))
    return plans


class PlanDamageInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides the damage of a plan."""

    calibration: Calibration
    heads: tuple[Head, ...]
    plan: tuple[tuple[str, str], ...]
    samples: int


class PlanPrecisionInputs(StageInputs, frozen=True, kw_only=True):
    """All that decides the box AP of a plan."""

    calibration: Calibration
    plan: tuple[tuple[str, str], ...]
    labels: str
    limit: int | None


class Bench:
    """Measures plans and remembers them.

    Args:
        analysis: of the model.
        store: where results are kept.
        samples: images to measure on, the first ones of the probe matrix.
    """

    def __init__(self, analysis: Analysis, store: RunDirectory, samples: int) -> None:
        self._analysis, self._store = analysis, store
        self._feeds = [analysis.data.feeds(i) for i in analysis.parts.probe[:samples]]
        self._float = OrtSession(analysis.graph.to_bytes())
        self._exact = [Reference(self._float.run(f), analysis.heads) for f in self._feeds]
        self.energy = np.array([e.energy for e in self._exact]).mean(axis=0)
        """Mean ||y||^2 of each head, weighed as the probes are."""

    def damage(self, plan: Plan) -> np.ndarray:
        """Relative error energy of the rewritten model, (heads,)."""

        def make() -> bytes:
            session = OrtSession(self._analysis.variant(plan).to_bytes())
            errors = [e.error(session.run(feeds)) for feeds, e in zip(self._feeds, self._exact, strict=True)]
            return json.dumps((np.mean(errors, axis=0) / self.energy).tolist()).encode()

        key = key_of(
            PlanDamageInputs(
                calibration=self._analysis.calibration,
                heads=self._analysis.heads,
                plan=tuple(plan.listed),
                samples=len(self._feeds),
            )
        )
        return np.array(json.loads(self._store.cached("plan-damage", key, make)))

    def ap(self, plan: Plan, labels: Path, limit: int | None) -> float:
        """Box AP of the rewritten model; of the float model for an empty plan."""
        model = self._analysis.graph
        spec = image_spec(model)
        assert spec is not None, "detectors read images"

        def make() -> bytes:
            session = OrtSession(self._analysis.variant(plan).to_bytes()) if plan else self._float
            data = DetectionData(read_coco(labels), spec, class_names(model.metadata))
            return json.dumps(evaluate_detection(session.run, data, limit=limit).ap.value).encode()

        key = key_of(
            PlanPrecisionInputs(
                calibration=self._analysis.calibration,
                plan=tuple(plan.listed),
                labels=hashlib.sha256(labels.read_bytes()).hexdigest(),
                limit=limit,
            )
        )
        return float(json.loads(self._store.cached("plan-ap", key, make)))


def agreement(measured: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Of damages (plans,): rank correlation, and errors of their SQNR."""
    gap = np.abs(decibel(measured) - decibel(predicted))
    return {
        "spearman": round(float(spearmanr(measured, predicted)[0]), 4),
        "mean_abs_db": round(float(gap.mean()), 3),
        "max_abs_db": round(float(gap.max()), 3),
    }


def main() -> None:
    """Run the comparison and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an .onnx file or a name of the zoo")
    parser.add_argument("--images", type=Path, required=True, help="folder of images, or .npz feeds")
    parser.add_argument("--out", type=Path, required=True, help="run directory that keeps what was measured")
    parser.add_argument("--plans", type=int, default=50)
    parser.add_argument("--samples", type=int, default=8, help="images of the probe matrix and of the measurement")
    parser.add_argument("--probes", type=int, default=8, help="reverse passes per image, shared by the heads")
    parser.add_argument("--calibration-samples", type=int, default=64)
    parser.add_argument(
        "--confirm",
        type=int,
        default=EFFORTS[USUAL_EFFORT].confirmed,
        help="first measure so many of the worst units exactly, as `bitalloy run` does; 0 for none",
    )
    parser.add_argument("--eval", type=Path, help="COCO annotation file: also measure AP")
    parser.add_argument("--limit", type=int, help="at most so many labelled images")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console(stderr=True, soft_wrap=True)

    model = load(options.model)
    data = open_data(model, options.images, seed=options.seed)
    store = RunDirectory(options.out)
    settings = Settings(
        samples=options.samples,
        probes=options.probes,
        calibration_samples=options.calibration_samples,
        seed=options.seed,
    )
    analysis = analyze(model, data, settings, work=Workspace(store))
    if options.confirm:
        work = Workspace(store)
        analysis = confirm(analysis, options.confirm, flagged=False, samples=CONFIRM_SAMPLES, work=work)
    units, matrix = analysis.units, analysis.matrix
    # the damage of a plan needs no cost
    problem = Problem(units, matrix, analysis.secant, None, 0)  # type: ignore[arg-type]
    bench = Bench(analysis, store, matrix.samples)
    plain = np.array([not (h.scores or h.kind) for h in analysis.heads])
    share = np.where(plain, bench.energy, 0.0) / bench.energy[plain].sum()
    squared = matrix.plain

    plans = random_plans(analysis, np.geomspace(0.02, 1.0, options.plans), options.seed)
    measured, predicted, searched, drops = [], [], [], []
    float_ap = bench.ap(Plan(), options.eval, options.limit) if options.eval else 0.0
    for number, plan in enumerate(plans):
        linear = matrix.damage(matrix.select(rounded(units, plan))).mean(axis=0)
        predicted.append(linear * bend(analysis.secant, linear))
        searched.append(problem.damage(plan))
        measured.append(bench.damage(plan))
        if options.eval:
            drops.append(float_ap - bench.ap(plan, options.eval, options.limit))
        line = f"{number + 1:3} {len(plan):4} units: measured {decibel(measured[-1]).round(1)} dB, "
        line += f"predicted {decibel(predicted[-1]).round(1)} dB"
        console.print(line + (f", AP drop {drops[-1]:.4f}" if drops else ""), highlight=False)
    real, guess, other = np.array(measured), np.array(predicted), np.array(searched)  # (plans, heads)

    result = {
        "benchmark": "plan_prediction",
        "model": model.info.name,
        "model_sha256": model.info.sha256[:16],
        "plans": len(plans),
        "samples": matrix.samples,
        "probes": int(sum(r.shape[1] for r in matrix.rows)),
        "confirmed": options.confirm,
        "seed": options.seed,
        "heads": {h.name: agreement(real[:, i], guess[:, i]) for i, h in enumerate(analysis.heads)},
        "whole": agreement(real @ share, guess @ share),
        "mean": agreement(real[:, squared].mean(axis=1), guess[:, squared].mean(axis=1)),
        "search": {
            **{h.name: agreement(real[:, i], other[:, i]) for i, h in enumerate(analysis.heads)},
            "mean": agreement(real[:, squared].mean(axis=1), other[:, squared].mean(axis=1)),
        },
    }
    if options.eval:
        variants = {}
        for kind, table in (("measured", real), ("predicted", guess), ("search", other)):
            columns = {h.name: table[:, i] for i, h in enumerate(analysis.heads)}
            columns |= {"whole": table @ share, "aims": table @ problem.aims}
            columns |= {"mean": table[:, squared].mean(axis=1), "max": table[:, squared].max(axis=1)}
            variants[kind] = {name: round(float(spearmanr(drops, c)[0]), 4) for name, c in columns.items()}
        result["ap"] = {
            "float": round(float_ap, 4),
            "largest_drop": round(max(drops), 4),
            "median_drop": round(float(np.median(drops)), 4),
            "spearman_with_damage": variants,
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
