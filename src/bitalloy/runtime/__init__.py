"""Sessions that execute ONNX models: one contract, `Session`, and one class per runtime."""
