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
from engines.safetensors_header import TensorShapes, read_header

_PICKLED = (".ckpt", ".pt", ".pth", ".bin")
_UNNAMED = ("emb_params", "string_to_param.*")  # AUTOMATIC1111's tensor names, which do not say the token
_IN_FOLDER = "learned_embeds.safetensors"  # as diffusers writes it
# Names of the tensors for both text encoders of Stable Diffusion XL: in most files, and in those of pivotal tuning.
_PAIRS = (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"))
_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "Stable Diffusion XL"}


@dataclass(frozen=True)
class LearnedToken:
    """A token with one or more embedding vectors learned by textual inversion."""

    token: str
    keys: tuple[str, ...]  # of its tensors, one for each text encoder
    vectors: int  # in each of them
    widths: tuple[int, ...]

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
        if pair := next((pair for pair in _PAIRS if not shapes.keys().isdisjoint(pair)), None):
            return (self._learned_pair(pair, shapes),)
        self._check_names(shapes)
        names = {key: self.path.stem if key in _UNNAMED else key for key in shapes}
        return tuple(self._learned_token(self.token or names[key], (key,), shapes) for key in shapes)

    def _learned_pair(self, pair: tuple[str, str], shapes: TensorShapes) -> LearnedToken:
        """Return the token of a file for two text encoders. Raises CheckpointError unless it has as much for each."""
        if shapes.keys() != set(pair) or shapes[pair[0]][:-1] != shapes[pair[1]][:-1]:
            held = ", ".join(f"{key} {list(shape)}" for key, shape in sorted(shapes.items()))
            raise CheckpointError(
                f"{self.path.name} should hold {' and '.join(pair)} with as many vectors each, and holds {held}: pass "
                "an embedding for Stable Diffusion XL as it is published."
            )
        return self._learned_token(self.token or self.path.stem, pair, shapes)

    def _check_names(self, shapes: TensorShapes) -> None:
        """Raise CheckpointError unless the tensors are named for tokens. Whether they fit the model comes later."""
        name = self.path.name
        if not shapes or any(re.search(r"\.(weight|bias|alpha)$", key) for key in shapes):
            raise CheckpointError(
                f"{name} is not a textual inversion embedding: none of its tensors is named for a token."
            )
        if self.token and len(shapes) > 1:
            raise CheckpointError(
                f"{name} holds {len(shapes)} tokens that have names of their own ({', '.join(shapes)}): "
                f"leave out {self.token!r}, or write each to its own file."
            )

    def _learned_token(self, token: str, keys: tuple[str, ...], shapes: TensorShapes) -> LearnedToken:
        """Return the token of tensors [D] or [n, D]. Raises CheckpointError for other shapes."""
        name = self.path.name
        for key in keys:
            if len(shape := shapes[key]) not in {1, 2} or 0 in shape:
                raise CheckpointError(
                    f"{name} is not a textual inversion embedding: {key} has the shape {list(shape)}, not [D] or "
                    "[n, D]."
                )
        if not re.fullmatch(r"\S+", token):
            raise CheckpointError(
                f"{token!r} is not a token, which must be one word without spaces: name one with {name}:TOKEN."
            )
        first = shapes[keys[0]]
        return LearnedToken(
            token=token,
            keys=keys,
            vectors=first[0] if len(first) == 2 else 1,
            widths=tuple(shapes[key][-1] for key in keys),
        )


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
    """Raise CheckpointError for a token that this model's tokenizer or text encoders cannot take."""
    name, vocabulary = embedding.path.name, config.vocabulary
    second = config.text_encoder_2
    widths = (config.text_encoder.hidden_size, *((second.hidden_size,) if second else ()))
    for learned in embedding.learned_tokens:
        _check_widths(learned, widths, name, config.name)
        if learned.vectors > (most := config.context.tokens - 2):  # besides the start and end tokens
            raise CheckpointError(
                f"{name} has {learned.vectors} vectors for {learned.token}, and a prompt holds at most {most} tokens."
            )
        if taken := next((token for token in learned.reserved if token in vocabulary), None):
            raise CheckpointError(
                f"{taken} of {name} is already a token of {config.name}: choose another name with {name}:TOKEN."
            )


def _check_widths(learned: LearnedToken, widths: tuple[int, ...], name: str, model: str) -> None:
    made = f"made for {_WIDTHS[learned.widths[0]]}, " if learned.widths[0] in _WIDTHS else ""
    if len(learned.widths) > len(widths):
        raise CheckpointError(
            f"{name} is an embedding for Stable Diffusion XL, with vectors for two text encoders, and {model} has one: "
            "pass an embedding that was made for this kind of model."
        )
    if len(learned.widths) < len(widths):
        raise CheckpointError(
            f"{name} does not fit {model}: {made}it has vectors for one text encoder, and this model has two. Pass an "
            f"embedding for Stable Diffusion XL, with the tensors {' and '.join(_PAIRS[0])}."
        )
    for found, width in zip(learned.widths, widths, strict=True):
        if found != width:
            made = made if len(widths) == 1 else ""
            raise CheckpointError(
                f"{name} does not fit {model}: {made}{found} wide, while this model's text encoder is {width} wide."
            )
