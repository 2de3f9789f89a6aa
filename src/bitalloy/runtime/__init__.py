"""Sessions that execute ONNX models. One contract (`Session`), one class per runtime."""
