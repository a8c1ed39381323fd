"""The load test: puts load on a running server and reports what it sustains. The server never imports it."""
