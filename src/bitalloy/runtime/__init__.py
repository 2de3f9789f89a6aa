"""Sessions that execute ONNX models. One contract (`Session`), one class per runtime."""

from bitalloy.runtime.artefact import Artefact, Chain, reopeners
from bitalloy.runtime.base import ONLY, Kernel, Reopener, Runtime, Session
from bitalloy.runtime.openvino import OPENVINO
from bitalloy.runtime.optimized import Rewritten, match
from bitalloy.runtime.ort import AS_WRITTEN, ORT, OrtSession, available_cores

__all__ = [
    "AS_WRITTEN",
    "ONLY",
    "OPENVINO",
    "ORT",
    "Artefact",
    "Chain",
    "Kernel",
    "OrtSession",
    "Reopener",
    "Rewritten",
    "Runtime",
    "Session",
    "available_cores",
    "match",
    "reopeners",
]
