"""The workload of a model: one inference, or of a language model a prompt and the tokens of its answer.

A language model is a program whose decoder takes its cache as inputs and leaves three sizes open, by these names:
`new` positions at once, `past` ones in the cache, and `all` of both. Its answer to a prompt is priced as one run of all
graphs at the length of the prompt, and a run of the decoder alone for every new token, at the mean length of the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from bitalloy.core.errors import BitalloyError
from bitalloy.core.records import Workload
from bitalloy.model.graphs.joining import Joined
from bitalloy.model.load import Graph, load_graph
from bitalloy.model.read import name_of
from bitalloy.model.sizes import Shapes
from bitalloy.runtime.steps import Step, once
from bitalloy.sensitivity.analysis import Analysis

_NEW, _PAST, _ALL, _AFTER = "new", "past", "all", "after"
"""Open sizes of a language model: positions at once, of the cache, of both; and tokens behind an image."""
PREFILL, TOKEN = "prefill", "token"
"""Names of the steps."""
DEFAULT_NEW = 64
"""Tokens of an answer where nothing is asked for."""


def is_language(graph: Graph) -> bool:
    """Tell whether a model is a language model whose steps can be priced."""
    return _decoder(graph) is not None


def workload_of(graph: Graph, asked: Workload | None) -> Workload | None:
    """Return the workload with its sizes: what is asked for, or what a model of this kind usually does.

    Raises:
        BitalloyError: a workload is asked for, and the model is no language model, or the prompt is too short.
    """
    decoder = _decoder(graph)
    if decoder is None:
        if asked is None:
            return None
        raise BitalloyError(
            "--workload speaks of a prompt and new tokens, which only language models have: a program whose decoder "
            f"leaves the sizes '{_NEW}', '{_PAST}' and '{_ALL}' open (as `bitalloy export mobilevlm-...` writes it). "
            "Leave it out: one inference is priced."
        )
    sizes = _sizes(graph)
    usual = sizes[_NEW]
    prompt = usual if asked is None or asked.prompt is None else asked.prompt
    new = DEFAULT_NEW if asked is None or asked.new is None else asked.new
    fixed = usual - sizes[_AFTER] if _AFTER in sizes else 0
    if prompt <= fixed:
        raise BitalloyError(f"--workload prompt={prompt} is too short: {fixed} positions stand before the question.")
    return Workload(prompt=prompt, new=new)


def priced(analysis: Analysis) -> tuple[Step, ...]:
    """Return the steps that the latencies of an analysis pay for, with its first sample."""
    workload = workload_of(analysis.graph, analysis.settings.workload)
    return workload_steps(analysis.graph, analysis.data.feeds(0), workload, seed=analysis.settings.seed)


def workload_steps(
    graph: Graph, feeds: Mapping[str, np.ndarray], workload: Workload | None, *, seed: int = 0
) -> tuple[Step, ...]:
    """Return what is run for a workload.

    Args:
        graph: the model.
        feeds: one sample; a prompt of another length repeats it or cuts it short.
        workload: from `workload_of`; None for one inference.
        seed: seed of the embedding and the cache, which are random: no latency depends on them.
    """
    decoder = _decoder(graph)
    if workload is None or decoder is None:
        return (once(feeds),)
    assert isinstance(graph, Joined) and workload.prompt is not None and workload.new is not None
    usual = _sizes(graph)
    sizes = _prompt_sizes(usual, workload.prompt)
    named = {graph.program.names[g, t]: dims for (g, t), dims in _open(graph).items() if (g, t) in graph.program.names}
    prompt = {
        name: np.resize(value, tuple(sizes.get(d, n) for d, n in zip(named[name], value.shape, strict=True)))
        if name in named and 0 not in value.shape
        else value
        for name, value in feeds.items()
    }
    steps = [Step(PREFILL, prompt)]
    if workload.new:
        past = _mean_past(workload.prompt, workload.new)
        token = _token(graph.opened[decoder], past, np.random.default_rng(seed))
        steps.append(Step(TOKEN, token, times=workload.new, graph=decoder))
    return tuple(steps)


@dataclass(frozen=True)
class SizedStep:
    """A step of a workload, of which nothing is run: its nodes, whose tensors have the sizes of that step."""

    name: str
    times: int
    """How often it is made."""
    nodes: Mapping[str, ir.Node]
    """Name in the whole model -> node, of the graphs that run."""


def sized_steps(graph: Graph, workload: Workload | None) -> tuple[SizedStep, ...]:
    """Return the steps of a workload for an estimate. Graphs are loaded again at sizes other than those of the samples.

    Args:
        graph: the model.
        workload: from `workload_of`; None for one inference.
    """
    decoder = _decoder(graph)
    if workload is None or decoder is None:
        return (SizedStep(once({}).name, 1, graph.node),)
    assert isinstance(graph, Joined) and workload.prompt is not None and workload.new is not None
    usual = _sizes(graph)
    prompt = {**usual, **_prompt_sizes(usual, workload.prompt)}
    whole = graph.node if prompt == usual else _sized(graph, graph.program.order, prompt)
    steps = [SizedStep(PREFILL, 1, whole)]
    if workload.new:
        past = _mean_past(workload.prompt, workload.new)
        nodes = _sized(graph, [decoder], {**usual, _NEW: 1, _PAST: past, _ALL: past + 1})
        steps.append(SizedStep(TOKEN, workload.new, nodes))
    return tuple(steps)


def optimization_profiles(
    graph: Graph, models: Mapping[str, ir.Model | Path], workload: Workload | None, others: Sequence[Shapes] = ()
) -> dict[str, dict[str, tuple[tuple[int, ...], ...]]]:
    """Return the least, the usual and the largest shape of every input that a shipped model leaves open.

    Of a language model the least is one position and an empty cache, the largest a prompt behind a full one, and the
    usual shape that of the mean token. Of other models they are those of the samples and the other sizes asked for.

    Args:
        graph: the model that was planned.
        models: graph -> shipped model in memory.
        workload: from `workload_of`; None for one inference.
        others: further shapes of inputs, of a model that is one graph.

    Returns:
        Graph -> input -> three shapes. Graphs without open sizes are left out.
    """
    steps: list[tuple[int, dict[str, int]]] = [(1, {})]
    if workload is not None and workload.prompt is not None and workload.new is not None:
        prompt, new = workload.prompt, workload.new
        read, past, last = _prompt_sizes(_sizes(graph), prompt), _mean_past(prompt, new), prompt + new
        steps = [(0, {**read, _NEW: 1, _PAST: 0, _ALL: 1}), (0, {**read, _PAST: last, _ALL: prompt + last})]
        steps += [(1, {**read, _PAST: 0}), (new, {**read, _NEW: 1, _PAST: past, _ALL: past + 1})]
    found: dict[str, dict[str, tuple[tuple[int, ...], ...]]] = {}
    for name, model in models.items():
        assert isinstance(model, ir.Model), "shapes are read from models in memory"
        part = graph.program.graphs[name] if isinstance(graph, Joined) else graph
        bound = {spec.name: tuple(int(d) for d in spec.shape) for spec in part.info.inputs}
        for value in model.graph.inputs:
            if value.shape is None or value.shape.is_static():
                continue
            tensor = str(value.name)
            sized = [(times, _at(value.shape, bound[tensor], sizes)) for times, sizes in steps]
            shapes = [shape for _, shape in sized] + [tuple(o[tensor]) for o in others if tensor in o]
            least, largest = (tuple(map(end, zip(*shapes, strict=True))) for end in (min, max))
            usual = max(sized, key=lambda step: step[0])[1]
            found.setdefault(name, {})[tensor] = (least, usual, largest)
    return found


def _at(shape: ir.Shape, bound: Sequence[int], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return a shape whose open sizes have given values, or those of the samples."""
    named = [str(d.value) if isinstance(d, ir.SymbolicDim) else "" for d in shape]
    return tuple(sizes.get(d, n) for d, n in zip(named, bound, strict=True))


def _sized(graph: Joined, names: Sequence[str], sizes: Mapping[str, int]) -> dict[str, ir.Node]:
    """Load some graphs of a program at other sizes; name in the whole -> node."""
    found: dict[str, ir.Node] = {}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in names}
    for (name, tensor), dims in _open(graph).items():
        if name in shapes:
            shapes[name][tensor] = tuple(int(d) if d.isdigit() else sizes[d] for d in dims)
    for name in names:
        part = load_graph(graph.program.graphs[name].source, shapes=shapes[name], part=True)
        found.update({f"{name}/{name_of(node)}": node for node in part.nodes})
    return found


def _prompt_sizes(usual: Mapping[str, int], prompt: int) -> dict[str, int]:
    """Open size -> what it is while a prompt of some length is read."""
    return {_NEW: prompt, _ALL: prompt, _AFTER: usual.get(_AFTER, 0) + prompt - usual[_NEW]}


def _mean_past(prompt: int, new: int) -> int:
    """Return the mean length of the cache while an answer is written."""
    return prompt + new // 2


def told_workload(graph: Graph, workload: Workload | None) -> str:
    """Say what one latency pays for, e.g. `one run of encoder, then decoder: image 1x3x1024x1024, ...`."""
    if not isinstance(graph, Joined):
        return "one inference"
    order = ", then ".join(graph.program.order)
    if workload is not None:
        return (
            f"an answer: one run of {order} on a prompt of {workload.prompt} positions, and {workload.new} runs of "
            f"{_decoder(graph)} for one token each"
        )
    fed = ", ".join(f"{s.name} {'x'.join(map(str, s.shape))}" for s in graph.info.inputs if 0 not in s.shape)
    return f"one run of {order}: {fed}"


def _open(graph: Joined) -> dict[tuple[str, str], tuple[str, ...]]:
    """(graph, input) -> names of its open sizes and its other sizes as text, of inputs that leave any open."""
    found = {}
    for name, model in graph.opened.items():
        for value in model.graph.inputs:
            dims = tuple(str(d.value) if isinstance(d, ir.SymbolicDim) else str(d) for d in value.shape or ())
            if not all(d.isdigit() for d in dims):
                found[name, str(value.name)] = dims
    return found


def _decoder(graph: Graph) -> str | None:
    """Name the graph with a cache whose length is open."""
    if not isinstance(graph, Joined):
        return None
    named: dict[str, set[str]] = {}
    for (name, _), dims in _open(graph).items():
        named.setdefault(name, set()).update(dims)
    return next((name for name, dims in named.items() if {_NEW, _PAST, _ALL} <= dims), None)


def _sizes(graph: Graph) -> dict[str, int]:
    """Open size -> what it is in the samples."""
    assert isinstance(graph, Joined)
    found: dict[str, int] = {}
    for (name, tensor), dims in _open(graph).items():
        spec = next(s for s in graph.program.graphs[name].info.inputs if s.name == tensor)
        found.update({d: int(n) for d, n in zip(dims, spec.shape, strict=True) if not d.isdigit()})
    return found


def _token(decoder: ir.Model, past: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Feeds of the decoder for one token behind `past` others."""
    sizes, found = {_NEW: 1, _PAST: past, _ALL: past + 1}, {}
    for value in decoder.graph.inputs:
        assert value.shape is not None and value.dtype is not None, "inputs of a loaded graph are typed"
        dims = [str(d.value) if isinstance(d, ir.SymbolicDim) else int(d) for d in value.shape]
        shape = [sizes.get(d, 1) if isinstance(d, str) else d for d in dims]
        kind = value.dtype.numpy()
        if np.issubdtype(kind, np.floating):
            found[str(value.name)] = (0.02 * generator.standard_normal(shape)).astype(kind)
        else:
            found[str(value.name)] = np.full(shape, 1 if _ALL in dims else past, kind)
    return found
