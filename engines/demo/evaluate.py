"""Check the images of a checkpoint in diffusers' own pipeline: the reference for the server's scores.

python -m engines.demo.evaluate --checkpoint demo-checkpoint --prompts 200 --out grid.png
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from rich.progress import track

from engines.demo.check import GUIDANCE, STEPS, CheckedImage, conclude, judge, parser
from engines.demo.pictures import draw_prompts

BATCH = 20  # images


def load_pipeline(checkpoint: Path) -> StableDiffusionPipeline:
    """Load the checkpoint, without progress bars."""
    pipeline = StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def paint(pipeline: StableDiffusionPipeline, prompts: list[str], seed: int) -> Iterator[Image.Image]:
    """Yield an image for each prompt; image i uses seed + i."""
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        generators = [torch.Generator().manual_seed(seed + start + at) for at in range(len(batch))]
        yield from pipeline(batch, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators).images


def draw_all(checkpoint: Path, prompts: int, seed: int) -> list[CheckedImage]:
    """Generate and check an image for each prompt."""
    wanted = draw_prompts(prompts, seed)
    pictures = paint(load_pipeline(checkpoint), [prompt for prompt, _ in wanted], seed)
    shown = track(zip(wanted, pictures, strict=True), "drawing", total=prompts)
    return [judge(prompt, seen, picture) for (prompt, seen), picture in shown]


def main() -> int:
    """Evaluate one checkpoint."""
    options = parser(__doc__)
    options.add_argument("--checkpoint", type=Path, required=True)
    given = options.parse_args()
    return conclude(draw_all(given.checkpoint, given.prompts, given.seed), given.out)


if __name__ == "__main__":
    sys.exit(main())
