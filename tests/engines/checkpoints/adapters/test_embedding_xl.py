"""Learned tokens of Stable Diffusion XL have vectors for both text encoders, as in diffusers."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import tokenizers
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from engines.checkpoints.adapters.embedding import Embedding
from engines.checkpoints.find import find_checkpoint
from engines.errors import CheckpointError
from engines.export.run import export_tokenizer
from tests.support.checkpoints import load
from tests.support.tiny import WIDTH

WIDTH_2 = 48
Shapes = dict[str, tuple[int, ...]]


def written(path: Path, shapes: Shapes, *, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    save_file({key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}, path)
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> list[Embedding]:
    """Of several vectors, of one, and of pivotal tuning."""
    files: dict[str, Shapes] = {
        "kirigami": {"clip_l": (3, WIDTH), "clip_g": (3, WIDTH_2)},
        "style": {"clip_g": (WIDTH_2,), "clip_l": (WIDTH,)},
        "pivotal": {"text_encoders_0": (2, WIDTH), "text_encoders_1": (2, WIDTH_2)},
    }
    paths = [
        written(tmp_path / f"{name}.safetensors", shapes, seed=seed)
        for seed, (name, shapes) in enumerate(files.items())
    ]
    return [Embedding(paths[0]), Embedding(paths[1], "<style>"), Embedding(paths[2], "<s0>")]


def test_tables_and_ids_are_those_of_diffusers(xl_checkpoint: Path, pairs: list[Embedding], tmp_path: Path) -> None:
    """As its documentation loads them: the vectors of either encoder with the tokenizer of that encoder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = StableDiffusionXLPipeline.from_pretrained(xl_checkpoint)
        for embedding in pairs:
            (learned,) = embedding.learned_tokens
            first, second = (load_file(embedding.path)[key] for key in learned.keys)
            theirs.load_textual_inversion(
                first, learned.token, text_encoder=theirs.text_encoder, tokenizer=theirs.tokenizer
            )
            theirs.load_textual_inversion(
                second, learned.token, text_encoder=theirs.text_encoder_2, tokenizer=theirs.tokenizer_2
            )
    found = find_checkpoint(str(xl_checkpoint), embeddings=pairs)
    assert found.source.embeddings == (
        "kirigami.safetensors:kirigami", "style.safetensors:<style>", "pivotal.safetensors:<s0>"
    )  # fmt: skip
    modules = load(found)
    for part in ("text_encoder", "text_encoder_2"):
        ours, others = (getattr(model, part).get_input_embeddings().weight for model in (modules, theirs))
        assert torch.equal(ours, others)
    made = export_tokenizer(found.config, found.learned_tokens, tmp_path)
    assert made.embeddings == {"kirigami": 3, "<style>": 1, "<s0>": 2}
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / made.file.path))
    assert tokenizer.get_vocab() == theirs.tokenizer.get_vocab() == theirs.tokenizer_2.get_vocab()


@pytest.mark.parametrize(
    ("shapes", "complaint"),
    [
        (
            {"clip_l": (2, WIDTH), "clip_g": (3, WIDTH_2)},
            r"hold clip_l and clip_g with as many vectors each, and holds .*",
        ),
        ({"clip_l": (2, WIDTH)}, r"should hold clip_l and clip_g .*, and holds clip_l \[2, 32\]: pass"),
        ({"clip_l": (2, WIDTH), "clip_g": (2, WIDTH_2), "<a>": (WIDTH,)}, "should hold clip_l and clip_g"),
        ({"clip_l": (2, WIDTH), "clip_g": (2, 1280)}, "1280 wide, while this model's text encoder is 48 wide"),
        ({"clip_l": (15, WIDTH), "clip_g": (15, WIDTH_2)}, "15 vectors for .*, and a prompt holds at most 14"),
        ({"clip_l": (1, 2, WIDTH), "clip_g": (1, 2, WIDTH_2)}, r"clip_l has the shape \[1, 2, 32\]"),
        ({"<a>": (768,)}, "made for Stable Diffusion 1.x, it has vectors for one text encoder, and this model has two"),
        (
            {"emb_params": (2, WIDTH)},
            "does not fit tiny-xl: it has vectors for one text encoder, and this model has two",
        ),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(
    xl_checkpoint: Path, tmp_path: Path, shapes: Shapes, complaint: str
) -> None:
    path = written(tmp_path / "style1.safetensors", shapes)
    with pytest.raises(CheckpointError) as raised:
        find_checkpoint(str(xl_checkpoint), embeddings=[Embedding(path)])
    assert re.search(complaint, str(raised.value)), raised.value


def test_a_pair_is_refused_by_models_with_one_encoder(checkpoint: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "style1.safetensors", {"clip_l": (2, WIDTH), "clip_g": (2, WIDTH_2)})
    with pytest.raises(
        CheckpointError, match="embedding for Stable Diffusion XL, with vectors for two text encoders, and"
    ):
        find_checkpoint(str(checkpoint), embeddings=[Embedding(path)])
