"""Benchmarks: of the server itself, of the GPU path, and of other pipelines and servers for comparison."""
