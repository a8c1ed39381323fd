"""Checkpoints: find, download and recognise them, read their configs without torch, and load their weights with it."""
