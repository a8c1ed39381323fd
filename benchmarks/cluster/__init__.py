"""Many servers behind one balancer: simulated from a step curve, and real ones on this machine."""
