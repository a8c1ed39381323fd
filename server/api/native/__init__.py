"""latentd's own API."""
