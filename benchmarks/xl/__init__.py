"""Stable Diffusion XL at its full size: a checkpoint with random weights, and pictures of few steps."""
