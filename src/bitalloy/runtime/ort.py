"""ONNX Runtime on the CPU, and on a GPU for audits only."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from bitalloy.core.errors import BitalloyError, ModelError
from bitalloy.formats.words import KERNEL_SCHEMES
from bitalloy.model.weights import Packed, pack
from bitalloy.runtime.base import Kernel, Runtime

ort.set_default_logger_severity(3)

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_KERNEL = "_kernel_time"
"""Ending of the events of a profile that stand for the execution of a node."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Settings of a session that differ from the runtime's defaults on a CPU."""

    provider: str = CPU
    """Execution provider that runs the nodes; nodes that it does not support run on the CPU."""
    integers: bool = True
    """False computes products behind QuantizeLinear and DequantizeLinear in float32, as they are written. On CPUs
    without VNNI the integer kernels that else take their place saturate sums of two products in 16 bits. It also leaves
    the pass `ReluQuantRewrite` out, which drops a Relu before a QuantizeLinear: rightly where the zero point is the
    smallest integer, and wrongly (ONNX Runtime 1.32) before one to 8-bit floats, which keep what is negative."""
    wide_sums: bool = False
    """True stores signed weights of integer kernels as unsigned ones, whose products are added in 32 bits."""
    rounds_weights: bool = True
    """False leaves the pass `WeightBiasQuantization` out, see `bitalloy.rewrite.floats`."""
    written: Path | None = None
    """File for the graph as the session runs it, after all optimisations; the weights go beside it."""


USUAL = Execution()


class OrtSession:
    """A model loaded into ONNX Runtime.

    Args:
        model: a model, one that is packed or serialized already, or the path of an .onnx file. The weights of a large
            model are lent to the session and stay where they are; from a file the runtime reads and repacks its own.
        threads: intra-op threads; None takes one per available core, shared between the `streams`.
        optimize: False keeps the graph as written, so that every node is executed by its own kernel.
        profile: path prefix of a profile to be written; `kernels` reads it back.
        shared: work in memory that all such sessions of the process have in common. Sessions that take turns then need
            no more of it than the largest, and fresh memory, which is slow, only once. Not for timing.
        streams: threads of Python that may call `run` at the same time.
        execution: how the nodes are executed.

    Worker threads stop spinning when a run ends, so sessions that take turns do not slow each other down.

    Raises:
        ModelError: ONNX Runtime refuses the model.
    """

    def __init__(
        self,
        model: bytes | str | Path | ir.Model | Packed,
        *,
        threads: int | None = None,
        optimize: bool = True,
        profile: Path | None = None,
        shared: bool = False,
        streams: int = 1,
        execution: Execution = USUAL,
    ) -> None:
        options = _options(execution)
        if shared:
            _register_shared_memory()
            options.add_session_config_entry("session.use_env_allocators", "1")
        options.intra_op_num_threads = threads or max(1, available_cores() // streams)
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        packed = pack(model) if isinstance(model, ir.Model) else model
        source = str(packed) if isinstance(packed, (str, Path)) else packed
        self._lent: dict[str, np.ndarray] = {}
        if isinstance(source, Packed):
            self._lent, source = dict(source.weights), source.data
            # from its second run on a session would take a planned block beside what the first run left in its arena
            options.enable_mem_pattern = not self._lent
        # both forms of a lent weight are views of the same memory
        self._lent_values = {name: ort.OrtValue.ortvalue_from_numpy(w) for name, w in self._lent.items()}
        providers = list(dict.fromkeys((execution.provider, CPU)))
        try:
            left_out = [] if execution.rounds_weights else ["WeightBiasQuantization"]
            left_out += [] if execution.integers else ["ReluQuantRewrite"]
            self._session = ort.InferenceSession(source, options, providers=providers, disabled_optimizers=left_out)
        except Exception as error:  # ORT raises a dozen unrelated types from its C++ border
            raise ModelError(f"ONNX Runtime cannot load the model: {error}") from error

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(i.name for i in self._session.get_inputs() if i.name not in self._lent)

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(o.name for o in self._session.get_outputs())

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            values = self._session.run(None, {**feeds, **self._lent})
        except Exception as error:  # as above
            raise ModelError(f"ONNX Runtime failed while running the model: {error}") from error
        return dict(zip(self.output_names, values, strict=True))

    def run_values(self, feeds: Mapping[str, ort.OrtValue], outputs: Sequence[str]) -> dict[str, ort.OrtValue]:
        """Execute without copying: feeds and results stay in the runtime's own memory."""
        try:
            values = self._session.run_with_ort_values(list(outputs), {**feeds, **self._lent_values})
        except Exception as error:  # as above
            raise ModelError(f"ONNX Runtime failed while running the model: {error}") from error
        return dict(zip(outputs, values, strict=True))

    def kernels(self) -> tuple[Kernel, ...]:
        """Stop profiling, remove the profile, and return the kernels in the order of their first run."""
        path = Path(self._session.end_profiling())
        try:
            events: list[dict[str, Any]] = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise BitalloyError(
                f"The runtime's profile '{path}' cannot be written as a whole. Free space in that folder."
            ) from error
        path.unlink()
        found: dict[str, tuple[dict[str, Any], list[float]]] = {}
        for event in events:
            name = str(event.get("name"))
            if event.get("cat") == "Node" and name.endswith(_KERNEL):
                found.setdefault(name.removesuffix(_KERNEL), (event["args"], []))[1].append(float(event["dur"]))
        return tuple(
            Kernel(name, (name,), str(args.get("op_name", "")), _precision(args), tuple(times))
            for name, (args, times) in found.items()
        )

    def close(self) -> None:
        del self._session, self._lent, self._lent_values


def _options(execution: Execution) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 4 if execution.wide_sums else 3  # a form that is only tried
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.load_model_format", "ONNX")  # whatever a file is called
    if not execution.integers:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if execution.wide_sums:
        options.add_session_config_entry("session.x64quantprecision", "1")
    if (written := execution.written) is not None:
        options.optimized_model_filepath = str(written)
        for key, value in (("file_name", f"{written.name}.data"), ("min_size_in_bytes", "1024")):
            options.add_session_config_entry(f"session.optimized_model_external_initializers_{key}", value)
    return options


def rewrite(model: ir.Model | Path, folder: Path, provider: str = CPU) -> ir.Model:
    """Return the optimized graph that a session runs; its large weights are in the folder, in their own file.

    Raises:
        ModelError: the graph cannot be written, such as on a full disk.
    """
    path = folder / "optimized.onnx"
    try:
        OrtSession(model, execution=Execution(written=path, provider=provider)).close()
        return ir.load(path)
    except Exception as error:  # a damaged file, by many types
        raise ModelError(f"ONNX Runtime could not write the graph that it runs: {error}") from error


def _precision(args: Mapping[str, Any]) -> str:
    """Type of the largest operand of a profiled node, the first of equals: others may be scales, sizes or indices."""
    operands = [(kind, math.prod(shape)) for one in args.get("input_type_shape") or () for kind, shape in one.items()]
    kind, _ = max(operands, key=lambda operand: operand[1], default=("", 0))
    return KERNEL_SCHEMES.get(kind, kind)


@cache
def _register_shared_memory() -> None:
    """Give the process the one arena that sessions may share; the runtime accepts it once."""
    arena = ort.OrtArenaCfg(0, -1, -1, -1)  # the runtime's own defaults
    ort.create_and_register_allocator(
        ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT), arena
    )


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def evaluate_node(
    op_type: str, inputs: Sequence[np.ndarray], attributes: Mapping[str, object], *, opset: int = 17
) -> list[np.ndarray]:
    """Run a single operator; an input of size 0 stands for an absent one."""
    names = [f"i{n}" if a.size else "" for n, a in enumerate(inputs)]
    given: dict[str, Any] = {k: v for k, v in attributes.items() if v is not None}
    node = onnx.helper.make_node(op_type, names, ["y"], **given)
    feeds = {n: a for n, a in zip(names, inputs, strict=True) if n}
    specs = [
        onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in feeds.items()
    ]
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], op_type, specs, [output]),
        opset_imports=[onnx.helper.make_opsetid("", opset)],
        ir_version=9,
    )
    return list(OrtSession(model.SerializeToString(), threads=1).run(feeds).values())


def _version() -> str:
    return str(ort.__version__)


ORT = Runtime("ONNX Runtime", OrtSession, _version, rewrite, library="onnxruntime")
"""ONNX Runtime on the CPU, which comes with bitalloy."""
ORT_GPU = Runtime(
    "ONNX Runtime on CUDA",
    partial(OrtSession, execution=Execution(provider=CUDA)),
    _version,
    partial(rewrite, provider=CUDA),
)
"""ONNX Runtime with its CUDA provider, whose kernels the host starts without waiting for them."""
AS_WRITTEN = Runtime(ORT.name, partial(OrtSession, execution=Execution(integers=False)), ORT.version)
"""ONNX Runtime on the CPU for models of absent devices: it computes the numbers that the graph says."""


def cuda_missing() -> str:
    """Return why the CUDA provider cannot be used here; empty where it can."""
    if CUDA in ort.get_available_providers():
        return ""
    return "this ONNX Runtime has no CUDA provider: pip install onnxruntime-gpu"
