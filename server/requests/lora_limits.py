"""What a model's engines take of a request's LoRAs."""

from __future__ import annotations

from collections.abc import Sequence

from engines.manifest import Manifest
from server.requests.errors import FieldError, InvalidRequest
from server.requests.request import WeightedLora


def check_loras(loras: Sequence[WeightedLora], manifest: Manifest) -> None:
    """Raise InvalidRequest if requests of this model can have no LoRAs, or not so many ranks of them."""
    ranks = sum(weighted.lora.ranks for weighted in loras)
    if loras and manifest.lora is None:
        raise _rejected(
            f"{manifest.name} was built without LoRAs: leave them out, or have the model built with --lora-slots."
        )
    if manifest.lora and ranks > manifest.lora.ranks_per_row:
        raise _rejected(
            f"These LoRAs have {ranks} ranks together, this model's engines take {manifest.lora.ranks_per_row}: "
            "ask for fewer LoRAs, or for some of lower rank."
        )


def _rejected(message: str) -> InvalidRequest:
    return InvalidRequest(message, fields=(FieldError("loras", message),))
