"""What an operator sees of a runtime: metrics, traces, health, and hangs."""
