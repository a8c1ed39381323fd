"""A safety checker with random weights, which flags some pictures of a tiny checkpoint and not others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessorPil

from tests.support.references import load_pipeline
from tests.support.tiny import CAPTIONS, edit_index

REQUEST: dict[str, Any] = {"prompt": CAPTIONS[0], "num_inference_steps": 2}
SEEDS = range(8)  # of the pictures that the checker is adjusted to
SIDE = 28  # of what it looks at


def add_safety_checker(folder: Path) -> Path:
    """Add the checker to the diffusers folder, as diffusers does."""
    checker, extractor = random_checker(), CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE)
    pipeline = load_pipeline(folder)
    pictures = [draw(pipeline, seed).images[0] for seed in SEEDS]
    _adjust(checker, _similarities(checker, extractor, pictures))
    checker.save_pretrained(folder / "safety_checker")
    extractor.save_pretrained(folder / "feature_extractor")
    edit_index(
        folder,
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
    )
    return folder


def checking_pipeline(folder: Path) -> Any:
    """diffusers' pipeline with the checker of the folder."""
    pipeline = load_pipeline(folder)
    pipeline.register_modules(
        safety_checker=StableDiffusionSafetyChecker.from_pretrained(folder / "safety_checker"),
        feature_extractor=CLIPImageProcessorPil.from_pretrained(folder / "feature_extractor"),
    )
    return pipeline


def draw(pipeline: Any, seed: int) -> Any:
    """What diffusers' pipeline returns for `REQUEST`."""
    return pipeline(generator=torch.Generator("cpu").manual_seed(seed), output_type="pil", **REQUEST)


def random_checker() -> Any:
    """A checker that sees differences, and flags nothing: all thresholds are 1."""
    torch.manual_seed(2)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": 14,
    }
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16)).eval()
    for weight in (
        checker.concept_embeds,
        checker.special_care_embeds,
        checker.visual_projection.weight,
        checker.vision_model.embeddings.patch_embedding.weight,
    ):
        torch.nn.init.normal_(weight)
    return checker


def _similarities(checker: Any, extractor: Any, pictures: Sequence[PIL.Image.Image]) -> torch.Tensor:
    """[pictures, concepts]"""
    pixels = extractor(pictures, return_tensors="pt").pixel_values
    with torch.inference_mode():
        embeddings = checker.visual_projection(checker.vision_model(pixels).pooler_output)
    return torch.nn.functional.normalize(embeddings) @ torch.nn.functional.normalize(checker.concept_embeds).T


def _adjust(checker: Any, similarities: torch.Tensor) -> None:
    """Let the concept that divides the pictures most clearly in two flag those above the division."""
    ordered = similarities.sort(dim=0).values
    gaps = (ordered[1:] - ordered[:-1])[1:-1]  # at least two pictures on each side
    place, concept = divmod(int(gaps.argmax()), gaps.shape[1])
    with torch.no_grad():
        checker.concept_embeds_weights[concept] = ordered[place + 1 : place + 3, concept].mean()
