"""Requests that a server over a Stable Diffusion XL bundle and diffusers' pipelines answer with the same pictures."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline

from engines.accuracy import psnr
from tests.support.image_files import mask, picture, text_of
from tests.support.references import CLASSES, Pixels, draw, load_pipeline
from tests.support.serving import Serving, pictures

Start = Literal["noise", "image", "mask"]  # what a picture is drawn from

_BODY: Mapping[str, Any] = {
    "prompt": "a red cat on a blue hill",
    "guidance_scale": 5.0,
    "num_inference_steps": 10,
    "seed": 5,
    "width": 48,
    "height": 32,
}
_NEGATIVE = {"negative_prompt": "rain"}
_SIZES = {"original_size": (64, 96), "crops_coords_top_left": (8, 20), "target_size": (40, 24)}
CASES: Mapping[str, tuple[Start, dict[str, Any]]] = {
    "guided": ("noise", _NEGATIVE),
    "no negative prompt": ("noise", {}),  # its embeddings are zeros
    "unguided": ("noise", {"guidance_scale": 1.0}),
    "clip skip": ("noise", {**_NEGATIVE, "clip_skip": 1}),
    "other sizes": ("noise", {**_NEGATIVE, **_SIZES}),
    "image": ("image", {**_NEGATIVE, "strength": 0.6}),
    "mask": ("mask", {"strength": 0.8}),
}


class Pipelines(NamedTuple):
    """diffusers' pipelines over one checkpoint, by what they draw from."""

    noise: Any
    image: Any
    mask: Any

    @classmethod
    def load(cls, checkpoint: Path) -> Self:
        text = load_pipeline(checkpoint)
        kinds = (StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline)
        others = [kind(**text.components, add_watermarker=False) for kind in kinds]
        for one in others:
            one.register_to_config(_name_or_path=str(checkpoint))
            one.set_progress_bar_config(disable=True)
        return cls(text, *others)


@dataclass(frozen=True)
class Drawing:
    """A request, whose fields are arguments of diffusers' pipelines by the same names."""

    fields: Mapping[str, Any]
    start: Start = "noise"

    @classmethod
    def of(cls, name: str, **fields: Any) -> Self:
        """The case of this name."""
        start, own = CASES[name]
        return cls({**_BODY, **fields, **own}, start)

    @property
    def body(self) -> dict[str, Any]:
        """The request's body."""
        files = {"noise": (), "image": ("image",), "mask": ("image", "mask")}[self.start]
        return {**self.fields, **{name: text_of(image) for name, image in self._files() if name in files}}

    def served_by(self, serving: Serving) -> list[Pixels]:
        return pictures(serving.generate(**self.body))

    def drawn_by(self, pipelines: Pipelines) -> list[Pixels]:
        """What diffusers draws, each image by its own seed."""
        options = dict(self.fields)
        seed, count = options.pop("seed"), options.pop("num_images", 1)
        images = dict(self._files())
        if self.start == "noise":
            images = {}
        elif self.start == "image":
            images = {"image": images["image"]}
            del options["width"], options["height"]  # they are the image's
        else:
            images["mask_image"] = images.pop("mask")
        pipeline = getattr(pipelines, self.start)
        return [draw(pipeline, seed=seed + index, **options, **images) for index in range(count)]

    def decibels(self, ours: Sequence[Pixels], pipelines: Pipelines) -> float:
        """The PSNR of the picture of `ours` that differs most from diffusers'."""
        theirs = self.drawn_by(pipelines)
        assert min(pixels.std() for pixels in theirs) > 5, "a reference is a flat picture: it proves nothing"
        return min(psnr(one, other) for one, other in zip(ours, theirs, strict=True))

    def _files(self) -> list[tuple[str, Any]]:
        size = self.fields["width"], self.fields["height"]
        return [("image", picture(*size)), ("mask", mask(*size))]


def crowd(count: int, *, seed: int = 7) -> list[Drawing]:
    """`count` requests of every case and scheduler in turn; the rest are dice."""
    dice, schedulers, names = random.Random(seed), list(CLASSES), list(CASES)
    return [
        Drawing.of(
            names[index % len(names)],
            prompt=f"a {dice.choice(['red', 'green', 'blue'])} bird at night",
            seed=100 + index,
            scheduler=schedulers[(index * 5) % len(schedulers)],
            num_inference_steps=dice.randint(2, 4),
            guidance_scale=round(dice.uniform(2, 8), 2),
            num_images=dice.choice([1, 1, 1, 2]),
            width=dice.choice([32, 48]),
        )
        for index in range(count)
    ]
