"""How near a bundle's served pictures are to those that diffusers draws from the checkpoint, in FP32.

python -m tests.fidelity --checkpoint demo-checkpoint --bundle engines/demo --backend openvino
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from engines.manifest import Manifest
from tests.references import draw, load_pipeline, psnr
from tests.serving import Serving, pictures


def compare(checkpoint: Path, bundle: Path, backend: str, *, count: int) -> list[float]:
    """PSNR in dB of `count` pictures of the model's examples, with its own defaults."""
    manifest, pipeline = Manifest.load(bundle), load_pipeline(checkpoint)
    defaults, size = manifest.defaults, manifest.resolutions[0]
    found = []
    with Serving(bundle, "--backend", backend, start_seconds=600) as serving:
        for seed in range(count):
            prompt = manifest.examples[seed % len(manifest.examples)] if manifest.examples else "a lighthouse at night"
            wish = {
                "prompt": prompt,
                "num_inference_steps": defaults.num_inference_steps,
                "guidance_scale": defaults.guidance_scale,
            }
            ours = pictures(serving.generate(**wish, seed=seed))[0]
            theirs = draw(pipeline, scheduler=defaults.scheduler, seed=seed, **size.model_dump(), **wish)
            found.append(psnr(ours, theirs))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--count", type=int, default=12)
    given = parser.parse_args()
    found = compare(given.checkpoint, given.bundle, given.backend, count=given.count)
    sys.stdout.write(
        f"PSNR of {len(found)} pictures: least {min(found):.1f} dB, median {statistics.median(found):.1f} dB\n"
    )


if __name__ == "__main__":
    main()
