"""Models to measure: real architectures with random weights, which take as long as trained ones."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.build import api
from engines.build.console import display_on, terminal
from engines.errors import EngineError
from engines.manifest import MANIFEST, BundleError, Manifest

if TYPE_CHECKING:
    from transformers import CLIPTextConfig, CLIPTokenizer

_TOKENS = 77
_CAPTION = "a photograph of a lighthouse on a rock in the sea"


@dataclass(frozen=True, slots=True)
class Work:
    """Floating-point operations at 512x512, of convolutions and linear layers; attention's own products come on top."""

    row: float  # of the UNet, each step
    decode: float  # of a picture


@dataclass(frozen=True, slots=True)
class Architecture:
    """What sets a model of the SD 1.x family apart."""

    layers_per_block: int
    work: Work


ARCHITECTURES = {
    "small": Architecture(1, Work(row=447e9, decode=2480e9)),  # OFA-Sys/small-stable-diffusion-v0
    "sd15": Architecture(2, Work(row=677e9, decode=2480e9)),  # Stable Diffusion 1.5
}


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to be measured: what PyTorch loads, and the bundle made of it. None: it is not there to be measured."""

    name: str
    checkpoint: Path | None
    bundle: Path
    architecture: Architecture | None = None
    given: bool = False  # the bundle is somebody's own, and is taken as it is

    @property
    def work(self) -> Work | None:
        return self.architecture.work if self.architecture else None


def subject(model: str, folder: Path) -> Subject:
    """The model called `model`, or the diffusers folder at that path, with all that is made of it under `folder`."""
    if model in ARCHITECTURES:
        home = folder / model
        return Subject(model, home / "checkpoint", home / "bundle", ARCHITECTURES[model])
    if not Path(model).is_dir():
        raise EngineError(f"{model} is neither a folder nor one of {', '.join(ARCHITECTURES)}.")
    name = Path(model).resolve().name
    return Subject(name, Path(model), folder / name / "bundle")


def checkpoint_of(subject: Subject) -> Path:
    """The folder that diffusers loads, made if it is not there. Raises EngineError where there is none to be had."""
    if subject.checkpoint is None:
        raise EngineError("a bundle is nothing that PyTorch runs: name its checkpoint with --model.")
    if subject.architecture and not (subject.checkpoint / "model_index.json").exists():
        write_checkpoint(subject.checkpoint, layers_per_block=subject.architecture.layers_per_block)
    return subject.checkpoint


def build(subject: Subject, backend: str, rows: Sequence[int]) -> Manifest:
    """Build the subject's bundle for `backend` and these row buckets, unless it is there.

    Raises:
        EngineError: it cannot be built.
    """
    if not subject.given and not is_built(subject, backend, rows):
        with display_on(terminal()) as display:
            api.build(
                api.CheckpointSource(str(checkpoint_of(subject))),
                subject.bundle,
                backends=[backend],
                options=api.ExportOptions(name=subject.name, rows=tuple(rows)),
                verify=False,
                reporter=api.Reporter(progress=display),
            )
    return Manifest.read(subject.bundle)


def is_built(subject: Subject, backend: str, rows: Sequence[int]) -> bool:
    """Whether the bundle is as `build` would make it."""
    with suppress(BundleError):
        manifest = Manifest.read(subject.bundle)
        return subject.given or (backend in manifest.builds and manifest.rows == tuple(rows))
    return False


def adapted(bundle: Path, folder: Path, **facts: Any) -> Path:
    """The bundle once more in the empty `folder`, by links, with other `facts` in its manifest."""
    for path in bundle.iterdir():
        if path.name != MANIFEST:
            (folder / path.name).symlink_to(path.resolve())
    Manifest.read(bundle).model_copy(update=facts).save(folder)
    return folder


def write_checkpoint(folder: Path, *, layers_per_block: int) -> None:
    """Write a diffusers folder of the SD 1.x architecture at its full size; the weights are the dice of seed 0."""
    import torch  # noqa: PLC0415 - seconds of imports, for those who need a model made
    from diffusers import PNDMScheduler, StableDiffusionPipeline  # noqa: PLC0415 - as above
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: PLC0415 - as above

    from engines.demo.tokenizer import write_tokenizer  # noqa: PLC0415 - as above

    write_tokenizer(folder / "tokenizer", [_CAPTION])
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=_TOKENS)
    torch.manual_seed(0)
    StableDiffusionPipeline(
        tokenizer=tokenizer,
        text_encoder=CLIPTextModel(_text_config(tokenizer)),
        unet=make_unet(layers_per_block),
        vae=make_vae(),
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    name_as_published(folder / "text_encoder" / "model.safetensors")


def name_as_published(text_encoder: Path) -> None:
    """Give weights the names that published checkpoints have, and that every reader knows.

    Newer versions of transformers leave their first part out; those read both.
    """
    from safetensors.torch import load_file, save_file  # noqa: PLC0415 - as above

    first = "text_model."
    named = {f"{first}{name.removeprefix(first)}": weight for name, weight in load_file(text_encoder).items()}
    save_file(named, text_encoder, metadata={"format": "pt"})


def _text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    from transformers import CLIPTextConfig  # noqa: PLC0415 - as above

    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_unet(layers_per_block: int) -> Any:
    """diffusers' UNet of the SD 1.x family."""
    from diffusers import UNet2DConditionModel  # noqa: PLC0415 - as above

    return UNet2DConditionModel(
        sample_size=64,
        layers_per_block=layers_per_block,
        block_out_channels=(320, 640, 1280, 1280),
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        cross_attention_dim=768,
        attention_head_dim=8,
    )


def make_vae() -> Any:
    """diffusers' autoencoder of the family."""
    from diffusers import AutoencoderKL  # noqa: PLC0415 - as above

    return AutoencoderKL(
        sample_size=512,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
    )
