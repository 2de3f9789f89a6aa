"""The human view of a graph: a tree of regions read from where each node comes from in the model's source.

Sources, in this order:

1. `bitalloy.region` metadata, which the model zoo writes in the words of the model's family: `neck/model.13/cv1`.
2. `pkg.torch.onnx.name_scopes` metadata (torch.export exporter): module paths such as `model.4.m.0`.
3. Node names with slashes (TorchScript exporter): `/model.4/m.0/cv1/conv/Conv`.
4. Otherwise the node belongs to the root region.

A path is a tuple of names; a region is any prefix of a path, so regions nest.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable

import onnx_ir as ir

from bitalloy.model.metadata import REGION, SCOPES

ROOT = "(model)"
MOST_LEVELS = 64
"""What lies deeper in the tree belongs to its ancestor of this level: no model is written in so many."""


def path_of(node: ir.Node) -> tuple[str, ...]:
    """Return the path of the module that a node belongs to, outermost first; empty for the root.

    >>> path_of(ir.node("Conv", [], name="/model.4/m.0/cv1/conv/Conv"))
    ('model.4', 'm.0', 'cv1', 'conv')
    """
    return _path(node)[:MOST_LEVELS]


def _path(node: ir.Node) -> tuple[str, ...]:
    if REGION in node.metadata_props:
        return tuple(p for p in node.metadata_props[REGION].split("/") if p)
    scopes = _scopes(node.metadata_props.get(SCOPES, ""))
    if scopes:
        path: list[str] = []
        previous = ""
        for scope in scopes:
            path.append(scope.removeprefix(previous + ".") if previous and scope.startswith(previous + ".") else scope)
            previous = scope
        return tuple(path)
    name = node.name or ""
    if "/" not in name:
        return ()
    return tuple(p for p in name.strip("/").split("/")[:-1] if p)


def _scopes(text: str) -> list[str]:
    """Module paths of the name-scope list, outermost first, without the node's own name at the end."""
    try:
        value = ast.literal_eval(text) if text else []
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return []
    return [str(s) for s in value[:-1] if s] if isinstance(value, list) else []


def region_id(path: Iterable[str]) -> str:
    """Return the name of a region, e.g. `model.4/m.0/cv1`."""
    return "/".join(path) or ROOT


def ancestors(region: str) -> tuple[str, ...]:
    """Return all regions that contain a region, itself first and the root last.

    >>> ancestors("model.4/m.0")
    ('model.4/m.0', 'model.4', '(model)')
    """
    parts = region.split("/") if region != ROOT else []
    return (*(region_id(parts[:n]) for n in range(len(parts), 0, -1)), ROOT)
