"""Convert a single-file checkpoint to a diffusers folder."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from engines.checkpoints.checkpoint import Checkpoint
from engines.checkpoints.diffusers_folder import CheckpointConfig
from engines.checkpoints.families import EVERY_TOKENIZER, SECOND_ENCODER
from engines.checkpoints.loading.libraries import LOAD_ERRORS, first_sentence, load_tensors, quiet
from engines.checkpoints.prediction import Prediction, read_prediction
from engines.checkpoints.single_file import SingleFileLayout, check_configs_fit, layout_of, model_names
from engines.checkpoints.vae import Vae, vae_name
from engines.errors import CheckpointError
from engines.progress import Progress

# Of the tensors of each part; those of text encoders begin with cond_stage_model or conditioner.
_PREFIXES = {"unet": "model.", "vae": "first_stage_model.", "text_encoder": "cond", SECOND_ENCODER: "cond"}
_SCHEDULER = "scheduler/scheduler_config.json"


@contextmanager
def as_folder(checkpoint: Checkpoint, progress: Progress) -> Iterator[CheckpointConfig]:
    """Give the checkpoint as a diffusers folder; that of a single file is temporary, and as large as the file.

    Raises:
        CheckpointError: the single file cannot be read, is not supported, or its configs describe another.
    """
    if not checkpoint.single_file:
        yield checkpoint.config
        return
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
        with progress.stage(f"converting {checkpoint.path.name}"):
            _convert(checkpoint, Path(folder), progress)
        yield CheckpointConfig(folder=Path(folder), name=checkpoint.name)


def _convert(checkpoint: Checkpoint, folder: Path, progress: Progress) -> None:
    """Write the single file as a diffusers folder, one part after the other. What has no weights is copied."""
    tensors, layout = _recognised(checkpoint, progress)
    source = checkpoint.config.folder
    try:
        for copied in (*EVERY_TOKENIZER, "scheduler"):
            if (source / copied).is_dir():
                shutil.copytree(source / copied, folder / copied)
        shutil.copy(source / "model_index.json", folder)
        if prediction := read_prediction(checkpoint.path):
            _set_prediction(prediction, folder / _SCHEDULER, progress)
        for part in checkpoint.config.parts:
            if part == "vae" and checkpoint.vae:
                (folder / part).mkdir()
                shutil.copy(source / part / "config.json", folder / part)
            else:
                made = _made(part, checkpoint, layout, tensors)
                with quiet():
                    made.save_pretrained(folder / part)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{checkpoint.path.name} cannot be converted: {error}. Set TMPDIR to choose another folder."
        ) from error


def _set_prediction(prediction: Prediction, path: Path, progress: Progress) -> None:
    """Let the file itself overrule the configs, which only describe its kind."""
    config = json.loads(path.read_text(encoding="utf-8"))
    changes: dict[str, Any] = {"prediction_type": prediction.kind}
    if prediction.zero_terminal_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if any(config.get(key) != value for key, value in changes.items()):
        progress.note(f"{prediction.source} says that the UNet predicts {prediction.kind}: built so")
        path.chmod(0o644)
        path.write_text(json.dumps(config | changes), encoding="utf-8")


def _recognised(checkpoint: Checkpoint, progress: Progress) -> tuple[dict[str, Tensor], SingleFileLayout]:
    """The file's tensors by the names that diffusers knows them by. Raises CheckpointError: the configs do not fit."""
    tensors = _read(checkpoint.path)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    layout = layout_of(checkpoint.path.name, shapes, needs_vae=checkpoint.vae is None)
    check_configs_fit(checkpoint, layout)
    if layout.strays:
        progress.note(
            f"{checkpoint.path.name}: ignoring {len(layout.strays)} tensors that are not of the model, such as "
            f"{layout.strays[0]}"
        )
    return {known: tensors[name] for name, known in model_names(shapes).items()}, layout


def _made(part: str, checkpoint: Checkpoint, layout: SingleFileLayout, tensors: Mapping[str, Tensor]) -> Any:
    """One part, in the type of the file. Raises CheckpointError unless all of its weights are there, and no others."""
    try:
        with quiet():
            own = {"in_channels": layout.channels} if part == "unet" else {}  # more where it inpaints
            module = _part(part, tensors, str(checkpoint.config_folder), **own)
    except LOAD_ERRORS as error:
        raise _misfit(checkpoint, _explain(error, part)) from error
    weights = module.state_dict()
    if lacking := [name for name, weight in weights.items() if weight.is_meta]:
        raise _misfit(checkpoint, f"weights of its {part} are missing, such as {lacking[0]}")
    if part == "unet" and layout.tensors != len(weights):
        raise _misfit(checkpoint, f"its UNet has {layout.tensors} weights, not {len(weights)}")
    return module


def load_vae(vae: Vae, config: CheckpointConfig) -> Any:
    """Load a VAE from a file of its own, by the config of the checkpoint that it is for. Raises CheckpointError."""
    tensors = {vae_name(name): tensor for name, tensor in _read(vae.weights).items()}
    try:
        with quiet():
            module = _part("vae", {name: one for name, one in tensors.items() if name}, str(config.folder)).float()
    except LOAD_ERRORS as error:
        raise CheckpointError(
            f"{vae.name} does not fit {config.name}: {_explain(error, 'vae')}. Pass a VAE made for this kind of model."
        ) from error
    if lacking := [name for name, weight in module.state_dict().items() if weight.is_meta]:
        raise CheckpointError(f"{vae.name} lacks weights of the VAE, such as {lacking[0]}: download it again.")
    return module


def _part(part: str, tensors: Mapping[str, Tensor], config: str, **changes: int) -> Any:
    """Build one part from its tensors by its config with `changes`, in the type that holds all of them exactly."""
    # These modules warn of optional packages, so they are imported only when quiet.
    from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: PLC0415
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm  # noqa: PLC0415
    from transformers import CLIPTextModel, CLIPTextModelWithProjection  # noqa: PLC0415

    own = {name: _computable(tensor) for name, tensor in tensors.items() if name.startswith(_PREFIXES[part])}
    types = {tensor.dtype for tensor in own.values() if tensor.is_floating_point()}
    options: dict[str, Any] = {
        "config": config,
        "subfolder": part,
        "torch_dtype": types.pop() if len(types) == 1 else torch.float32,
        "local_files_only": True,
        **changes,
    }
    encoder = {"text_encoder": CLIPTextModel, SECOND_ENCODER: CLIPTextModelWithProjection}.get(part)
    if encoder:
        return create_diffusers_clip_model_from_ldm(encoder, own, **options)
    kind = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part]
    return kind.from_single_file(own, **options)


def _misfit(checkpoint: Checkpoint, why: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path.name} is not what the configs in {checkpoint.config_folder} describe: {why}. "
        "Pass --config with a checkpoint of the same kind."
    )


def _explain(error: Exception, part: str) -> str:
    if isinstance(error, NotImplementedError):  # torch raises it for weights that were never loaded
        return f"weights of its {part} are missing"
    if found := re.search(r"because (\S+) expected shape \S+?(\[.*?\])\)?, but got \S+?(\[.*?\])", str(error)):
        return f"its {part} has {found[1]} with the shape {found[3]}, not {found[2]}"
    return f"{part}: {first_sentence(error)}"


def _computable(tensor: Tensor) -> Tensor:
    """FP8, which few operations take, in FP16, which holds it exactly."""
    return tensor.half() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a single file. Pickles are read as plain tensors."""
    return load_tensors(path) if path.suffix.lower() == ".safetensors" else _unpickled(path)


def _is_cut(path: Path) -> bool:
    """Whether a pickle is empty, or its zip archive lacks the directory at the end."""
    with path.open("rb") as file:
        start = file.read(4)
    return not start or (start == b"PK\x03\x04" and not zipfile.is_zipfile(path))


def _unpickled(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (*LOAD_ERRORS, EOFError, TypeError, IndexError) as error:
        if _is_cut(path):
            raise CheckpointError(
                f"{path} is incomplete ({path.stat().st_size:,} bytes): download it again."
            ) from error
        raise CheckpointError(
            f"{path} cannot be read as plain tensors ({first_sentence(error)}): convert it to .safetensors "
            "where you trust it."
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path} holds a {type(state).__name__} and not tensors by name (a state dict): pass a checkpoint as it is "
            "published."
        )
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
