"""Compare served pictures of a tiny Stable Diffusion XL with diffusers', by scheduler and case, as PSNR in dB.

python -m tests.tools.xl_parity --out xl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import build_engines
from engines.accuracy import IDENTICAL
from tests.support.parity import CASES, Drawing, Pipelines
from tests.support.references import CLASSES
from tests.support.serving import Serving
from tests.support.tiny import make_checkpoint


def rows(serving: Serving, pipelines: Pipelines, *, steps: int) -> Iterator[tuple[str, list[float]]]:
    """Each scheduler, and the PSNR of each case."""
    for scheduler in CLASSES:
        drawings = [Drawing.of(name, scheduler=scheduler, num_inference_steps=steps) for name in CASES]
        yield scheduler, [drawing.decibels(drawing.served_by(serving), pipelines) for drawing in drawings]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint and the bundle")
    parser.add_argument("--steps", type=int, default=8, help="(default: %(default)s)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint, bundle = given.out / "checkpoint", given.out / "bundle"
    if not checkpoint.exists():
        make_checkpoint(checkpoint, "xl")
    if not bundle.exists():
        build_engines.main(["--model", str(checkpoint), "--out", str(bundle), "--resolution", "48x32", "--rows", "2"])
    sys.stdout.write(f"| scheduler | {' | '.join(CASES)} |\n| --- |{' --: |' * len(CASES)}\n")
    with Serving(bundle, start_seconds=300) as serving:
        for scheduler, found in rows(serving, Pipelines.load(checkpoint), steps=given.steps):
            cells = ["identical" if value >= IDENTICAL else f"{value:.0f}" for value in found]
            sys.stdout.write(f"| `{scheduler}` | {' | '.join(cells)} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
