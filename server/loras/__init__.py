"""LoRAs that requests choose: the folder of their files, and those of them that are packed for a model."""
