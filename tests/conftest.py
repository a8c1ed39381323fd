"""One tiny checkpoint, one bundle and one server for the whole run: each is real, and each costs seconds to make."""

from __future__ import annotations

import gc
import shutil
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo.config  # the exporter imports it too

import build_engines
from engines.contract import GRAPHS, PLAIN_STEPS
from engines.demo import BUNDLE as DEMO
from engines.manifest import Manifest
from tests.support.meeting import HeldServing
from tests.support.safety import add_safety_checker
from tests.support.shared import made_once, reused_graphs
from tests.support.tiny import make_checkpoint, make_decoder

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a shell's background process; the programs tested inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # tiny models gain nothing from more, and lose much where other programs run
# The cache of shapes costs more than it saves where they are symbols: without it, an export takes a fifth less.
torch._dynamo.config.fake_tensor_cache_enabled = False

_SHAPES = ["--resolution", "32x32", "--resolution", "48x32", "--rows", "2,4,8"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the file that takes longest and shares nothing: another process makes what the others share."""
    items.sort(key=lambda item: item.path.name != "test_rtx_bundle.py")


def pytest_collection_finish() -> None:
    """Spare the garbage collector what lives as long as the run: the libraries, and ten thousand tests."""
    gc.collect()
    gc.freeze()


def build(checkpoint: Path, out: Path, *options: str) -> None:
    """Build for ONNX Runtime by the command people use."""
    assert (
        build_engines.main(["--model", str(checkpoint), "--out", str(out), "--backend", "onnxruntime", *options]) == 0
    )


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with random weights."""
    return made_once(tmp_path_factory, "tiny-sd", make_checkpoint)


@pytest.fixture(scope="session")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the checkpoint. Tests that alter a bundle copy it first."""
    return made_once(tmp_path_factory, "bundle", lambda out: build(checkpoint, out, *_SHAPES))


@pytest.fixture(scope="session")
def lora_bundle(checkpoint: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with graphs that apply the LoRAs of requests. Tests that alter it copy it first."""

    def make(out: Path) -> None:
        shutil.copytree(bundle, out)  # a build that finds graphs there adds those for LoRAs
        build(checkpoint, out, *_SHAPES, "--lora-slots", "4", "--lora-rank", "8")

    return made_once(tmp_path_factory, "lora-bundle", make)


@pytest.fixture(scope="session")
def xl_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `checkpoint`, of the family of Stable Diffusion XL."""
    return made_once(tmp_path_factory, "tiny-xl", lambda folder: make_checkpoint(folder, "xl"))


@pytest.fixture(scope="session")
def xl_bundle(xl_checkpoint: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of it, with graphs that apply the LoRAs of requests. Tests that alter it copy it first."""

    def make(out: Path) -> None:
        with reused_graphs(bundle, out, "decode", "encode_image"):  # all tiny families have one VAE
            build(xl_checkpoint, out, *_SHAPES, "--lora-slots", "4", "--lora-rank", "8")

    return made_once(tmp_path_factory, "xl-bundle", make)


def build_like(plain: Path, checkpoint: Path, out: Path) -> None:
    """Build a checkpoint that has the parts of the bundle `plain` but for its UNet, which takes a mask too."""
    with reused_graphs(plain, out, "encode_prompt", "decode"):
        build(checkpoint, out, *_SHAPES)


@pytest.fixture(scope="session")
def inpainting_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `checkpoint`, with a UNet that takes a mask and the masked image."""
    return made_once(tmp_path_factory, "tiny-inpaint", lambda folder: make_checkpoint(folder, "inpaint"))


@pytest.fixture(scope="session")
def inpainting_bundle(inpainting_checkpoint: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of it. Tests that alter it copy it first."""
    make = partial(build_like, bundle, inpainting_checkpoint)
    return made_once(tmp_path_factory, "inpainting-bundle", make)


@pytest.fixture(scope="session")
def manifest(bundle: Path) -> Manifest:
    return Manifest.load(bundle)


@pytest.fixture(scope="session")
def checked_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with a safety checker that flags some of its pictures."""
    return made_once(tmp_path_factory, "checked/tiny-sd", lambda folder: add_safety_checker(make_checkpoint(folder)))


@pytest.fixture(scope="session")
def checked_bundle(checked_checkpoint: Path, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(out: Path) -> None:
        with reused_graphs(bundle, out, *GRAPHS):
            build(checked_checkpoint, out, "--rows", "2,16", "--decode-batch", "2")

    return made_once(tmp_path_factory, "checked-bundle", make)


@pytest.fixture(scope="session")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distilled decoder for the latents of the checkpoint, with random weights."""
    return made_once(tmp_path_factory, "taesd", make_decoder)


@pytest.fixture(scope="session")
def fast_bundle(
    checked_checkpoint: Path, checked_bundle: Path, distilled: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The checked bundle with that decoder beside its VAE. Tests that alter it copy it first."""

    def make(out: Path) -> None:
        with reused_graphs(checked_bundle, out, "encode_prompt", *PLAIN_STEPS, "encode_image", "safety"):
            build(checked_checkpoint, out, "--rows", "2,4,8", "--decode-batch", "2", "--decoder", str(distilled))

    return made_once(tmp_path_factory, "fast-bundle", make)


@pytest.fixture(scope="session")
def serving(bundle: Path) -> Iterator[HeldServing]:
    """A server process over the tiny bundle, shared: leave it as you found it."""
    with HeldServing(bundle) as running:
        yield running
        assert running.client.get("/v2/health/ready").status_code == 200, "a test left the server not ready"


@pytest.fixture(scope="session")
def demo() -> Iterator[HeldServing]:
    """A server process over the demo's model, shared: leave it as you found it."""
    with HeldServing(DEMO) as running:
        yield running
        assert running.client.get("/v2/health/ready").status_code == 200, "a test left the server not ready"


@pytest.fixture(scope="session")
def xl_serving(xl_bundle: Path, bundle: Path) -> Iterator[HeldServing]:
    """A server process over the tiny Stable Diffusion XL, and `bundle` as `sd`: leave it as you found it."""
    with HeldServing(xl_bundle, "--bundle", f"sd={bundle}") as running:
        yield running
        assert running.client.get("/v2/health/ready").status_code == 200, "a test left the server not ready"
