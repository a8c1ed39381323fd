"""Which LoRAs a request has: those that its prompt names in tags, and those of its field `loras`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from engines.manifest import Manifest
from server.requests.errors import FieldError, InvalidRequest
from server.requests.lora_tags import MAX_LORA_WEIGHT, tags_in
from server.requests.params import Lora, WeightedLora
from server.requests.schemas import MAX_LORAS, GenerateRequest, LoraDescription


class KnownLora(NamedTuple):
    """A LoRA that can be loaded."""

    name: str  # the one that answers have; requests may have others
    ranks: int


class Loras(Protocol):
    """The LoRAs of a server, as one model applies them. For any thread; its methods may read files."""

    def find(self, name: str) -> KnownLora:
        """Raises UnusableLora, LoraUnreadable."""

    def load(self, name: str) -> Lora:
        """Raises UnusableLora, LoraUnreadable."""

    def describe(self) -> list[LoraDescription]:
        """All of the folder, as it is now. Raises LoraUnreadable."""


class UnusableLora(ValueError):
    """There is no LoRA of this name, or it cannot be used; the message says why, in a sentence."""


class Chosen(NamedTuple):
    """A LoRA by a name that a request has for it, and the field where that stands."""

    name: str
    weight: float
    field: str


def names_loras(body: GenerateRequest) -> bool:
    """Whether the request may have LoRAs, whose files may have to be read for it."""
    return bool(body.loras) or (body.prompt_syntax == "a1111" and "<" in body.prompt)


def choose(body: GenerateRequest, loras: Loras | None, manifest: Manifest) -> tuple[WeightedLora, ...]:
    """The LoRAs of a request, each once, without those whose weight is 0.

    Weights of one LoRA add up. Those of the field `loras` replace those of tags, so that an answer's parameters, which
    have the prompt as it was sent and all its LoRAs, are the same request.

    Raises:
        InvalidRequest: there is no such LoRA, it cannot be used, or they are too many.
        LoraUnreadable: a file cannot be read now.
    """
    tags = tags_in(body.prompt) if loras and body.prompt_syntax == "a1111" else []
    tagged = [Chosen(tag.name, tag.weight, "prompt") for tag in tags]
    listed = [Chosen(choice.name, choice.weight, "loras") for choice in body.loras]
    if not tagged and not listed:
        return ()
    field = "loras" if listed else "prompt"
    if loras is None:
        raise _refused(field, "This server has no LoRAs to choose from: start it with --loras DIR.")
    if manifest.lora is None:
        raise _refused(field, "This model was built without --lora-slots: build it with them to use LoRAs.")
    ranks: dict[str, int] = {}
    weights = {**_weights(tagged, loras, ranks), **_weights(listed, loras, ranks)}
    wanted = {name: weight for name, weight in weights.items() if weight}
    _check_fits(wanted, ranks, manifest.lora.ranks_per_row, field)
    chosen = tuple(WeightedLora(_load(loras, name, field), weight) for name, weight in wanted.items())
    loaded = {name: weighted.lora.ranks for name, weighted in zip(wanted, chosen, strict=True)}
    _check_fits(wanted, loaded, manifest.lora.ranks_per_row, field)  # again: a file may have been replaced meanwhile
    return chosen


def _weights(chosen: Sequence[Chosen], loras: Loras, ranks: dict[str, int]) -> Mapping[str, float]:
    """The weight of each LoRA by its own name. Its ranks are added to `ranks`."""
    weights = defaultdict[str, float](float)
    for name, weight, field in chosen:
        try:
            known = loras.find(name)
        except UnusableLora as error:
            raise _refused(field, str(error)) from error
        weights[known.name] += weight
        ranks[known.name] = known.ranks
        if abs(weights[known.name]) > MAX_LORA_WEIGHT:
            raise _refused(field, f"The weights of {known.name} add up to more than {MAX_LORA_WEIGHT:g}: lower them.")
    return weights


def _check_fits(names: Iterable[str], ranks: Mapping[str, int], most: int, field: str) -> None:
    wanted = {name: ranks[name] for name in names}
    if len(wanted) > MAX_LORAS:
        raise _refused(field, f"{len(wanted)} LoRAs: ask for at most {MAX_LORAS}.")
    if sum(wanted.values()) > most:
        listed = ", ".join(f"{name} has rank {rank}" for name, rank in wanted.items())
        raise _refused(field, f"{listed}: this model takes ranks of {most} in all: ask for fewer or smaller LoRAs.")


def _load(loras: Loras, name: str, field: str) -> Lora:
    try:
        return loras.load(name)
    except UnusableLora as error:
        raise _refused(field, str(error)) from error


def _refused(field: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, fields=(FieldError(field, message),))
