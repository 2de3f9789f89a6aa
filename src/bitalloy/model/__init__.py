"""Models: reading ONNX files, bringing them to normal form, and describing them."""
