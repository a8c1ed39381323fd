"""The defaults of requests that a bundle has: asked for, by a preset, or as the checkpoint says."""
