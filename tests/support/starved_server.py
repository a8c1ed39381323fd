"""A server that may open few files.

python -m tests.support.starved_server [the server's arguments] 128
"""

from __future__ import annotations

import resource
import sys

from server.__main__ import main

if __name__ == "__main__":
    most = int(sys.argv.pop())
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    sys.exit(main())
