"""What other programs call the fields of a request: diffusers, AUTOMATIC1111, ComfyUI, OpenAI, Hugging Face."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST = 40  # characters of a name that is compared with others

_SYNONYMS = {
    "prompt": ("inputs", "text", "positive", "positive_prompt", "caption", "text_prompt"),
    "negative_prompt": ("negative", "neg_prompt", "uc"),
    "loras": ("lora", "adapters", "lora_weights", "adapter_id"),
    "clip_skip": ("clip_stop_at_last_layers", "stop_at_clip_layer"),
    "width": ("w",),
    "height": ("h",),
    "num_inference_steps": ("steps", "num_steps", "inference_steps", "sampling_steps", "ddim_steps"),
    "guidance_scale": ("cfg", "cfg_scale", "guidance", "scale", "unconditional_guidance_scale"),
    "seed": ("noise_seed", "random_seed", "generator"),
    "num_images": ("n", "batch_size", "n_iter", "batch_count", "num_images_per_prompt", "n_samples", "num_outputs"),
    "scheduler": ("sampler", "sampler_name", "sampler_index", "sampling_method", "sample_method", "scheduler_name"),
    "sigmas": ("schedule_type", "scheduler_type", "noise_schedule"),
    "eta": ("eta_ddim", "ddim_eta"),
    "image_format": ("format", "output_format", "file_format"),
    "preview_every": ("partial_images", "progressive_steps"),
    "image": ("init_image", "init_images", "image_url", "input_image", "images"),
    "mask": ("mask_image", "inpainting_mask"),
    "decoder": ("sd_vae_decode_method", "vae_decode_method", "vae_decoder"),
    "strength": ("denoise", "denoising_strength", "image_strength", "prompt_strength", "init_image_strength"),
}
_LORAS = 'send loras, such as [{"name": "style", "weight": 0.8}]'
_UPSCALING = "images are not upscaled: send width and height of a size that GET /models lists"
_REASONS = {
    "size": "send width and height",
    "image_size": "send width and height",
    "aspect_ratio": "send width and height",
    "resolution": "send width and height",
    "parameters": "send its fields beside prompt, not in an object of their own",
    "override_settings": "send its fields beside prompt, not in an object of their own",
    "response_format": "set the header Accept: application/json for base64, image/png for a file",
    "output_type": "set the header Accept: application/json for base64, image/png for a file",
    "stream": "set the header Accept: text/event-stream",
    "timesteps": "choose scheduler, timestep_spacing and sigmas by name",
    "lora_scale": _LORAS,
    "cross_attention_kwargs": _LORAS,
    "joint_attention_kwargs": _LORAS,
    "enable_hr": _UPSCALING,
    "hr_scale": _UPSCALING,
    "hr_upscaler": _UPSCALING,
    "upscale": _UPSCALING,
    "subseed": "variations of a seed are not supported: leave it out",
    "subseed_strength": "variations of a seed are not supported: leave it out",
    "restore_faces": "faces are not restored: leave it out",
    "tiling": "tiling is not supported: leave it out",
    "alwayson_scripts": "extensions are not supported: leave it out",
    "script_name": "extensions are not supported: leave it out",
    "styles": "styles are not supported: write them into prompt",
    "style": "styles are not supported: write them into prompt",
    "mask_blur": "masks are not blurred: leave it out",
    "inpainting_fill": "the image itself is the start of what is regenerated: leave it out",
    "inpaint_full_res": "the whole image is denoised: leave it out",
    "inpainting_mask_invert": "invert the mask before sending it: white areas are regenerated",
    "resize_mode": "the image is resized to width and height: leave it out",
    "background": "images are opaque: leave it out",
    "quality": "choose num_inference_steps and guidance_scale",
    "user": "callers are not recorded: leave it out",
    "prompt_2": "both text encoders read prompt: leave it out",
    "negative_prompt_2": "both text encoders read negative_prompt: leave it out",
    "negative_original_size": "it is that of original_size: leave it out",
    "negative_crops_coords_top_left": "it is that of crops_coords_top_left: leave it out",
    "negative_target_size": "it is that of target_size: leave it out",
    "prompt_embeds": "send the text as prompt",
    "negative_prompt_embeds": "send the text as negative_prompt",
}


def _key(name: str) -> str:
    """What spellings of one name share: numInferenceSteps, num-inference-steps."""
    return name.replace("_", "").replace("-", "").replace(" ", "").lower()


_FIELDS = {_key(name): field for field, names in _SYNONYMS.items() for name in names}
_ADVICE = {_key(name): reason for name, reason in _REASONS.items()}


def hint(unknown: str, fields: Iterable[str]) -> str:
    """What to send instead of the field `unknown`, where `fields` are those there are; a sentence without its stop."""
    own = {_key(name): name for name in fields}
    key = _key(unknown) if len(unknown) <= _LONGEST else ""
    if field := own.get(key) or own.get(_key(_FIELDS.get(key, ""))):
        return f"use {field}"
    if reason := _ADVICE.get(key):
        return reason
    known = own | {key: field for key, field in _FIELDS.items() if field in own.values()}
    if near := difflib.get_close_matches(key, known, n=1, cutoff=0.75):
        return f"did you mean {known[near[0]]}?"
    return "/docs lists all fields"
