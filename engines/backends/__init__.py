"""What engines run on: the device protocols, and a module or a package for each backend that implements them."""
