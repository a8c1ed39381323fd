"""The programs that pods run, run here; and a Secret that is exchanged as Kubernetes does it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from server.access import keys
from server.access.key_file import KeyFile
from server.startup import compiling
from tests.deploy.helm.cases import RENDERED_KEYS
from tests.deploy.helm.chart import CHART, of_kind, pod
from tests.support.serving import Serving


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)  # noqa: S603 - our own


def script(name: str) -> str:
    return (CHART / "files" / name).read_text(encoding="utf-8")


def test_helm_test_makes_an_image(pod_server: Serving) -> None:
    host, _, port = pod_server.url.removeprefix("http://").partition(":")
    done = run(sys.executable, "-c", script("try.py"), host, port)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_helm_test_fails_where_the_server_is_not_ready() -> None:
    answer = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 9\r\n\r\ncompiling"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: answer_once(listener, answer))
        thread.start()
        done = run(sys.executable, "-c", script("try.py"), "127.0.0.1", str(listener.getsockname()[1]))
        thread.join()
    assert (done.returncode, done.stderr.strip()) == (1, "not ready (503): compiling")


def answer_once(listener: socket.socket, answer: bytes) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(4096)
        connection.sendall(answer)


def test_the_scripts_are_rendered_as_they_are() -> None:
    (test,) = of_kind("Pod")["spec"]["containers"]
    assert test["args"][0] == script("try.py").rstrip() + "\n"
    assert test["args"][1:] == ["try-latentd", "80"]
    (demo,) = pod()["initContainers"]
    assert demo["args"][0].rstrip() == script("demo.sh").rstrip()


@pytest.fixture
def bundle_here(tmp_path: Path) -> Path:
    folder = tmp_path / "image/demo"
    (folder / "onnx").mkdir(parents=True)
    (folder / "onnx/unet.onnx").write_text("graph")
    (folder / "manifest.json").write_text("{}")
    (tmp_path / "models").mkdir()
    return folder


def copy(bundle: Path, target: Path) -> subprocess.CompletedProcess[str]:
    return run("sh", "-c", script("demo.sh"), "demo", bundle, target)


def test_the_demo_is_copied_once(bundle_here: Path, tmp_path: Path) -> None:
    target = tmp_path / "models/demo"
    assert copy(bundle_here, target).returncode == 0
    assert (target / "onnx/unet.onnx").read_text() == "graph"
    (target / "engine").write_text("compiled")
    assert copy(bundle_here, target).returncode == 0
    assert (target / "engine").exists()
    assert [one.name for one in (tmp_path / "models").iterdir()] == ["demo"]


def test_pods_that_start_together_copy_the_demo_once(bundle_here: Path, tmp_path: Path) -> None:
    target = tmp_path / "models/demo"
    codes: list[int] = []
    threads = [threading.Thread(target=lambda: codes.append(copy(bundle_here, target).returncode)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0] * 6
    assert [one.name for one in (tmp_path / "models").iterdir()] == ["demo"]
    assert sorted(one.name for one in target.iterdir()) == ["manifest.json", "onnx"]


@pytest.fixture
def compiler(tmp_path: Path) -> Path:
    """A `python` that writes down its arguments, and whether the bundle's lock is held."""
    program = tmp_path / "bin/python"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$@" >> "$LOG"\nflock -n "$4/.compiling" echo free >> "$LOG"\nexit "$CODE"\n')
    program.chmod(0o755)
    return program.parent


def compile_with(compiler: Path, *bundles: Path, code: int = 0) -> tuple[int, list[str]]:
    log = compiler / "log"
    path = f"{compiler}{os.pathsep}{os.environ['PATH']}"
    for bundle in bundles:
        bundle.mkdir()
    words = ["sh", "-c", script("compile.sh"), "compile", "tensorrt"]
    done = run(*words, *bundles, PATH=path, LOG=str(log), CODE=str(code))
    return done.returncode, log.read_text().splitlines()


def test_each_bundle_is_compiled_under_the_servers_lock(compiler: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    code, log = compile_with(compiler, first, second)
    assert code == 0
    assert log == [f"-m build_engines compile {one} --backend tensorrt" for one in (first, second)]
    assert '_LOCK = ".compiling"' in Path(compiling.__file__).read_text(encoding="utf-8")


def test_the_pod_does_not_start_without_its_engines(compiler: Path, tmp_path: Path) -> None:
    code, log = compile_with(compiler, tmp_path / "first", tmp_path / "second", code=1)
    assert code == 1
    assert len(log) == 1


def test_a_rendered_secret_is_a_file_of_keys() -> None:
    secret = of_kind("Secret", RENDERED_KEYS)
    assert len(keys.parse(secret["stringData"]["keys.toml"].encode())) == 1


def publish(volume: Path, version: str, text: str) -> None:
    """Write a Secret's file as the kubelet does: a new folder, and a link that is exchanged for another."""
    folder = volume / f"..{version}"
    folder.mkdir()
    (folder / "keys.toml").write_text(text)
    (volume / "..new").symlink_to(folder.name)
    (volume / "..new").replace(volume / "..data")


def test_an_exchanged_secret_counts(tmp_path: Path) -> None:
    first, second = keys.new_key(), keys.new_key()
    publish(tmp_path, "1", keys.entry("first", first, admin=False))
    (tmp_path / "keys.toml").symlink_to("..data/keys.toml")
    file = KeyFile(tmp_path / "keys.toml")
    publish(tmp_path, "2", keys.entry("second", second, admin=False))
    file.reload()
    assert file.find(first) is None
    assert file.find(second)
