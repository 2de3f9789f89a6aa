"""A calibrated model, and the models that plans make of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Self

import msgspec
import onnx_ir as ir

from bitalloy.core.errors import ModelError
from bitalloy.core.jobs import Contexts, Opening
from bitalloy.core.outcome import Correction
from bitalloy.core.records import Calibration, DataInfo, Head, Record, SampleParts, Settings, TensorSpec
from bitalloy.core.schemes import BASELINE, Plan
from bitalloy.core.units import Offset, UnitGraph
from bitalloy.data.datasets import Dataset
from bitalloy.model.graphs.joining import Joined
from bitalloy.model.load import Graph
from bitalloy.model.metadata import SOURCE
from bitalloy.model.opset import raise_opset
from bitalloy.model.twins import join_twins
from bitalloy.rewrite.apply import MixedModel, write_plan
from bitalloy.rewrite.cast import as_specified
from bitalloy.rewrite.divide import divide
from bitalloy.rewrite.floats import keep_floats
from bitalloy.rewrite.kernels import lower_kernels
from bitalloy.rewrite.reopen import reopen
from bitalloy.rewrite.sums import halve_sums
from bitalloy.runtime.artefact import Artefact
from bitalloy.runtime.base import ONLY
from bitalloy.runtime.machine import Machine, this_machine
from bitalloy.runtime.ort import AS_WRITTEN
from bitalloy.targets.base import Target
from bitalloy.targets.recipe import Recipe, recipe_identity
from bitalloy.targets.stored import ChosenRoundings


class Environment(Record, frozen=True, kw_only=True):
    """What executes models."""

    machine: Machine
    runtime: str
    """Name of the runtime."""
    version: str
    """Version of the runtime."""


class ExecutedNetwork(Record, frozen=True, kw_only=True):
    """All that decides what rounded models of a network, and the network itself, do here: a part of stages' inputs."""

    model: str
    """Identity of the network that is rounded, see `Graph.identity`."""
    given: str
    """Identity of the network as loaded, which is the reference."""
    shapes: tuple[TensorSpec, ...]
    """Inputs, with the sizes at which it runs."""
    heads: tuple[Head, ...]
    recipe: Opening
    """How the target rounds it."""
    data: DataInfo
    """The samples."""
    environment: Environment


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A model that is ready to be rounded, on the first target of its settings."""

    graph: Graph
    target: Target
    units: UnitGraph
    heads: tuple[Head, ...]
    settings: Settings
    data: Dataset
    """The samples that were drawn."""
    parts: SampleParts
    """What each of them serves."""
    info: DataInfo
    """What tells all of `data` from other samples."""
    excluded: frozenset[str]
    """Nodes that the user keeps in float."""
    calibration: Calibration
    given: Graph
    """The model as loaded: the reference of all measurements. `graph` computes the same, perhaps with other weights."""
    notes: tuple[str, ...] = ()
    """What a reader of the results must know, e.g. that the data is the embedded sample."""
    corrections: tuple[Correction, ...] = ()
    """What scaling between layers and bias correction did."""
    offsets: Mapping[str, Offset] = field(default_factory=dict)
    """What is added to biases, see `Recipe.offsets`; empty without bias correction."""
    roundings: ChosenRoundings = field(default_factory=ChosenRoundings)
    """Weights whose stored numbers are not all the nearest ones, see `Recipe.roundings`."""
    others: tuple[Calibrated, ...] = ()
    """The same on the other targets of the settings."""

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Tensor -> (low, high)."""
        return {r.tensor: (r.low, r.high) for r in self.calibration.ranges}

    def recipe(self, method: str = "") -> Recipe:
        """Say how the target rounds the model, with ranges by another method where that gives something else."""
        ranges = {r.tensor: r.others.get(method, (r.low, r.high)) for r in self.calibration.ranges}
        return Recipe(self.units, self.target, ranges, self.offsets, self.roundings)

    def on(self, methods: Mapping[str, str]) -> Calibrated:
        """Return the same model with the ranges of some tensors by another method."""
        ranges = []
        for r in self.calibration.ranges:
            if r.tensor in methods:
                low, high = r.others[methods[r.tensor]]
                r = msgspec.structs.replace(r, low=low, high=high, method=methods[r.tensor])
            ranges.append(r)
        return replace(self, calibration=msgspec.structs.replace(self.calibration, ranges=tuple(ranges)))

    @property
    def environment(self) -> Environment:
        """What executes models of the target here."""
        return environment_of(self.target)

    @property
    def executed(self) -> ExecutedNetwork:
        """All that decides what models of plans, and the float model, do here."""
        return ExecutedNetwork(
            model=self.graph.identity,
            given=self.given.identity,
            shapes=self.graph.info.inputs,
            heads=self.heads,
            recipe=recipe_identity(self.recipe()),
            data=self.info,
            environment=self.environment,
        )

    def corrected(self, offsets: Mapping[str, Offset]) -> Self:
        """Return the same model with its biases moved."""
        return replace(self, offsets=offsets)

    def stored(self, roundings: ChosenRoundings) -> Self:
        """Return the same model with some weights stored otherwise."""
        return replace(self, roundings=roundings)

    def variant(self, plan: Plan) -> MixedModel:
        """Make the model in which the units of a plan run in its schemes."""
        return write_plan(self.graph, self.recipe(), plan)

    def artefact(self, plan: Plan) -> Artefact:
        """Make the model of a plan as it is shipped, of a program one for every graph; open sizes are left open.

        A graph whose rounded nodes are not found again with open sizes keeps those of the samples.
        """
        return plan_artefact(self.graph, self.recipe(), plan)

    def executable(self, artefact: Artefact) -> Artefact:
        """Return an artefact for ONNX Runtime here, with the numbers that the graph says: see `as_specified`."""
        return _executable(artefact, self.target)

    def original(self) -> Artefact:
        """Return the float model as it was given, or in normal form where the file cannot stand for it."""
        return original_artefact(self.graph, self.given, self.target)


class ArtefactParts(Record, frozen=True, kw_only=True):
    """What an executable model is made from."""

    graph: Opening
    given: Opening
    """The model as loaded."""
    recipe: Opening
    schemes: dict[str, str] | None
    """The plan as a mapping; None for the model as loaded."""


def open_artefact(spec: ArtefactParts, contexts: Contexts) -> Artefact:
    """Make the model of a plan, or the model as loaded, for ONNX Runtime on this machine."""
    graph, recipe = contexts.open(spec.graph), contexts.open(spec.recipe)
    if spec.schemes is None:
        return original_artefact(graph, contexts.open(spec.given), recipe.target)
    return _executable(plan_artefact(graph, recipe, Plan(spec.schemes)), recipe.target)


def plan_artefact(graph: Graph, recipe: Recipe, plan: Plan) -> Artefact:
    """Make the model of a plan as it is shipped: see `Calibrated.artefact`."""
    model = write_plan(graph, recipe, plan, kernels=False).model
    program = graph.program if isinstance(graph, Joined) else None
    parts = {ONLY: model} if program is None else divide(model, program)
    bound: dict[str, str] = {}
    for form in _open_forms(graph):
        try:
            if not recipe.target.runtime.open_sizes:
                raise ModelError(f"{recipe.target.runtime.name} builds an engine for one size of each input.")
            parts[form.name] = form.take(parts[form.name])
        except ModelError as error:
            bound[form.name] = str(error)
    for part in parts.values():
        lower_kernels(part)
    for part in parts.values() if recipe.target.rounds_floats else ():
        keep_floats(part)
    for part in parts.values() if recipe.target.rounds_apart else ():
        halve_sums(part)
    for part in parts.values():
        join_twins(part)
    return Artefact(parts, program, recipe.target.runtime, graph.shown, bound)


@dataclass(frozen=True)
class _OpenForm:
    """A graph as its file leaves sizes open."""

    name: str
    fixed: ir.Model
    """The float graph with the sizes of the samples, as it was loaded."""
    load: Callable[[], ir.Model]
    prefix: str = ""
    """What the names of its weights have in front in the whole."""

    def take(self, mixed: ir.Model) -> ir.Model:
        """Write the roundings of the graph with fixed sizes into a copy.

        Raises:
            ModelError: the forms differ where something is rounded.
        """
        model = self.load().clone()
        for value in model.graph.initializers.values():
            value.meta[SOURCE] = (f"{self.prefix}{value.name}", BASELINE)
        raise_opset(model, int(mixed.opset_imports[""]))
        return reopen(mixed, model, self.fixed)


def _open_forms(graph: Graph) -> list[_OpenForm]:
    """List the graphs whose files leave sizes open."""
    if not isinstance(graph, Joined):
        whole = _OpenForm(ONLY, graph.base or graph.model, lambda: graph.open_model)
        return [whole] if graph.is_open else []
    parts = graph.program.graphs
    return [
        _OpenForm(name, parts[name].model, partial(graph.opened.__getitem__, name), f"{name}/") for name in graph.opened
    ]


def _executable(artefact: Artefact, target: Target) -> Artefact:
    if not target.casts:
        return artefact
    models = {name: as_specified(m) if isinstance(m, ir.Model) else m for name, m in artefact.models.items()}
    return replace(artefact, models=models, runtime=AS_WRITTEN)


def original_artefact(graph: Graph, given: Graph, target: Target) -> Artefact:
    """Return the float model as it was given, see `Calibrated.original`, for the runtime of a target."""
    if not isinstance(graph, Joined):
        return Artefact({ONLY: as_given(given, target)}, runtime=target.runtime)
    program = graph.program
    return Artefact({name: as_given(p, target) for name, p in program.graphs.items()}, program, target.runtime)


def as_given(graph: Graph, target: Target) -> Path | ir.Model:
    """Return the file of a float model, or its normal form where the file cannot stand for it on a target."""
    return graph.model if unfit_reason(graph, target) or graph.shown else graph.source


def unfit_reason(graph: Graph, target: Target) -> str:
    """Say why the file as it is cannot stand for the float model on a target; empty where it can."""
    return graph.unfit or (target.refuses_branches if graph.branched else "")


def environment_of(target: Target) -> Environment:
    """Say what executes models of a target here."""
    runtime = target.runtime
    return Environment(machine=this_machine(), runtime=runtime.name, version=runtime.version())


def deciding_target(parts: Sequence[Calibrated]) -> int | None:
    """Find the first target whose roundings can be switched: what is measured on it holds for all."""
    return next((i for i, part in enumerate(parts) if part.units.lowest_gated()), None)
