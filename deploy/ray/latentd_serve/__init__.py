"""latentd on Ray Serve: `serve run latentd_serve:app`, or a configuration file with this import path."""

from __future__ import annotations

from latentd_serve.application import app

__all__ = ["app"]
