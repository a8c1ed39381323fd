"""Real servers over bundles that are no files, or change while they are checked, loaded or served from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engines.manifest import MANIFEST
from tests import ROOT
from tests.support.bare_server import wait_until
from tests.support.serving import Serving, run_server

pytestmark = pytest.mark.faults

DEMO = ROOT / "engines" / "demo"
FAULT = 70
WAIT = 60  # seconds at most


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    (tmp_path / "bundle").mkdir()
    shutil.copytree(DEMO / "onnx", tmp_path / "bundle" / "onnx")
    for name in (MANIFEST, "tokenizer.json"):
        shutil.copy(DEMO / name, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def serving(copied: Path) -> Iterator[Serving]:
    with Serving(copied, "--backend", "onnxruntime") as running:
        assert running.generate(prompt="a red heart", seed=1).status_code == 200
        yield running


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**30)


@pytest.mark.parametrize("put", [os.mkfifo, sparse, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("name", [MANIFEST, "onnx/denoise.weights", "tokenizer.json"])
def test_what_is_no_file_of_a_bundle_is_refused_at_once(copied: Path, name: str, put: Callable[[Path], None]) -> None:
    (copied / name).unlink()
    put(copied / name)
    done = run_server("--bundle", str(copied), "--port", "0", "--backend", "onnxruntime")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {copied / name} ")
    assert done.stderr.count("\n") == 1


def rewrite(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest's fields."""
    fields = json.loads((bundle / MANIFEST).read_text())
    change(fields)
    (bundle / MANIFEST).write_text(json.dumps(fields))


def swap_graphs(fields: dict[str, Any]) -> None:
    """The manifest names encode_prompt's file for decode, and the other way round: all hashes agree."""
    for graphs, key in [(fields["graphs"], "onnx"), (fields["builds"]["onnxruntime"]["engines"], "files")]:
        one, other = graphs["encode_prompt"], graphs["decode"]
        one[key], other[key] = other[key], one[key]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_swapped_graphs_are_refused_by_their_ports(copied: Path, backend: str) -> None:
    rewrite(copied, swap_graphs)
    done = run_server("--bundle", str(copied), "--port", "0", "--backend", backend)
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "decode.onnx has the ports images, is_finite, slot, state; " in line


def rewrite_tokenizer(bundle: Path, content: bytes) -> None:
    (bundle / "tokenizer.json").write_bytes(content)
    facts = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    rewrite(bundle, lambda fields: fields["tokenizer"]["file"].update(facts))


@pytest.mark.parametrize("content", [b"{}", b"\xff", b"[" * 10_000, b'{"version": "1.0", "model": {"type": "other"}}'])
def test_what_is_no_tokenizer_is_refused(copied: Path, content: bytes) -> None:
    rewrite_tokenizer(copied, content)
    done = run_server("--bundle", str(copied), "--port", "0", "--backend", "onnxruntime")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "tokenizer.json is no tokenizer.json" in done.stderr


def altered(weights: Path) -> None:
    with weights.open("r+b") as file:
        file.seek(weights.stat().st_size // 2)
        block = file.read(4096)
        file.seek(-len(block), os.SEEK_CUR)
        file.write(bytes(byte ^ 255 for byte in block))


def test_weights_altered_while_they_are_served_end_the_server(serving: Serving, copied: Path) -> None:
    altered(copied / "onnx/denoise.weights")
    assert serving.process.wait(WAIT) == FAULT
    serving.stop()
    (line,) = [line for line in serving.stderr if "denoise.weights" in line]
    assert "was altered while it was served from: images may be wrong since" in line


def test_weights_cut_while_they_are_served_end_the_server_with_a_word(serving: Serving, copied: Path) -> None:
    """Whichever is first: the look at the files, or the bus error of a step that reads what is gone."""
    os.truncate(copied / "onnx/denoise.weights", 100)
    deadline = time.monotonic() + WAIT
    while serving.process.poll() is None and time.monotonic() < deadline:
        try:
            serving.generate(prompt="a red heart", seed=2)
        except httpx.HTTPError:
            continue
    code = serving.stop()
    said = "".join(serving.stderr)
    if code == FAULT:
        assert "denoise.weights was altered" in said
    else:
        assert code == -signal.SIGBUS
        assert "Fatal Python error: Bus error" in said


def test_a_build_beside_a_server_changes_nothing_for_it(serving: Serving, copied: Path) -> None:
    """New files under the same names, touched ones, and in the end none at all."""
    before = serving.generate(prompt="a red heart", seed=3).json()["images"]
    weights = copied / "onnx/denoise.weights"
    shutil.copy(copied / "onnx/decode.weights", copied / "new")
    (copied / "onnx/decode.weights").touch()
    (copied / "new").replace(weights)
    (copied / MANIFEST).write_text("{}")
    shutil.rmtree(copied)
    until = time.monotonic() + 5  # two looks at the files
    while time.monotonic() < until:
        assert serving.generate(prompt="a red heart", seed=3).json()["images"] == before
    assert serving.client.get("/v2/health/ready").status_code == 200


def has_children(process: subprocess.Popen[str]) -> bool:
    tasks = Path(f"/proc/{process.pid}/task").iterdir()
    return any((task / "children").read_text() for task in tasks)


def test_a_file_replaced_while_backends_are_measured_is_not_served(copied: Path, tmp_path: Path) -> None:
    """The measurement begins after the check, and takes long."""
    other = tmp_path / "other"
    shutil.copy(copied / "onnx/decode.weights", other)
    altered(other)
    options = ["--bundle", str(copied), "--port", "0", "--backend", "auto", "--threads", "1"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "server", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:  # noqa: S603 - our own
        wait_until(lambda: has_children(process))
        other.replace(copied / "onnx/decode.weights")
        _, said = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "decode.weights was changed or replaced while it was loaded: start again." in said
