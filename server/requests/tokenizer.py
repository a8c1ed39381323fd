"""Prompts to chunks of weighted token ids: CLIP's byte-level BPE through `tokenizers`, from the bundle's own file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import tokenizers

from engines.contract import MAX_CHUNKS
from engines.errors import EngineError
from server.requests.prompts import Span, excerpt, parse, unsupported

Syntax = Literal["a1111", "plain"]

# Prompts share a step when the shorter can be repeated, whole, up to the longest.
CHUNK_COUNTS = tuple(count for count in range(1, MAX_CHUNKS + 1) if MAX_CHUNKS % count == 0)

_COMMA = ",</w>"
_COMMA_REACH = 20  # AUTOMATIC1111's: how near its end a full chunk may be cut after a comma instead; tokens
_BREAK = " BREAK "  # what quoted text shows between parts
_REMEMBERED = 256  # prompts, of up to 20 kB each: the negative one is nearly everyone's
_NONE: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Chunk:
    """What the text encoder reads at once: [tokens] ids and weights; begin, end and padding weigh 1."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]

    def __hash__(self) -> int:
        """Of the ids alone, in less than half the time: few chunks differ by their weights alone."""
        return hash(self.ids)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text as the model reads it."""

    text: str
    chunks: tuple[Chunk, ...]  # as many as one of CHUNK_COUNTS
    warnings: tuple[str, ...] = ()  # sentences: what was left out, and what was read as text and perhaps not meant so
    syntax: Syntax = "a1111"  # how it was read


class _Piece(NamedTuple):
    """What is never split: a token, or all vectors of an embedding."""

    ids: tuple[int, ...]
    weight: float
    at: int  # where it begins in the text


class Tokenizer:
    """Reads prompts of up to MAX_CHUNKS chunks. One that fits one chunk has the ids that diffusers gives it."""

    def __init__(self, file: Path, *, tokens: int, pad: int, embeddings: Mapping[str, int] = _NONE) -> None:
        """Chunks have `tokens` ids, with begin and end. `embeddings` says how many vectors each textual inversion has:
        those after the first of "<cat>" are the tokens "<cat>_1", "<cat>_2", …

        Raises:
            EngineError: an embedding is not in the tokenizer, or too long for a chunk.
        """
        self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._begin, self._end = self._tokenizer.encode("").ids
        self._pad = pad
        self._room = tokens - 2
        self._comma = (self._tokenizer.token_to_id(_COMMA),)
        self._comma_reach = min(_COMMA_REACH, self._room // 3)  # a small chunk goes no emptier than that
        self._vectors = {ids[0]: ids for ids in (self._vectors_of(*item) for item in embeddings.items())}

        self._read_before = lru_cache(_REMEMBERED)(self._read)

    def __call__(self, text: str, *, syntax: Syntax = "a1111") -> Prompt:
        """Read `text`: its AUTOMATIC1111 syntax, or, if "plain", every character as it is written."""
        return self._read_before(text, syntax)

    def _read(self, text: str, syntax: Syntax) -> Prompt:
        parts = parse(text) if syntax == "a1111" else [[Span(text, 1.0)]]
        warnings = unsupported(text) if syntax == "a1111" else ()
        contents = [content for pieces in self._tokenize(parts) for content in self._split(pieces)]
        if len(contents) > 1 and not contents[-1]:
            contents.pop()  # a BREAK at the very end begins no chunk; any other may leave one empty
        if left_out := [piece for content in contents[MAX_CHUNKS:] for piece in content]:
            warnings = (*warnings, self._without(left_out, parts))
        kept = contents[:MAX_CHUNKS]
        count = next(count for count in CHUNK_COUNTS if count >= len(kept))
        kept += [[] for _ in range(count - len(kept))]
        return Prompt(text, tuple(self._chunk(content) for content in kept), warnings, syntax)

    def _vectors_of(self, token: str, vectors: int) -> tuple[int, ...]:
        if vectors > self._room:
            raise EngineError(
                f"The embedding {token} has {vectors} vectors, a chunk holds {self._room}: build without it."
            )
        names = [token, *(f"{token}_{vector}" for vector in range(1, vectors))]
        ids = tuple(index for name in names if (index := self._tokenizer.token_to_id(name)) is not None)
        if len(ids) < vectors:
            raise EngineError(f"The tokenizer knows {len(ids)} of {vectors} vectors of {token}: build again.")
        return ids

    def _tokenize(self, parts: Iterable[Iterable[Span]]) -> Iterator[list[_Piece]]:
        """The pieces of each part. Spans are tokenized one by one, so no token lies across a change of weight."""
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
        """The contents of one or more chunks. Where a full one is cut after a comma, the rest moves on to the next."""
        content: list[_Piece] = []
        size = 0
        for piece in pieces:
            while size + len(piece.ids) > self._room:
                full = size == self._room and piece.ids != self._comma
                end = self._last_comma(content) if full else len(content)
                yield content[:end]
                content = content[end:]
                size = _size(content)
            content.append(piece)
            size += len(piece.ids)
        yield content

    def _last_comma(self, content: Sequence[_Piece]) -> int:
        """How many pieces there are up to the last comma, or in all if none is near the end."""
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
        padding = self._room - len(ids)
        return Chunk(
            ids=(self._begin, *ids, self._end, *[self._pad] * padding),
            weights=(1.0, *weights, 1.0, *[1.0] * padding),
        )

    def _without(self, left_out: Sequence[_Piece], parts: Iterable[Iterable[Span]]) -> str:
        text = _BREAK.join("".join(span.text for span in spans) for spans in parts)
        beginning = excerpt(text[left_out[0].at :])
        return (
            f'The prompt was read up to "{beginning}": its last {_size(left_out)} tokens do not fit in '
            f"{MAX_CHUNKS} chunks of {self._room}."
        )


def _size(content: Iterable[_Piece]) -> int:
    """Tokens."""
    return sum(len(piece.ids) for piece in content)
