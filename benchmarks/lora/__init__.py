"""What LoRAs in the batch cost: steps with and without them, timed and counted."""
