"""Images of the same model by other pipelines on a CPU, one at a time."""
