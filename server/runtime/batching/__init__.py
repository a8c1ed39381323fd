"""Who takes the next step: queues, lanes and fair shares, without a device."""
