"""Servers under load: ours, and those that people build on diffusers."""
