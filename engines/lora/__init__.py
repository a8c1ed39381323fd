"""LoRAs: how files name, scale and hold their updates, and where those lie in the pool on the device."""
