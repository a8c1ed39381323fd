"""The defaults of requests: what the build was asked for, a preset, or what the checkpoint itself says."""

from __future__ import annotations

from collections.abc import Iterator

from engines.build.options import OWN, ExportOptions
from engines.build.request_defaults.presets import PRESETS, Preset
from engines.checkpoints.checkpoint import Checkpoint
from engines.checkpoints.distilled import Distillation, find_distillation
from engines.errors import EngineError
from engines.manifest import Defaults
from engines.schedulers import complete, find

_LCM = Preset("latent consistency models", "diffusers' pipeline", steps=4, guidance=8.5, scheduler="lcm")
_USUAL = Preset("any other model", "diffusers' pipelines", steps=50, guidance=7.5)


def request_defaults(checkpoint: Checkpoint, options: ExportOptions) -> Defaults:
    """The defaults of requests.

    Raises EngineError for options that contradict each other or the checkpoint.
    """
    preset = _preset(checkpoint, options)
    _check_fits(checkpoint, options.preset, preset)
    usual = _defaults_of(preset, checkpoint)
    try:
        asked = find(options.scheduler or usual.scheduler, timestep_spacing=options.timestep_spacing, eta=options.eta)
    except ValueError as error:
        raise EngineError(f"The defaults of requests (--scheduler, --timestep-spacing, --eta): {error}") from error
    steps = options.steps or usual.num_inference_steps
    scheduler = complete(asked, usual, num_steps=steps)
    return Defaults(
        scheduler=scheduler.name,
        num_inference_steps=steps,
        guidance_scale=usual.guidance_scale if options.guidance is None else options.guidance,
        timestep_spacing=scheduler.timestep_spacing,
        eta=scheduler.eta,
        timesteps=scheduler.timesteps,
    )


def notes_on_defaults(checkpoint: Checkpoint, options: ExportOptions) -> Iterator[str]:
    """What a user should know of where the defaults come from: a sentence for each."""
    found = _found(checkpoint)
    if options.preset is None and found:
        yield f"requests have the defaults of --preset {found.preset}, by {found.evidence} (--preset {OWN}: its own)"
    if options.preset in (None, OWN) or PRESETS[options.preset].embeds_guidance:
        return
    if found and found.preset != options.preset:
        yield f"warning: --preset {options.preset} is not the one of {found.evidence}, which is {found.preset}"
    if found is None and not checkpoint.loras:
        yield (
            f"warning: nothing in {checkpoint.name} says that it is {PRESETS[options.preset].models}, and no LoRA is "
            "fused: unless its weights are distilled, images of so few steps are blurred"
        )


def _preset(checkpoint: Checkpoint, options: ExportOptions) -> Preset:
    if options.preset not in (None, OWN):
        return PRESETS[options.preset]
    found = _found(checkpoint) if options.preset is None else None
    if found:
        return PRESETS[found.preset]
    return _LCM if _embeds_guidance(checkpoint) or checkpoint.config.scheduler == "lcm" else _USUAL


def _found(checkpoint: Checkpoint) -> Distillation | None:
    """What it is a distillation of. Latent consistency models are known by their UNets, and keep their defaults."""
    return None if _embeds_guidance(checkpoint) else find_distillation(checkpoint)


def _embeds_guidance(checkpoint: Checkpoint) -> bool:
    return checkpoint.config.guidance_embedding is not None


def _check_fits(checkpoint: Checkpoint, name: str | None, preset: Preset) -> None:
    """Raise EngineError unless the checkpoint can be what the preset named is for."""
    if name in (None, OWN):
        return
    embeds, is_xl = _embeds_guidance(checkpoint), checkpoint.config.has_two_encoders
    if preset.embeds_guidance and not embeds:
        raise EngineError(
            f"--preset {name} is for UNets that embed the guidance scale (time_cond_proj_dim), and that of "
            f"{checkpoint.name} does not: with LCM-LoRA, fused or merged, take --preset lcm-lora."
        )
    if embeds and not preset.embeds_guidance:
        raise EngineError(
            f"--preset {name} is for {preset.models}, and {checkpoint.name} is a latent consistency model, whose UNet "
            "embeds the guidance scale: take --preset lcm."
        )
    if preset.is_for_xl_alone and not is_xl:
        raise EngineError(
            f"--preset {name} is for {preset.models}, which is a Stable Diffusion XL, and {checkpoint.name} is not: "
            "choose another preset, or leave it out."
        )


def _defaults_of(preset: Preset, checkpoint: Checkpoint) -> Defaults:
    scheduler = preset.scheduler or checkpoint.config.scheduler
    if preset.scheduler_xl and checkpoint.config.has_two_encoders:
        scheduler = preset.scheduler_xl
    return Defaults(
        scheduler=scheduler,
        num_inference_steps=preset.steps,
        guidance_scale=preset.guidance,
        timestep_spacing=preset.timestep_spacing,
        eta=preset.eta,
        timesteps=preset.timesteps,
    )
