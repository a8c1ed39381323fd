"""What an engine is: checkpoints become ONNX graphs, graphs become engines. Knows nothing of the server."""

import os

# ONNX Runtime's wheels report their use to its makers unless this is said before any of them is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
