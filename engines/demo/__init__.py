"""The demo model: a tiny latent diffusion model of emoji on flat backgrounds, and a checker for its images."""

from pathlib import Path

BUNDLE = Path(__file__).parent  # with its manifest
