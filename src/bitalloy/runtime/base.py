"""The interface to runtimes: a runtime opens sessions, and a session runs one model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir

ONLY = "model"
"""Graph name in an artefact whose model is one graph."""


@dataclass(frozen=True)
class Kernel:
    """A kernel that a runtime executed, and its time in each profiled run."""

    name: str
    layers: tuple[str, ...]
    """Names of nodes and tensors of the model that the kernel stands for, as far as the runtime says, main one first.
    Here and in `name` a runtime may append to them."""
    op: str
    """Operator in the runtime's words, e.g. `QLinearConv` or `Convolution brgconv_avx512_I8`."""
    precision: str
    """Type that the kernel reads: `int8`, `fp16`, `fp32`, another in the runtime's words, or empty for none."""
    us: tuple[float, ...]
    """Time in microseconds, for each run in which the kernel was executed."""
    graph: str = ONLY
    """Name of the graph of a program that the kernel belongs to; `ONLY` for a model that is one graph."""


class Session(Protocol):
    """An executable model."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the feeds that `run` expects."""
        ...

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the results that `run` returns, in graph order."""
        ...

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Execute once. Shapes and dtypes of `feeds` are those of the graph inputs.

        As many threads may call it at the same time as the session was opened with `streams`.
        """
        ...

    def kernels(self) -> Sequence[Kernel]:
        """End the profile of a session that was opened with one; return the kernels of all runs so far, in order."""
        ...

    def close(self) -> None:
        """Release the runtime's memory. `run` may not be called afterwards."""
        ...


class Reopener(Protocol):
    """Makes sessions of one model."""

    def __call__(self, *, profile: Path | None = None) -> Session:
        """Open a session; `profile` is a path prefix for a profile, see `Opener`."""
        ...


class Opener(Protocol):
    """Makes a session of a model in memory or in a file."""

    def __call__(self, model: ir.Model | Path, *, profile: Path | None = None, streams: int = 1) -> Session:
        """Load a model with one thread per available core.

        Args:
            model: weights of a large one in memory may be lent to the session, so it must outlive it unchanged.
            profile: where the runtime may write a profile, as a path prefix; None times nothing.
            streams: runs at the same time, which share the cores: more throughput, and more latency of each.

        Raises:
            ModelError: the runtime refuses the model.
            MissingExtraError: the runtime is not installed.
        """
        ...


@dataclass(frozen=True)
class Runtime:
    """What executes the models of a target."""

    name: str
    """Name of the runtime as people write it."""
    open: Opener
    version: Callable[[], str]
    """Function that returns the installed version.

    Raises:
        MissingExtraError: the runtime is not installed.
    """
    rewrite: Callable[[ir.Model | Path, Path], ir.Model] | None = None
    """Function (model, folder) -> graph into which a session optimizes the model; in the existing folder its large
    weights stay there. None where the kernels tell what they were made from.

    Raises:
        ModelError: the runtime cannot write the graph.
    """
    keep: Callable[[ir.Model | Path], Reopener] | None = None
    """Function that compiles a model once for many sessions, each with its own memory; None if `open` is quick."""
    library: str = ""
    """Package with which a bare process opens the file of a model, see `runtime.resident`; empty where the memory of a
    process says nothing, such as on a GPU."""
    open_sizes: bool = True
    """Whether a session takes inputs of any size where the model leaves it open."""
