"""Binding of the inputs of a file to static shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import onnx

from bitalloy.core.errors import ModelError


def fed_inputs(proto: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs that must be fed: old files list their weights as inputs too."""
    names = {i.name for i in proto.graph.initializer}
    return [v for v in proto.graph.input if v.name not in names]


def part_contradicted(proto: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Take the name from dimensions of the inputs that have one name and, in `shapes`, several sizes.

    Some exporters name dimensions by their position, as if the widths of all inputs were one; runtimes do not compare
    them. The names are returned.
    """
    found: dict[str, set[int]] = {}
    values = [value for value in fed_inputs(proto) if value.name in shapes]
    for value in values:
        for dim, size in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=False):
            if dim.dim_param:
                found.setdefault(dim.dim_param, set()).add(size)
    parted = tuple(name for name, sizes in found.items() if len(sizes) > 1)
    for value in fed_inputs(proto):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in parted:
                dim.Clear()
    return parted


def bind(proto: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give every input a static shape: its own, the one asked for, or 1 for a leading symbolic dimension."""
    values = fed_inputs(proto)
    unknown = sorted(set(shapes) - {v.name for v in values})
    if unknown:
        raise ModelError(f"No input called {unknown}; the model's inputs are {[v.name for v in values]}.")
    for name, sizes in shapes.items():
        if any(size < 0 for size in sizes):
            raise ModelError(f"Input '{name}' cannot have the shape {list(sizes)}: no size may be negative.")
    for value in values:
        kind = value.type.tensor_type
        if not kind.HasField("shape"):
            for _ in shapes.get(value.name, ()):
                kind.shape.dim.add()
            if value.name not in shapes:
                raise ModelError(
                    f"Input '{value.name}' has no shape. Add --shape {value.name}=1x3x640x640 (with your sizes)."
                )
        dims = [d.dim_value or d.dim_param or "?" for d in kind.shape.dim]
        if len(shapes.get(value.name, dims)) != len(dims):
            raise ModelError(
                f"Input '{value.name}' has {len(dims)} dimensions, but the shape {list(shapes[value.name])} was given."
            )
    symbols = _symbols(values, shapes)
    for value in values:
        dims = value.type.tensor_type.shape.dim
        given: Sequence[int | None] = shapes.get(value.name, [None] * len(dims))
        text = "x".join(str(d.dim_value or d.dim_param or "?") for d in dims)
        for axis, (dim, wanted) in enumerate(zip(dims, given, strict=True)):
            if dim.dim_value > 0 and wanted not in (None, dim.dim_value):
                raise ModelError(
                    f"Input '{value.name}' is fixed to {dim.dim_value} on axis {axis}, but {wanted} was given."
                )
            found = (dim.dim_value or None, wanted, symbols.get(dim.dim_param), 1 if axis == 0 else None)
            size = next((s for s in found if s is not None), None)
            if size is None:
                raise ModelError(
                    f"Input '{value.name}' has symbolic shape {text} and no size was given. "
                    f"Add --shape {value.name}={text} with numbers in place of the names."
                )
            dim.dim_value = size


def _symbols(values: Iterable[onnx.ValueInfoProto], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Sizes of named dimensions: those given, then 1 for names that lead a shape."""
    sizes: dict[str, int] = {}
    leading: dict[str, int] = {}
    for value in values:
        dims = value.type.tensor_type.shape.dim
        for axis, dim in enumerate(dims):
            if not dim.dim_param:
                continue
            if axis == 0:
                leading[dim.dim_param] = 1
            if value.name in shapes:
                sizes[dim.dim_param] = shapes[value.name][axis]
    return {**leading, **sizes}
