"""Export: the graphs as torch modules, traced to checked ONNX. Needs torch."""
