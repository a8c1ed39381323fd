"""A server whose device breaks in its hundredth call.

python -m tests.support.broken_server [the server's arguments] hangs|is-lost|computes-nan
"""

from __future__ import annotations

import itertools
import sys
import threading

import numpy as np

from engines.backends.onnxruntime import OnnxRuntimeCall
from engines.errors import DeviceLost
from server.__main__ import main
from server.runtime.monitoring import watchdog

_LAST = 100


def break_device(how: str) -> None:
    """Let every call from the hundredth on never return, raise DeviceLost, or compute NaN."""
    launch, numbers = OnnxRuntimeCall.launch, itertools.count(1)

    def launch_until_broken(call: OnnxRuntimeCall) -> None:
        if next(numbers) < _LAST:
            launch(call)
        elif how == "hangs":
            threading.Event().wait()
        elif how == "computes-nan":
            launch(call)
            for array in call._arrays[1].values():
                if np.issubdtype(array.dtype, np.floating):
                    array.fill(np.nan)
        else:
            raise DeviceLost("CUDA error 700, an illegal memory access was encountered.")

    OnnxRuntimeCall.launch = launch_until_broken  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    break_device(sys.argv.pop())
    watchdog._MIN_LIMIT = 1.0
    sys.exit(main())
