"""Checkpoints: found, downloaded and recognised without torch, and loaded with it (in the folder `loading` alone)."""
