"""Reverse mode on ONNX graphs: the derivative of a network, written as ONNX and run by the runtime."""
