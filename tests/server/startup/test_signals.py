"""Stop signals that come before there is anything to finish end the process, whatever it is doing."""

from __future__ import annotations

import subprocess
import sys

_SCRIPT = """
import os, signal, weakref
from server.startup.signals import StopSignals

class Module: ...

signals = StopSignals()
signals.install()
module = Module()
reference = weakref.ref(module, lambda _: signal.raise_signal(signal.SIGTERM))
del module  # the interpreter ignores what its callback raises, as it does in imports
print("still here", flush=True)
signals.keep()
print("never here", flush=True)
"""


def test_a_signal_within_a_callback_of_the_interpreter_is_not_lost() -> None:
    ended = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=60, check=False)  # noqa: S603 - our own
    assert (ended.returncode, ended.stdout) == (0, "still here\n"), ended.stderr
