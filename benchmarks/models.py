"""Models to measure: real architectures with random weights, which compute for as long as trained ones."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
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
class Flops:
    """Floating-point operations at 512x512 in convolutions and linear layers; attention products are not counted."""

    row: float  # one UNet row in one step
    decode: float  # one image


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model of the SD 1.x family: what differs from the others, and its cost."""

    layers_per_block: int
    flops: Flops


ARCHITECTURES = {
    "small": Architecture(1, Flops(row=447e9, decode=2480e9)),  # OFA-Sys/small-stable-diffusion-v0
    "sd15": Architecture(2, Flops(row=677e9, decode=2480e9)),  # Stable Diffusion 1.5
}


LORA_CAPACITY = api.LoraCapacity(slots=8, rank=64)


@dataclass(frozen=True, slots=True)
class BenchmarkModel:
    """A model to measure: the checkpoint that PyTorch loads, None if there is none, and the bundle built from it."""

    name: str
    checkpoint: Path | None
    bundle: Path
    architecture: Architecture | None = None
    given: bool = False  # the bundle was named by the user, and is never rebuilt

    @property
    def flops(self) -> Flops | None:
        return self.architecture.flops if self.architecture else None


def find_model(model: str, folder: Path) -> BenchmarkModel:
    """The architecture called `model`, or the diffusers folder at that path; built files go under `folder`.

    Raises EngineError if it is neither.
    """
    if model in ARCHITECTURES:
        home = folder / model
        return BenchmarkModel(model, home / "checkpoint", home / "bundle", ARCHITECTURES[model])
    if not Path(model).is_dir():
        raise EngineError(f"{model} is neither a folder nor one of {', '.join(ARCHITECTURES)}.")
    name = Path(model).resolve().name
    return BenchmarkModel(name, Path(model), folder / name / "bundle")


def with_loras(model: BenchmarkModel) -> BenchmarkModel:
    """The model in a bundle of its own, built with graphs for LoRAs; a bundle that was given stays as it is."""
    return model if model.given else replace(model, bundle=model.bundle.with_name("bundle-lora"))


def checkpoint_of(model: BenchmarkModel) -> Path:
    """The folder that diffusers loads, written if missing. Raises EngineError for a bundle without a checkpoint."""
    if model.checkpoint is None:
        raise EngineError("PyTorch cannot run a bundle: give its checkpoint with --model.")
    if model.architecture and not (model.checkpoint / "model_index.json").exists():
        write_checkpoint(model.checkpoint, layers_per_block=model.architecture.layers_per_block)
    return model.checkpoint


def build(
    model: BenchmarkModel, backend: str, rows: Sequence[int], *, lora: api.LoraCapacity | None = None
) -> Manifest:
    """Build the model's bundle for `backend` and these row buckets, unless it is up to date.

    With `lora` it has the graphs that apply LoRAs too.

    Raises:
        EngineError: it cannot be built.
    """
    if not model.given and not is_built(model, backend, rows, lora=lora):
        with display_on(terminal()) as display:
            api.build(
                api.CheckpointSource(str(checkpoint_of(model))),
                model.bundle,
                backends=[backend],
                options=api.ExportOptions(name=model.name, rows=tuple(rows), lora=lora),
                verify=False,
                reporter=api.Reporter(progress=display),
            )
    return Manifest.read(model.bundle)


def is_built(model: BenchmarkModel, backend: str, rows: Sequence[int], *, lora: api.LoraCapacity | None = None) -> bool:
    """Whether the bundle is up to date."""
    with suppress(BundleError):
        manifest = Manifest.read(model.bundle)
        as_wanted = (manifest.rows, manifest.lora) == (tuple(rows), lora)
        return model.given or (backend in manifest.builds and as_wanted)
    return False


def adapted(bundle: Path, folder: Path, **fields: Any) -> Path:
    """A copy of the bundle in the empty `folder`, with other `fields` in its manifest.

    Not by hard links: onnx reads no weights that have several names.
    """
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns(MANIFEST), dirs_exist_ok=True)
    Manifest.read(bundle).model_copy(update=fields).save(folder)
    return folder


def write_checkpoint(folder: Path, *, layers_per_block: int) -> None:
    """Write a diffusers folder of the SD 1.x architecture at its full size; the weights are random, of seed 0."""
    import torch  # noqa: PLC0415 - takes seconds to import, and only making a model needs it
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
    """Rename weights as in published checkpoints, which every version of transformers reads.

    Newer versions write names without the first part.
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
