"""nginx, Caddy and Envoy with the configurations of deploy/, on addresses of this machine."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.cluster.nginx import nginx_command
from tests import ROOT
from tests.support.ports import free_ports
from tests.support.programs import program

PORTS = {"listen": 8080, "first": 8000, "second": 8001}  # in the configurations
_SECONDS = 60


@dataclass(frozen=True)
class ProxyProgram:
    """How a proxy is run. The functions take the configuration and a folder to write to, and return a command."""

    configuration: Path
    check: Callable[[Path, Path], Sequence[str]]
    serve: Callable[[Path, Path], Sequence[str]]
    preamble: str = ""  # of the configuration that it serves with here


def _nginx(file: Path, folder: Path) -> list[str]:
    return nginx_command(program("nginx"), file, folder)


def _caddy(command: str, file: Path) -> list[str]:
    return [program("caddy"), command, "--config", str(file), "--adapter", "caddyfile"]


def _envoy(file: Path, *options: str) -> list[str]:
    envoy = Path(sys.executable).with_name("envoy")  # of a wheel
    quiet = ["--log-level", "warning", "--disable-hot-restart", "--concurrency", "1"]
    return [str(envoy), "--config-path", str(file), *quiet, *options]


PROXIES: Mapping[str, ProxyProgram] = {
    "nginx": ProxyProgram(
        ROOT / "deploy/nginx/latentd.conf",
        lambda file, folder: [*_nginx(file, folder), "-t"],
        lambda file, folder: [*_nginx(file, folder), "-g", "daemon off;"],
    ),
    "caddy": ProxyProgram(
        ROOT / "deploy/caddy/Caddyfile",
        lambda file, _folder: _caddy("validate", file),
        lambda file, _folder: _caddy("run", file),
        preamble="{\n\tadmin off\n}\n",  # or two at once would need the same port
    ),
    "envoy": ProxyProgram(
        ROOT / "deploy/envoy/envoy.yaml",
        lambda file, _folder: _envoy(file, "--mode", "validate"),
        lambda file, _folder: _envoy(file),
    ),
}


def check(name: str, folder: Path) -> None:
    """Fail if the proxy does not accept its configuration as it is."""
    proxy = PROXIES[name]
    command = proxy.check(proxy.configuration, folder)
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)  # noqa: S603 - our own command
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def proxied(name: str, folder: Path, *servers: str) -> Iterator[str]:
    """The URL of a proxy in front of one or two servers, given by their URLs."""
    proxy = PROXIES[name]
    (port,) = free_ports(1)
    file = folder / proxy.configuration.name
    ports = {PORTS["listen"]: port, PORTS["first"]: _port(servers[0]), PORTS["second"]: _port(servers[-1])}
    text = proxy.preamble + _with_ports(proxy.configuration.read_text(encoding="utf-8"), ports)
    file.write_text(text, encoding="utf-8")
    url = f"http://127.0.0.1:{port}"
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(proxy.serve(file, folder), stdout=log, stderr=log, env=_environment(folder)) as process,  # noqa: S603 - our own command
    ):
        try:
            _wait_until_ready(url, process, folder / "log")
            yield url
        finally:
            process.terminate()


def _port(url: str) -> int:
    return int(url.rpartition(":")[2])


def _with_ports(text: str, ports: Mapping[int, int]) -> str:
    """The configuration with other ports: all that has to be changed to run it here."""
    for port in ports:
        assert re.search(rf"\b{port}\b", text), port
    return re.sub(rf"\b({'|'.join(map(str, ports))})\b", lambda found: str(ports[int(found[0])]), text)


def _environment(folder: Path) -> Mapping[str, str]:
    return {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "XDG_DATA_HOME": str(folder), "PATH": "/usr/bin:/bin"}


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the proxy answers."""
    until = time.monotonic() + _SECONDS
    while time.monotonic() < until and process.poll() is None:
        try:
            httpx.get(f"{url}/v2/health/live")
        except httpx.TransportError:
            time.sleep(0.02)
        else:
            return
    raise AssertionError(f"the proxy did not start: {log.read_text()}")
