"""A server that says what it imports once it serves, a line for each module.

python -m tests.support.importing_server [the server's arguments]
"""

from __future__ import annotations

import sys

from server.__main__ import main
from server.startup.http_server import HttpServer


def tell(event: str, arguments: tuple[object, ...]) -> None:
    if event == "import":
        sys.stderr.write(f"imported {arguments[0]}\n")


def tell_when_serving() -> None:
    """From the moment on when the HTTP server has started; the engines may still be loading then."""
    main_loop = HttpServer.main_loop

    async def telling(server: HttpServer) -> None:
        sys.addaudithook(tell)
        await main_loop(server)

    HttpServer.main_loop = telling  # type: ignore[assignment, method-assign]


if __name__ == "__main__":
    tell_when_serving()
    sys.exit(main())
