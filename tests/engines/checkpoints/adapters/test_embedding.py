"""Learned tokens act as they do in diffusers; embeddings of other models are refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

import build_engines
from engines.build.tables import inspect_tables
from engines.checkpoints.adapters.embedding import Embedding
from engines.checkpoints.checkpoint import Checkpoint
from engines.checkpoints.find import find_checkpoint
from engines.checkpoints.loading.modules import Modules, load_modules
from engines.errors import CheckpointError
from engines.export.run import export_tokenizer
from engines.manifest import Manifest, Source
from tests.support.references import load_pipeline
from tests.support.tiny import TOKENS, WIDTH

PROMPTS = (
    "a <cat> on a blue hill",
    "two <CAT> at night, kirigami<cat>",
    "Kirigami boats in the STYLE",
    "<cat>_1 alone, <catnip>",
    "a red cat",
)


def vectors(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def written(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    save_file(dict(tensors), path)
    return path


@pytest.fixture
def learned(tmp_path: Path) -> dict[Path, dict[str, Tensor]]:
    """Files of every form, with their tensors."""
    files: dict[Path, dict[str, Tensor]] = {
        tmp_path / "learned_embeds.safetensors": {"<cat>": vectors(3, WIDTH, seed=1)},
        tmp_path / "two.safetensors": {"<catnip>": vectors(WIDTH, seed=2), "<hill>": vectors(2, WIDTH, seed=3)},
        tmp_path / "Kirigami.safetensors": {"emb_params": vectors(2, WIDTH, seed=4).half()},
        tmp_path / "v2-final.safetensors": {"emb_params": vectors(1, WIDTH, seed=5)},
    }
    for path, tensors in files.items():
        written(path, tensors)
    return files


@pytest.fixture
def embeddings(learned: dict[Path, dict[str, Tensor]]) -> list[Embedding]:
    return [Embedding(path, "style" if path.stem == "v2-final" else None) for path in learned]


def load(checkpoint: Checkpoint) -> Modules:
    return load_modules(checkpoint.config, checkpoint)


# --- what is built


@pytest.mark.filterwarnings("ignore")  # of diffusers
def test_tokens_are_those_of_diffusers(checkpoint: Path, embeddings: list[Embedding], tmp_path: Path) -> None:
    """The same ids from the bundle's own tokenizer, and the same embeddings, bit by bit."""
    theirs = load_pipeline(checkpoint)
    for embedding in embeddings:
        for learned in embedding.learned_tokens:
            theirs.load_textual_inversion({learned.token: load_file(embedding.path)[learned.keys[0]]})
    found = find_checkpoint(str(checkpoint), embeddings=embeddings)
    text_encoder = load(found).text_encoder
    made = export_tokenizer(found.config, found.learned_tokens, tmp_path)
    assert made.embeddings == {"<cat>": 3, "<catnip>": 1, "<hill>": 2, "Kirigami": 2, "style": 1}
    ours = tokenizers.Tokenizer.from_file(str(tmp_path / made.file.path))
    assert ours.get_vocab() == theirs.tokenizer.get_vocab()
    table = text_encoder.get_input_embeddings().weight
    assert torch.equal(table, theirs.text_encoder.get_input_embeddings().weight)
    for prompt in PROMPTS:
        expanded = theirs.maybe_convert_prompt(prompt, theirs.tokenizer)
        ids = theirs.tokenizer(expanded, max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
        ours.enable_truncation(TOKENS)
        assert ours.encode(expanded).ids == ids[0].tolist()
        with torch.inference_mode():
            assert torch.equal(text_encoder(ids)[0], theirs.text_encoder(ids)[0])
    assert theirs.maybe_convert_prompt("a <cat>", theirs.tokenizer) == "a <cat> <cat>_1 <cat>_2"


def test_other_weights_are_unchanged(checkpoint: Path, embeddings: list[Embedding]) -> None:
    plain, extended = (
        load(find_checkpoint(str(checkpoint))),
        load(find_checkpoint(str(checkpoint), embeddings=embeddings)),
    )
    known = len(plain.text_encoder.get_input_embeddings().weight)
    for part in ("text_encoder", "unet", "vae"):
        for name, weight in getattr(plain, part).state_dict().items():
            assert torch.equal(
                getattr(extended, part).state_dict()[name][: len(weight) if weight.ndim else None], weight
            )
    assert len(extended.text_encoder.get_input_embeddings().weight) == known + 9


def test_vectors_are_written_to_the_rows_of_their_tokens(checkpoint: Path, tmp_path: Path) -> None:
    """As in checkpoints whose text encoder has more rows than their tokenizer has tokens."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    config, weights = folder / "text_encoder/config.json", folder / "text_encoder/model.safetensors"
    settings, tensors = json.loads(config.read_text()), {name: one.clone() for name, one in load_file(weights).items()}
    key = next(name for name in tensors if name.endswith("token_embedding.weight"))
    known = len(tensors[key])
    tensors[key] = torch.cat([tensors[key], vectors(5, WIDTH, seed=7)])
    save_file(tensors, weights, metadata={"format": "pt"})
    config.write_text(json.dumps(settings | {"vocab_size": known + 5}))
    cat = vectors(3, WIDTH, seed=1)
    path = written(tmp_path / "cat.safetensors", {"<cat>": cat})
    table = load(find_checkpoint(str(folder), embeddings=[Embedding(path)])).text_encoder.get_input_embeddings().weight
    assert torch.equal(table, torch.cat([tensors[key][:known], cat, tensors[key][known + 3 :]]))
    assert torch.equal(load_file(weights)[key], tensors[key])  # weights are mapped into memory, and changed in it alone


def test_the_identity_covers_vectors_and_tokens(checkpoint: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "cat.safetensors", {"emb_params": vectors(2, WIDTH, seed=1)})
    other = written(tmp_path / "hill.safetensors", {"emb_params": vectors(WIDTH, seed=2)})

    def source(*embeddings: Embedding) -> Source:
        return find_checkpoint(str(checkpoint), embeddings=embeddings).source

    named, both = source(Embedding(path, "<cat>")), source(Embedding(path, "<cat>"), Embedding(other, "<hill>"))
    assert (named.embeddings, both.embeddings) == (
        ("cat.safetensors:<cat>",),
        ("cat.safetensors:<cat>", "hill.safetensors:<hill>"),
    )
    seen = [source(), source(Embedding(path, "<dog>")), named, both, source(Embedding(other, "<hill>"))]
    written(path, {"emb_params": vectors(2, WIDTH, seed=3)})
    seen.append(source(Embedding(path, "<cat>")))
    assert len({one.sha256 for one in seen}) == len(seen)


def test_inspect_shows_embeddings(manifest: Manifest) -> None:
    source = manifest.source.model_copy(update={"embeddings": ("cat.safetensors:<cat>",)})
    console = Console(width=120)
    with console.capture() as shown:
        console.print(inspect_tables(manifest.model_copy(update={"source": source})))
    assert "cat.safetensors:<cat>" in shown.get()


# --- how they are named


def test_embeddings_are_parsed_with_their_token() -> None:
    assert Embedding.parse("cat.safetensors") == Embedding(Path("cat.safetensors"))
    assert Embedding.parse("a/Cat.SafeTensors:<cat:toy>") == Embedding(Path("a/Cat.SafeTensors"), "<cat:toy>")
    assert Embedding.parse(r"C:\cat.safetensors:cat") == Embedding(Path(r"C:\cat.safetensors"), "cat")


@pytest.mark.parametrize("text", ["style.pt", "learned_embeds.bin", "style.pt:<style>", "C:/a.ckpt:<a>"])
def test_pickles_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match=r"is a pickle, .* can run code\. .*save_file"):
        Embedding.parse(text)
    with pytest.raises(SystemExit):
        build_engines.main(["export", "--model", "m", "--out", "out", "--embedding", text])
    assert "can run code" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "cat", "cat.safetensors:", "cat.ptx", ":<cat>"])
def test_malformed_embeddings_are_explained(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"write FILE.safetensors or FILE.safetensors:TOKEN"):
        Embedding.parse(text)


# --- what is refused


@pytest.fixture
def refused(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The error for files of some shapes and the tokens given with them, from a checkpoint without weights."""
    folder = shutil.copytree(checkpoint, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.chdir(tmp_path)

    def refused(*files: tuple[str, Mapping[str, tuple[int, ...]]]) -> str:
        embeddings = [Embedding.parse(name) for name, _ in files]
        for embedding, (_, shapes) in zip(embeddings, files, strict=True):
            written(embedding.path, {key: torch.zeros(shape) for key, shape in shapes.items()})
        with pytest.raises(CheckpointError) as raised:
            find_checkpoint(str(folder), embeddings=embeddings)
        return str(raised.value)

    return refused


@pytest.mark.parametrize(
    ("name", "shapes", "complaint"),
    [
        ("a.safetensors", {"clip_g": (2, 1280), "clip_l": (2, 768)}, "embedding for Stable Diffusion XL"),
        ("a.safetensors", {"<a>": (2, 1024)}, "made for Stable Diffusion 2.x, 1024 wide, while this model's .* is 32"),
        ("a.safetensors", {"<a>": (768,)}, "made for Stable Diffusion 1.x, 768 wide"),
        ("a.safetensors", {"<a>": (33,)}, "does not fit copy: 33 wide"),
        ("a.safetensors", {"<a>": (15, WIDTH)}, "15 vectors for <a>, and a prompt holds at most 14"),
        ("a.safetensors", {"<a>": (1, 2, WIDTH)}, r"<a> has the shape \[1, 2, 32\]"),
        ("a.safetensors", {"<a>": (0, WIDTH)}, r"<a> has the shape \[0, 32\]"),
        ("a.safetensors", {}, "not a textual inversion embedding"),
        ("a.safetensors", {"lora_unet_conv_in.lora_down.weight": (4, WIDTH)}, "not a textual inversion embedding"),
        ("a.safetensors", {"a b": (WIDTH,)}, r"'a b' is not a token, .* a\.safetensors:TOKEN"),
        ("a b.safetensors", {"emb_params": (WIDTH,)}, r"'a b' is not a token"),
        ("a.safetensors:a\tb", {"emb_params": (WIDTH,)}, "is not a token"),
        ("a.safetensors:<c>", {"<a>": (WIDTH,), "<b>": (WIDTH,)}, r"holds 2 tokens .* \(<a>, <b>\): leave out '<c>'"),
        (
            "re.safetensors",
            {"emb_params": (WIDTH,)},
            r"re of .* is already a token of copy: choose another name with re\.saf.*:TOKEN",
        ),
        ("a.safetensors:<|endoftext|>", {"emb_params": (WIDTH,)}, r"<\|endoftext\|> of .* is already a token"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(
    refused: Callable[..., str], name: str, shapes: Mapping[str, tuple[int, ...]], complaint: str
) -> None:
    assert re.search(complaint, message := refused((name, shapes))), message


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("<a>", (WIDTH,)), ("<a>", (WIDTH,))),
        (("<a>", (WIDTH,)), ("<A>", (WIDTH,))),
        (("<a>", (2, WIDTH)), ("<a>_1", (WIDTH,))),
        (("<a>_2", (WIDTH,)), ("<a>", (2, WIDTH))),
    ],
)
def test_tokens_that_prompts_cannot_tell_apart_are_refused(
    refused: Callable[..., str], first: tuple[str, Any], second: tuple[str, Any]
) -> None:
    message = refused(("a.safetensors", dict([first])), ("b.safetensors", dict([second])))
    assert "a.safetensors and b.safetensors have tokens that prompts cannot tell apart" in message


@pytest.mark.parametrize("file", ["vocab.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_known_tokens_are_read_from_every_tokenizer_file(checkpoint: Path, tmp_path: Path, file: str) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    kept = folder / "tokenizer"
    for path in kept.iterdir():
        path.unlink()
    added = {"content": "<a>"}
    contents: dict[str, Any] = {
        "vocab.json": {"<a>": 0},
        "added_tokens.json": {"<a>": 0},
        "tokenizer.json": {"model": {"vocab": {}}, "added_tokens": [added]},
        "tokenizer_config.json": {"added_tokens_decoder": {"0": added}},
    }
    (kept / "vocab.json").write_text("{}")
    (kept / "merges.txt").touch()
    (kept / file).write_text(json.dumps(contents[file]))
    path = written(tmp_path / "a.safetensors", {"<a>": torch.zeros(WIDTH)})
    with pytest.raises(CheckpointError, match=r"<a> of a\.safetensors is already a token of copy"):
        find_checkpoint(str(folder), embeddings=[Embedding(path)])
    assert find_checkpoint(str(folder), embeddings=[Embedding(path, "<b>")]).learned_tokens[0].tokens == ("<b>",)


def test_a_missing_embedding_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        find_checkpoint(str(checkpoint), embeddings=[Embedding(tmp_path / "cat.safetensors")])
