"""Connections: how much a caller may send and how long it may take, below the HTTP application."""
