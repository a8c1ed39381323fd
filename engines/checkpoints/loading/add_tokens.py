"""Add the tokens of textual inversion to the tokenizer and the text encoder."""

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


def add_to_text_encoder(text_encoder: Any, embeddings: Sequence[Embedding], tokenizer: Any) -> None:
    """Write each vector to the row of the embedding table that the tokenizer gives its token, enlarging the table.

    Raises:
        CheckpointError: a file cannot be read.
    """
    rows = _rows(embeddings, tokenizer)
    known = text_encoder.get_input_embeddings().num_embeddings
    with quiet():
        text_encoder.resize_token_embeddings(max(known, *(row + 1 for row in rows)), mean_resizing=False)
    with torch.no_grad():
        for row, vector in rows.items():
            text_encoder.get_input_embeddings().weight[row] = vector


def _rows(embeddings: Sequence[Embedding], tokenizer: Any) -> dict[int, Tensor]:
    rows: dict[int, Tensor] = {}
    for embedding in embeddings:
        tensors = load_tensors(embedding.path)
        check_finite(tensors.items(), str(embedding.path))
        for learned in embedding.learned_tokens:
            ids = tokenizer.convert_tokens_to_ids(list(learned.tokens))
            rows |= zip(ids, tensors[learned.key].view(learned.vectors, learned.width), strict=True)
    return rows
