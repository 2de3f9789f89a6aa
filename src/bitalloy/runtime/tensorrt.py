"""TensorRT 10 and 11 on an NVIDIA GPU: engines from strongly typed networks, timed, profiled and inspected.

TensorRT is imported only where it is used. TensorRT and CUDA's Python bindings are the extra `bitalloy[tensorrt]`.
"""

from __future__ import annotations

import importlib
import json
import re
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir

from bitalloy.core import files
from bitalloy.core.errors import BitalloyError, MissingExtraError, ModelError
from bitalloy.formats.words import KERNEL_SCHEMES
from bitalloy.model.weights import to_bytes
from bitalloy.runtime.base import Kernel, Runtime

INSTALL = "pip install 'bitalloy[tensorrt]'"
WORKSPACE_BYTES = 4 << 30


@dataclass(frozen=True)
class Layer:
    """One layer of a built engine."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    """Types and layouts of its output tensors in the engine inspector's words, e.g. `Int8 NC/32HW32`."""
    origin: str = ""
    """Nodes of the model it was made from, in the inspector's words: `[ONNX Layer: /conv/Conv]` and more."""

    def kernel(self, us: tuple[float, ...]) -> Kernel:
        """Return the layer as a kernel, with its times in microseconds."""
        return Kernel(self.name, (self.name, self.origin), self.kind, _precision(self.inputs), us)


def _precision(tensors: tuple[str, ...]) -> str:
    """Of the first tensor, which is the one that a layer works on; others may be scales."""
    words = re.findall("|".join(sorted(KERNEL_SCHEMES, key=len, reverse=True)), tensors[0].lower()) if tensors else []
    return KERNEL_SCHEMES[words[0]] if words else ""


def missing() -> str:
    """Return why TensorRT cannot be used here; empty where it can."""
    for name in ("tensorrt", "cuda.bindings.runtime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            return f"{name} is not installed ({error}): {INSTALL}"
    status, count = _cuda().cudaGetDeviceCount()
    return "" if int(status) == 0 and count else "there is no NVIDIA GPU, or no driver for it"


class TensorRtSession:
    """An engine built from an ONNX model, with its precisions as the graph says.

    Args:
        model: a model with QDQ and Cast nodes and static shapes.
        cache: file that keeps measured kernel times, so that the next build is quick and chooses the same kernels.
        profile: any path, which is not written, times every layer of every run; `kernels` tells the result.
        streams: threads of Python that may call `run` at the same time. They take turns: there is one GPU.

    Raises:
        BitalloyError: TensorRT, its bindings or a GPU is missing.
        ModelError: TensorRT refuses the model.
    """

    def __init__(
        self,
        model: ir.Model | bytes | str | Path,
        *,
        cache: Path | None = None,
        profile: Path | None = None,
        streams: int = 1,
    ) -> None:
        if reason := missing():
            raise BitalloyError(f"The model cannot run on TensorRT here: {reason}.")
        trt = importlib.import_module("tensorrt")
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._engine = trt.Runtime(self._logger).deserialize_cuda_engine(_build(trt, self._logger, model, cache))
        if self._engine is None:
            raise ModelError("TensorRT cannot load the engine that it has built. Free memory of the GPU.")
        self._trt, self._context, self._cuda = trt, self._engine.create_execution_context(), _cuda()
        self._stream = _checked(self._cuda.cudaStreamCreate())
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        reads = [self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT for n in names]
        self.input_names = tuple(n for n, read in zip(names, reads, strict=True) if read)
        self.output_names = tuple(n for n, read in zip(names, reads, strict=True) if not read)
        self._host = {
            n: np.empty(tuple(self._engine.get_tensor_shape(n)), trt.nptype(self._engine.get_tensor_dtype(n)))
            for n in names
        }
        self._device = {n: _checked(self._cuda.cudaMalloc(max(array.nbytes, 1))) for n, array in self._host.items()}
        for name, address in self._device.items():
            self._context.set_tensor_address(name, int(address))
        self._turns: AbstractContextManager[object] = Lock() if streams > 1 else nullcontext()
        self._times: dict[str, list[float]] = defaultdict(list)
        if profile is not None:
            self._context.profiler = self._profiler()

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Execute once, copies to and from the GPU included."""
        kinds = self._cuda.cudaMemcpyKind
        with self._turns:
            for name in self.input_names:
                given = np.asarray(feeds[name], self._host[name].dtype, order="C")
                if given.shape != self._host[name].shape:
                    raise ModelError(
                        f"Input '{name}' has shape {given.shape}; the engine takes {self._host[name].shape}."
                    )
                np.copyto(self._host[name], given)
                self._copy(self._device[name], self._host[name].ctypes.data, name, kinds.cudaMemcpyHostToDevice)
            self.execute()
            for name in self.output_names:
                self._copy(self._host[name].ctypes.data, self._device[name], name, kinds.cudaMemcpyDeviceToHost)
            _checked(self._cuda.cudaStreamSynchronize(self._stream))
            return {name: self._host[name].copy() for name in self.output_names}

    def execute(self) -> None:
        """Run the engine on what lies in the GPU's memory, and wait for it."""
        if not self._context.execute_async_v3(int(self._stream)):
            raise ModelError("TensorRT failed while running the engine.")
        _checked(self._cuda.cudaStreamSynchronize(self._stream))

    def milliseconds(self, repeats: int) -> list[float]:
        """Measure `repeats` inferences on the GPU, without copies, after a tenth as many warm-up runs; in ms each."""
        start, stop = (_checked(self._cuda.cudaEventCreate()) for _ in range(2))
        for _ in range(max(repeats // 10, 3)):
            self.execute()
        found = []
        for _ in range(repeats):
            _checked(self._cuda.cudaEventRecord(start, self._stream))
            self._context.execute_async_v3(int(self._stream))
            _checked(self._cuda.cudaEventRecord(stop, self._stream))
            _checked(self._cuda.cudaEventSynchronize(stop))
            found.append(float(_checked(self._cuda.cudaEventElapsedTime(start, stop))))
        return found

    def kernels(self) -> tuple[Kernel, ...]:
        """Return the layers that took part in a run, with their times."""
        return tuple(
            layer.kernel(tuple(self._times[layer.name])) for layer in self.layers() if layer.name in self._times
        )

    def layers(self) -> tuple[Layer, ...]:
        """Return the layers of the engine, which tell what was fused and the type of every tensor between them."""
        inspector = self._engine.create_engine_inspector()
        return read_layers(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def close(self) -> None:
        for address in self._device.values():
            self._cuda.cudaFree(address)
        self._cuda.cudaStreamDestroy(self._stream)
        del self._context, self._engine

    def _profiler(self) -> Any:
        times = self._times

        class Profiler(self._trt.IProfiler):  # type: ignore[name-defined, misc]
            def __init__(self) -> None:
                super().__init__()

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                times[layer_name].append(ms * 1e3)

        return Profiler()

    def _copy(self, to: int, source: int, name: str, kind: Any) -> None:
        _checked(self._cuda.cudaMemcpyAsync(to, source, self._host[name].nbytes, kind, self._stream))


def read_layers(text: str) -> tuple[Layer, ...]:
    """Read the layers from the engine inspector's JSON.

    Raises:
        ModelError: the engine was built without detailed profiling, or the text is something else.
    """
    try:
        found = json.loads(text)["Layers"]
        return tuple(
            Layer(
                name=str(layer["Name"]),
                kind=str(layer["LayerType"]),
                inputs=tuple(str(t["Format/Datatype"]) for t in layer["Inputs"]),
                outputs=tuple(str(t["Format/Datatype"]) for t in layer["Outputs"]),
                origin=str(layer.get("Metadata", "")),
            )
            for layer in found
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"The engine inspector's text has no layers with types ({error!r}). Build with detailed profiling."
        ) from error


def _build(trt: Any, logger: Any, model: ir.Model | bytes | str | Path, cache: Path | None) -> Any:
    builder = trt.Builder(logger)
    # version 11 knows no other networks, and may know no flag for them
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if isinstance(model, (str, Path)):
        parsed = parser.parse_from_file(str(model))
    else:
        parsed = parser.parse(to_bytes(model) if isinstance(model, ir.Model) else model)
    if not parsed:
        reasons = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise ModelError(f"TensorRT cannot read the model: {reasons}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    times = config.create_timing_cache(cache.read_bytes() if cache is not None and cache.is_file() else b"")
    config.set_timing_cache(times, ignore_mismatch=False)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ModelError("TensorRT cannot build an engine from the model; its log on standard error says why.")
    if cache is not None:
        files.write(cache, bytes(memoryview(config.get_timing_cache().serialize())))
    return engine


def _cuda() -> ModuleType:
    return importlib.import_module("cuda.bindings.runtime")


def _checked(result: tuple[Any, ...]) -> Any:
    """The value of a call into CUDA."""
    status, *values = result
    if int(status) != 0:
        raise BitalloyError(f"CUDA reports {status!r}. Look at the GPU with nvidia-smi.")
    return values[0] if values else None


def _version() -> str:
    """Installed version."""
    try:
        return str(importlib.import_module("tensorrt").__version__)
    except ImportError as error:
        raise MissingExtraError("tensorrt", "tensorrt", "The target tensorrt") from error


TENSORRT_RUNTIME = Runtime("TensorRT", TensorRtSession, _version, open_sizes=False)
"""The runtime of the extra `tensorrt`."""
