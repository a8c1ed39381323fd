"""Benchmarks of other pipelines and servers with the same model, requests and client."""
