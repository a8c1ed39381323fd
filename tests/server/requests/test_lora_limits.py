"""Which LoRAs a request may have."""

from __future__ import annotations

import numpy as np
import pytest

from engines.manifest import LoraCapacity, Manifest
from server.requests.errors import InvalidRequest
from server.requests.lora_limits import check_loras
from server.requests.request import Lora, WeightedLora


def lora(ranks: int) -> WeightedLora:
    values = np.zeros((ranks, 4), np.float16)
    return WeightedLora(Lora("a", "a", values, updates_unet=True, updates_text_encoder=False), 1.0)


def test_a_row_has_as_many_ranks_as_the_engines_take(manifest: Manifest) -> None:
    served = manifest.model_copy(update={"lora": LoraCapacity(slots=4, rank=8)})
    check_loras([lora(8), lora(8)], served)
    check_loras([], served)
    with pytest.raises(InvalidRequest, match="17 ranks together, this model's engines take 16") as refused:
        check_loras([lora(8), lora(9)], served)
    assert refused.value.fields[0].field == "loras"


def test_a_model_that_was_built_without_them_says_so(manifest: Manifest) -> None:
    check_loras([], manifest)
    with pytest.raises(InvalidRequest, match="--lora-slots"):
        check_loras([lora(1)], manifest)
