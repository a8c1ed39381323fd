"""Where an engine strays from its FP32 graph: the first tensor that differs, found by marking a few at a time."""
