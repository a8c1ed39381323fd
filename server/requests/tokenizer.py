"""Tokenizes prompts into chunks of weighted token ids, with the bundle's CLIP tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import tokenizers

from engines.contract import MAX_CHUNKS
from engines.errors import EngineError
from server.requests.lora_tags import without_tags
from server.requests.prompts import WeightedSpan, excerpt, parse, unsupported

Syntax = Literal["a1111", "plain"]

# Prompts of different lengths share a step if the shorter can be repeated a whole number of times.
CHUNK_COUNTS = tuple(count for count in range(1, MAX_CHUNKS + 1) if MAX_CHUNKS % count == 0)

_COMMA = ",</w>"
_COMMA_REACH = 20  # tokens: a full chunk is cut after a comma at most this far from its end, as in AUTOMATIC1111
_BREAK = " BREAK "  # separates parts in quoted text
_CACHE_SIZE = 256  # cached prompts, of up to 20 kB each; most requests share their negative prompt
_NONE: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Chunk:
    """The input of one text encoder call: [tokens] ids and weights; begin, end and padding have weight 1.

    Where all weights are 0, the embeddings are zeros.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    ids_2: tuple[int, ...] = ()  # of a second text encoder: the same with its padding

    def __hash__(self) -> int:
        """Hash the ids only, in less than half the time: few chunks differ in weights alone."""
        return hash(self.ids)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenized prompt."""

    text: str  # as it was sent, with its tags
    chunks: tuple[Chunk, ...]  # one of CHUNK_COUNTS in number
    warnings: tuple[str, ...] = ()  # sentences: truncation, and unsupported syntax that was treated as text
    syntax: Syntax = "a1111"  # the syntax it was parsed with


class _Piece(NamedTuple):
    """An indivisible unit: a token, or all vectors of an embedding."""

    ids: tuple[int, ...]
    weight: float
    at: int  # offset in the text


class PromptTokenizer:
    """Tokenizes prompts of up to MAX_CHUNKS chunks. A prompt of one chunk has the same ids as in diffusers."""

    def __init__(
        self,
        file: Path,
        *,
        tokens: int,
        pad: int,
        pad_2: int | None = None,
        embeddings: Mapping[str, int] = _NONE,
        content: bytes | None = None,
    ) -> None:
        """Load the tokenizer.

        Args:
            file: tokenizer.json of the bundle.
            tokens: ids per chunk, including begin and end.
            pad: id of the padding token.
            pad_2: the same of a second text encoder; None: there is none.
            embeddings: number of vectors of each textual inversion; those after the first of "<cat>" are the tokens
                "<cat>_1", "<cat>_2", …
            content: of the file, if it has been read.

        Raises:
            EngineError: the file is no tokenizer that begins and ends a prompt, or has no token `pad`; an embedding is
                missing from the tokenizer, or longer than a chunk.
        """
        self._tokenizer = _load(file, file.read_bytes() if content is None else content)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._begin, self._end = _ends(self._tokenizer, file)
        self._pad, self._pad_2 = pad, pad_2
        for token in (pad, pad_2):
            if token is not None and self._tokenizer.id_to_token(token) is None:
                raise EngineError(
                    f"{file} has no token {token}, with which prompts are padded: build the bundle again."
                )
        self._capacity = tokens - 2
        self._comma = (self._tokenizer.token_to_id(_COMMA),)
        self._comma_reach = min(_COMMA_REACH, self._capacity // 3)  # at most a third of a small chunk
        self._vectors = {ids[0]: ids for ids in (self._vectors_of(*item) for item in embeddings.items())}
        self._cached = lru_cache(_CACHE_SIZE)(self._tokenize_prompt)

    def __call__(
        self, text: str, *, syntax: Syntax = "a1111", names_loras: bool = False, zeros_if_empty: bool = False
    ) -> Prompt:
        """Tokenize `text`, parsed as AUTOMATIC1111 syntax, or with syntax "plain" as literal text.

        Where it `names_loras`, their tags are taken out of that syntax first; otherwise they are text. With
        `zeros_if_empty` the embeddings of a text of nothing but space are zeros.
        """
        return (
            self._zeros(text, syntax)
            if zeros_if_empty and not text.strip()
            else self._cached(text, syntax, names_loras)
        )

    def _zeros(self, text: str, syntax: Syntax) -> Prompt:
        chunk = self._chunk(())
        return Prompt(text, (replace(chunk, weights=(0.0,) * len(chunk.ids)),), syntax=syntax)

    def _tokenize_prompt(self, text: str, syntax: Syntax, names_loras: bool) -> Prompt:
        encoded = without_tags(text) if syntax == "a1111" and names_loras else text
        parts = parse(encoded) if syntax == "a1111" else [[WeightedSpan(text, 1.0)]]
        warnings = unsupported(encoded) if syntax == "a1111" else ()
        contents = [content for pieces in self._tokenize(parts) for content in self._split(pieces)]
        if len(contents) > 1 and not contents[-1]:
            contents.pop()  # a trailing BREAK starts no chunk; other BREAKs may leave one empty
        if dropped := [piece for content in contents[MAX_CHUNKS:] for piece in content]:
            warnings = (*warnings, self._truncation_warning(dropped, parts))
        kept = contents[:MAX_CHUNKS]
        count = next(count for count in CHUNK_COUNTS if count >= len(kept))
        kept += [[] for _ in range(count - len(kept))]
        return Prompt(text, tuple(self._chunk(content) for content in kept), warnings, syntax)

    def _vectors_of(self, token: str, vectors: int) -> tuple[int, ...]:
        if vectors > self._capacity:
            raise EngineError(
                f"The embedding {token} has {vectors} vectors, but a chunk holds {self._capacity}: rebuild without it."
            )
        names = [token, *(f"{token}_{vector}" for vector in range(1, vectors))]
        ids = tuple(index for name in names if (index := self._tokenizer.token_to_id(name)) is not None)
        if len(ids) < vectors:
            raise EngineError(f"The tokenizer has {len(ids)} of the {vectors} vectors of {token}: rebuild the bundle.")
        return ids

    def _tokenize(self, parts: Iterable[Iterable[WeightedSpan]]) -> Iterator[list[_Piece]]:
        """The pieces of each part. Spans are tokenized separately, so that no token crosses a change of weight."""
        at = 0
        for spans in parts:
            pieces = []
            for span in spans:
                encoding = self._tokenizer.encode(span.text, add_special_tokens=False)
                for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True):
                    pieces.append(_Piece(self._vectors.get(token, (token,)), span.weight, at + start))
                at += len(span.text)
            yield pieces
            at += len(_BREAK)

    def _split(self, pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
        """Split pieces into chunks. When a full chunk is cut after a comma, the rest moves to the next chunk."""
        content: list[_Piece] = []
        size = 0
        for piece in pieces:
            while size + len(piece.ids) > self._capacity:
                full = size == self._capacity and piece.ids != self._comma
                end = self._last_comma(content) if full else len(content)
                yield content[:end]
                content = content[end:]
                size = _size(content)
            content.append(piece)
            size += len(piece.ids)
        yield content

    def _last_comma(self, content: Sequence[_Piece]) -> int:
        """The number of pieces up to the last comma, or all if no comma is near the end."""
        after = 0  # tokens
        for end in range(len(content), 0, -1):
            if after >= self._comma_reach:
                break
            if content[end - 1].ids == self._comma:
                return end
            after += len(content[end - 1].ids)
        return len(content)

    def _chunk(self, content: Sequence[_Piece]) -> Chunk:
        ids = [token for piece in content for token in piece.ids]
        weights = [piece.weight for piece in content for _ in piece.ids]
        padding = self._capacity - len(ids)
        padded = (self._begin, *ids, self._end)
        return Chunk(
            ids=(*padded, *[self._pad] * padding),
            weights=(1.0, *weights, 1.0, *[1.0] * padding),
            ids_2=() if self._pad_2 is None else (*padded, *[self._pad_2] * padding),
        )

    def _truncation_warning(self, dropped: Sequence[_Piece], parts: Iterable[Iterable[WeightedSpan]]) -> str:
        text = _BREAK.join("".join(span.text for span in spans) for spans in parts)
        beginning = excerpt(text[dropped[0].at :])
        return (
            f'The prompt was truncated before "{beginning}": its last {_size(dropped)} tokens do not fit in '
            f"{MAX_CHUNKS} chunks of {self._capacity} tokens."
        )


def _load(file: Path, content: bytes) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the package raises no narrower class
        raise EngineError(f"{file} is no tokenizer.json ({error}): build the bundle again.") from error


def _ends(tokenizer: tokenizers.Tokenizer, file: Path) -> tuple[int, int]:
    """The tokens that begin and end each prompt."""
    ids = tokenizer.encode("").ids
    if len(ids) != 2:
        raise EngineError(f"{file} adds {len(ids)} tokens to a prompt, not a begin and an end: build the bundle again.")
    return ids[0], ids[1]


def _size(content: Iterable[_Piece]) -> int:
    """The number of tokens."""
    return sum(len(piece.ids) for piece in content)
