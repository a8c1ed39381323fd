"""Verdicts are those of diffusers' StableDiffusionSafetyChecker."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engines.safety import flagged
from tests.support.safety import random_checker

IMAGES = 400


def test_verdicts_are_those_of_diffusers() -> None:
    """On embeddings whose scores lie around every bound: the thresholds, the special-care ones, and the rounding."""
    checker = random_checker()
    torch.manual_seed(0)
    embeddings = torch.randn(IMAGES, 16)
    ours, theirs, special = (
        torch.nn.functional.normalize(vectors)
        for vectors in (embeddings, checker.concept_embeds, checker.special_care_embeds)
    )
    with torch.no_grad():
        checker.concept_embeds_weights.copy_((ours @ theirs.T).quantile(0.96, dim=0))
        checker.special_care_embeds_weights.copy_((ours @ special.T).quantile(0.8, dim=0))
    checker.vision_model, checker.visual_projection = _Pooled(), torch.nn.Identity()
    _, expected = checker(clip_input=embeddings, images=np.zeros((IMAGES, 1)))
    concepts = (ours @ theirs.T - checker.concept_embeds_weights).numpy()
    special_care = (ours @ special.T - checker.special_care_embeds_weights).numpy()
    verdicts = flagged(concepts, special_care)
    assert verdicts == tuple(expected)
    assert 0.2 < np.mean(verdicts) < 0.8
    assert verdicts != flagged(concepts, np.full_like(special_care, -1)), "special care decides about some"


class _Pooled(torch.nn.Module):
    """A vision model that is given what it returns."""

    def forward(self, embeddings: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, embeddings


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("broken", ["concepts", "special_care"])
def test_what_cannot_be_checked_is_flagged(value: float, broken: str) -> None:
    scores = SimpleNamespace(concepts=np.full((2, 3), -0.5), special_care=np.full((2, 1), -0.5))
    getattr(scores, broken)[1] = value
    scores.concepts[1, 1:] = -0.005  # near enough for what special care adds
    assert flagged(scores.concepts, scores.special_care) == (False, True)
