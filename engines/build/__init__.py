"""Build: from a checkpoint to a bundle of ONNX graphs, and from those to the engines of a backend."""
