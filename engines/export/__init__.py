"""Export: the graphs as torch modules, and their way to checked ONNX. Needs torch."""
