"""The running service: requests in, pictures out. Imports neither torch nor onnx."""
