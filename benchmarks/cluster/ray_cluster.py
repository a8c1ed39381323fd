"""A Ray cluster on loopback addresses of this machine, with latentd on it: for tests and for measurements.

The nodes share the machine's cores and memory. What it shows is what becomes of requests, not how fast a cluster is.
"""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
import yaml

_ROOT = Path(__file__).parents[2]
_PROGRAMS = Path(sys.executable).parent
_STORE = 100 * 2**20  # bytes of each node's object store
_HEAD = "127.0.0.11"
_GCS = 26379
_AGENT = 28300  # of the head's agent
_HTTP = 28000  # of the head's proxy; a worker node's has the next ones
_REPLICA = re.compile(r'replica="([^"]+)"')
_PATIENCE = 180.0  # seconds for what takes ten on a machine that does nothing else


class Node:
    """A node: a `ray start --block` with the processes it has started."""

    def __init__(self, index: int, folder: Path, *, cpus: int) -> None:
        """Start it. The first, of index 0, is the head, on 127.0.0.11."""
        self.address = f"127.0.0.{11 + index}"
        self._log = (folder / f"node-{index}.log").open("wb")
        role = [f"--address={_HEAD}:{_GCS}"]
        if index == 0:
            role = ["--head", f"--port={_GCS}", "--include-dashboard=false", f"--ray-client-server-port={_GCS + 1}"]
        command = [str(_PROGRAMS / "ray"), "start", "--block", *role, f"--node-ip-address={self.address}"]
        command += [f"--num-cpus={cpus}", "--num-gpus=0", f"--object-store-memory={_STORE}", "--disable-usage-stats"]
        # The default ports, and ranges of them, are taken by the first node of a machine. A raylet ends where
        # its agents take more than 15 seconds to start.
        command += ["--min-worker-port=0", "--max-worker-port=0"]
        names = "dashboard-agent-listen", "dashboard-agent-grpc", "metrics-export", "runtime-env-agent"
        command += [f"--{name}-port={_AGENT + 10 * index + number}" for number, name in enumerate(names)]
        command += [f"--temp-dir={folder / 'ray'}", "--include-log-monitor=false"] if index == 0 else []
        self.process = subprocess.Popen(  # noqa: S603 - our own command
            command, env=_environment(folder, index), stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )

    @property
    def replicas(self) -> list[psutil.Process]:
        """The processes of its replicas that hold a model."""
        return self._of("Images")

    @property
    def ingresses(self) -> list[psutil.Process]:
        """The processes of its ingresses."""
        return self._of("Ingress")

    def _of(self, deployment: str) -> list[psutil.Process]:
        title = f"ServeReplica:latentd:{deployment}"
        return [process for process in self.processes if title in " ".join(_words(process))]

    @property
    def processes(self) -> list[psutil.Process]:
        """All processes of the node, its replicas among them."""
        with suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        return []

    def kill(self) -> None:
        """End all processes at once, as a machine that loses its power."""
        for process in self.processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(_PATIENCE)
        self._log.close()


def _words(process: psutil.Process) -> list[str]:
    """The command line of a process; nothing of one that has ended."""
    with suppress(psutil.Error):
        return list(process.cmdline())
    return []


def _environment(folder: Path, index: int = 0) -> dict[str, str]:
    path = os.pathsep.join([str(folder / "left-out"), str(_ROOT / "deploy/ray"), str(_ROOT)])
    return {
        **os.environ,
        "PYTHONPATH": path,
        "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(_HTTP + index),
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "latentd_serve.proxy:middlewares",
        "RAY_AUTH_MODE": "token",  # else it depends on what lies in the home folder
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
        "RAY_raylet_start_wait_time_s": "120",
        # A machine with its own death detected within seconds, as the default needs half a minute.
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
        "RAY_health_check_initial_delay_ms": "2000",
    }


class Cluster:
    """Nodes, the first of them the head. A context manager that ends what it has started."""

    def __init__(self, nodes: int = 3, *, cpus: int = 2) -> None:
        """`cpus` of each worker node; the head has none, so that replicas run on the others."""
        self._made = tempfile.TemporaryDirectory(prefix="lr", ignore_cleanup_errors=True)  # sockets need short paths
        self.folder = Path(self._made.name)
        # jsonschema's grammar of URLs, which it can do without, takes half of the start of each of Ray's processes.
        (self.folder / "left-out").mkdir()
        (self.folder / "left-out/rfc3987_syntax.py").write_text("raise ImportError")
        (self.folder / "token").write_text(secrets.token_hex(32))
        self.cpus = cpus
        self.nodes: list[Node] = []
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{_HTTP}", timeout=_PATIENCE, trust_env=False)
        self._count = 0
        try:
            self.add(cpus=0)
            self._wait_for_nodes(1)
            for count in range(2, nodes + 1):
                self.add()
                self._wait_for_nodes(count)  # those of one machine name their sockets by what is there
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """The head's proxy, which outlives the other nodes."""
        return f"http://127.0.0.1:{_HTTP}"

    def add(self, *, cpus: int | None = None) -> Node:
        """Start another node."""
        node = Node(self._count, self.folder, cpus=self.cpus if cpus is None else cpus)
        self._count += 1
        self.nodes.append(node)
        return node

    def close(self) -> None:
        for node in self.nodes:
            node.kill()
        for process in psutil.process_iter():  # what outlived its parent names the folder of its sockets
            if any(str(self.folder) in word for word in _words(process)):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self.client.close()
        self._made.cleanup()

    def deploy(self, config: Mapping[str, Any], *, replicas: int) -> None:
        """`serve run` a configuration, and wait until so many replicas are ready."""
        file = self.folder / "serve.yaml"
        file.write_text(yaml.safe_dump(dict(config)))
        words = [str(_PROGRAMS / "serve"), "run", "--non-blocking", f"--address={_HEAD}:{_GCS}", str(file)]
        done = subprocess.run(  # noqa: S603 - our own command
            words, env=_environment(self.folder), capture_output=True, text=True, timeout=_PATIENCE, check=False
        )
        if done.returncode:
            raise RuntimeError(f"serve run: {done.stdout}{done.stderr}")
        self.wait_for_replicas(replicas)

    def replicas(self) -> set[str]:
        """The names of the replicas that are ready, of which `GET /metrics` has samples."""
        answer = self.client.get("/metrics")
        return set(_REPLICA.findall(answer.text)) if answer.status_code == 200 else set()

    def wait_for_replicas(self, count: int, seconds: float = _PATIENCE) -> set[str]:
        """Wait until so many are ready, and return their names."""
        until = time.monotonic() + seconds
        found: set[str] = set()
        while time.monotonic() < until:
            with suppress(httpx.HTTPError):
                found = self.replicas()
                if len(found) == count:
                    return found
            time.sleep(0.2)
        raise RuntimeError(f"{len(found)} replicas are ready after {seconds:g} s, and not {count}:\n{self.logs()}")

    def logs(self) -> str:
        """The ends of the logs of the nodes and replicas."""
        files = [*self.folder.glob("node-*.log"), *self.folder.glob("ray/session_latest/logs/serve/*")]
        return "\n".join(f"{file.name}: {file.read_text(errors='replace')[-1500:]}" for file in files if file.is_file())

    def _wait_for_nodes(self, count: int) -> None:
        """Wait until the last node says that it runs."""
        log = self.folder / f"node-{count - 1}.log"
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until and self.nodes[-1].process.poll() is None:
            if "Ray runtime started" in log.read_text(errors="replace"):
                return
            time.sleep(0.2)
        raise RuntimeError(f"node {count - 1} did not start: {log.read_text(errors='replace')[-3000:]}")


def configuration(
    bundle: Path, *, replicas: int = 2, images: Mapping[str, Any] | None = None, **server: Any
) -> dict[str, Any]:
    """A configuration for CPU replicas of a bundle; `images` are options of that deployment, `server` settings."""
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "127.0.0.1", "port": _HTTP},
        "applications": [
            {
                "name": "latentd",
                "route_prefix": "/",
                "import_path": "latentd_serve:app",
                "args": {"server": {"bundle": [str(bundle)], "threads": 1, **server}},
                "deployments": [
                    {"name": "Ingress", "num_replicas": 2, "ray_actor_options": {"num_cpus": 0.1}},
                    {
                        "name": "Images",
                        "num_replicas": replicas,
                        "ray_actor_options": {"num_cpus": 1.5, "num_gpus": 0},
                        **(images or {}),
                    },
                ],
            }
        ],
    }
