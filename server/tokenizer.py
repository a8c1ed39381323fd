"""Prompts to token ids: CLIP's byte-level BPE through `tokenizers`, from the bundle's own file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tokenizers


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text as the model reads it."""

    text: str
    ids: tuple[int, ...]  # exactly as many as the context has tokens
    truncated: bool  # the text had more tokens than that


class Tokenizer:
    """Pads and truncates every prompt to the context's length, as diffusers' pipelines do."""

    def __init__(self, file: Path, *, tokens: int, pad: int) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        self._tokenizer.enable_truncation(tokens)
        self._tokenizer.enable_padding(length=tokens, pad_id=pad)

    def __call__(self, text: str) -> Prompt:
        encoding = self._tokenizer.encode(text)
        return Prompt(text=text, ids=tuple(encoding.ids), truncated=bool(encoding.overflowing))
