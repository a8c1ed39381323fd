"""Who takes the next step: queues, lines and fair shares, without a device."""
