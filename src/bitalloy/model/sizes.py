"""Open sizes of the inputs of a file: shapes at which it is bound, and others at which it should run as well."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from bitalloy.core.errors import ModelError
from bitalloy.core.records import TensorSpec
from bitalloy.model.load import Graph

Shapes = dict[str, tuple[int, ...]]
"""Input -> shape."""
SIZE_STEP = 32
"""Strides of image networks divide it: larger sizes stay multiples of it where they are."""


class OpenSizes:
    """The inputs of a file that leaves sizes open.

    Args:
        graph: a model of one graph.
    """

    def __init__(self, graph: Graph) -> None:
        declared = {spec.name: spec for spec in graph.declared}
        self._bound = {spec.name: tuple(int(d) for d in spec.shape) for spec in graph.info.inputs}
        self._keys = {
            name: tuple(_key(declared[name], axis, size) for axis, size in enumerate(shape))
            for name, shape in self._bound.items()
        }

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs that have open sizes."""
        return tuple(name for name, keys in self._keys.items() if any(keys))

    def bound(self) -> Shapes:
        """Return the shapes of these inputs in the graph."""
        return {name: self._bound[name] for name in self.inputs}

    def completed(self, given: Mapping[str, Sequence[int]]) -> Shapes:
        """Return the shapes of all inputs with open sizes, of which some are given; what has no name in common stays.

        Raises:
            ModelError: a name, a rank or a fixed size is wrong, or two inputs disagree on a size.
        """
        sizes: dict[str, int] = {}
        for name, shape in given.items():
            if name not in self.inputs or len(shape) != len(self._bound[name]):
                raise ModelError(
                    f"--shape gives '{name}' {list(shape)} beside other sizes; inputs with open sizes, as they are "
                    f"bound first, are {self.bound()}."
                )
            for axis, (key, size) in enumerate(zip(self._keys[name], shape, strict=True)):
                fixed = self._bound[name][axis]
                if (not key and size != fixed) or (key and sizes.setdefault(key, size) != size):
                    raise ModelError(
                        f"--shape gives '{name}' {list(shape)}, but axis {axis} is {sizes[key] if key else fixed}."
                    )
        return self._with(lambda key, size, _: sizes.get(key, size))

    def others(self) -> list[Shapes]:
        """Return further shapes to be tried, different ones first: larger, smaller, larger batches, all but batches."""
        rules: tuple[Callable[[int, int], int], ...] = (
            lambda size, axis: _larger(size),
            lambda size, axis: _smaller(size),
            lambda size, axis: _larger(size) if axis == 0 else size,
            lambda size, axis: 3 * size if axis == 0 else size,
            lambda size, axis: _larger(size) if axis else size,
            lambda size, axis: _smaller(size) if axis else size,
        )
        found: list[Shapes] = []
        for rule in rules:
            shapes = self._by(rule)
            if shapes != self.bound() and shapes not in found:
                found.append(shapes)
        return found

    def _by(self, rule: Callable[[int, int], int]) -> Shapes:
        """Return the shapes that a rule makes of size and axis; the first axis of a name decides for all."""
        sizes: dict[str, int] = {}
        return self._with(lambda key, size, axis: sizes.setdefault(key, rule(size, axis)))

    def _with(self, choose: Callable[[str, int, int], int]) -> Shapes:
        return {
            name: tuple(
                choose(key, size, axis) if key else size
                for axis, (key, size) in enumerate(zip(self._keys[name], self._bound[name], strict=True))
            )
            for name in self.inputs
        }


def _key(declared: TensorSpec, axis: int, size: int) -> str:
    """Name an open size: sizes of one name are equal; empty for a fixed one."""
    said = declared.shape[axis] if axis < len(declared.shape) else "?"
    if said == size:
        return ""
    return str(said) if isinstance(said, str) and said != "?" else f"{declared.name}[{axis}]"


def _larger(size: int) -> int:
    return size + SIZE_STEP if size >= 2 * SIZE_STEP else 2 * size


def _smaller(size: int) -> int:
    return size // 2 // SIZE_STEP * SIZE_STEP if size >= 2 * SIZE_STEP else max(size // 2, 1)


def told_shapes(shapes: Mapping[str, Sequence[int]]) -> str:
    """Write shapes as `--shape` takes them.

    >>> told_shapes({"x": (1, 3, 32, 32)})
    'x=1x3x32x32'
    """
    return ", ".join(f"{name}={'x'.join(map(str, shape))}" for name, shape in shapes.items())
