"""Sessions that execute ONNX models. One contract (`Session`), one class per runtime."""

from bitalloy.runtime.artefact import ONLY, Artefact, Chain
from bitalloy.runtime.base import Session
from bitalloy.runtime.ort import OrtSession

__all__ = ["ONLY", "Artefact", "Chain", "OrtSession", "Session"]
