"""What every thread is doing, for the log: `faulthandler` writes to a descriptor itself, and waits until it is read."""

from __future__ import annotations

import sys
import threading
import traceback


def stacks() -> str:
    """The stacks of all threads, the innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        parts += [f"Thread {names.get(ident, ident)}:\n", *traceback.format_stack(frame)]
    return "".join(parts)
