"""The real nginx with the configuration of deploy/nginx, before servers of this machine."""

from __future__ import annotations

import getpass
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from benchmarks.process import ROOT, ServerProcess, ServerStartError, free_port

CONFIGURATION = ROOT / "deploy" / "nginx" / "latentd.conf"

_SERVER = re.compile(r"^ *server \S+:\d+(?P<options>[^;\n]*);\n", re.MULTILINE)
_LISTEN = re.compile(r"\blisten [\d.]+:\d+;")
_MAIN = """
user {user};
pid {folder}/pid;
events {{}}
http {{
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    access_log off;
    include {file};
}}
"""


def nginx(servers: Sequence[str], folder: Path) -> ServerProcess:
    """nginx before `servers`, given by their URLs; a context manager. `folder` is for its files.

    Raises ServerStartError where it is not installed, OSError.
    """
    # Debian has daemons where only the administrator's shell looks for them.
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        raise ServerStartError("nginx is not on this machine: install it (scripts/system-packages does).")
    port, file = free_port(), folder / "latentd.conf"
    file.write_text(configuration(CONFIGURATION.read_text(encoding="utf-8"), servers, port=port), encoding="utf-8")
    return ServerProcess([*nginx_command(program, file, folder), "-g", "daemon off;"], port=port)


def nginx_command(program: str, file: Path, folder: Path) -> list[str]:
    """The command of nginx with the configuration `file` of its servers. `folder` is for everything else it writes."""
    main = folder / "nginx.conf"
    main.write_text(_MAIN.format(user=getpass.getuser(), folder=folder, file=file), encoding="utf-8")
    return [program, "-e", "stderr", "-c", str(main)]


def configuration(text: str, servers: Sequence[str], *, port: int) -> str:
    """The configuration `text` with these servers in place of its own, at another port of this machine.

    Raises ValueError where it does not have what is to be replaced.
    """
    found = _SERVER.search(text)
    if not found or not _LISTEN.search(text):
        raise ValueError(f"{CONFIGURATION.name} has no line `server ADDRESS:PORT;` or `listen ADDRESS:PORT;` any more.")
    lines = [f"    server {server.removeprefix('http://')}{found['options']};\n" for server in servers]
    rest = _SERVER.sub("", text[found.end() :])
    return _LISTEN.sub(f"listen 127.0.0.1:{port};", text[: found.start()] + "".join(lines) + rest)
