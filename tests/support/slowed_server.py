"""A server whose device takes longer than it needs.

python -m tests.support.slowed_server [the server's arguments] 1.2
"""

from __future__ import annotations

import sys
import time

from engines.backends.onnxruntime import OnnxRuntimeCall
from server.__main__ import main


def slow_down(times: float) -> None:
    """Let every call take so many times as long as it did."""
    launch = OnnxRuntimeCall.launch

    def launch_slowly(call: OnnxRuntimeCall) -> None:
        began = time.perf_counter()
        launch(call)
        time.sleep((time.perf_counter() - began) * (times - 1))

    OnnxRuntimeCall.launch = launch_slowly  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    slow_down(float(sys.argv.pop()))
    sys.exit(main())
