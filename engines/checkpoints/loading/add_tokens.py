"""Add the tokens of textual inversion to the tokenizer and the text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engines.checkpoints.adapters.embedding import Embedding, LearnedToken
from engines.checkpoints.loading.finite import check_finite
from engines.checkpoints.loading.libraries import load_tensors, quiet


def add_to_tokenizer(tokenizer: Any, learned_tokens: Sequence[LearnedToken]) -> None:
    """Make the tokenizer find the tokens in prompts, as diffusers' `load_textual_inversion` does."""
    for learned in learned_tokens:
        tokenizer.add_tokens(list(learned.tokens))


def add_to_text_encoders(text_encoders: Sequence[Any], embeddings: Sequence[Embedding], tokenizer: Any) -> None:
    """Write each vector to the row of the embedding table that the tokenizer gives its token, enlarging the tables.

    Args:
        text_encoders: as many as the embeddings have vectors for, in the order of those.
        embeddings: files that fit them.
        tokenizer: of all of them, with the tokens added.

    Raises:
        CheckpointError: a file cannot be read.
    """
    for number, text_encoder in enumerate(text_encoders):
        rows = _rows(embeddings, tokenizer, number)
        known = text_encoder.get_input_embeddings().num_embeddings
        with quiet():
            text_encoder.resize_token_embeddings(max(known, *(row + 1 for row in rows)), mean_resizing=False)
        with torch.no_grad():
            for row, vector in rows.items():
                text_encoder.get_input_embeddings().weight[row] = vector


def _rows(embeddings: Sequence[Embedding], tokenizer: Any, number: int) -> dict[int, Tensor]:
    """The vectors for the text encoder of this number, by the token's id."""
    rows: dict[int, Tensor] = {}
    for embedding in embeddings:
        tensors = load_tensors(embedding.path)
        check_finite(tensors.items(), str(embedding.path))
        for learned in embedding.learned_tokens:
            ids = tokenizer.convert_tokens_to_ids(list(learned.tokens))
            vectors = tensors[learned.keys[number]].view(learned.vectors, learned.widths[number])
            rows |= zip(ids, vectors, strict=True)
    return rows
