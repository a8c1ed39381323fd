"""LoRAs that requests choose: where their factors lie in the pool on the device."""
