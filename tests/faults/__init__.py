"""Servers in processes of their own, under overload, signals and damage: `scripts/test -m faults`."""
