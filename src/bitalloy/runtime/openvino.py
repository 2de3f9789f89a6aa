"""OpenVINO on the CPU. The package is imported when a session is opened, not before."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import onnx_ir as ir

from bitalloy.core.errors import MissingExtraError, ModelError
from bitalloy.formats.words import KERNEL_SCHEMES
from bitalloy.model.weights import MESSAGE_BYTES, to_bytes, weight_bytes
from bitalloy.runtime.base import Kernel, Reopener, Runtime
from bitalloy.runtime.ort import available_cores

_RESULT = "/sink_port_0"
"""What the importer appends to the name of an output for the node that stands for it."""
_NO_KERNELS = frozenset({"Const", "Constant", "Input", "Output", "Parameter", "Result"})


@dataclass(frozen=True)
class CompiledModel:
    """A compiled model, readable by the same version on the same machine."""

    data: bytes


class OpenVinoSession:
    """A model compiled for OpenVINO's CPU plugin, by default for the least latency; float32 stays float32.

    Args:
        model: in memory, serialized, or the path of an .onnx file. One of more than 2 GB must lie in a file. Or what
            `exported` gave.
        threads: threads of all streams together; None takes one per available core, as for ONNX Runtime.
        profile: any path, which is not written, times every kernel of every run; `kernels` tells the result.
        streams: threads of Python that may call `run` at the same time; with a profile 1.

    Raises:
        MissingExtraError: OpenVINO is not installed.
        ModelError: OpenVINO refuses the model.
    """

    def __init__(
        self,
        model: bytes | str | Path | ir.Model | CompiledModel,
        *,
        threads: int | None = None,
        profile: Path | None = None,
        streams: int = 1,
    ) -> None:
        openvino = _openvino()
        if isinstance(model, ir.Model):
            if weight_bytes(model) > MESSAGE_BYTES:
                raise ModelError("OpenVINO reads a model above 2 GB from a file only. Save it and give its path.")
            model = to_bytes(model)
        settings = {
            "INFERENCE_NUM_THREADS": max(threads or available_cores(), streams),
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": streams,
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,  # several sessions take turns on the same cores
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # numbers are those that the graph says, with VNNI too
            "PERF_COUNT": profile is not None,
        }
        try:
            core = openvino.Core()
            if isinstance(model, CompiledModel):
                self._compiled = core.import_model(io.BytesIO(model.data), "CPU", settings)
            else:
                read = core.read_model(model if isinstance(model, bytes) else str(model))
                self._compiled = core.compile_model(read, "CPU", settings)
            requests = [self._compiled.create_infer_request() for _ in range(streams)]
        except Exception as error:  # its C++ border raises RuntimeError and others
            raise ModelError(f"OpenVINO cannot load the model: {error}") from error
        self._free: SimpleQueue[Any] = SimpleQueue()
        for request in requests:
            self._free.put(request)
        self._inputs, self._outputs = _names(self._compiled.inputs), _names(self._compiled.outputs)
        self._times: dict[str, list[float]] | None = None if profile is None else {}

    @property
    def input_names(self) -> tuple[str, ...]:
        return self._inputs

    @property
    def output_names(self) -> tuple[str, ...]:
        return self._outputs

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = {i: np.asarray(feeds[name], order="C") for i, name in enumerate(self._inputs)}
        request = self._free.get()
        try:
            # by start and wait, so that other threads of Python run meanwhile; memory of the feeds is used in place
            request.start_async(given, share_inputs=True)
            request.wait()
            found = {n: np.array(request.get_output_tensor(i).data) for i, n in enumerate(self._outputs)}
            events = request.get_profiling_info() if self._times is not None else ()
        except Exception as error:  # as above
            raise ModelError(f"OpenVINO failed while running the model: {error}") from error
        finally:
            self._free.put(request)
        if self._times is not None:
            for event in events:
                if event.status.name == "EXECUTED":
                    self._times.setdefault(event.node_name, []).append(event.real_time.total_seconds() * 1e6)
        return found

    def kernels(self) -> tuple[Kernel, ...]:
        """Return the nodes of the execution graph that took part in a run, in order."""
        times = self._times or {}
        found = []
        for node in self._compiled.get_runtime_model().get_ordered_ops():
            facts = {name: str(value.astype(str)) for name, value in node.get_rt_info().items() if name in _FACTS}
            name, kind = node.get_friendly_name(), facts.get("layerType", "")
            if name not in times or kind in _NO_KERNELS:
                continue
            precision = facts.get("runtimePrecision", "")
            layers = tuple(part for part in facts.get("originalLayersNames", "").split(",") if part)
            found.append(
                Kernel(
                    name=name,
                    layers=layers or (name,),
                    op=f"{kind} {facts.get('primitiveType', '')}".strip(),
                    precision=KERNEL_SCHEMES.get(precision, precision),
                    us=tuple(times[name]),
                )
            )
        return tuple(found)

    def exported(self) -> CompiledModel:
        """Return the compiled model; a session of it is opened in a quarter of the time."""
        return CompiledModel(self._compiled.export_model().getvalue())

    def close(self) -> None:
        del self._free, self._compiled


_FACTS = frozenset({"layerType", "runtimePrecision", "originalLayersNames", "primitiveType"})


def _names(ports: Any) -> tuple[str, ...]:
    """Names of inputs or outputs in the file: a tensor may have several, such as those before an Identity."""
    return tuple(port.get_node().get_friendly_name().removesuffix(_RESULT) for port in ports)


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError("openvino", "openvino", "The target openvino-cpu") from error
    return openvino


def _version() -> str:
    """Installed version, e.g. `2026.4.1`; the build is left out."""
    return str(_openvino().__version__).split("-")[0]


def _keep(model: ir.Model | Path) -> Reopener:
    session = OpenVinoSession(model)
    exported = session.exported()
    session.close()
    return partial(OpenVinoSession, exported)


OPENVINO = Runtime("OpenVINO", OpenVinoSession, _version, keep=_keep, library="openvino")
"""The runtime of the extra `openvino`."""
