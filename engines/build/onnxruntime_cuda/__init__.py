"""Graphs for ONNX Runtime's CUDA provider: the exported ones with its fused operators, computed channels last."""
