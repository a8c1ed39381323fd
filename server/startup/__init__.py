"""Startup: settings, choosing a backend, compiling missing engines, and wiring the service."""
