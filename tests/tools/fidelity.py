"""Compare a bundle's served images with those that diffusers generates from the checkpoint in FP32, as PSNR.

python -m tests.tools.fidelity --checkpoint demo-checkpoint --bundle engines/demo --backend openvino
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from engines.accuracy import psnr
from engines.manifest import Manifest
from tests.support.references import draw, load_pipeline
from tests.support.serving import Serving, pictures


def compare(checkpoint: Path, bundle: Path, backend: str, *, count: int) -> list[float]:
    """Return the PSNR in dB of `count` images of the model's examples, with its defaults."""
    manifest, pipeline = Manifest.load(bundle), load_pipeline(checkpoint)
    with Serving(bundle, "--backend", backend, start_seconds=600) as serving:
        scheduler = manifest.defaults.scheduler
        return [served_psnr(serving, pipeline, manifest, scheduler=scheduler, seed=seed) for seed in range(count)]


def served_psnr(serving: Serving, pipeline: Any, manifest: Manifest, *, scheduler: str, seed: int) -> float:
    """Return the PSNR in dB of a served image compared with diffusers', for one of the model's examples."""
    params: dict[str, Any] = {
        "prompt": manifest.examples[seed % len(manifest.examples)] if manifest.examples else "a lighthouse at night",
        "num_inference_steps": manifest.defaults.num_inference_steps,
        "guidance_scale": manifest.defaults.guidance_scale,
        "scheduler": scheduler,
        "seed": seed,
        **manifest.resolutions[0].model_dump(),
    }
    return psnr(pictures(serving.generate(**params))[0], draw(pipeline, **params))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--count", type=int, default=12, help="images (default: %(default)s)")
    given = parser.parse_args()
    found = compare(given.checkpoint, given.bundle, given.backend, count=given.count)
    sys.stdout.write(
        f"PSNR of {len(found)} images: minimum {min(found):.1f} dB, median {statistics.median(found):.1f} dB\n"
    )


if __name__ == "__main__":
    main()
