"""`build_engines.py` makes bundles from checkpoints on disk, and says in one line why it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

import build_engines
from engines import checkpoint as checkpoints
from engines.base import EngineError, open_device
from engines.checkpoint import CheckpointError
from engines.export import export_bundle
from engines.manifest import Manifest, Size
from server.tokenizer import Tokenizer
from tests.tiny import TOKENS, WIDTH


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert build_engines.main(arguments) == 1
    return capsys.readouterr().err.split("error: ")[1].strip()


def test_the_manifest_holds_the_checkpoints_facts(manifest: Manifest) -> None:
    assert manifest.name == "tiny-sd"
    assert manifest.resolutions == (Size(width=32, height=32), Size(width=48, height=32))
    assert manifest.rows == (2, 4, 8)
    assert (manifest.latent.channels, manifest.latent.downscale, manifest.latent.multiple) == (4, 2, 4)
    assert (manifest.context.tokens, manifest.context.width) == (TOKENS, WIDTH)
    assert manifest.noise_schedule.steps_offset == 1
    assert manifest.noise_schedule.set_alpha_to_one is False
    assert manifest.defaults.scheduler == "pndm"
    assert manifest.graphs["denoise"].inputs[0].shape == ("S", 5, 4, "h", "w")
    assert manifest.graphs["decode"].outputs[0].dtype == "uint8"


def test_weights_keep_their_names(bundle: Path) -> None:
    """The exporter folds linear layers' weights into transposed constants; they are named again."""
    weights = onnx.load(bundle / "onnx/denoise.onnx").graph.initializer
    large = [weight.name for weight in weights if np.prod(weight.dims) >= 256]
    assert large
    assert all(name.startswith("unet.") for name in large)
    assert "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight.T" in large


def test_encode_prompt_is_the_text_encoder(checkpoint: Path, bundle: Path, manifest: Manifest) -> None:
    tokenizer = Tokenizer(bundle / "tokenizer.json", tokens=TOKENS, pad=manifest.tokenizer.pad)
    prompt = tokenizer("a red cat on a blue hill")
    device = open_device("onnxruntime")
    ids, embeddings = device.allocate((1, TOKENS), np.int64), device.allocate((1, TOKENS, WIDTH), np.float32)
    ids.write(np.array([prompt.ids]))
    device.load(bundle / "onnx/encode_prompt.onnx").bind({"ids": ids, "embeddings": embeddings}).run()
    with torch.inference_mode():
        encoder = CLIPTextModel.from_pretrained(checkpoint / "text_encoder").eval()
        expected = encoder(input_ids=torch.tensor([prompt.ids])).last_hidden_state.numpy()
    assert np.abs(embeddings.read() - expected).max() < 1e-4


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red cat",
        "  A  Red\tCAT!! ",
        "naïve café 東京 🍎",
        "x" * 500,
        "don't stop",
        "a,b;c (d:1.3)",
        "<|endoftext|>",
    ],
)
def test_prompts_become_the_ids_that_transformers_makes(
    checkpoint: Path, bundle: Path, manifest: Manifest, text: str
) -> None:
    ours = Tokenizer(bundle / "tokenizer.json", tokens=TOKENS, pad=manifest.tokenizer.pad)(text)
    theirs = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")
    padded = theirs(text, padding="max_length", max_length=TOKENS, truncation=True)
    assert list(ours.ids) == padded.input_ids
    assert ours.truncated == (len(theirs(text).input_ids) > TOKENS)


def test_fp16_halves_the_bundle_and_large_weights_lie_apart(
    checkpoint: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export itself compares each graph it wrote with torch."""
    monkeypatch.setattr("engines.export._INLINE_LIMIT", 1000)
    built = export_bundle(checkpoints.find(str(checkpoint)), tmp_path, precision="fp16")
    assert built.precision == "fp16"
    assert [file.path for file in built.graphs["denoise"].files] == ["onnx/denoise.onnx", "onnx/denoise.onnx.data"]
    half, full = (sum(file.size for file in made.graphs["denoise"].files) for made in (built, manifest))
    assert half < 0.75 * full  # the rest is the graph's own, which a tiny model has much of
    assert Manifest.load(tmp_path) == built


def test_a_hub_id_without_a_network_fails_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = complaint(capsys, "--model", "OFA-Sys/small-stable-diffusion-v0", "--out", str(tmp_path / "out"))
    assert len(text.splitlines()) == 1
    assert "OFA-Sys/small-stable-diffusion-v0 could not be downloaded" in text
    assert not (tmp_path / "out").exists()


def test_what_is_neither_a_folder_nor_a_hub_id_is_said_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = complaint(capsys, "--model", str(tmp_path / "no such folder"), "--out", str(tmp_path / "out"))
    assert "neither a folder here nor a hub id" in text


def test_a_size_the_unet_cannot_halve_is_refused(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    text = complaint(capsys, "--model", str(checkpoint), "--out", str(tmp_path), "--resolution", "33x32")
    assert "multiples of 4" in text


@pytest.mark.parametrize(
    "wrong", [["--resolution", "big"], ["--resolution", "0x64"], ["--rows", "2,x"], ["--rows", "0"]]
)
def test_malformed_flags_are_explained(wrong: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        build_engines.main(["--model", str(tmp_path), "--out", str(tmp_path), *wrong])
    assert ended.value.code == 2


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_another_architecture_is_refused_by_name(copied: Path) -> None:
    edit(copied / "model_index.json", _class_name="StableDiffusionXLPipeline")
    with pytest.raises(CheckpointError, match="StableDiffusionXLPipeline"):
        checkpoints.find(str(copied))


def test_an_inpainting_unet_is_refused(copied: Path) -> None:
    edit(copied / "unet" / "config.json", in_channels=9)
    with pytest.raises(CheckpointError, match="9 input channels"):
        checkpoints.find(str(copied))


def test_pickled_weights_are_not_loaded(copied: Path) -> None:
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="can run code"):
        checkpoints.find(str(copied))


def test_damaged_weights_are_an_error_that_names_the_checkpoint(copied: Path, tmp_path: Path) -> None:
    weights = copied / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(EngineError, match="weights of copy cannot be loaded"):
        export_bundle(checkpoints.find(str(copied)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
