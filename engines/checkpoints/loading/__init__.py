"""Checkpoints as torch modules: single files converted, weights loaded, LoRAs fused, learned tokens added."""
