"""Presets: how the authors of distilled models sample them in a few steps, as their model cards say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from types import MappingProxyType

from engines.schedulers import Spacing


@dataclass(frozen=True, slots=True)
class Preset:
    """The defaults of requests that a model card states."""

    models: str  # what it is for
    source: str  # the hub ids of the model cards
    _: KW_ONLY
    steps: int
    scheduler: str | None = None  # None: the checkpoint's own
    scheduler_xl: str | None = None  # of Stable Diffusion XL, where it is another
    guidance: float = 0.0  # of most, which are distilled to do without it
    timestep_spacing: Spacing | None = None
    eta: float | None = None
    timesteps: tuple[int, ...] | None = None
    embeds_guidance: bool = False  # whether the UNet takes the guidance scale as an input
    is_for_xl_alone: bool = False


_LIGHTNING = "ByteDance/SDXL-Lightning"
_HYPER = "ByteDance/Hyper-SD"
_DMD2 = "tianweiy/DMD2"


def _lightning(steps: int) -> Preset:
    return Preset(
        f"SDXL-Lightning, {steps} steps",
        _LIGHTNING,
        steps=steps,
        scheduler="euler",
        timestep_spacing="trailing",
        is_for_xl_alone=True,
    )


def _hyper(steps: int) -> Preset:
    return Preset(
        f"Hyper-SD, LoRA of {steps} steps", _HYPER, steps=steps, scheduler="ddim", timestep_spacing="trailing"
    )


def _hyper_cfg(steps: int) -> Preset:
    return Preset(  # the card recommends a guidance from 5 to 8
        f"Hyper-SD, LoRA of {steps} steps that keeps guidance",
        _HYPER,
        steps=steps,
        guidance=5.0,
        scheduler="ddim",
        timestep_spacing="trailing",
    )


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "turbo": Preset(
            "SD-Turbo, SDXL-Turbo",
            "stabilityai/sd-turbo, stabilityai/sdxl-turbo",
            steps=1,
            scheduler="euler",
            scheduler_xl="euler_ancestral",
            timestep_spacing="trailing",
        ),
        "lightning-2": _lightning(2),
        "lightning-4": _lightning(4),
        "lightning-8": _lightning(8),
        "hyper-1": Preset("Hyper-SD, unified LoRA of 1 to 8 steps", _HYPER, steps=1, scheduler="tcd", eta=1.0),
        "hyper-1-unet": Preset(
            "Hyper-SD, UNet of one step", _HYPER, steps=1, scheduler="lcm", timesteps=(800,), is_for_xl_alone=True
        ),
        "hyper-2": _hyper(2),
        "hyper-4": _hyper(4),
        "hyper-8": _hyper(8),
        "hyper-8-cfg": _hyper_cfg(8),
        "hyper-12-cfg": _hyper_cfg(12),
        "lcm": Preset(
            "LCM, UNets that embed the guidance scale",
            "SimianLuo/LCM_Dreamshaper_v7, latent-consistency/lcm-sdxl",
            steps=4,
            guidance=8.0,
            scheduler="lcm",
            embeds_guidance=True,
        ),
        "lcm-lora": Preset(
            "LCM-LoRA",
            "latent-consistency/lcm-lora-sdv1-5, latent-consistency/lcm-lora-sdxl",
            steps=4,
            scheduler="lcm",
        ),
        "tcd": Preset("TCD", "h1t/TCD-SD15-LoRA, h1t/TCD-SDXL-LoRA", steps=4, scheduler="tcd", eta=0.3),
        "dmd2": Preset(
            "DMD2, four steps",
            _DMD2,
            steps=4,
            scheduler="lcm",
            timesteps=(999, 749, 499, 249),
            is_for_xl_alone=True,
        ),
        "dmd2-1": Preset("DMD2, one step", _DMD2, steps=1, scheduler="lcm", timesteps=(399,), is_for_xl_alone=True),
        "sdxs": Preset("SDXS", "IDKiro/sdxs-512-0.9, IDKiro/sdxs-512-dreamshaper", steps=1),
    }
)
