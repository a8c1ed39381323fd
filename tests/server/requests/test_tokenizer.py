"""Tokenization to chunks, compared with transformers' CLIPTokenizer and diffusers' textual inversions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from diffusers.loaders import TextualInversionLoaderMixin
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from engines.contract import MAX_CHUNKS
from engines.demo.tokenizer import write_tokenizer
from engines.errors import EngineError
from server.requests.tokenizer import CHUNK_COUNTS, Chunk, Prompt, PromptTokenizer
from tests.support.tiny import CAPTIONS, TOKENS

ROOM = TOKENS - 2
EMBEDDINGS = {"<cat>": 3, "<hill>": 1, "<long>": ROOM}


@dataclass(frozen=True)
class Reference:
    """transformers' tokenizer, and the file that a bundle would hold of it."""

    transformers: Any
    file: Path

    def open(self, tokens: int = TOKENS) -> PromptTokenizer:
        return PromptTokenizer(self.file, tokens=tokens, pad=self.transformers.pad_token_id, embeddings=EMBEDDINGS)

    def padded(self, text: str, tokens: int = TOKENS) -> tuple[int, ...]:
        return tuple(self.transformers(text, padding="max_length", truncation=True, max_length=tokens).input_ids)

    def content(self, text: str) -> tuple[int, ...]:
        return tuple(self.transformers(text, add_special_tokens=False).input_ids)


def make_reference(folder: Path, **changes: str) -> Reference:
    write_tokenizer(folder, CAPTIONS)
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS, **changes)
    for token, vectors in EMBEDDINGS.items():
        tokenizer.add_tokens([token, *(f"{token}_{vector}" for vector in range(1, vectors))])
    file = folder / "tokenizer.json"
    file.write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
    return Reference(tokenizer, file)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """As Stable Diffusion 1.x has it: padded with the token that ends a prompt."""
    return make_reference(tmp_path_factory.mktemp("sd1"))


@pytest.fixture(scope="module")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """As Stable Diffusion 2.x has it: padded with a token of its own."""
    return make_reference(tmp_path_factory.mktemp("sd2"), pad_token="!")  # noqa: S106 - a token of text


@pytest.fixture(scope="module")
def tokenizer(reference: Reference) -> PromptTokenizer:
    return reference.open()


def contents(reference: Reference, prompt: Prompt) -> list[str]:
    """What each chunk says between begin and end."""
    tokens = reference.transformers
    words = [tokens.convert_ids_to_tokens(content(reference, chunk)) for chunk in prompt.chunks]
    return [" ".join(chunk).replace("</w>", "") for chunk in words]


def content(reference: Reference, chunk: Chunk) -> Sequence[int]:
    return chunk.ids[1 : chunk.ids.index(reference.transformers.eos_token_id)]


def words(count: int) -> str:
    return "cat " * count


def test_chunk_counts_divide_the_maximum() -> None:
    assert CHUNK_COUNTS == (1, 2, 3, 6)
    assert CHUNK_COUNTS[-1] == MAX_CHUNKS


@pytest.mark.parametrize("syntax", ["a1111", "plain"])
@pytest.mark.parametrize("text", ["", "a red cat", "  A  RÉD, cat!\n", "猫 on 2 hills", *CAPTIONS, words(ROOM)])
def test_a_prompt_of_one_chunk_has_the_ids_of_transformers(
    reference: Reference, sd2: Reference, text: str, syntax: Any
) -> None:
    for kind in (reference, sd2):
        (chunk,) = kind.open()(text, syntax=syntax).chunks
        assert chunk.ids == kind.padded(text)
        assert chunk.weights == (1.0,) * TOKENS


@pytest.mark.parametrize("text", ["", "a red cat", "a cat, <|endoftext|> a dog", words(ROOM), words(ROOM + 1)])
def test_a_second_encoder_has_the_same_prompt_with_its_own_padding(
    reference: Reference, sd2: Reference, text: str
) -> None:
    pads = reference.transformers.pad_token_id, sd2.transformers.pad_token_id
    both = PromptTokenizer(reference.file, tokens=TOKENS, pad=pads[0], pad_2=pads[1])(text)
    second = PromptTokenizer(reference.file, tokens=TOKENS, pad=pads[1])(text)
    assert [chunk.ids for chunk in both.chunks] == [chunk.ids for chunk in reference.open()(text).chunks]
    assert [chunk.ids_2 for chunk in both.chunks] == [chunk.ids for chunk in second.chunks]
    assert all(chunk.ids_2 == () for chunk in second.chunks)


@pytest.mark.parametrize(("count", "chunks"), [(0, 1), (75, 1), (76, 2), (150, 2), (151, 3), (226, 6), (450, 6)])
def test_chunks_of_the_real_length(reference: Reference, count: int, chunks: int) -> None:
    prompt = reference.open(77)(words(count))
    assert [len(chunk.ids) for chunk in prompt.chunks] == [77] * chunks
    assert [len(content(reference, chunk)) for chunk in prompt.chunks] == [
        max(0, min(75, count - 75 * index)) for index in range(chunks)
    ]
    assert prompt.chunks[0].ids == reference.padded(words(count), 77)


def test_a_saved_truncation_is_not_kept(reference: Reference, tmp_path: Path) -> None:
    backend = type(reference.transformers.backend_tokenizer).from_file(str(reference.file))
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = PromptTokenizer(tmp_path / "tokenizer.json", tokens=TOKENS, pad=reference.transformers.pad_token_id)
    assert tokenizer(words(ROOM)).chunks[0].ids == reference.padded(words(ROOM))


def test_weights_align_with_their_tokens(reference: Reference, tokenizer: PromptTokenizer) -> None:
    (chunk,) = tokenizer("a (red:1.5) [blue hill], (boats (at:2):0.5)").chunks
    assert chunk.ids == reference.padded("a red blue hill, boats at")
    weights = [1, 1, 1.5, 1 / 1.1, 1 / 1.1, 1, 0.5, 1]
    assert chunk.weights == pytest.approx([*weights, *[1] * (TOKENS - len(weights))])


def test_cached_prompts_are_equal_to_new_ones(reference: Reference, tokenizer: PromptTokenizer) -> None:
    plain, weighted = (tokenizer("(red:1.5)", syntax=syntax) for syntax in ("plain", "a1111"))
    assert tokenizer("(red:1.5)", syntax="plain") == plain != weighted == reference.open()("(red:1.5)")


def test_plain_syntax_is_literal(reference: Reference, tokenizer: PromptTokenizer) -> None:
    text = r"(red:1.5) BREAK [a|b]\("
    prompt = tokenizer(text, syntax="plain")
    assert prompt.text == text
    assert prompt.chunks[0].ids == reference.padded(text)
    assert set(prompt.chunks[0].weights) == {1.0}
    assert prompt.warnings == ()


@pytest.mark.parametrize(
    ("text", "chunks"),
    [
        ("red BREAK blue", ["red", "blue"]),
        ("red BREAK", ["red"]),
        ("BREAK red", ["", "red"]),
        ("BREAK", [""]),
        ("BREAK BREAK", ["", ""]),
        ("red BREAK BREAK blue", ["red", "", "blue"]),
        ("red BREAK ( )", ["red"]),
        ("(red BREAK blue:1.5)", ["red", "blue"]),
        ("red BREAK blue BREAK a BREAK cat", ["red", "blue", "a", "cat", "", ""]),
        (words(ROOM) + "BREAK red", [words(ROOM).strip(), "red"]),
        (words(ROOM + 1) + "BREAK red", [words(ROOM).strip(), "cat", "red"]),
        ("BREAK " * MAX_CHUNKS, [""] * MAX_CHUNKS),
        ("BREAK " * 100, [""] * MAX_CHUNKS),
    ],
)
def test_a_break_ends_a_chunk(reference: Reference, tokenizer: PromptTokenizer, text: str, chunks: list[str]) -> None:
    prompt = tokenizer(text)
    assert contents(reference, prompt) == chunks
    assert prompt.warnings == ()


@pytest.mark.parametrize("after", range(24))
def test_a_full_chunk_ends_after_a_comma_near_its_end(reference: Reference, after: int) -> None:
    """20 tokens near, as in AUTOMATIC1111, counting the comma."""
    before = 74 - after
    first, second = reference.open(77)(f"{words(before)}, {words(after + 5)}").chunks
    moved = after if after < 20 else 0
    assert len(content(reference, first)) == 75 - moved
    assert len(content(reference, second)) == 5 + moved


@pytest.mark.parametrize(
    ("text", "chunks"),
    [
        (f"{words(10)}, a red blue hill", [f"{words(10)},", "a red blue hill"]),
        (f"{words(9)}, a red blue hill at", [f"{words(9)}, a red blue hill", "at"]),  # too far from the end
        (f"{words(13)}, red", [f"{words(13)},", "red"]),  # at the end
        (f"{words(11)}, a red, blue", [f"{words(11)}, a red", ", blue"]),  # a comma comes next: nothing is torn apart
        (f"{words(11)}, a red", [f"{words(11)}, a red"]),  # the text ends with the chunk
        (f"{words(11)}, a red BREAK blue", [f"{words(11)}, a red", "blue"]),
        (f"{words(10)}, a , red blue", [f"{words(10)}, a ,", "red blue"]),  # the last of them
        (f", {words(14)}", [f", {words(13)}", "cat"]),
    ],
)
def test_commas_in_chunks_of_sixteen(
    reference: Reference, tokenizer: PromptTokenizer, text: str, chunks: list[str]
) -> None:
    """A comma is near when it is among the last third of the content: four tokens."""
    assert contents(reference, tokenizer(text)) == [" ".join(chunk.replace(",", " ,").split()) for chunk in chunks]


def test_weights_move_to_the_next_chunk_with_their_tokens(reference: Reference, tokenizer: PromptTokenizer) -> None:
    first, second = tokenizer(f"{words(10)}, (a red blue hill:1.5) at").chunks
    assert first.weights == (1.0,) * TOKENS
    assert second.weights == (1.0, *[1.5] * 4, *[1.0] * (TOKENS - 5))
    assert list(content(reference, second)) == list(reference.content("a red blue hill at"))


@pytest.mark.parametrize("text", ["a <cat> on <hill>", "<cat>", "a<cat>,<cat>red", "<cat>_1", "< cat >", "<long>"])
def test_an_embedding_becomes_its_vectors_as_in_diffusers(
    reference: Reference, tokenizer: PromptTokenizer, text: str
) -> None:
    converted = TextualInversionLoaderMixin().maybe_convert_prompt(text, reference.transformers)
    expected = reference.padded(converted) if text != "<cat>_1" else reference.padded(text)
    assert tokenizer(text).chunks[0].ids == expected


def test_all_vectors_of_an_embedding_have_its_weight(reference: Reference, tokenizer: PromptTokenizer) -> None:
    (chunk,) = tokenizer("a (<cat> red:1.5) hill").chunks
    assert chunk.ids == reference.padded("a <cat> <cat>_1 <cat>_2 red hill")
    assert chunk.weights[:8] == (1.0, 1.0, *[1.5] * 4, 1.0, 1.0)


@pytest.mark.parametrize(
    ("text", "chunks"),
    [
        (f"{words(12)}<cat>", [words(12), "<cat> <cat>_1 <cat>_2"]),
        (f"{words(11)}<cat>", [f"{words(11)}<cat> <cat>_1 <cat>_2"]),
        (f"{words(8)}, a red blue<cat>", [f"{words(8)}, a red blue", "<cat> <cat>_1 <cat>_2"]),  # it is not full
        (f"{words(10)}, a red blue<cat>", [f"{words(10)},", "a red blue <cat> <cat>_1 <cat>_2"]),
    ],
)
def test_an_embedding_is_never_split(
    reference: Reference, tokenizer: PromptTokenizer, text: str, chunks: list[str]
) -> None:
    assert contents(reference, tokenizer(text)) == [" ".join(chunk.replace(",", " ,").split()) for chunk in chunks]


def test_an_embedding_as_long_as_a_chunk_gets_a_chunk_of_its_own(
    reference: Reference, tokenizer: PromptTokenizer
) -> None:
    prompt = tokenizer(f"{words(10)}, a red blue<long>")
    assert contents(reference, prompt)[:2] == [f"{words(10)},", "a red blue"]
    assert len(content(reference, prompt.chunks[2])) == ROOM


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        ({"<long>": ROOM + 1}, "The embedding <long> has 15 vectors, but a chunk holds 14: rebuild without it."),
        ({"<cat>": 4}, "The tokenizer has 3 of the 4 vectors of <cat>: rebuild the bundle."),
        ({"<dog>": 1}, "The tokenizer has 0 of the 1 vectors of <dog>: rebuild the bundle."),
    ],
)
def test_an_invalid_embedding_is_rejected(reference: Reference, embeddings: dict[str, int], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        PromptTokenizer(reference.file, tokens=TOKENS, pad=0, embeddings=embeddings)


@pytest.mark.parametrize(("full", "chunks"), [(1, 1), (2, 2), (3, 3), (4, 6), (5, 6), (6, 6)])
def test_four_or_five_chunks_are_padded_to_six(tokenizer: PromptTokenizer, full: int, chunks: int) -> None:
    prompt = tokenizer(words(full * ROOM))
    (empty,) = tokenizer("").chunks
    assert len(prompt.chunks) == chunks
    assert prompt.chunks[full:] == (empty,) * (chunks - full)
    assert prompt.warnings == ()


def test_a_long_prompt_is_truncated_with_a_warning(tokenizer: PromptTokenizer) -> None:
    text = words(MAX_CHUNKS * ROOM)
    prompt = tokenizer(f"{text} (A  Réd:1.2)\nBIRD BREAK at <cat>")
    assert prompt.chunks == tokenizer(text).chunks
    assert prompt.warnings == (
        'The prompt was truncated before "A Réd BIRD BREAK at <cat>": '
        "its last 10 tokens do not fit in 6 chunks of 14 tokens.",
    )


def test_the_truncation_warning_quotes_the_beginning_of_a_long_rest(tokenizer: PromptTokenizer) -> None:
    (warning,) = tokenizer(words(4000 // 4), syntax="plain").warnings
    assert warning == (
        f'The prompt was truncated before "{words(15).strip()}…": '
        "its last 916 tokens do not fit in 6 chunks of 14 tokens."
    )


def test_unsupported_syntax_is_warned_of_before_truncation(tokenizer: PromptTokenizer) -> None:
    warnings = tokenizer("<lora:style:1> " + words(100)).warnings
    assert [warning.split()[0] for warning in warnings] == ['"<lora:style:1>"', "The"]


scraps = ["(", ")", "[", "]", ":1.3)", "\\", " BREAK ", ", ", " cat", " red", " <cat>", "<hill> ", " unknown", "猫"]
texts = st.one_of(st.text(), st.lists(st.sampled_from(scraps), max_size=150).map("".join))


@settings(deadline=None)
@given(text=texts, syntax=st.sampled_from(["a1111", "plain"]))
def test_every_prompt_gives_whole_chunks(reference: Reference, sd2: Reference, text: str, syntax: Any) -> None:
    for kind in (reference, sd2):
        tokenizer, tokens = kind.open(), kind.transformers
        prompt = tokenizer(text, syntax=syntax)
        assert len(prompt.chunks) in CHUNK_COUNTS
        vectors = tokens.convert_tokens_to_ids(["<cat>", "<cat>_1", "<cat>_2"])
        for chunk in prompt.chunks:
            assert len(chunk.ids) == len(chunk.weights) == TOKENS
            said = content(kind, chunk)
            end = len(said) + 1
            assert chunk.ids[0] == tokens.bos_token_id
            assert chunk.ids[end + 1 :] == (tokens.pad_token_id,) * (TOKENS - end - 1)
            assert {chunk.weights[0], *chunk.weights[end:]} == {1.0}
            assert all(map(math.isfinite, chunk.weights))
            for at, token in enumerate(said):
                assert token != vectors[0] or list(said[at : at + 3]) == vectors


@settings(deadline=None)
@given(texts)
def test_no_token_is_lost_or_added(reference: Reference, text: str) -> None:
    tokenizer = PromptTokenizer(reference.file, tokens=TOKENS, pad=reference.transformers.pad_token_id)
    prompt = tokenizer(text, syntax="plain")
    said = [token for chunk in prompt.chunks for token in content(reference, chunk)]
    whole = reference.content(text)
    assert tuple(said) == whole[: len(said)]
    assert (len(said) == len(whole)) == (not prompt.warnings)
    if len(whole) <= ROOM:
        assert prompt.chunks[0].ids == reference.padded(text)
    if prompt.warnings:
        assert f"its last {len(whole) - len(said)} tokens" in prompt.warnings[0]
