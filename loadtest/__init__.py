"""Load and measurements: what the server does under work, and beside others. No room of the server imports it."""
