"""What a compiler made of a plan: every planned unit beside the types that its kernel in the engine reads.

Case 1. Of a convolution or a product of matrices both operands have the type of the planned scheme: it agrees.
Case 2. Weights stored in fewer bits stand beside a float operand: it agrees with the scheme that stores them so.
Case 3. Other types: it differs. Where the plan rounds, the compiler has widened what was rounded.
Case 4. The text does not name it: it was folded, or fused under the name of another.
Case 5. Pointwise operators are fused across units, and one kernel reads the types of many; a product of a column or a
        row may be among them. The planned type is one of those that it reads: it agrees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from bitalloy import ops
from bitalloy.core.audited import Compilation, CompiledGraph, CompiledUnit
from bitalloy.core.errors import ModelError
from bitalloy.core.ownership import temporary
from bitalloy.core.schemes import BASELINE, Plan, Scheme
from bitalloy.core.units import Unit, UnitGraph
from bitalloy.formats.words import KERNEL_SCHEMES
from bitalloy.measure.tracing import TracedModel, trace
from bitalloy.model.weights import save
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.engine_text import FUSION, EngineKernel, EngineTensor
from bitalloy.runtime.tensorrt_rtx import (
    CompiledEngine,
    Profile,
    compile_engine,
    compiler_version,
    nearest_capability,
)

COMPILER = "TensorRT for RTX"
BESIDE = "/"
"""Stands between the schemes of types that one kernel reads."""


def compile_plan(
    models: Mapping[str, ir.Model],
    units: UnitGraph,
    plan: Plan,
    capability: int,
    profiles: Mapping[str, Profile] | None = None,
) -> Compilation:
    """Compile a mixed model, graph by graph, and compare the engines with the plan.

    A graph that the compiler refuses is told in the result.

    Args:
        models: graph -> mixed model in memory, whose nodes are renamed.
        units: the units on the plan's target.
        plan: unit -> scheme.
        capability: compute capability of the device.
        profiles: graph -> shapes of the inputs that it leaves open.

    Raises:
        MissingExtraError: the compiler is not installed.
    """
    version, nearest = compiler_version(), nearest_capability(capability)
    traced = trace(Artefact(models), (u.id for u in units.units))
    graphs: list[CompiledGraph] = []
    kernels: list[EngineKernel] = []
    for name, model in models.items():
        try:
            with temporary() as folder:
                path, *_ = save(model, folder / f"{name}.onnx")
                engine = compile_engine(path, nearest, (profiles or {}).get(name))
        except ModelError as error:
            graphs.append(CompiledGraph(graph=name, failed=str(error)))
            continue
        graphs.append(_graph(name, engine, units, traced))
        kernels.extend(engine.kernels)
    note = ""
    if nearest != capability:
        note = f"The compiler does not know SM{capability}; SM{nearest} is the nearest that it does."
    return Compilation(
        compiler=COMPILER,
        version=version,
        capability=nearest,
        units=compare_engine(units, plan, kernels, traced),
        graphs=tuple(graphs),
        note=note,
    )


def compare_engine(
    units: UnitGraph, plan: Plan, kernels: Sequence[EngineKernel], traced: TracedModel
) -> tuple[CompiledUnit, ...]:
    """Compare every unit of a plan with the kernels that work for it.

    Args:
        units: the units on the plan's target.
        plan: unit -> scheme.
        kernels: kernels of all engines of the model, in order.
        traced: the model that was compiled, which knows what the names in the engines stand for.
    """
    named: dict[str, list[EngineKernel]] = {}
    weighted: dict[str, list[EngineKernel]] = {}
    for kernel in kernels:
        for unit in traced.units_of(kernel.nodes):
            named.setdefault(unit, []).append(kernel)
        for unit in traced.units_of(n for n in kernel.nodes if traced.operator(n) in ops.WEIGHTED):
            weighted.setdefault(unit, []).append(kernel)
    return tuple(
        _unit(unit, units.scheme(plan.scheme_of(unit.id)), (weighted if _weighs(unit) else named).get(unit.id, []))
        for unit in units.units
    )


def _weighs(unit: Unit) -> bool:
    return unit.kind in ops.WEIGHTED


def _unit(unit: Unit, planned: Scheme, kernels: Sequence[EngineKernel]) -> CompiledUnit:
    weighted, whole = _weighs(unit), [k for k in kernels if not k.inside]
    kernel = next((k for k in whole if k.contracts), whole[0] if whole else None)
    if kernel is None:
        cause = "the engine's text does not name it: it was folded, or fused under another name"
        return CompiledUnit(
            unit=unit.id, kind=unit.kind, planned=planned.name, compiled="", weighted=weighted, cause=cause
        )
    types = [tensor.type for tensor in kernel.reads if not tensor.scalar]
    operands = [tensor.type for tensor in kernel.reads[:2]] if kernel.contracts else types
    if kernel.kind == FUSION:
        parts = (k for k in kernels if k.inside and k.contracts)
        operands = next(([t.type for t in part.reads[:2]] for part in parts), types)
    stored = planned.weights_only and planned.weight in types
    among = not kernel.contracts and planned.name in _scheme(types).split(BESIDE)
    compiled = planned.name if stored or among else _scheme(operands)
    return CompiledUnit(
        unit=unit.id,
        kind=unit.kind,
        planned=planned.name,
        compiled=compiled,
        kernel=kernel.kind,
        reads=tuple(types),
        weighted=weighted,
        cause=_cause(planned, compiled) if weighted and compiled else "",
    )


def _scheme(types: Sequence[str]) -> str:
    """Name the scheme in which a kernel works that reads these types; empty where one is not known."""
    words = list(dict.fromkeys(KERNEL_SCHEMES.get(t, t) for t in types))
    return "" if "" in words else BESIDE.join(words)


def _cause(planned: Scheme, compiled: str) -> str:
    if compiled == planned.name:
        return ""
    if planned.weights_only:
        return f"its weights are widened in every run, and the product reads {compiled.upper()}"
    if planned.rounds:
        return f"the compiler has no kernel for it that reads {planned.name.upper()}, and widens what was rounded"
    return f"the compiler chose {compiled.upper()}"


def _graph(name: str, engine: CompiledEngine, units: UnitGraph, traced: TracedModel) -> CompiledGraph:
    """Count the kernels of an engine."""
    rounded = {scheme.name for scheme in units.schemes if scheme.rounds}

    def rounds(tensors: Sequence[EngineTensor]) -> bool:
        return any(KERNEL_SCHEMES.get(t.type) in rounded for t in tensors)

    def floats(tensors: Sequence[EngineTensor]) -> bool:
        known = {KERNEL_SCHEMES[t.type] for t in tensors if t.type in KERNEL_SCHEMES and not t.scalar}
        return bool(known - rounded)

    whole = [k for k in engine.kernels if not k.inside]
    others = [k for k in whole if not k.contracts]
    return CompiledGraph(
        graph=name,
        kernels=len(whole),
        requantizing=sum(rounds(k.writes) and floats(k.reads) for k in others),
        casting=sum({traced.operator(node) for node in k.nodes} == {"Cast"} for k in others),
        reformatting=sum(not k.nodes for k in others),
        widening=sum(
            k.contracts and rounds(k.reads[:2]) and any(KERNEL_SCHEMES.get(t.type) == BASELINE for t in k.writes)
            for k in whole
        ),
        size_bytes=engine.size_bytes,
        seconds=round(engine.seconds, 3),
        messages=engine.messages,
    )
