"""Build engines from a full-size small-stable-diffusion-v0 with random weights; report time and peak memory.

python -m tests.tools.full_size --out DIR [--backend tensorrt_rtx] [arguments of build_engines.py]

It needs about 6 GB of disk, and takes minutes, so it is not part of the test run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import psutil

from benchmarks.models import write_checkpoint
from engines.manifest import Manifest


def run(command: list[str]) -> tuple[int, float, int]:
    """Run `command`; return its exit code, seconds, and peak memory in bytes including its children."""
    began, peak = time.monotonic(), 0
    with subprocess.Popen(command) as process:  # noqa: S603 - our own command
        while process.poll() is None:
            peak = max(peak, _memory(process.pid))
            time.sleep(0.5)
    return process.returncode, time.monotonic() - began, peak


def _memory(pid: int) -> int:
    total = 0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            total += process.memory_info().rss
    except psutil.Error:
        pass  # the process has just ended
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the bundle")
    parser.add_argument("--backend", default="tensorrt_rtx")
    given, more = parser.parse_known_args()
    checkpoint, bundle = given.out / "checkpoint", given.out / "bundle"
    if not (checkpoint / "model_index.json").exists():
        write_checkpoint(checkpoint, layers_per_block=1)
    build = ["build_engines.py", "--model", str(checkpoint), "--out", str(bundle), "--backend", given.backend, *more]
    code, seconds, peak = run([sys.executable, *build])
    sys.stderr.write(f"exit {code} after {seconds / 60:.1f} minutes, peak memory {peak / 1e9:.1f} GB\n")
    if code == 0 and (layers := Manifest.load(bundle).builds[given.backend].engines["denoise"].layers):
        sys.stderr.write(f"fused attention layers: {layers.fused_attentions} of {layers.attentions}\n")
        return int(layers.fused_attentions < layers.attentions)
    return code


if __name__ == "__main__":
    sys.exit(main())
