"""A distilled decoder is a graph beside the VAE's, computes what it does in diffusers, and fits or is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from rich.console import Console

from engines.backends.registry import ON_CPU
from engines.build.bundle import _export_key
from engines.build.tables import inspect_tables
from engines.checkpoints.checkpoint import count_parameters
from engines.checkpoints.find import find_checkpoint
from engines.checkpoints.loading.modules import load_modules
from engines.contract import GRAPHS, LANES, Array
from engines.errors import CheckpointError
from engines.manifest import Manifest
from tests.support.loaded import Loaded
from tests.support.tiny import make_checkpoint, make_decoder

SLOTS, SIDE = 3, 8  # latents


@pytest.fixture
def copied(distilled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(distilled, tmp_path / "copy"))


def decoded(backend: str, bundle: Path, state: Array) -> tuple[Array, Array]:
    decode = Loaded(backend, bundle / "onnx" / "decode_fast.onnx", threads=1)
    images, is_finite = np.empty((len(state), 2 * SIDE, 2 * SIDE, 3), np.uint8), np.empty(len(state), np.float32)
    made = decode({"state": state, "slot": np.arange(len(state))}, {"images": images, "is_finite": is_finite})
    return made["images"], made["is_finite"]


def random_state() -> Array:
    return np.random.default_rng(0).standard_normal((SLOTS, LANES, 4, SIDE, SIDE), np.float32)


@pytest.mark.parametrize("backend", ON_CPU)
def test_it_decodes_as_in_diffusers(backend: str, fast_bundle: Path, distilled: Path) -> None:
    state = random_state()
    images, is_finite = decoded(backend, fast_bundle, state)
    theirs = AutoencoderTiny.from_pretrained(distilled).eval()
    with torch.inference_mode():
        pixels = theirs.decode(torch.from_numpy(state[:, 0]) / theirs.config.scaling_factor).sample
    expected = (pixels / 2 + 0.5).clamp(0, 1).mul(255).permute(0, 2, 3, 1).numpy()
    assert expected.std() > 3
    assert np.abs(images - expected).max() <= 0.5 + 1e-2
    assert is_finite.tolist() == [1] * SLOTS


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_infinite_is_not_sound_though_it_decodes(backend: str, fast_bundle: Path, value: float) -> None:
    """Its first operation is a tanh, behind which infinity is a number."""
    state = random_state()
    state[1, 0, 2, 3, 3] = value
    images, is_finite = decoded(backend, fast_bundle, state)
    assert is_finite.tolist() == [1, 0, 1]
    np.testing.assert_array_equal(images[[0, 2]], decoded(backend, fast_bundle, random_state())[0][[0, 2]])


def test_the_graphs_of_the_vae_stay_as_they_are(fast_bundle: Path, checked_bundle: Path) -> None:
    ours, theirs = Manifest.load(fast_bundle), Manifest.load(checked_bundle)
    assert ours.graph_names == (*GRAPHS, "decode_fast", "safety")
    assert {**ours.graphs, "decode_fast": None} == {**theirs.graphs, "decode_fast": None}
    np.testing.assert_allclose(ours.preview, theirs.preview, rtol=1e-6)
    assert (ours.has_fast_decoder, theirs.has_fast_decoder) == (True, False)


def test_it_is_compiled_and_verified_like_every_graph(fast_bundle: Path) -> None:
    engines = Manifest.load(fast_bundle).builds["onnxruntime"].engines
    assert tuple(engines) == (*GRAPHS, "decode_fast", "safety")
    assert engines["decode_fast"].difference


def test_the_bundle_says_what_decodes(fast_bundle: Path, bundle: Path) -> None:
    console = Console(record=True, width=100)
    for folder, words in ((fast_bundle, "taesd"), (bundle, None)):
        manifest = Manifest.load(folder)
        assert manifest.source.decoder == words
        console.print(inspect_tables(manifest))
        assert ("fast decoder" in console.export_text()) == bool(words)


def test_another_decoder_is_another_model(checkpoint: Path, copied: Path) -> None:
    def key() -> str:
        return _export_key(find_checkpoint(str(checkpoint), decoder=str(copied)), "fp32")

    keys = [key(), _export_key(find_checkpoint(str(checkpoint)), "fp32")]
    make_decoder(copied, scaling_factor=1.0)
    keys.append(key())
    with (copied / "diffusion_pytorch_model.safetensors").open("r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        weights.write(b"\x55")
    keys.append(key())
    assert len(set(keys)) == 4


def test_its_weights_are_counted(checkpoint: Path, distilled: Path) -> None:
    plain, counts = (
        count_parameters(find_checkpoint(str(checkpoint), decoder=name)) for name in (None, str(distilled))
    )
    theirs = AutoencoderTiny.from_pretrained(distilled).decoder
    assert counts == plain | {"decode_fast": sum(weight.numel() for weight in theirs.parameters())}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"latent_channels": 16},
            "with 16 channels and 2 pixels per latent to 3 colors; tiny-sd has 4 channels, 2 pixels",
        ),
        (
            {"num_decoder_blocks": (1, 1, 1), "decoder_block_out_channels": (16, 16, 16)},
            "with 4 channels and 4 pixels per latent",
        ),
        ({"out_channels": 4}, "to 4 colors"),
    ],
)
def test_one_that_reads_other_latents_is_refused(
    checkpoint: Path, tmp_path: Path, changes: dict[str, Sequence[int]], words: str
) -> None:
    decoder = make_decoder(tmp_path / "other", **changes)
    with pytest.raises(CheckpointError, match=words):
        find_checkpoint(str(checkpoint), decoder=str(decoder))


def test_what_is_no_decoder_is_said_so(checkpoint: Path, copied: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="vae is of class AutoencoderKL"):
        find_checkpoint(str(checkpoint), decoder=str(checkpoint / "vae"))
    with pytest.raises(CheckpointError, match=r"config\.json is missing: .* is not a diffusers AutoencoderTiny"):
        find_checkpoint(str(checkpoint), decoder=str(tmp_path))
    weights = copied / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="is incomplete"):
        find_checkpoint(str(checkpoint), decoder=str(copied))
    weights.rename(copied / "taesd_decoder.safetensors")
    with pytest.raises(CheckpointError, match=r"has no diffusion_pytorch_model\.safetensors"):
        find_checkpoint(str(checkpoint), decoder=str(copied))


def test_weights_that_do_not_fit_its_config_are_an_error(tmp_path: Path, copied: Path) -> None:
    model = make_checkpoint(tmp_path / "model")
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"num_decoder_blocks": [2, 1]}))
    checkpoint = find_checkpoint(str(model), decoder=str(copied))
    with pytest.raises(CheckpointError, match="The weights of copy cannot be loaded: decoder"):
        load_modules(checkpoint.config, checkpoint)
