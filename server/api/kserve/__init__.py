"""The Open Inference Protocol (KServe v2): health, what is served, and Triton's extension that loads and unloads it."""
