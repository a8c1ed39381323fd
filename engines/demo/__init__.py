"""The demo model: a tiny latent diffusion model of emoji on flat backgrounds, and the checker of its pictures."""
