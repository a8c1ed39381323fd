"""What engines run on: the device protocols, and one module for each backend that implements them."""
