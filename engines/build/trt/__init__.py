"""TensorRT engine builds, each in a process of its own."""
