"""Benchmarks of the server itself: overhead, start-up, memory, the step cache, and two commits compared."""
