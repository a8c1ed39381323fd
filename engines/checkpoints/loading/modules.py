"""Read a checkpoint's weights into torch modules, from a diffusers folder or a single file; fuse LoRAs into them, and
teach them the words of embeddings.
"""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from engines.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointConfig,
    CheckpointError,
    Decoder,
    Layout,
    LearnedToken,
    Lora,
    check_fit,
    layout_of,
    read_header,
    read_layout,
)
from engines.progress import Progress

# What the libraries raise for files that are damaged, or do not fit their configs.
_UNREADABLE = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    AttributeError,
    NotImplementedError,
    SafetensorError,
    pickle.UnpicklingError,
)


@dataclass(frozen=True)
class Modules:
    """A checkpoint's parts in FP32, in evaluation mode, with torch's fused attention."""

    text_encoder: Any
    unet: Any
    vae: Any
    decoder: Any  # what decodes: the VAE, or what was distilled from it


@contextmanager
def opened(checkpoint: Checkpoint, progress: Progress) -> Iterator[CheckpointConfig]:
    """The checkpoint as a diffusers folder; that of a single file is temporary, and needs 4 GB for SD 1.x.

    Raises:
        CheckpointError: the single file cannot be read, is not one we build, or its configs describe another.
    """
    if not checkpoint.single_file:
        yield checkpoint.config
        return
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
        with progress.stage(f"converting {checkpoint.path.name}"):
            _convert(checkpoint, Path(folder))
        yield CheckpointConfig(folder=Path(folder), name=checkpoint.name)


def _convert(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the single file as a diffusers folder, in FP32. What holds no weights is copied as it is."""
    pipeline, source = _read_single_file(checkpoint), checkpoint.config.folder
    try:
        for part in ("tokenizer", "scheduler"):
            shutil.copytree(source / part, folder / part)
        shutil.copy(source / "model_index.json", folder)
        with quiet():
            for part in ("text_encoder", "unet", "vae"):
                getattr(pipeline, part).save_pretrained(folder / part)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint.path.name} cannot be converted: {error}. TMPDIR says where.") from error


def _read_single_file(checkpoint: Checkpoint) -> Any:
    """A diffusers pipeline of the file's weights, all of them and nothing else."""
    pickled = checkpoint.path.suffix.lower() != ".safetensors"
    layout = _layout_of_pickle(checkpoint) if pickled else read_layout(checkpoint.path)
    absent = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    try:
        with quiet():
            from diffusers import StableDiffusionPipeline  # noqa: PLC0415 - remarks on packages it can do without

            pipeline = StableDiffusionPipeline.from_single_file(
                str(checkpoint.path),
                config=str(checkpoint.config_folder),
                local_files_only=True,
                torch_dtype=torch.float32,
                requires_safety_checker=False,
                **absent,
            )
    except _UNREADABLE as error:
        raise _misfit(checkpoint, error) from error
    if layout.tensors != (wanted := len(pipeline.unet.state_dict())):
        raise _misfit(checkpoint, f"its UNet has {layout.tensors} weights, not {wanted}")
    return pipeline


def _misfit(checkpoint: Checkpoint, why: Exception | str) -> CheckpointError:
    if isinstance(why, NotImplementedError):  # torch's word for weights that were never filled in
        why = "weights are missing"
    elif isinstance(why, Exception):
        why = _first_sentence(why)
    return CheckpointError(
        f"{checkpoint.path.name} is not what the configs in {checkpoint.config_folder} describe: {why}. "
        "Pass --config with a checkpoint of its kind."
    )


def _layout_of_pickle(checkpoint: Checkpoint) -> Layout:
    """Recognise a pickled single file, as `find` does others by their header."""
    try:
        content = torch.load(checkpoint.path, map_location="meta", weights_only=True)
    except (*_UNREADABLE, EOFError) as error:
        raise CheckpointError(
            f"{checkpoint.path} cannot be read as bare tensors ({_first_sentence(error)}): convert it to .safetensors "
            "where you trust it."
        ) from error
    content = content.get("state_dict", content)
    shapes = {name: tuple(value.shape) for name, value in content.items() if isinstance(value, Tensor)}
    layout = layout_of(checkpoint.path.name, shapes)
    check_fit(checkpoint, layout)
    return layout


def load_modules(config: CheckpointConfig, checkpoint: Checkpoint) -> Modules:
    """Read the weights, fuse the checkpoint's LoRAs into them in order, and add its embeddings and its decoder.

    Raises:
        CheckpointError: a file is damaged or lacks weights, or a LoRA was made for another model.
    """
    with quiet():
        vae = _part(AutoencoderKL, config, "vae")
        modules = Modules(
            text_encoder=_part(CLIPTextModel, config, "text_encoder", attn_implementation="sdpa"),
            unet=_part(UNet2DConditionModel, config, "unet"),
            vae=vae,
            decoder=_decoder(checkpoint.decoder) if checkpoint.decoder else vae,
        )
    for lora in checkpoint.loras:
        _fuse(lora, modules)
    if checkpoint.embeddings:
        _teach(checkpoint, load_tokenizer(config, checkpoint.learned_tokens), modules.text_encoder)
    return modules


def load_tokenizer(config: CheckpointConfig, words: Sequence[LearnedToken] = ()) -> Any:
    """The tokenizer, which finds the tokens of `words` in prompts as diffusers' `load_textual_inversion` has it.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with quiet():
            tokenizer = CLIPTokenizer.from_pretrained(config.folder / "tokenizer", local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"The tokenizer of {config.name} cannot be loaded: {error}") from error
    for word in words:
        tokenizer.add_tokens(list(word.tokens))
    return tokenizer


def _part(kind: Any, config: CheckpointConfig, part: str, **options: Any) -> Any:
    """One module. Pickles are read by torch's weights_only loading, which both libraries are set to."""
    place, safe = config.folder / part, not config.pickled(part)
    return _module(kind, place, name=config.name, part=part, use_safetensors=safe, **options)


def _decoder(decoder: Decoder) -> Any:
    return _module(AutoencoderTiny, decoder.folder, name=decoder.name, part="decoder", use_safetensors=True)


def _module(kind: Any, folder: Path, *, name: str, part: str, **options: Any) -> Any:
    dtype = "torch_dtype" if kind.__module__.startswith("diffusers") else "dtype"
    try:
        module, info = kind.from_pretrained(
            folder,
            local_files_only=True,
            output_loading_info=True,
            **{dtype: torch.float32},
            **options,
        )
    except _UNREADABLE as error:
        raise CheckpointError(f"The weights of {name} cannot be loaded: {part}: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"The weights of {name} cannot be loaded: {part} lacks {len(missing)} that its config needs, "
            f"such as {missing[0]}. Download the checkpoint again."
        )
    return module.eval()


# --- LoRA

# How the two factors of a layer's change, and their scale, are named by those who train them.
_FACTORS = {
    ".lora_down.weight": "down",  # kohya
    ".lora_up.weight": "up",
    ".alpha": "alpha",
    ".lora_A.weight": "down",  # peft
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",  # diffusers
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",  # diffusers' attention processors
    "_lora.up.weight": "up",
}
_Layer = nn.Linear | nn.Conv2d
_ELSEWHERE = "it was made for another model"


def _fuse(lora: Lora, modules: Modules) -> None:
    """W += scale · alpha / rank · up @ down, Hu et al. (2021), section 4.1, for each layer that the file names."""
    named, alphas = _layers(modules), _alphas(lora.path)
    for layer, factors in _factors(lora.path).items():
        part, module = named.get(layer) or named.get(f"{layer}.0") or (None, None)
        if part is None or module is None:
            raise CheckpointError(f"{lora.path.name} changes the layer {layer}, which is not here: {_ELSEWHERE}.")
        change = _change(factors, alphas.get(part))
        if change is None or change.numel() != module.weight.numel() or len(change) != len(module.weight):
            raise CheckpointError(f"{lora.path.name} does not fit the shape of the layer {layer}: {_ELSEWHERE}.")
        with torch.no_grad():
            module.weight += lora.scale * change.view_as(module.weight)


def _change(factors: Mapping[str, Tensor], alpha: float | None) -> Tensor | None:
    """alpha / rank · up @ down as a matrix, [out, in · kernel]; None where the factors do not fit each other."""
    if not {"up", "down"} <= set(factors):
        return None
    up, down = factors["up"].float().flatten(1), factors["down"].float().flatten(1)
    rank = len(down)
    if up.shape[1] != rank:
        return None
    scale = float(factors["alpha"]) if "alpha" in factors else alpha
    return (up @ down) * (1.0 if scale is None else scale / rank)


def _factors(path: Path) -> dict[str, dict[str, Tensor]]:
    """The factors of every layer, by the name that the file has for it."""
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in _tensors(path).items():
        suffix = next((suffix for suffix in _FACTORS if name.endswith(suffix)), None)
        if suffix is None:
            raise CheckpointError(f"{path.name} holds {name}, which is no factor of a LoRA that we know.")
        layer = name.removesuffix(suffix).removeprefix("base_model.model.").replace(".processor.", ".")
        layers[layer][_FACTORS[suffix]] = tensor
    return layers


def _layers(modules: Modules) -> dict[str, tuple[str, _Layer]]:
    """Every layer that a LoRA may change, under each name it goes by, with the part it is of."""
    named: dict[str, tuple[str, _Layer]] = {}
    for name, layer in _changeable(modules.unet):
        for alias in (name, f"unet.{name}", f"lora_unet_{name.replace('.', '_')}"):
            named[alias] = ("unet", layer)
    for name, layer in _changeable(modules.text_encoder):
        full = f"text_model.{name.removeprefix('text_model.')}"  # the wrapper that transformers 5 has taken away
        for alias in (full, f"text_encoder.{full}", f"lora_te_{full.replace('.', '_')}"):
            named[alias] = ("text_encoder", layer)
    return named


def _changeable(module: nn.Module) -> Iterator[tuple[str, _Layer]]:
    for name, layer in module.named_modules():
        if isinstance(layer, _Layer):
            yield name, layer


def _alphas(path: Path) -> Mapping[str, float]:
    """Each part's alpha, where diffusers noted it beside the weights rather than among them."""
    try:
        noted = dict(json.loads(read_header(path)[1].get("lora_adapter_metadata", "{}")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} has metadata that cannot be read: {error}") from error
    config = {key if "." in key else f"unet.{key}": value for key, value in noted.items()}
    for key, value in config.items():
        if value and key.endswith((".use_rslora", ".use_dora", ".alpha_pattern")):
            raise CheckpointError(f"{path.name} was trained with {key}, which is not fused here.")
    return {key.removesuffix(".lora_alpha"): float(config[key]) for key in config if key.endswith(".lora_alpha")}


# --- embeddings


def _teach(checkpoint: Checkpoint, tokenizer: Any, text_encoder: Any) -> None:
    """Lay each vector where the text encoder looks up its token."""
    rows: dict[int, Tensor] = {}
    for embedding in checkpoint.embeddings:
        tensors = _tensors(embedding.path)
        for word in embedding.learned_tokens:
            ids = tokenizer.convert_tokens_to_ids(list(word.tokens))
            rows |= zip(ids, tensors[word.key].view(word.vectors, word.width), strict=True)
    known = text_encoder.get_input_embeddings().num_embeddings
    with quiet():
        text_encoder.resize_token_embeddings(max(known, *(row + 1 for row in rows)), mean_resizing=False)
    with torch.no_grad():
        for row, vector in rows.items():
            text_encoder.get_input_embeddings().weight[row] = vector


# --- the libraries


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _first_sentence(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' remarks on their own internals from people who build an engine."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "transformers", "diffusers")]
    levels = [logger.level for logger in loggers]
    bars = (transformers.logging, diffusers.logging)  # the build shows its own
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        for library in bars:
            library.disable_progress_bar()
        try:
            yield
        finally:
            for library in bars:
                library.enable_progress_bar()
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
