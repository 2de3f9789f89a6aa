"""Reverse mode on ONNX graphs: the derivative of a network, written as ONNX and run by the runtime."""

from bitalloy.adjoint.engine import Adjoint, Tap, build

__all__ = ["Adjoint", "Tap", "build"]
