"""`python -m server`: check the bundle, start the service, say where it is."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from server.startup.signals import StopSignals


def main(argv: Sequence[str] | None = None) -> int:
    signals = StopSignals()
    signals.install()
    from server.startup.command import run  # noqa: PLC0415 - half a second of imports, in which a signal may come

    exit_code = run(sys.argv[1:] if argv is None else argv, signals)
    signals.ignore()
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
