"""What each scheme would cost on a device that is not here: an estimate from peak rates, never a measurement.

A kernel takes the longer of two times, that of its arithmetic at the device's peak and that of its memory traffic at
full bandwidth, and a fixed time to start. So a product of few rows waits for its weights, in the size in which they are
stored, and one of many for its arithmetic, at the rate of the format that it computes in. Real kernels reach neither
peak, fuse more or less than the target's rules say, and some widen stored weights in memory first: the table ranks
schemes and borders, and its microseconds are not what a device will show.

Of a language model each step of a workload has its own sizes (`workload.sized_steps`). A unit takes the sum over all
steps that it runs in. A border has one price for all tensors: the mean over the steps, by their elements and number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, product

import msgspec
import onnx_ir as ir

from bitalloy.core.plans import BorderCost, CostTable, UnitCost
from bitalloy.core.records import Estimate, Workload
from bitalloy.core.schemes import BASELINE, Plan, Scheme
from bitalloy.core.units import Placement, Unit, UnitGraph
from bitalloy.formats import find_format, weight_bits
from bitalloy.measure.prices import latency_us
from bitalloy.measure.workload import SizedStep, sized_steps
from bitalloy.model.load import Graph
from bitalloy.model.read import constant, elements, is_float, name_of
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.base import ONLY
from bitalloy.targets.base import macs
from bitalloy.targets.devices import Device
from bitalloy.targets.placement import all_conversions

SLOW_RATE, DEAR_BORDERS, START_FACTORS = 0.5, 2.0, (0.5, 2.0)
"""Ends of what is not known of a device, see `ratio_interval`."""
FLOAT_BYTES, LEAST_WRITTEN = 4.0, 2.0
"""Size of a float32 number; and of the smallest number that a kernel which rounds what it reads hands on."""


def estimate_costs(
    graph: Graph, units: UnitGraph, device: Device, workload: Workload | None = None, rounds_apart: bool = False
) -> CostTable:
    """Estimate the cost table of a device that is not here; the table says that it is estimated.

    Args:
        graph: the model.
        units: the units of the model on a target of that device.
        device: peak rates.
        workload: what the table prices, from `workload_of`; None for one inference.
        rounds_apart: whether a kernel of its own rounds behind every convolution or product of rounded numbers, see
            `Target.rounds_apart`: it starts, reads the FP16 sums and writes rounded numbers.
    """
    table = _table(_Priced(graph, units, device, sized_steps(graph, workload), rounds_apart))
    pure = {scheme.name: Plan.of(scheme.name, *units.able(scheme.name)) for scheme in units.schemes}
    return msgspec.structs.replace(
        table,
        pure_us={n: latency_us(table, units, plan) for n, plan in pure.items()},
        float_bytes=Artefact({ONLY: graph.model}).size_bytes,
    )


def ratio_interval(
    graph: Graph,
    units: UnitGraph,
    device: Device,
    plan: Plan,
    against: Plan,
    workload: Workload | None = None,
    rounds_apart: bool = False,
) -> Estimate:
    """Estimate the latency of a plan over that of another, between the ends of what is not known of a device.

    The value takes peak rates as they are. The ends are the least and the largest ratio over all combinations of what
    data sheets leave open: lowered schemes reach all of their peak, or `SLOW_RATE` of it; borders cost nothing, because
    they are fused with a kernel beside them, or `DEAR_BORDERS` times a pass through memory; kernels start in half the
    assumed time, or in twice that. The truth may lie outside: nothing is measured.

    Args:
        graph: the model.
        units: the units of the model on a target of that device.
        device: peak rates.
        plan: the plan.
        against: the other plan; an empty one is float.
        workload: what is priced; None for one inference.
        rounds_apart: as `estimate_costs` takes it.
    """
    steps = sized_steps(graph, workload)

    def ratios(rate: float, start: float, borders: Sequence[float]) -> list[float]:
        rates = {n: r * (1.0 if n == BASELINE else rate) for n, r in device.operations_per_second.items()}
        real = msgspec.structs.replace(device, operations_per_second=rates, start_us=device.start_us * start)
        table, found = _table(_Priced(graph, units, real, steps, rounds_apart)), []
        for dear in borders:
            prices = (
                msgspec.structs.replace(b, us_per_element=b.us_per_element * dear, us=b.us * dear)
                for b in table.borders
            )
            priced = msgspec.structs.replace(table, borders=tuple(prices))
            found.append(latency_us(priced, units, plan) / latency_us(priced, units, against))
        return found

    (value,) = ratios(1.0, 1.0, (1.0,))
    ends = [ratios(rate, start, (0.0, DEAR_BORDERS)) for rate, start in product((1.0, SLOW_RATE), START_FACTORS)]
    low, high = min(value, *chain(*ends)), max(value, *chain(*ends))
    return Estimate(value=round(value, 4), low=round(low, 4), high=round(high, 4))


def number_bytes(scheme: Scheme) -> float:
    """Return the size of one number of a tensor in a scheme."""
    if scheme.activation is None or scheme.dynamic:
        return FLOAT_BYTES
    return find_format(scheme.activation).bits / 8


def _crossings(graph: Graph, units: UnitGraph, steps: Sequence[SizedStep]) -> tuple[float, float]:
    """Return how many elements, and how many tensors, pass between units in all steps, over those in one inference."""
    numbers = count = 0
    known = [(e.elements, graph.value[e.tensor].producer(), e.tensor) for e in units.edges]
    for step in steps:
        for _, maker, tensor in known:
            node = step.nodes.get(name_of(maker)) if maker is not None else None
            if node is not None and maker is not None:
                index = [str(v.name) for v in maker.outputs].index(tensor)
                numbers += step.times * elements(node.outputs[index])
                count += step.times
    made = [size for size, maker, _ in known if maker is not None]
    return (numbers / max(sum(made), 1), count / len(made)) if made else (1.0, 1.0)


@dataclass(frozen=True)
class _Traffic:
    """Numbers that a unit reads and makes in one step, and its multiply-accumulates."""

    entering: int
    leaving: int
    weights: int
    """Of constants; of a table from which rows are gathered, these rows."""
    macs: int

    @staticmethod
    def of(nodes: Sequence[ir.Node]) -> _Traffic:
        made = {v for n in nodes for v in n.outputs}
        read: dict[ir.Value, int] = {}
        for node in nodes:
            for value in node.inputs:
                if value is not None and value not in made and is_float(value):
                    size = elements(value)
                    read[value] = min(size, elements(node.outputs[0])) if node.op_type == "Gather" else size
        constants = {v for v in read if constant(v) is not None}
        return _Traffic(
            entering=sum(size for v, size in read.items() if v not in constants),
            leaving=elements(nodes[-1].outputs[0]),
            weights=sum(read[v] for v in constants),
            macs=sum(macs(n) for n in nodes),
        )


@dataclass(frozen=True)
class _Priced:
    """What is priced, and where."""

    graph: Graph
    units: UnitGraph
    device: Device
    steps: Sequence[SizedStep]
    rounds_apart: bool


def _table(priced: _Priced) -> CostTable:
    """Price units and borders; what needs whole plans or files is left out."""
    units, device = priced.units, priced.device
    elements, count = _crossings(priced.graph, units, priced.steps)
    # kernels that round what they read belong to a compiler that fuses conversions with their neighbours
    start = count * device.start_us if any(e.placement is Placement.ENDS for e in units.edges) else 0.0
    per_byte, borders = elements * 1e6 / device.bytes_per_second, []
    for conversion in all_conversions(units.schemes):
        size = sum(number_bytes(units.scheme(end or BASELINE)) for end in (conversion.source, conversion.sink))
        price = BorderCost(source=conversion.source, sink=conversion.sink, us_per_element=size * per_byte, us=start)
        borders.append(price)
    return CostTable(
        target=units.target,
        device=f"{device.name} (estimated from peak rates)",
        threads=0,
        units=tuple(_unit(priced, unit) for unit in units.units),
        borders=tuple(borders),
        fixed_us=0.0,
        pure_us={},
        residual_percent=0.0,
        estimated=True,
    )


def _unit(priced: _Priced, unit: Unit) -> UnitCost:
    graph, units, device = priced.graph, priced.units, priced.device
    rounded = sum(site.elements for site in unit.weights)
    sized = [(s.times, [s.nodes[name] for name in unit.core if name in s.nodes]) for s in priced.steps]
    passes = [(times, _Traffic.of(nodes)) for times, nodes in sized if nodes]

    def weight_bytes(scheme: Scheme, weights: int) -> float:
        """Return the size of the constants; those without sites, such as a bias, are what nodes compute in."""
        others, sited = number_bytes(scheme) if scheme.cast else FLOAT_BYTES, min(rounded, weights)
        return (weights - sited) * others + sited * weight_bits(scheme) / 8

    def us(scheme: Scheme) -> float:
        # a layer that reads rounded numbers hands on floats, which the next one rounds
        size, total = number_bytes(scheme), 0.0
        for times, one in passes:
            moved = one.entering * size + weight_bytes(scheme, one.weights) + one.leaving * max(size, LEAST_WRITTEN)
            rates = device.operations_per_second  # tables in fewer bits have no rate: nothing is computed
            arithmetic = 2 * one.macs / rates.get(scheme.name, rates[BASELINE])
            total += times * (max(arithmetic, moved / device.bytes_per_second) * 1e6 + device.start_us)
            if priced.rounds_apart and scheme.rounds and one.macs:
                again = one.leaving * (LEAST_WRITTEN + size)
                total += times * (again / device.bytes_per_second * 1e6 + device.start_us)
        return round(total, 3)

    known = [units.scheme(name) for name in (BASELINE, *unit.choices)]
    kept = max(_Traffic.of([graph.node[name] for name in unit.core]).weights, rounded)  # of a table all rows
    return UnitCost(
        unit=unit.id,
        us={scheme.name: us(scheme) for scheme in known},
        bytes={scheme.name: round(weight_bytes(scheme, kept)) for scheme in known},
    )
