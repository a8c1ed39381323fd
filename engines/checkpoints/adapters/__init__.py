"""What is added to a checkpoint when it is exported: LoRAs and textual inversions."""
