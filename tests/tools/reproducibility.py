"""Compare images of the same requests: repeated, batched with others, on other backends, and in diffusers.

python -m tests.tools.reproducibility --checkpoint demo-checkpoint --bundle engines/demo [--compare NAME BUNDLE BACKEND]
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engines.accuracy import IDENTICAL, psnr
from engines.manifest import Manifest
from engines.schedulers import METHODS
from tests.support.references import Pixels, draw, load_pipeline
from tests.support.serving import Serving, pictures

ImageList = Sequence[Pixels]


def random_requests(manifest: Manifest, count: int) -> list[dict[str, Any]]:
    """Return requests with every scheduler in turn, and random steps and guidance."""
    rng, schedulers = random.Random(1), [name for name in METHODS if name not in {"lcm", "tcd", "ddpm"}]
    size = manifest.resolutions[0].model_dump()
    return [
        {
            "prompt": rng.choice(manifest.examples),
            "scheduler": schedulers[index % len(schedulers)],
            "num_inference_steps": rng.randint(15, 30),
            "guidance_scale": rng.uniform(1, 6),
            "seed": index,
            **size,
        }
        for index in range(count)
    ]


def generate(serving: Serving, requests: Sequence[dict[str, Any]], *, concurrency: int = 1, **more: Any) -> ImageList:
    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(lambda params: pictures(serving.generate(**params, **more))[0], requests))


def row(name: str, one: ImageList, other: ImageList) -> str:
    found = [psnr(*pair) for pair in zip(one, other, strict=True)]
    identical = sum(value == IDENTICAL for value in found)
    minimum, median = (
        "identical" if value == IDENTICAL else f"{value:.1f} dB" for value in (min(found), statistics.median(found))
    )
    return f"| {name} | {minimum} | {median} | {identical} of {len(found)} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--compare", nargs=3, action="append", default=[], metavar=("NAME", "BUNDLE", "BACKEND"))
    given = parser.parse_args()
    requests = random_requests(Manifest.load(given.bundle), given.count)
    rows = ["| compared with the image generated alone | minimum PSNR | median | identical |\n|---|---|---|---|\n"]
    with Serving(given.bundle, "--backend", "onnxruntime") as serving:
        alone = generate(serving, requests)
        rows.append(row("generated alone again", alone, generate(serving, requests)))
        rows.append(row("batched with others", alone, generate(serving, requests, concurrency=given.count)))
        with ThreadPoolExecutor() as pool:
            others = pool.submit(generate, serving, requests * 2, concurrency=8)
            exact = generate(serving, requests, exact=True)
            others.result()
        rows.append(row("`exact`, batched with others", alone, exact))
    with Serving(given.bundle, "--backend", "onnxruntime", "--threads", "2") as serving:
        rows.append(row("on two threads instead of one", alone, generate(serving, requests)))
    for name, bundle, backend in given.compare:
        with Serving(Path(bundle), "--backend", backend) as serving:
            rows.append(row(name, alone, generate(serving, requests)))
    pipeline = load_pipeline(given.checkpoint)
    rows.append(row("diffusers in FP32", alone, [draw(pipeline, **params) for params in requests]))
    sys.stdout.write("".join(rows))


if __name__ == "__main__":
    main()
