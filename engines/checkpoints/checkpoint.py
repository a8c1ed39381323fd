"""A checkpoint to build from: where it is, what is added to it, and its identity. Reads no weights."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from engines.checkpoints.adapters.embedding import Embedding, LearnedToken
from engines.checkpoints.adapters.lora import Lora
from engines.checkpoints.decoder import Decoder, decoder_layer
from engines.checkpoints.diffusers_folder import SAFETY_CHECKER, SAFETY_CONFIGS, CheckpointConfig
from engines.checkpoints.prediction import read_prediction
from engines.checkpoints.vae import Vae, vae_name
from engines.contract import ALL_GRAPHS, GRAPHS, STEPS, VAE_GRAPHS, GraphName
from engines.files import sha256_of
from engines.manifest import Source
from engines.safetensors_header import read_header

# The graph that a weight goes into, by its name in a single file, or by that of its part and its name in a folder.
_GRAPHS: Mapping[str, GraphName] = {
    r"(text_encoder(_2)?|cond_stage_model|conditioner)\.": "encode_prompt",
    r"(unet|model\.diffusion_model)\.": "denoise",
    r"(vae|first_stage_model)\.(decoder|post_quant_conv)\.": "decode",
    r"(vae|first_stage_model)\.(encoder|quant_conv)\.": "encode_image",
    r"safety_checker\.": "safety",
}
LARGE_PART = 2**28  # weights; of a part with as many they stay in its file while it is exported
_SAFETY_CLASS = "StableDiffusionSafetyChecker"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found, with the LoRAs, embeddings and decoder to build it with."""

    name: str
    path: Path  # a diffusers folder, or a single file
    config_folder: Path | None = None  # the diffusers folder whose configs describe a single file; None for a folder
    allow_pickle: bool = False
    loras: tuple[Lora, ...] = ()
    embeddings: tuple[Embedding, ...] = ()
    decoder: Decoder | None = None  # a distilled one, beside the VAE
    vae: Vae | None = None  # None: the checkpoint's own
    variant: str | None = None  # of the weights in a folder, such as fp16
    with_safety_checker: bool = True  # where the checkpoint has one

    @property
    def single_file(self) -> bool:
        return self.config_folder is not None

    @cached_property
    def config(self) -> CheckpointConfig:
        """The configs. Their folder holds the weights too, unless those are in a single file."""
        return CheckpointConfig(folder=self.config_folder or self.path, name=self.name, variant=self.variant)

    @cached_property
    def source(self) -> Source:
        """The identity: one hash over every file that decides the export, LoRA scales and embedding tokens."""
        digest = hashlib.sha256()
        for line in self._hashed():
            digest.update(f"{line}\n".encode())
        return Source(
            name=self.name,
            sha256=digest.hexdigest(),
            file_sha256=self._file_sha256,
            loras=tuple(map(str, self.loras)),
            embeddings=tuple(f"{path.name}:{token}" for path, token in self._tokens()),
            decoder=self.decoder.name if self.decoder else None,
        )

    @property
    def learned_tokens(self) -> tuple[LearnedToken, ...]:
        """The tokens of all embeddings, in the order in which they are added to the tokenizer."""
        return tuple(learned for embedding in self.embeddings for learned in embedding.learned_tokens)

    @property
    def weights(self) -> tuple[Path, ...]:
        """Every file that holds weights."""
        if self.single_file:
            return (self.path,)
        parts = (*self.config.parts, SAFETY_CHECKER) if self.has_safety_checker else self.config.parts
        return tuple(path for part in parts for path in self.config.weights(part))

    @property
    def graphs(self) -> tuple[GraphName, ...]:
        """The graphs that it is exported to."""
        exists = {"decode_fast": self.decoder is not None, "safety": self.has_safety_checker}
        return (*GRAPHS, *(name for name in ALL_GRAPHS if exists.get(name)))

    @property
    def exceeding_fp16(self) -> frozenset[GraphName]:
        """The graphs that leave the range of FP16, as far as configs tell. Others are measured at the export."""
        unet = STEPS if self.config.prefers_bf16 else ()
        told = self.vae.force_upcast if self.vae else None
        if not self.config.family.follows_force_upcast or not (self.config.vae.force_upcast if told is None else told):
            return frozenset(unet)
        return frozenset((*unet, *VAE_GRAPHS))

    @property
    def wants_safety_checker(self) -> bool:
        """Whether its pipeline has a safety checker, and that is to be built."""
        return self.with_safety_checker and self.config.index.class_of(SAFETY_CHECKER) is not None

    @property
    def has_safety_checker(self) -> bool:
        """Whether a safety checker is built; on the hub known once its files are downloaded."""
        return self.wants_safety_checker and self._lacks_of_safety_checker is None

    @property
    def not_followed(self) -> tuple[str, ...]:
        """What the configs ask for and latentd does not do: a sentence for each."""
        asked = self.config.not_followed
        if not self.wants_safety_checker or self.has_safety_checker:
            return asked
        reason = (
            f"model_index.json asks for a safety checker, and images are not checked: {self._lacks_of_safety_checker}."
        )
        return (*asked, reason)

    @property
    def _lacks_of_safety_checker(self) -> str | None:
        """Why the safety checker of its pipeline cannot be built; None where it can."""
        config, kind = self.config, self.config.index.class_of(SAFETY_CHECKER)
        if kind != _SAFETY_CLASS:
            return f"a {kind} is not supported"
        if self.single_file:
            return "a single file holds none; build from a diffusers folder, or have the server check them (--safety)"
        if not all((config.folder / name).is_file() for name in SAFETY_CONFIGS) or not config.weights(SAFETY_CHECKER):
            return f"{SAFETY_CHECKER}/ or feature_extractor/ of {config.name} lacks files; download it again"
        if config.pickled(SAFETY_CHECKER) and not self.allow_pickle:
            return "its weights are pickled, which can run code; --allow-pickle reads them as plain tensors"
        return None

    @cached_property
    def _file_sha256(self) -> str | None:
        """The hash of a single file, by which the web UI and Civitai know it; None for a folder."""
        return sha256_of(self.path) if self.single_file else None

    def _hashed(self) -> Iterator[str]:
        safety = [self.config.folder / name for name in SAFETY_CONFIGS] if self.has_safety_checker else []
        for path in (*self.weights, *self.config.files(), *safety):
            inside = path.is_relative_to(self.config.folder)
            label = path.relative_to(self.config.folder).as_posix() if inside else "file"
            yield f"{label} {(path == self.path and self._file_sha256) or sha256_of(path)}"
        for lora in self.loras:
            yield f"lora {lora.scale!r} {' '.join(map(sha256_of, lora.files))}"
        for path, token in self._tokens():
            yield f"embedding {token!r} {sha256_of(path)}"
        if self.decoder:
            for path in self.decoder.files:
                yield f"decoder {path.name} {sha256_of(path)}"
        if self.vae:
            for path in self.vae.files:
                yield f"vae {path.name} {sha256_of(path)}"
        if self.single_file and (prediction := read_prediction(self.path)):
            yield f"prediction {prediction.kind} {prediction.zero_terminal_snr}"

    def _tokens(self) -> list[tuple[Path, str]]:
        return [
            (embedding.path, learned.token) for embedding in self.embeddings for learned in embedding.learned_tokens
        ]


def count_parameters(checkpoint: Checkpoint) -> dict[GraphName, int]:
    """Return the number of weights of each graph, read from the files' headers; empty where they are pickled."""
    counts: dict[GraphName, int] = {}
    for path in checkpoint.weights:
        if path.suffix == ".safetensors":
            for key, shape in read_header(path)[0].items():
                name = _graph_of(key if checkpoint.single_file else f"{path.parent.name}.{key}")
                if name:
                    counts[name] = counts.get(name, 0) + math.prod(shape)
    if counts and checkpoint.vae and checkpoint.vae.weights.suffix == ".safetensors":
        counts |= dict.fromkeys(("decode", "encode_image"), 0)
        for key, shape in read_header(checkpoint.vae.weights)[0].items():
            if name := _graph_of(vae_name(key) or ""):
                counts[name] += math.prod(shape)
    if counts and checkpoint.decoder:
        shapes, _ = read_header(checkpoint.decoder.weights)
        counts["decode_fast"] = sum(math.prod(shape) for key, shape in shapes.items() if decoder_layer(key))
    return counts


def _graph_of(key: str) -> GraphName | None:
    return next((name for sign, name in _GRAPHS.items() if re.match(sign, key)), None)
