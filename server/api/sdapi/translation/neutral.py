"""Fields that clients always send and that have no counterpart here: they must have a value without effect."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from server.api.problems import shorten
from server.requests.errors import FieldError, InvalidRequest

# Null is always accepted; the first value is the one that errors recommend.
_FIELDS: Mapping[str, tuple[object, ...]] = {
    "enable_hr": (False,),
    "firstphase_width": (0,),
    "firstphase_height": (0,),
    "subseed_strength": (0,),
    "seed_resize_from_w": (0, -1),
    "seed_resize_from_h": (0, -1),
    "restore_faces": (False,),
    "tiling": (False,),
    "styles": ([],),
    "s_churn": (0,),
    "s_noise": (1,),
    "s_min_uncond": (0,),
    "refiner_checkpoint": ("", "None"),
    "script_name": ("", "None"),
    "infotext": ("",),
    "initial_noise_multiplier": (1,),
    "latent_mask": ("",),
    "mask_round": (True,),
}
_SETTINGS: Mapping[str, tuple[object, ...]] = {
    "samples_format": ("png",),
    "sd_vae": ("Automatic", "None", "auto", ""),
    "sd_vae_encode_method": ("Full",),
    "sd_hypernetwork": ("None", ""),
    "sd_lora": ("None", ""),
    "randn_source": ("CPU",),
    "eta_noise_seed_delta": (0,),
    "initial_noise_multiplier": (1,),
    "inpainting_mask_weight": (1,),
    "img2img_color_correction": (False,),
    "img2img_fix_steps": (False,),
    "token_merging_ratio": (0,),
    "token_merging_ratio_img2img": (0,),
}
HONOURED_SETTINGS = ("CLIP_stop_at_last_layers", "sd_model_checkpoint", "sd_vae_decode_method")
# What changes nothing: options of steps that are off, what would be saved, and what only the web UI's page has.
_WITHOUT_EFFECT = {
    "alwayson_scripts",  # checked for itself
    "comments",
    "denoising_strength",
    "disable_extra_networks",
    "do_not_save_grid",
    "do_not_save_samples",
    "hr_checkpoint_name",
    "hr_cfg",
    "hr_negative_prompt",
    "hr_prompt",
    "hr_resize_x",
    "hr_resize_y",
    "hr_sampler_name",
    "hr_scale",
    "hr_scheduler",
    "hr_second_pass_steps",
    "hr_upscaler",
    "image_cfg_scale",
    "override_settings_restore_afterwards",
    "refiner_switch_at",
    "s_tmax",
    "s_tmin",
    "save_images",
    "script_args",
    "seed_enable_extras",
    "subseed",
}
_MOST_WARNINGS = 10


def check(extra: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Check the fields and the overridden settings that decide no image; return warnings of the unknown ones.

    Raises InvalidRequest, naming each that would change the image.
    """
    found = [
        *_unsupported(extra, _FIELDS),
        *_unsupported(settings, _SETTINGS, prefix="override_settings."),
        *_active_scripts(extra.get("alwayson_scripts")),
    ]
    if found:
        raise InvalidRequest(f"{found[0].field}: {found[0].message}", fields=tuple(found))
    return [*_warnings(extra, settings)][:_MOST_WARNINGS]


def _unsupported(
    values: Mapping[str, Any], known: Mapping[str, tuple[object, ...]], *, prefix: str = ""
) -> Iterator[FieldError]:
    for name, allowed in known.items():
        value = values.get(name)
        if value is not None and value not in allowed:
            neutral = json.dumps(allowed[0])
            message = f"{_json(value)} is not supported: leave it out, or send {neutral}."
            yield FieldError(prefix + name, message)


def _active_scripts(scripts: object) -> Iterator[FieldError]:
    """The scripts of extensions that are switched on: there are no extensions."""
    if not scripts:
        return
    if not isinstance(scripts, dict):
        yield FieldError("alwayson_scripts", "Input should be an object")
        return
    for name, script in scripts.items():
        if not _is_off(script):
            field = f"alwayson_scripts.{shorten(name)}"
            yield FieldError(field, "There are no extensions here: leave it out, or switch it off.")


def _is_off(script: object) -> bool:
    """Whether a script has no arguments, is switched off by the first one, or by `enabled` in each."""
    arguments = script.get("args") if isinstance(script, dict) else script
    if not arguments:
        return True
    if not isinstance(arguments, list):
        return False
    return arguments[0] is False or all(map(_is_disabled, arguments))


def _is_disabled(argument: object) -> bool:
    return isinstance(argument, dict) and argument.get("enabled", argument.get("enable")) is False


def _warnings(extra: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    for name in extra.keys() - _FIELDS.keys() - _WITHOUT_EFFECT:
        yield f"{shorten(name)}: This field is unknown, and was ignored."
    for name in settings.keys() - _SETTINGS.keys() - {*HONOURED_SETTINGS}:
        yield f"override_settings.{shorten(name)}: This setting has no effect here."
    if extra.get("save_images"):
        yield "save_images: The server saves no images: they are in the reply."


def _json(value: object) -> str:
    return shorten(json.dumps(value, default=str))
