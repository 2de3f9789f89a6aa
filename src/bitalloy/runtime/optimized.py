"""Optimized graphs of a runtime: which nodes of the model each node of the optimized graph stands for.

ONNX Runtime names what it fuses after a node or a tensor that it took in, and tensors that survive keep their names.
Tensors in another layout are renamed, so between two that survive there may lie a chain of nodes.

Case 1. A node whose name, or whose output's, is found in the name of a node of the result: that one does its work.
Case 2. Constant operands only, and the result does not read them any more: it was folded into a constant.
Case 3. Else it was fused. The node that took it lies before the tensors that survive behind it. Among several it is the
        one that took the nearest node before it, because what follows a kernel runs at its end; DequantizeLinear runs
        at the beginning of the kernels behind it.
Case 4. Nothing that survives depends on it: it was removed.

Beside that, a node whose float weights the result stores as integers of one byte has been rounded by the runtime.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from bitalloy import ops

BYTES = frozenset({ir.DataType.INT8, ir.DataType.UINT8})
LAYOUT = frozenset({"ReorderInput", "ReorderOutput", "Reshape", "Transpose"})
"""Operators that a runtime adds to change the layout of tensors for other operators."""


@dataclass(frozen=True)
class RewrittenNode:
    """A node of the optimized graph."""

    name: str
    op: str
    sources: tuple[str, ...]
    """Names of the nodes of the model whose work this node does, in order; empty for a node that the runtime added."""


@dataclass(frozen=True)
class Rewritten:
    """A graph as a runtime executes it, matched with the model."""

    nodes: tuple[RewrittenNode, ...]
    folded: tuple[str, ...]
    """Names of the nodes of the model that became constants (case 2)."""
    removed: tuple[str, ...]
    """Names of the nodes of the model that were removed (case 4)."""
    unfused: tuple[str, ...]
    """Names of QuantizeLinear nodes of the optimized graph that only DequantizeLinear reads: no kernel took them in."""
    rounded: tuple[str, ...] = ()
    """Names of the nodes of the model whose float weights became integers."""


def match(model: ir.Graph, result: ir.Graph, origin: Callable[[str], str | None]) -> Rewritten:
    """Tell what became of every node of a model in the graph that a runtime made of it.

    Args:
        model: the graph as given to the runtime; names of nodes and tensors are unique.
        result: the optimized graph that the runtime made of it.
        origin: from a name in `result` to the name of a node or tensor of `model` that it was made from; None for one
            that the runtime made up.
    """
    return _Matcher(model, result, origin).matched()


class _Matcher:
    def __init__(self, model: ir.Graph, result: ir.Graph, origin: Callable[[str], str | None]) -> None:
        self._model, self._result = model, result
        makers = {str(v.name): node for node in model for v in node.outputs}
        nodes = {str(node.name): node for node in model}
        self._makes: dict[str, ir.Node] = {}
        """Tensor of the model -> node of the result that makes it."""
        self._anchors: dict[ir.Node, list[ir.Node]] = {}
        """Node of the model -> nodes of the result that have its name (case 1)."""
        for node in result:
            self._makes.update({str(v.name): node for v in node.outputs if str(v.name) in makers})
            name = origin(str(node.name)) or ""
            source = nodes.get(name) or makers.get(name)
            if source is None or (node.op_type in ops.ROUNDING and source.op_type not in ops.ROUNDING):
                continue  # rounding that was moved is named after what it rounds now
            if name in makers:
                self._makes.setdefault(name, node)
            self._anchors.setdefault(source, []).append(node)
        self._ends = set(self._makes.values())
        self._constants = {str(name) for name in result.initializers}

    def matched(self) -> Rewritten:
        taken: dict[ir.Node, list[str]] = {node: [] for node in self._result}
        folded, removed, rounded = [], [], []
        for node in self._model:
            if takers := self._anchors.get(node):
                pass
            elif self._folded(node):
                folded.append(str(node.name))
            elif not (takers := self._fused(node)):
                removed.append(str(node.name))
            for taker in takers or ():
                taken[taker].append(str(node.name))
            if any(_rounds_weight(node, taker) for taker in takers or ()):
                rounded.append(str(node.name))
        pairs = [n for n in self._result if n.op_type == "QuantizeLinear" and _only_dequantized(n)]
        return Rewritten(
            tuple(RewrittenNode(str(n.name), n.op_type, tuple(sources)) for n, sources in taken.items()),
            tuple(folded),
            tuple(removed),
            tuple(str(n.name) for n in pairs),
            tuple(rounded),
        )

    def _folded(self, node: ir.Node) -> bool:
        roots, open_ = set[str](), [node]
        while open_:
            for value in open_.pop().inputs:
                producer = value.producer() if value is not None else None
                if producer is not None:
                    open_.append(producer)
                elif value is not None and not value.is_initializer():
                    return False
                elif value is not None:
                    roots.add(str(value.name))
        if any(str(v.name) in self._constants for v in node.outputs):
            return True
        return str(node.inputs[0].name) not in self._constants if node.inputs and node.inputs[0] else not roots

    def _fused(self, node: ir.Node) -> list[ir.Node]:
        """Return the nodes of the result into which a node was fused (case 3)."""
        group = self._between(node)
        ways = [self._forwards, self._backwards] if node.op_type == "DequantizeLinear" else [self._backwards]
        for way in (*ways, self._forwards):
            if found := [n for n in way(node) if n in group]:
                return found
        return [n for n in group if n.op_type not in LAYOUT] or list(group)

    def _between(self, node: ir.Node) -> dict[ir.Node, None]:
        """Nodes of the result before the tensors that survive behind a node, back to those that survive before them."""
        open_ = [self._makes[name] for name in self._surviving(node)]
        found = dict.fromkeys(open_)
        while open_:
            for value in open_.pop().inputs:
                producer = value.producer() if value is not None else None
                if producer is not None and producer not in self._ends and producer not in found:
                    found[producer] = None
                    open_.append(producer)
        return found

    def _surviving(self, node: ir.Node) -> Iterator[str]:
        seen, open_ = {node}, [node]
        while open_:
            for value in open_.pop(0).outputs:
                if str(value.name) in self._makes:
                    yield str(value.name)
                    continue
                following = [n for n, _ in value.uses() if n not in seen]
                seen.update(following)
                open_ += following

    def _backwards(self, node: ir.Node) -> list[ir.Node]:
        """What took the nearest nodes before a node, up to tensors that survive."""

        def before(one: ir.Node) -> Iterable[ir.Node]:
            values = (v for v in one.inputs if v is not None and str(v.name) not in self._makes)
            return [p for v in values if (p := v.producer()) is not None]

        return self._nearest(node, before)

    def _forwards(self, node: ir.Node) -> list[ir.Node]:
        """The same behind it."""
        values = self._makes

        def behind(one: ir.Node) -> Iterable[ir.Node]:
            return [n for v in one.outputs if str(v.name) not in values for n, _ in v.uses()]

        return self._nearest(node, behind)

    def _nearest(self, node: ir.Node, neighbours: Callable[[ir.Node], Iterable[ir.Node]]) -> list[ir.Node]:
        found: dict[ir.Node, None] = {}
        seen, open_ = {node}, [node]
        while open_:
            for other in neighbours(open_.pop(0)):
                if other in seen:
                    continue
                seen.add(other)
                if other in self._anchors:
                    found.update(dict.fromkeys(self._anchors[other]))
                else:
                    open_.append(other)
        return list(found)


def _rounds_weight(node: ir.Node, taker: ir.Node) -> bool:
    """Tell whether a node that took another one in reads its float weights as integers, itself or dequantized."""
    weight = node.inputs[1] if node.op_type in ops.WEIGHTED else None
    if weight is None or not weight.is_initializer() or weight.dtype != ir.DataType.FLOAT or weight.shape is None:
        return False
    read = [v for v in taker.inputs if v is not None]
    read += [p.inputs[0] for v in read if (p := v.producer()) and p.op_type == "DequantizeLinear" and p.inputs[0]]
    stored = [v.shape for v in read if v.is_initializer() and v.dtype in BYTES and v.shape is not None]
    return math.prod(weight.shape.numpy()) in [math.prod(shape.numpy()) for shape in stored if len(shape)]


def _only_dequantized(node: ir.Node) -> bool:
    uses = [n for n, _ in node.outputs[0].uses()]
    return bool(uses) and all(n.op_type == "DequantizeLinear" for n in uses)
