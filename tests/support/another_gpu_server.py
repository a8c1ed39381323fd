"""A server on a machine whose GPU is said to be an NVIDIA L4, which is enough to compare engines with it.

python -m tests.support.another_gpu_server [the server's arguments]
"""

from __future__ import annotations

import sys

from engines.backends import cuda
from engines.backends.cuda import Probe
from engines.manifest import Gpu
from server.__main__ import main

if __name__ == "__main__":
    cuda.probe = lambda: Probe(Gpu(name="NVIDIA L4", compute_capability="8.9"))
    sys.exit(main())
