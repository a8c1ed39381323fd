"""Which models are supported, by their configs."""

from __future__ import annotations

from engines.checkpoints.adapters.embedding import check_embedding_fits
from engines.checkpoints.adapters.lora import check_lora_fits
from engines.checkpoints.checkpoint import Checkpoint
from engines.checkpoints.decoder import check_decoder_fits
from engines.checkpoints.diffusers_folder import CheckpointConfig
from engines.checkpoints.safety_checker import read_preprocessing
from engines.checkpoints.vae import check_vae_fits
from engines.errors import CheckpointError

SUPPORTED = "Supported models: text-to-image checkpoints of Stable Diffusion 1.x, 2.x and XL"
_PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
)
_XL_PIPELINES = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
_XL_CLASSES = {
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
_CLASSES = {
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
}
# Config fields that, when set, give the UNet inputs besides the latent, the timestep and the prompt.
_CONDITIONS = ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim", "encoder_hid_dim_type")
_PURPOSES = {9: "inpainting", 5: "depth-to-image", 7: "upscaling", 8: "editing by instruction"}  # by input channels


def check_supported(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless the configs are those of a supported model, and its additions fit it."""
    _check_classes(checkpoint.config)
    _check_unet(checkpoint.config)
    checkpoint.config.check_complete()
    for lora in checkpoint.loras:
        check_lora_fits(lora, checkpoint.config)
    for embedding in checkpoint.embeddings:
        check_embedding_fits(embedding, checkpoint.config)
    if checkpoint.has_safety_checker:
        read_preprocessing(checkpoint.config)
    if checkpoint.vae:
        check_vae_fits(checkpoint.vae, checkpoint.config)
    if checkpoint.decoder:
        check_decoder_fits(checkpoint.decoder, checkpoint.config)


def check_channels(name: str, channels: int, latent: int) -> None:
    """Raise CheckpointError unless the UNet takes the `latent` channels of the VAE alone."""
    if channels != latent:
        purpose = _PURPOSES.get(channels, "more than a latent")
        raise CheckpointError(f"{name} has a UNet with {channels} input channels ({purpose}). {SUPPORTED}.")


def _check_classes(config: CheckpointConfig) -> None:
    index = config.index
    if index.pipeline not in (*_PIPELINES, *_XL_PIPELINES):
        raise CheckpointError(
            f"{config.name} is a {index.pipeline} (_class_name in model_index.json). {SUPPORTED} ({_PIPELINES[0]})."
        )
    wanted = {**_CLASSES, **(_XL_CLASSES if index.pipeline in _XL_PIPELINES else {})}
    for part, classes in wanted.items():
        if (published := index.class_of(part)) not in classes:
            raise CheckpointError(
                f"{config.name} has {f'a {published}' if published else 'nothing'} as {part} (in model_index.json). "
                f"{SUPPORTED} ({classes[0]})."
            )


def _check_unet(config: CheckpointConfig) -> None:
    unet, latent = config.unet, config.vae.latent_channels
    check_channels(config.name, unet.in_channels, latent)
    if unet.out_channels != latent:
        raise CheckpointError(
            f"{config.name} has a UNet with {unet.out_channels} output channels (out_channels in unet/config.json), "
            f"and its latents have {latent}: it predicts more than the noise. {SUPPORTED}."
        )
    for key in _CONDITIONS:
        if key == "addition_embed_type" and config.has_two_encoders and unet.addition_embed_type == "text_time":
            continue
        if (value := getattr(unet, key)) is not None:
            raise CheckpointError(
                f"{config.name} has a UNet with {key} {value!r}, an input that is not supported. {SUPPORTED}."
            )
    if (width := unet.cross_attention_dim) != config.context.width:
        raise CheckpointError(
            f"The parts of {config.name} do not fit each other: its UNet takes prompt embeddings {width} wide, its "
            f"text encoder returns {config.context.width}. Take both parts from the same checkpoint."
        )
