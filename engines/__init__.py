"""What an engine is: checkpoints become ONNX graphs, graphs become engines. Knows nothing of the server."""
