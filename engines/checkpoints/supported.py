"""Which models are supported, by their configs."""

from __future__ import annotations

from engines.checkpoints.adapters.embedding import check_embedding_fits
from engines.checkpoints.adapters.lora import check_lora_fits
from engines.checkpoints.checkpoint import Checkpoint
from engines.checkpoints.configs import TextEncoderConfig
from engines.checkpoints.decoder import check_decoder_fits
from engines.checkpoints.diffusers_folder import CheckpointConfig
from engines.checkpoints.families import INPAINTING, SECOND_ENCODER, SUPPORTED
from engines.checkpoints.safety_checker import read_preprocessing
from engines.checkpoints.vae import check_vae_fits
from engines.errors import CheckpointError

# Config fields that, when set, give the UNet inputs besides the latent, the timestep and the prompt.
_CONDITIONS = ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim", "encoder_hid_dim_type")
_TIME_IDS = "text_time"  # diffusers' name of the inputs `time_ids` and pooled embeddings
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


def check_channels(name: str, channels: int, latent: int, *, inpaints: bool) -> None:
    """Raise CheckpointError unless the UNet takes the `latent` channels of the VAE alone.

    Where it may be one that `inpaints`, it may also take a mask and the latents of the masked image.
    """
    if channels != latent and not (inpaints and channels == 2 * latent + 1):
        purpose = _PURPOSES.get(channels, "more than a latent")
        raise CheckpointError(f"{name} has a UNet with {channels} input channels ({purpose}). {SUPPORTED}.")


def _check_classes(config: CheckpointConfig) -> None:
    for part, classes in config.family.classes.items():
        if (published := config.index.class_of(part)) in classes:
            continue
        if published is None and config.index.class_of(SECOND_ENCODER):
            raise CheckpointError(
                f"{config.name} has nothing as {part} (in model_index.json), like the refiner of Stable Diffusion XL, "
                "which continues images that the base model began. Build from the base model, which draws whole ones."
            )
        raise CheckpointError(
            f"{config.name} has {f'a {published}' if published else 'nothing'} as {part} (in model_index.json). "
            f"{SUPPORTED} ({classes[0]})."
        )


def _check_unet(config: CheckpointConfig) -> None:
    unet, latent = config.unet, config.vae.latent_channels
    check_channels(config.name, unet.in_channels, latent, inpaints=config.index.pipeline in INPAINTING)
    if unet.out_channels != latent:
        raise CheckpointError(
            f"{config.name} has a UNet with {unet.out_channels} output channels (out_channels in unet/config.json), "
            f"and its latents have {latent}: it predicts more than the noise. {SUPPORTED}."
        )
    _check_conditions(config)
    if (width := unet.cross_attention_dim) != config.context.width:
        raise CheckpointError(
            f"The parts of {config.name} do not fit each other: its UNet takes prompt embeddings {width} wide, its "
            f"{_encoders(config)} {config.context.width}. Take all parts from the same checkpoint."
        )


def _encoders(config: CheckpointConfig) -> str:
    return "two text encoders return together" if config.text_encoder_2 else "text encoder returns"


def _check_conditions(config: CheckpointConfig) -> None:
    """Raise CheckpointError where the UNet has other inputs than those of its family."""
    expected = {"addition_embed_type": _TIME_IDS} if config.family.time_ids else {}
    for key in _CONDITIONS:
        if (value := getattr(config.unet, key)) == expected.get(key):
            continue
        if value is None:
            raise CheckpointError(
                f"{config.name} has a UNet without {key} {expected[key]!r} (in unet/config.json), which every "
                f"{config.index.pipeline} needs: take the original file."
            )
        raise CheckpointError(
            f"{config.name} has a UNet with {key} {value!r}, an input that is not supported. {SUPPORTED}."
        )
    if config.text_encoder_2:
        _check_pair(config, config.text_encoder, config.text_encoder_2)


def _check_pair(config: CheckpointConfig, first: TextEncoderConfig, second: TextEncoderConfig) -> None:
    """Raise CheckpointError unless the two text encoders fit each other, and the UNet takes what they return."""
    if first.max_position_embeddings != second.max_position_embeddings:
        raise CheckpointError(
            f"The text encoders of {config.name} do not fit each other: one takes {first.max_position_embeddings} "
            f"tokens, the other {second.max_position_embeddings} (max_position_embeddings). Take both from the same "
            "checkpoint."
        )
    unet, count = config.unet, config.family.time_ids
    of_time, total = unet.addition_time_embed_dim, unet.projection_class_embeddings_input_dim
    path = config.folder / "unet" / "config.json"
    if of_time is None or total is None:
        lacking = "addition_time_embed_dim" if of_time is None else "projection_class_embeddings_input_dim"
        raise CheckpointError(f"{path}: {lacking} is missing, the size of an input. Take the original file.")
    if total != (fitting := count * of_time + second.projection_dim):
        raise CheckpointError(
            f"{path}: projection_class_embeddings_input_dim is {total}, and {count} numbers of "
            f"{of_time} (addition_time_embed_dim) with pooled embeddings {second.projection_dim} wide make {fitting}. "
            "Take unet and text_encoder_2 from the same checkpoint; refiners of Stable Diffusion XL are not supported."
        )
