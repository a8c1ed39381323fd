"""The LoRAs of the folder, as one model applies them."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from pathlib import Path

from engines.errors import CheckpointError
from engines.lora.pack import LoraInfo, inspect_lora, pack_lora
from engines.manifest import Manifest
from server.loras.catalogue import Catalogue, CataloguedFile
from server.loras.packed import PackedLoras
from server.requests.errors import LoraUnreadable
from server.requests.loras import KnownLora, UnusableLora
from server.requests.params import Lora
from server.requests.schemas import LoraDescription


class ModelLoras:
    """Finds, checks and packs LoRAs for a model. For any thread; headers and packed LoRAs are read once."""

    def __init__(self, catalogue: Catalogue, packed: PackedLoras, manifest: Manifest) -> None:
        self._catalogue = catalogue
        self._packed = packed
        self._manifest = manifest
        self._layout = hashlib.sha256(
            repr(manifest.lora_layers).encode()
        ).hexdigest()  # models that share it share LoRAs
        self._inspected: dict[Path, tuple[Hashable, LoraInfo]] = {}
        self._hashes: dict[Path, tuple[Hashable, str]] = {}

    def find(self, name: str) -> KnownLora:
        """Raises UnusableLora, LoraUnreadable."""
        file = self._catalogue.find(name)
        info = self._inspect(file)
        if info.refusal:
            raise UnusableLora(info.refusal)
        return KnownLora(file.name, info.rank)

    def load(self, name: str) -> Lora:
        """Raises UnusableLora, LoraUnreadable."""
        file = self._catalogue.find(name)
        lora = self._packed.get((self._layout, file.path, file.stamp), lambda: self._pack(file))
        self._hashes[file.path] = file.stamp, lora.sha256
        return lora

    def describe(self) -> list[LoraDescription]:
        """All of the folder, as it is now. Raises LoraUnreadable."""
        files = self._catalogue.files()
        paths = {file.path for file in files}
        for known in (self._inspected, self._hashes):
            for path in [path for path in list(known) if path not in paths]:  # a copy: other threads add to it
                known.pop(path, None)
        return [self._describe(file, self._inspect(file)) for file in files]

    def _inspect(self, file: CataloguedFile) -> LoraInfo:
        stamp, info = self._inspected.get(file.path, (None, None))
        if info is None or stamp != file.stamp:
            info = inspect_lora(file.path, self._manifest)
            self._inspected[file.path] = file.stamp, info
        return info

    def _pack(self, file: CataloguedFile) -> Lora:
        path = file.path
        try:
            packed = pack_lora(path, self._manifest)
        except CheckpointError as error:
            message = str(error).replace(str(path), path.name)
            if isinstance(error.__cause__, OSError):
                raise LoraUnreadable(f"{message}: try again.") from error
            raise UnusableLora(message) from error
        return Lora(
            file.name,
            packed.sha256,
            packed.values,
            updates_unet="unet" in packed.parts,
            updates_text_encoder=not packed.parts.isdisjoint(("text_encoder", "text_encoder_2")),
            tensors_sha256=packed.tensors_sha256,
        )

    def _describe(self, file: CataloguedFile, info: LoraInfo) -> LoraDescription:
        reason = file.problem or info.refusal
        stamp, sha256 = self._hashes.get(file.path, (None, None))
        return LoraDescription(
            name=file.name,
            usable=not reason,
            reason=reason or None,
            warning=info.warning or None,
            rank=info.rank or None,
            parts=sorted(info.parts),
            size=file.stamp.size,
            sha256=sha256 if stamp == file.stamp else None,
            title=info.hints.title or None,
            base_model=info.hints.base_model or None,
            trigger_words=info.hints.trigger_words or None,
            tags=list(info.hints.tags),
        )
