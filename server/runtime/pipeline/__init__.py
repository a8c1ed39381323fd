"""A model on the device: its pools, what requests own of them, and the plans of its steps."""
