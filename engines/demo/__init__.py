"""The demo model: a tiny latent diffusion model of emoji on flat backgrounds, and the checker of its pictures."""

from pathlib import Path

BUNDLE = Path(__file__).parent  # holds its manifest
