"""How near pictures of the same request are: to themselves, in a crowd, on other backends, and in diffusers.

python -m tests.tools.reproducibility --checkpoint demo-checkpoint --bundle engines/demo [--beside NAME BUNDLE BACKEND]
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

Pictures = Sequence[Pixels]


def wishes(manifest: Manifest, count: int) -> list[dict[str, Any]]:
    """Requests of every scheduler in turn; steps and guidance are dice."""
    dice, schedulers = random.Random(1), [name for name in METHODS if name not in {"lcm", "tcd", "ddpm"}]
    size = manifest.resolutions[0].model_dump()
    return [
        {
            "prompt": dice.choice(manifest.examples),
            "scheduler": schedulers[index % len(schedulers)],
            "num_inference_steps": dice.randint(15, 30),
            "guidance_scale": dice.uniform(1, 6),
            "seed": index,
            **size,
        }
        for index in range(count)
    ]


def drawn(serving: Serving, asked: Sequence[dict[str, Any]], *, crowd: int = 1, **more: Any) -> Pictures:
    with ThreadPoolExecutor(crowd) as pool:
        return list(pool.map(lambda wish: pictures(serving.generate(**wish, **more))[0], asked))


def row(name: str, one: Pictures, other: Pictures) -> str:
    found = [psnr(*pair) for pair in zip(one, other, strict=True)]
    identical = sum(value == IDENTICAL for value in found)
    least, median = (
        "identical" if value == IDENTICAL else f"{value:.1f} dB" for value in (min(found), statistics.median(found))
    )
    return f"| {name} | {least} | {median} | {identical} of {len(found)} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--beside", nargs=3, action="append", default=[], metavar=("NAME", "BUNDLE", "BACKEND"))
    given = parser.parse_args()
    asked = wishes(Manifest.load(given.bundle), given.count)
    rows = ["| beside the picture drawn alone | least PSNR | median | identical |\n|---|---|---|---|\n"]
    with Serving(given.bundle, "--backend", "onnxruntime") as serving:
        alone = drawn(serving, asked)
        rows.append(row("drawn alone again", alone, drawn(serving, asked)))
        rows.append(row("in a crowd", alone, drawn(serving, asked, crowd=given.count)))
        with ThreadPoolExecutor() as pool:
            company = pool.submit(drawn, serving, asked * 2, crowd=8)
            exact = drawn(serving, asked, exact=True)
            company.result()
        rows.append(row("`exact`, in a crowd", alone, exact))
    with Serving(given.bundle, "--backend", "onnxruntime", "--threads", "2") as serving:
        rows.append(row("by two threads in place of one", alone, drawn(serving, asked)))
    for name, bundle, backend in given.beside:
        with Serving(Path(bundle), "--backend", backend) as serving:
            rows.append(row(name, alone, drawn(serving, asked)))
    pipeline = load_pipeline(given.checkpoint)
    rows.append(row("diffusers in FP32", alone, [draw(pipeline, **wish) for wish in asked]))
    sys.stdout.write("".join(rows))


if __name__ == "__main__":
    main()
