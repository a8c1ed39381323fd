"""Textual inversion: files of learned token embeddings, and whether they fit a model. Reads no weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from engines.checkpoints.diffusers_folder import CheckpointConfig
from engines.errors import CheckpointError
from engines.lora.early import LEARNED
from engines.manifest import Context
from engines.safetensors_header import TensorShapes, read_header

_PICKLED = (".ckpt", ".pt", ".pth", ".bin")
_UNNAMED = ("emb_params", "string_to_param.*")  # AUTOMATIC1111's tensor names, which do not say the token
_IN_FOLDER = "learned_embeds.safetensors"  # as diffusers writes it
_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "Stable Diffusion XL"}


@dataclass(frozen=True)
class LearnedToken:
    """A token with one or more embedding vectors learned by textual inversion."""

    token: str
    key: str  # of its tensor
    vectors: int
    width: int

    @property
    def tokens(self) -> tuple[str, ...]:
        """One token per vector, named as diffusers names them."""
        return (self.token, *(f"{self.token}_{number}" for number in range(1, self.vectors)))

    @property
    def reserved(self) -> tuple[str, ...]:
        """Names that no other token may have: its own, and the one that would be taken for a further vector."""
        return (*self.tokens, f"{self.token}_{self.vectors}")


@dataclass(frozen=True)
class Embedding:
    """A file of textual inversion, Gal et al. (2022), and the name to give its token."""

    path: Path
    token: str | None = None  # None: as in the file, or else the file's name

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read FILE or FILE:TOKEN, such as `cat.safetensors:<cat-toy>`. Raises CheckpointError."""
        if found := re.fullmatch(r"(.+?\.safetensors)(?::(.+))?", text, re.IGNORECASE | re.DOTALL):
            return cls(Path(found[1]), found[2])
        if re.search(rf"({'|'.join(map(re.escape, _PICKLED))})(:|$)", text, re.IGNORECASE):
            raise CheckpointError(
                f"{text!r} is a pickle, and loading one can run code. Convert it where you trust it: read it with "
                "torch.load, and write its vectors with "
                "safetensors.torch.save_file({token: vectors}, FILE.safetensors). In AUTOMATIC1111's files the vectors "
                'are under ["string_to_param"]["*"].'
            )
        if (Path(text) / _IN_FOLDER).is_file():
            return cls(Path(text) / _IN_FOLDER)
        if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text) and not Path(text).exists():
            raise CheckpointError(
                f"There is no folder {text!r}. If it is a hub id, download {_IN_FOLDER} from it, and pass that file."
            )
        raise CheckpointError(f"{text!r} is not an embedding file: write FILE.safetensors or FILE.safetensors:TOKEN.")

    @cached_property
    def learned_tokens(self) -> tuple[LearnedToken, ...]:
        """The tokens in the file, by its header. Raises CheckpointError."""
        shapes, metadata = read_header(self.path)
        trained = {key: shape for key, shape in shapes.items() if metadata.get(key) == LEARNED}
        shapes = trained or shapes
        self._check_names(shapes)
        names = {key: self.path.stem if key in _UNNAMED else key for key in shapes}
        return tuple(self._learned_token(self.token or names[key], key, shape) for key, shape in shapes.items())

    def _check_names(self, shapes: TensorShapes) -> None:
        """Raise CheckpointError unless the tensors are named for tokens. Whether they fit the model comes later."""
        name = self.path.name
        if {"clip_l", "clip_g"} & shapes.keys():
            raise CheckpointError(
                f"{name} is an embedding for Stable Diffusion XL, with vectors for two text encoders (clip_l, clip_g). "
                "Supported: embeddings for Stable Diffusion 1.x and 2.x."
            )
        if not shapes or any(re.search(r"\.(weight|bias|alpha)$", key) for key in shapes):
            raise CheckpointError(
                f"{name} is not a textual inversion embedding: none of its tensors is named for a token."
            )
        if self.token and len(shapes) > 1:
            raise CheckpointError(
                f"{name} holds {len(shapes)} tokens that have names of their own ({', '.join(shapes)}): "
                f"leave out {self.token!r}, or write each to its own file."
            )

    def _learned_token(self, token: str, key: str, shape: tuple[int, ...]) -> LearnedToken:
        """Return the token of a tensor [D] or [n, D]. Raises CheckpointError for other shapes."""
        name = self.path.name
        if len(shape) not in {1, 2} or 0 in shape:
            raise CheckpointError(
                f"{name} is not a textual inversion embedding: {key} has the shape {list(shape)}, not [D] or [n, D]."
            )
        if not re.fullmatch(r"\S+", token):
            raise CheckpointError(
                f"{token!r} is not a token, which must be one word without spaces: name one with {name}:TOKEN."
            )
        return LearnedToken(token=token, key=key, vectors=shape[0] if len(shape) == 2 else 1, width=shape[-1])


def check_tokens_distinct(embeddings: Sequence[Embedding]) -> None:
    """Raise CheckpointError if two tokens differ in case alone, or not at all: prompts are read in lower case."""
    files: dict[str, str] = {}
    for embedding in embeddings:
        name = embedding.path.name
        for learned in embedding.learned_tokens:
            for token in dict.fromkeys(token.lower() for token in learned.reserved):
                if token in files:
                    raise CheckpointError(
                        f"{files[token]} and {name} have tokens that prompts cannot tell apart ({token}): "
                        f"name another with {name}:TOKEN."
                    )
                files[token] = name


def check_embedding_fits(embedding: Embedding, config: CheckpointConfig) -> None:
    """Raise CheckpointError for a token that this model's tokenizer or text encoder cannot take."""
    name, vocabulary = embedding.path.name, config.vocabulary
    for learned in embedding.learned_tokens:
        _check_size(learned, config.context, name, config.name)
        if taken := next((token for token in learned.reserved if token in vocabulary), None):
            raise CheckpointError(
                f"{taken} of {name} is already a token of {config.name}: choose another name with {name}:TOKEN."
            )


def _check_size(learned: LearnedToken, context: Context, name: str, model: str) -> None:
    if learned.width != context.width:
        made = f"made for {_WIDTHS[learned.width]}, " if learned.width in _WIDTHS else ""
        raise CheckpointError(
            f"{name} does not fit {model}: {made}{learned.width} wide, while this model's text encoder is "
            f"{context.width} wide."
        )
    if learned.vectors > (most := context.tokens - 2):  # besides the start and end tokens
        raise CheckpointError(
            f"{name} has {learned.vectors} vectors for {learned.token}, and a prompt holds at most {most} tokens."
        )
