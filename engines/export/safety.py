"""The safety checker as a torch module: decoded images in, what they resemble out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from engines.checkpoints.safety_checker import Preprocessing
from engines.export.graph_module import GraphModule


class Safety(GraphModule):
    """RGB images to how far they resemble each concept of a StableDiffusionSafetyChecker, above its threshold.

    `engines.safety` makes verdicts of that. The preprocessing is Pillow's, of which a value in a thousand may differ by
    one level of 255.
    """

    graph = "safety"

    def __init__(self, checker: Any, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.vision_model = checker.vision_model
        self.visual_projection = checker.visual_projection
        self.concept_embeds = checker.concept_embeds
        self.special_care_embeds = checker.special_care_embeds
        # Numbers, which keep their digits when the weights are rounded.
        self._thresholds: list[float] = checker.concept_embeds_weights.tolist()
        self._special_care_thresholds: list[float] = checker.special_care_embeds_weights.tolist()
        self._preprocessing = preprocessing

    @property
    def concepts(self) -> int:
        return len(self._thresholds)

    @property
    def special_care(self) -> int:
        return len(self._special_care_thresholds)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = self._preprocessed(images).to(self.visual_projection.weight.dtype)
        embeddings = self.visual_projection(self.vision_model(pixels).pooler_output)
        return (
            _similarity(embeddings, self.concept_embeds) - torch.tensor(self._thresholds),
            _similarity(embeddings, self.special_care_embeds) - torch.tensor(self._special_care_thresholds),
        )

    def _preprocessed(self, images: Tensor) -> Tensor:
        """[n, H, W, 3] of 0..255 to [n, 3, crop, crop], as CLIPImageProcessor does with Pillow."""
        height, width = images.shape[1:3]
        shorter = torch.sym_min(height, width)  # type: ignore[no-untyped-call] # torch's own
        rows, columns = (self._resizing(side, shorter) for side in (height, width))
        resized = _levels(images.permute(0, 3, 1, 2).float() @ columns.T)  # Pillow rounds after each direction
        colours = _levels(rows @ resized) / 255
        mean, std = (
            torch.tensor(values)[:, None, None] for values in (self._preprocessing.mean, self._preprocessing.std)
        )
        return (colours - mean) / std

    def _resizing(self, side: int, shorter: int) -> Tensor:
        """The matrix [crop, side] that resizes one direction and cuts out its centre.

        Bicubic with a = -1/2 over a wider area where images shrink; Keys (1981), eq. 4, and Pillow's Resample.c.
        """
        crop = self._preprocessing.crop
        resized = self._preprocessing.shortest_edge * side // shorter
        scale = side / resized
        wide = torch.clamp(torch.scalar_tensor(scale), min=1.0)
        centres = (torch.arange(crop) + (resized - crop) // 2 + 0.5) * scale
        x = (torch.arange(side) + 0.5 - centres[:, None]).abs() / wide
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
        return weights / weights.sum(dim=1, keepdim=True)


def _levels(pixels: Tensor) -> Tensor:
    return pixels.round().clamp(0, 255)


def _similarity(embeddings: Tensor, concepts: Tensor) -> Tensor:
    """Cosines [n, concepts]."""
    ours, theirs = (nn.functional.normalize(vectors.float()) for vectors in (embeddings, concepts))
    return ours @ theirs.T
