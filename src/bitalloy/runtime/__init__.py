"""Sessions that execute ONNX models. One contract (`Session`), one class per runtime."""

from bitalloy.runtime.artefact import ONLY, Artefact, Chain
from bitalloy.runtime.base import Kernel, Reopener, Runtime, Session
from bitalloy.runtime.openvino import OPENVINO
from bitalloy.runtime.ort import ORT, OrtSession, available_cores

__all__ = [
    "ONLY",
    "OPENVINO",
    "ORT",
    "Artefact",
    "Chain",
    "Kernel",
    "OrtSession",
    "Reopener",
    "Runtime",
    "Session",
    "available_cores",
]
