"""A crowd of requests with LoRAs of every form, and what diffusers draws with them fused.

The updates are kept as they were drawn, so that what the server makes of the files is compared with what they mean, and
not with what our own reader finds in them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engines.manifest import LoraPart, Manifest
from tests.support.loras import Changes, FileForm, early_layers, make_changes, shapes_in, write_lora
from tests.support.references import CLASSES, Pixels, draw

_STRENGTH = 0.16  # of factors: pictures differ, and stay pictures
_UNET: frozenset[LoraPart] = frozenset({"unet"})
_BOTH: frozenset[LoraPart] = frozenset({"unet", "text_encoder"})
_ALL: frozenset[LoraPart] = frozenset({"unet", "text_encoder", "text_encoder_2"})
_SECOND: frozenset[LoraPart] = frozenset({"text_encoder_2"})


class WrittenLora(NamedTuple):
    """A LoRA in a file."""

    name: str  # of requests
    changes: Changes

    @property
    def updates_text(self) -> bool:
        return any(target.part != "unet" for target in self.changes)


class Kind(NamedTuple):
    """How a LoRA is written: in which form, which parts it updates, and its alpha over its rank."""

    form: FileForm
    parts: frozenset[LoraPart]
    strength: float = 1.0

    @property
    def name(self) -> str:
        return self.form if len(self.parts) > 1 or self.form == "peft" else f"{self.form}-{'-'.join(self.parts)}"


KINDS = (
    Kind("kohya", _BOTH, 0.5),
    Kind("kohya", _UNET, 2.0),
    Kind("diffusers", _BOTH),
    Kind("diffusers", _UNET, 0.5),
    Kind("diffusers-old", _BOTH),
    Kind("diffusers-old", _UNET, 2.0),
    Kind("peft", _UNET, 2.0),  # in a folder, with its config
    Kind("early", _BOTH),
)
XL_KINDS = (  # of Stable Diffusion XL
    Kind("kohya", _ALL, 0.5),
    Kind("kohya-sgm", _ALL, 2.0),
    Kind("kohya-sgm", _UNET),
    Kind("diffusers", _ALL),
    Kind("diffusers", _SECOND, 2.0),
    Kind("diffusers-old", _ALL, 0.5),
)


def write_loras(
    folder: Path,
    manifest: Manifest,
    ranks: Sequence[int] = (2, 4, 4, 8, 2, 4, 4, 4),
    *,
    kinds: Sequence[Kind] = KINDS,
    seed: int = 0,
) -> list[WrittenLora]:
    """One LoRA of each kind in `folder`, which `--loras` reads."""
    chosen = zip(kinds, ranks[: len(kinds)], strict=True)
    return [_write(folder, kind, manifest, rank, seed + index) for index, (kind, rank) in enumerate(chosen)]


def _write(folder: Path, kind: Kind, manifest: Manifest, rank: int, seed: int) -> WrittenLora:
    shapes = shapes_in(manifest)
    chosen = early_layers(shapes) if kind.form == "early" else shapes
    mine = {target: shape for target, shape in chosen.items() if target.part in kind.parts}
    changes = make_changes(mine, seed=seed, rank=rank, strength=_STRENGTH / (rank * kind.strength**2) ** 0.25)
    path = folder / kind.name / "adapter_model" if kind.form == "peft" else folder / kind.name
    file, alpha = path.with_suffix(".safetensors"), kind.strength * rank
    write_lora(file, changes, kind.form, alpha=alpha, beside=manifest.lora_refused)
    scaled = {target: factors._replace(up=kind.strength * factors.up) for target, factors in changes.items()}
    return WrittenLora(kind.name, scaled)


@contextmanager
def fused(pipeline: Any, loras: Sequence[tuple[WrittenLora, float]]) -> Iterator[None]:
    """Within it, the pipeline's weights have these LoRAs added, each by its weight."""
    before: dict[nn.Linear | nn.Conv2d, Tensor] = {}
    for lora, weight in loras:
        for target, factors in lora.changes.items():
            layer: nn.Linear | nn.Conv2d = getattr(pipeline, target.part).get_submodule(target.name)
            before.setdefault(layer, layer.weight.detach().clone())
            with torch.no_grad():
                layer.weight.add_(weight * factors.product().view_as(layer.weight))
    try:
        yield
    finally:
        for layer, weights in before.items():
            with torch.no_grad():
                layer.weight.copy_(weights)


@dataclass(frozen=True, eq=False)
class Wish:
    """A request of the crowd."""

    body: dict[str, Any]
    loras: tuple[tuple[WrittenLora, float], ...] = ()

    @property
    def with_loras(self) -> dict[str, Any]:
        """The request's body."""
        chosen = [{"name": lora.name, "weight": weight} for lora, weight in self.loras]
        return {**self.body, "loras": chosen} if chosen else self.body

    def drawn_by(self, pipeline: Any) -> Pixels:
        """What diffusers draws with the LoRAs fused."""
        body = dict(self.body)
        with fused(pipeline, self.loras):
            return draw(pipeline, scheduler=body.pop("scheduler"), seed=body.pop("seed"), **body)

    def __str__(self) -> str:
        return f"{self.body['scheduler']} with {', '.join(lora.name for lora, _ in self.loras) or 'none'}"


def crowd(loras: Sequence[WrittenLora], count: int, *, seed: int = 5) -> list[Wish]:
    """`count` requests of every scheduler in turn; a quarter has no LoRA, and another two."""
    dice, schedulers = random.Random(seed), list(CLASSES)
    wishes = []
    for index in range(count):
        body = {
            "prompt": f"a {dice.choice(['red', 'green', 'blue'])} bird at night",
            "negative_prompt": dice.choice(["", "rain"]),
            "seed": 100 + index,
            "scheduler": schedulers[(index * 7) % len(schedulers)],
            "num_inference_steps": dice.randint(4, 12),
            "guidance_scale": round(dice.uniform(2, 8), 2),
            "width": 32,
            "height": 32,
        }
        first = index * 5 % len(loras)
        chosen = (loras[first], loras[(first + 1) % len(loras)])
        some = () if index % 4 == 3 else chosen[: 1 + (index % 4 == 2)]
        wishes.append(Wish(body, tuple((lora, round(dice.uniform(0.4, 1.2), 2)) for lora in some)))
    return wishes
