"""Benchmarks of the GPU path: this server, PyTorch, and request-level batching on one machine."""
