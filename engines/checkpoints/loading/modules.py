"""Load a checkpoint's weights into torch modules, with its LoRAs, embeddings and decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

from engines.checkpoints.adapters.embedding import LearnedToken
from engines.checkpoints.checkpoint import Checkpoint
from engines.checkpoints.configs import TinyVaeConfig
from engines.checkpoints.decoder import Decoder, decoder_layer
from engines.checkpoints.diffusers_folder import SAFETY_CHECKER, CheckpointConfig
from engines.checkpoints.families import SECOND_ENCODER, SECOND_TOKENIZER
from engines.checkpoints.loading.add_tokens import add_to_text_encoders, add_to_tokenizer
from engines.checkpoints.loading.convert import load_vae
from engines.checkpoints.loading.diagnose import why_unloadable
from engines.checkpoints.loading.finite import check_finite
from engines.checkpoints.loading.fuse_lora import fuse_lora
from engines.checkpoints.loading.libraries import LOAD_ERRORS, first_sentence, load_tensors, quiet
from engines.checkpoints.loading.mapped import type_to_load, widen
from engines.checkpoints.safety_checker import Preprocessing, read_preprocessing
from engines.checkpoints.vae import Vae
from engines.errors import CheckpointError
from engines.manifest import LoraPart
from engines.safetensors_header import read_header


@dataclass(frozen=True)
class SafetyChecker:
    """A StableDiffusionSafetyChecker, and what is done to images before it sees them."""

    module: Any
    preprocessing: Preprocessing


@dataclass(frozen=True)
class Modules:
    """A checkpoint's parts, which compute in FP32, in evaluation mode, with torch's fused attention.

    Weights of large parts may be in 16 bits; see `engines.checkpoints.loading.mapped`.
    """

    text_encoder: Any
    unet: Any
    vae: Any
    decoder: Any = None  # a distilled one, beside the VAE
    safety_checker: SafetyChecker | None = None
    text_encoder_2: Any = None  # of models with two

    @property
    def text_encoders(self) -> tuple[Any, ...]:
        return (self.text_encoder, self.text_encoder_2) if self.text_encoder_2 else (self.text_encoder,)

    @property
    def lora_parts(self) -> dict[LoraPart, Any]:
        """Those that LoRAs update."""
        parts: dict[LoraPart, Any] = {"unet": self.unet, "text_encoder": self.text_encoder}
        return parts | ({"text_encoder_2": self.text_encoder_2} if self.text_encoder_2 else {})


def load_modules(config: CheckpointConfig, checkpoint: Checkpoint) -> Modules:
    """Load the weights from the folder of `config`, fuse the LoRAs into them in order, and add embeddings and decoder.

    Raises:
        CheckpointError: a file is damaged or lacks weights, or a LoRA was made for another model.
    """
    with quiet():
        replaced = checkpoint.vae
        vae = _load_vae(replaced, config) if replaced else _load_part(_vae_class(config), config, "vae")
        modules = Modules(
            text_encoder=_load_part(CLIPTextModel, config, "text_encoder", attn_implementation="sdpa"),
            unet=_load_part(UNet2DConditionModel, config, "unet", dtype=_type_of("unet", config, checkpoint)),
            vae=vae,
            decoder=_load_decoder(checkpoint.decoder) if checkpoint.decoder else None,
            safety_checker=_load_safety_checker(config) if checkpoint.has_safety_checker else None,
            text_encoder_2=_load_second_encoder(config, checkpoint) if config.has_two_encoders else None,
        )
    _check_finite(modules, config, checkpoint)
    for module in (modules.unet, modules.text_encoder_2):
        if module is not None:
            widen(module)
    for lora in checkpoint.loras:
        fuse_lora(lora, modules.lora_parts)
    if checkpoint.embeddings:
        tokenizer = load_tokenizer(config, checkpoint.learned_tokens)
        add_to_text_encoders(modules.text_encoders, checkpoint.embeddings, tokenizer)
    return modules


def load_tokenizer(config: CheckpointConfig, learned_tokens: Sequence[LearnedToken] = ()) -> Any:
    """Load the tokenizer and add `learned_tokens` to it. Raises CheckpointError if it cannot be read."""
    tokenizer = _load_tokenizer(config, "tokenizer")
    add_to_tokenizer(tokenizer, learned_tokens)
    return tokenizer


def second_pad(config: CheckpointConfig) -> int | None:
    """The token that the second tokenizer fills prompts up with; None where the model has one text encoder.

    Raises:
        CheckpointError: it cannot be read, or has another vocabulary than the first.
    """
    if not config.has_two_encoders:
        return None
    first, second = (_load_tokenizer(config, name) for name in ("tokenizer", SECOND_TOKENIZER))
    if first.get_vocab() != second.get_vocab():
        raise CheckpointError(
            f"The two tokenizers of {config.name} have different vocabularies, which is not supported."
        )
    pad: int = second.pad_token_id
    return pad


def _load_tokenizer(config: CheckpointConfig, folder: str) -> Any:
    try:
        with quiet():
            return CLIPTokenizer.from_pretrained(config.folder / folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"The {folder} of {config.name} cannot be loaded: {error}") from error


def _check_finite(modules: Modules, config: CheckpointConfig, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for NaN or infinity, and name the file that holds it as the caller knows it."""
    for part in config.parts:
        files = (checkpoint.path,) if checkpoint.single_file else config.weights(part)
        if part == "vae" and checkpoint.vae:
            files = (checkpoint.vae.weights,)
        for file in files:
            shapes = read_header(file)[0] if len(files) > 1 and file.suffix == ".safetensors" else None
            held = (
                (f"{part}.{name}", tensor)
                for name, tensor in getattr(modules, part).state_dict().items()
                if shapes is None or name in shapes or f"text_model.{name}" in shapes
            )
            check_finite(held, str(file))
    if checkpoint.decoder:
        check_finite(modules.decoder.state_dict().items(), str(checkpoint.decoder.weights))


def _load_part(kind: Any, config: CheckpointConfig, part: str, **options: Any) -> Any:
    """Load one part. Pickles are read by torch's weights_only loading, which both libraries use."""
    weights = config.part_weights(part)
    options |= {"use_safetensors": not weights.pickled, "variant": weights.variant}
    return _load(kind, config.folder / part, name=config.name, part=part, **options)


def _vae_class(config: CheckpointConfig) -> Any:
    return AutoencoderTiny if isinstance(config.vae, TinyVaeConfig) else AutoencoderKL


def _load_second_encoder(config: CheckpointConfig, checkpoint: Checkpoint) -> Any:
    dtype = _type_of(SECOND_ENCODER, config, checkpoint)
    return _load_part(CLIPTextModelWithProjection, config, SECOND_ENCODER, dtype=dtype, attn_implementation="sdpa")


def _type_of(part: str, config: CheckpointConfig, checkpoint: Checkpoint) -> torch.dtype:
    """The type that a part is loaded in: FP32 where its weights are changed in memory."""
    is_changed = checkpoint.loras or checkpoint.embeddings
    return torch.float32 if is_changed else type_to_load(config.weights(part))


def _load_safety_checker(config: CheckpointConfig) -> SafetyChecker:
    module = _load_part(StableDiffusionSafetyChecker, config, SAFETY_CHECKER)
    module.vision_model.set_attn_implementation("sdpa")
    check_finite(module.state_dict().items(), str(config.folder / SAFETY_CHECKER))
    return SafetyChecker(module, read_preprocessing(config))


def _load_decoder(decoder: Decoder) -> Any:
    if decoder.file:
        return _decoder_in_file(decoder)
    return _load(AutoencoderTiny, decoder.folder, name=decoder.name, part="decoder", use_safetensors=True)


def _decoder_in_file(decoder: Decoder) -> Any:
    config = {key: value for key, value in decoder.config.items() if not key.startswith("_")}
    module = AutoencoderTiny(**config)
    tensors = {decoder_layer(name): tensor for name, tensor in load_tensors(decoder.weights).items()}
    try:
        module.decoder.load_state_dict({name: tensor.float() for name, tensor in tensors.items() if name})
    except RuntimeError as error:
        raise CheckpointError(
            f"{decoder.name} is not a distilled decoder such as TAESD ({first_sentence(error)}): pass the folder of an "
            "AutoencoderTiny."
        ) from error
    return module.eval()


def _load_vae(vae: Vae, config: CheckpointConfig) -> Any:
    if vae.config:
        return _load(AutoencoderKL, vae.config.parent, name=vae.name, part="vae", use_safetensors=True)
    return load_vae(vae, config)


def _load(kind: Any, folder: Path, *, name: str, part: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    keyword = "dtype" if issubclass(kind, PreTrainedModel) else "torch_dtype"
    try:
        module, info = kind.from_pretrained(
            folder,
            local_files_only=True,
            output_loading_info=True,
            **{keyword: dtype},
            **options,
        )
    except LOAD_ERRORS as error:
        why = why_unloadable(kind, folder, error)
        raise CheckpointError(f"The weights of {name} cannot be loaded: {part}: {why.rstrip('.')}.") from error
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"The weights of {name} cannot be loaded: {part} lacks {len(missing)} that its config needs, "
            f"such as {missing[0]}. Download the checkpoint again."
        )
    return module.eval()
