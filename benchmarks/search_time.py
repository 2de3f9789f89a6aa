"""Time of the search on a made-up network, from tables alone: no model, no data, no runtime.

The network is a chain of residual blocks as detectors have them: convolutions with activations, an Add, and a Concat
over what the blocks hand on. Damages of sites are log-normal and grow towards the outputs, as measured ones do; time
goes with the size of the tensors, INT8 takes 0.3 to 0.6 of it in convolutions and more elsewhere.

    python benchmarks/search_time.py --units 300

The last line is JSON: `seconds` of wall and `cpu_seconds` of processor time for a plan with its front, `plans` on the
front, the largest `gap` that the solver left open on it, whether it `solved` every program before its limit of nodes,
and whether a second search gave the `same` plans.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from bitalloy.core.plans import BorderCost, Budget, CostTable, UnitCost
from bitalloy.core.records import Secant
from bitalloy.core.schemes import BASELINE, Scheme
from bitalloy.core.units import Edge, Unit, UnitEdge, UnitGraph, WeightSite
from bitalloy.search.choice import search
from bitalloy.search.problem import Problem
from bitalloy.sensitivity.matrix import ProbeMatrix
from bitalloy.targets.placement import ACTIVATIONS, Site, own_sites, rounded

FLOAT = Scheme(name=BASELINE)
HALF = Scheme(name="fp16", activation="float16", weight="float16", cast=True)
INT8 = Scheme(name="int8", activation="uint8", weight="int8", bias="int32")
HEADS = ("boxes", "scores")


class Drawing:
    """A growing network of units and edges.

    Args:
        random: of sizes and times.
        half: whether units may run in FP16.
    """

    def __init__(self, random: np.random.Generator, *, half: bool) -> None:
        self._random, self._half = random, half
        self.units: list[Unit] = []
        self.costs: list[UnitCost] = []
        self.edges: list[UnitEdge] = []
        self._makers: dict[str, str] = {}

    def unit(self, kind: str, block: int, inputs: list[str], elements: int) -> str:
        """Add a unit that reads tensors; returns the tensor that it makes."""
        name = f"/model.{block}/{kind}.{len(self.units)}"
        weights: tuple[WeightSite, ...] = ()
        if kind == "Conv":
            count = int(self._random.choice([4_608, 18_432, 73_728]))
            weights = (WeightSite(tensor=f"{name}.weight", node=name, slot=1, axis=0, elements=count),)
        inner = (Edge(tensor=f"{name}.sigmoid", node=name, slot=1),) if kind == "SiLU" else ()
        schemes = (FLOAT, *(HALF,) * self._half, *(INT8,) * (kind != "Softmax"))
        allowed = tuple(scheme.name for scheme in schemes)
        self.units.append(
            Unit(
                id=name,
                kind=kind,
                region=f"model.{block}",
                core=(name,),
                tail=(),
                root=f"{name}.out",
                inner=inner,
                weights=weights,
                allowed=allowed,
                macs=0,
            )
        )
        for slot, tensor in enumerate(inputs):
            self._edge(tensor, name, slot, elements)
        self._makers[f"{name}.out"] = name
        slow = elements * self._random.uniform(0.004, 0.02 if kind == "Conv" else 0.006)
        fast = slow * (self._random.uniform(0.3, 0.6) if kind == "Conv" else self._random.uniform(0.6, 1.1))
        stored = sum(w.elements for w in weights)
        self.costs.append(
            UnitCost(
                unit=name,
                us={scheme: {BASELINE: slow, HALF.name: 0.6 * slow, INT8.name: fast}[scheme] for scheme in allowed},
                bytes={scheme: {BASELINE: 4, HALF.name: 2, INT8.name: 1}[scheme] * stored for scheme in allowed},
            )
        )
        return f"{name}.out"

    def leave(self, tensor: str, elements: int) -> None:
        """Make a tensor an output."""
        self._edge(tensor, "", 0, elements)

    def _edge(self, tensor: str, node: str, slot: int, elements: int) -> None:
        maker = self._makers.get(tensor)
        self.edges.append(
            UnitEdge(
                tensor=tensor,
                uses=(Edge(tensor=tensor, node=node, slot=slot),),
                producer=maker,
                consumer=node or None,
                root=tensor,
                rooted=maker is not None,
                elements=elements,
                passed_on=maker is not None and "Concat" in maker,
            )
        )


def network(count: int, random: np.random.Generator, *, half: bool) -> tuple[UnitGraph, CostTable]:
    """At least `count` units and what they cost."""
    net = Drawing(random, half=half)
    tensor, block, elements = "images", 0, 400_000
    while len(net.units) < count - 1:
        entry = net.unit("SiLU", block, [net.unit("Conv", block, [tensor], elements)], elements)
        parts = [entry]
        for _ in range(int(random.integers(1, 4))):
            inside = net.unit("SiLU", block, [net.unit("Conv", block, [parts[-1]], elements)], elements)
            outside = net.unit("SiLU", block, [net.unit("Conv", block, [inside], elements)], elements)
            parts.append(net.unit("Add", block, [parts[-1], outside], elements))
        tensor = net.unit("Concat", block, parts, elements * len(parts))
        if block % 4 == 3:
            tensor = net.unit("Softmax", block, [tensor], elements)
        block += 1
        elements = max(elements // 2, 12_800) if block % 3 == 0 else elements
    net.leave(net.unit("Conv", block, [tensor], elements), elements)
    units = UnitGraph(
        target="ort-cpu",
        model_sha256="0" * 64,
        units=tuple(net.units),
        edges=tuple(net.edges),
        schemes=(FLOAT, *(HALF,) * half, INT8),
    )
    slow = sum(c.us[BASELINE] for c in net.costs)
    prices = [(INT8.name, "", 5e-4, 5.0), ("", INT8.name, 5e-4, 5.0)]
    prices += [(BASELINE, HALF.name, 4e-4, 4.0), (HALF.name, BASELINE, 4e-4, 4.0)] * half
    cost = CostTable(
        target="ort-cpu",
        device="none",
        threads=2,
        units=tuple(net.costs),
        borders=tuple(BorderCost(source=a, sink=b, us_per_element=each, us=us) for a, b, each, us in prices),
        fixed_us=0.02 * slow,
        pure_us={BASELINE: 1.02 * slow, INT8.name: 0.6 * slow},
        residual_percent=3.0,
    )
    return units, cost


def matrix_of(units: UnitGraph, samples: int, probes: int, random: np.random.Generator) -> ProbeMatrix:
    """A probe matrix with a column for every site; later sites do more damage."""
    sites = [s.id for u in units.units for s in own_sites(u, INT8)]
    sites += [Site(e.id, INT8.name, ACTIVATIONS).id for e in units.edges]
    sites += [Site(e.id, INT8.name, ACTIVATIONS, again=True).id for e in units.edges if e.passed_on]
    halves = [s.id for u in units.units if HALF.name in u.allowed for s in own_sites(u, HALF)]
    rows, own = [], []
    levels = np.concatenate([np.linspace(0, 1, len(sites)), np.linspace(-3, -2, len(halves))])
    sites += halves
    for _ in HEADS:
        size = np.sqrt(10 ** (random.normal(-5.5, 0.8, len(sites)) + levels))
        common = random.standard_normal((samples, probes, 1))
        values = size * (0.95 * random.standard_normal((samples, probes, len(sites))) + 0.3 * common)
        rows.append(values.astype(np.float32))
        own.append(np.square(values).astype(np.float32))
    return ProbeMatrix(HEADS, tuple(sites), tuple(rows), tuple(own), np.ones((samples, len(HEADS))))


def problem_of(count: int, seed: int, *, half: bool) -> Problem:
    """All tables of the search."""
    random = np.random.default_rng(seed)
    units, cost = network(count, random, half=half)
    matrix = matrix_of(units, 16, 4, random)
    whole = matrix.damage(matrix.select(rounded(units, units.lowest_gated()))).mean(axis=0)
    secant = Secant(
        heads=HEADS,
        fractions=(0.35, 1.0),
        damage=(tuple(0.12 * whole), tuple(0.8 * whole)),
        linear=tuple(whole),
        samples=8,
    )
    size = sum(c.bytes[BASELINE] for c in cost.units) + 100_000
    return Problem(units, matrix, secant, cost, size)


def main() -> None:
    """Search twice and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=300)
    parser.add_argument("--half", action="store_true", help="units may run in FP16 too")
    parser.add_argument("--latency", type=float, default=0.75, help="budget, of the float model's latency")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    problem = problem_of(options.units, options.seed, half=options.half)
    budget = Budget(latency_ratio=options.latency)
    wall, cpu = time.perf_counter(), time.process_time()
    plan = search(problem, budget)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    gaps = [p.optimality_gap for p in plan.pareto]
    again = search(problem_of(options.units, options.seed, half=options.half), budget)
    result = {
        "benchmark": "search_time",
        "units": len(problem.units.units),
        "sites": len(problem.matrix.sites),
        "half": options.half,
        "seconds": round(wall, 2),
        "cpu_seconds": round(cpu, 2),
        "plans": len(plan.pareto),
        "gap_of_the_plan": plan.optimality_gap,
        "gap": max(gaps),
        "solved": plan.solved,
        "same": again == plan,
        "seed": options.seed,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
