"""LoRA files as the device's pool holds them: updates of rank one, every scale of the file included. Without torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from engines.errors import CheckpointError
from engines.lora.file import LoraHeader, read_lora, read_lora_header
from engines.lora.hints import NO_HINTS, Hints, printable, read_hints
from engines.lora.layout import width_of
from engines.lora.names import Form, Target
from engines.lora.refusals import check_is_lora, check_kind
from engines.lora.updates import Outline, Shape, Update, outline, updates
from engines.manifest import LoraCapacity, LoraLayer, LoraPart, Manifest

_FP16_ENDS: Final = 65504.0


@dataclass(frozen=True, slots=True)
class LoraInfo:
    """What a LoRA file is, as its header says."""

    file: str  # its name, without the folder
    refusal: str = ""  # why requests cannot use it; empty: they can, as far as the header shows
    form: Form | None = None  # whose names its tensors have; None: not known
    rank: int = 0  # the largest of a layer: how many rows of the pool it takes
    parts: frozenset[LoraPart] = frozenset()  # that it updates
    tokens: tuple[str, ...] = ()  # that were trained with it, and that the model's prompts do not know
    hints: Hints = NO_HINTS

    @property
    def warning(self) -> str:
        """What does not work of a LoRA that can be used; empty: nothing."""
        if not self.tokens:
            return ""
        return (
            f"{self.file} was trained with the tokens {' '.join(self.tokens)}, which prompts do not have: build the "
            f"model with --embedding {self.file} to use them."
        )


@dataclass(frozen=True, slots=True, eq=False)
class PackedLora:
    """A LoRA as the device's pool holds it."""

    sha256: str  # of the file, and of PEFT's config beside it where that decides
    tensors_sha256: str  # of the file without its header: what AUTOMATIC1111's web UI and Civitai know it by
    values: NDArray[np.float16]  # [ranks, G], by `Manifest.lora_layers`; layers of lower rank end in zeros
    info: LoraInfo

    @property
    def parts(self) -> frozenset[LoraPart]:
        """Those that it updates."""
        return self.info.parts


def inspect_lora(path: Path, manifest: Manifest) -> LoraInfo:
    """Read the header of a file, in some milliseconds. What is wrong with it is the `refusal`."""
    header = None
    try:
        header = read_lora_header(path)
        return _info(header, _checked_outline(header, manifest), manifest)
    except CheckpointError as error:
        refusal = printable(str(error).replace(str(path), path.name), 1000)
        return LoraInfo(path.name, refusal, hints=read_hints(header.metadata) if header else NO_HINTS)


def pack_lora(path: Path, manifest: Manifest) -> PackedLora:
    """Read a file for the pool of a model.

    Raises:
        CheckpointError: it cannot be read or used with this model. The message names the layer where one is to blame.
    """
    file = read_lora(path)
    found = _checked_outline(file.header, manifest)
    places = {Target(layer.part, layer.name): layer for layer in manifest.lora_layers}
    values = np.zeros((found.rank, width_of(manifest.lora_layers)), np.float16)
    filled = Counter[Target]()
    for update in updates(file, found):
        start = filled[update.target]
        filled[update.target] += len(update.down)
        _fill(values[start : filled[update.target]], places[update.target], update, path.name)
    return PackedLora(file.sha256, file.tensors_sha256, values, _info(file.header, found, manifest))


def _fill(ranks: NDArray[np.float16], place: LoraLayer, update: Update, file: str) -> None:
    """Write the factors to the ranks of a layer: [r, G]."""
    up, down = update.up.T, update.down.reshape(len(update.down), -1)  # [r, out], [r, in]
    up_size, down_size = _largest(up), _largest(down)
    size = np.sqrt(abs(update.scale) * up_size * down_size)  # of both then: FP16 holds them best where they are equal
    if (size > _FP16_ENDS).any():
        raise CheckpointError(f"{file} updates the layer {place.name} by more than FP16 holds: it is damaged.")
    ranks[:, place.up : place.up + place.outputs] = up * (np.sign(update.scale) * size / up_size)
    ranks[:, place.down : place.down + place.inputs] = down * (size / down_size)


def _largest(factor: NDArray[np.float32]) -> NDArray[np.float64]:
    """The largest magnitude of each rank; 1 where there are only zeros. [r, n] -> [r, 1]."""
    largest = np.abs(factor).max(axis=1, keepdims=True).astype(np.float64)
    return np.where(largest == 0, 1, largest)


def _checked_outline(header: LoraHeader, manifest: Manifest) -> Outline:
    """What the file updates of the model. Raises CheckpointError where requests cannot use it."""
    if manifest.lora is None:
        raise CheckpointError(
            f"{manifest.name} was built without LoRAs of requests: build it again with --lora-slots, or fuse "
            f"{header.name} into it (--lora)."
        )
    check_is_lora(header)
    two = any(layer.part == "text_encoder_2" for layer in manifest.lora_layers)
    check_kind(header, model=manifest.name, width=manifest.context.width, has_two_encoders=two)
    found = outline(header, _layers(manifest), refused=[Target("unet", name) for name in manifest.lora_refused])
    _check_rank(found, manifest.lora)
    return found


def _layers(manifest: Manifest) -> Mapping[Target, Shape]:
    return {Target(layer.part, layer.name): Shape(layer.outputs, layer.inputs) for layer in manifest.lora_layers}


def _check_rank(found: Outline, capacity: LoraCapacity) -> None:
    target, rank = found.ranks.most_common(1)[0]
    if rank > capacity.rank:
        raise CheckpointError(
            f"{found.header.name} has rank {rank} in the layer {target.name}, and this model takes LoRAs of rank "
            f"{capacity.rank} at most: resize it with the tool that it was trained with, or build the model with "
            f"--lora-rank {rank}."
        )
    for source in found.sources:
        if "mid" in source.keys:
            raise CheckpointError(
                f"{found.header.name} has three factors in the layer {target.name}, which LoRAs of requests cannot "
                "have: fuse it into the model (build_engines.py --lora)."
            )


def _info(header: LoraHeader, found: Outline, manifest: Manifest) -> LoraInfo:
    unknown = sorted(header.learned - manifest.tokenizer.embeddings.keys())
    return LoraInfo(
        header.name,
        form=found.form,
        rank=found.rank,
        parts=found.parts,
        tokens=tuple(filter(None, map(printable, unknown))),
        hints=read_hints(header.metadata),
    )
