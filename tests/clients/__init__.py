"""The official client of each API, against a real server."""
