"""One picture by an executor in this process, for tools that look at processes.

python -m tests.support.one_picture BUNDLE BACKEND
"""

from __future__ import annotations

import sys
from pathlib import Path

from engines.backends.registry import open_device
from tests.support.executing import Running


def main() -> int:
    bundle, backend = sys.argv[1:]
    with Running(Path(bundle), lambda: open_device(backend), backend=backend) as running:
        return len(running.ask(num_inference_steps=3).images()) - 1


if __name__ == "__main__":
    sys.exit(main())
