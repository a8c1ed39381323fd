"""The text that AUTOMATIC1111's web UI writes into images: the prompt, the negative prompt, and a line of fields.

    a red heart
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 42, Size: 512x512, Model: sd15

What the web UI has no field for has one of our own, after its fields. It has no escapes for prompts: space at the ends
of lines is lost, and a line of the prompt that begins with "Negative prompt:" begins the negative prompt.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from engines.schedulers import Scheduler, Sigmas, describe
from server.requests.lora_tags import tag_of, tags_in, without_tags
from server.requests.params import GenerationParams
from server.version import VERSION

PROMPT, NEGATIVE_PROMPT = "Prompt", "Negative prompt"  # keys of what `parse` returns
_NEGATIVE = f"{NEGATIVE_PROMPT}:"
_LORA_HASH = 12  # digits that the web UI writes
_MODEL_HASH = 10
_FEWEST_FIELDS = 3  # of a last line that is not the prompt's

_TITLES: Mapping[str, str] = {about.name: about.title for about in describe()}
_SCHEDULE_TYPES: Mapping[Sigmas, str] = {
    "default": "Automatic",
    "karras": "Karras",
    "exponential": "Exponential",
    "beta": "Beta",
}
_QUOTED = re.compile(r'[,:\n"]|^\s|\s$')
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
# A field and the comma after it. Nothing is tried twice, which keeps parsing linear.
_FIELD = re.compile(r'\s*+(?P<key>\w[\w /-]++):\s*+(?P<value>"(?:\\.|[^\\"])++"(?=,|\Z)|[^,]*+)(?:,|\Z)')
_SIZE = re.compile(r"(\d{1,6})x(\d{1,6})")


class SamplerNames(NamedTuple):
    """What the web UI calls a scheduler. Methods that it does not have keep our titles."""

    sampler: str
    schedule_type: str


def sampler_names(scheduler: Scheduler) -> SamplerNames:
    """The names of `scheduler`: dpmpp_2m_karras is DPM++ 2M, Karras. Automatic is the checkpoint's own levels."""
    return SamplerNames(_TITLES[scheduler.method], _SCHEDULE_TYPES[scheduler.sigmas])


def write(params: GenerationParams, *, seed: int, model: str) -> str:
    """The text of the image with `seed`, one of those of `params`; `model` is the name of the model."""
    model_hash = params.model_sha256 and params.model_sha256[:_MODEL_HASH]
    known = {**_fields(params, seed), "Model hash": model_hash, "Model": model, **_extra_fields(params)}
    known["Version"] = f"latentd {VERSION}"
    line = ", ".join(f"{key}: {_quote(_text(value))}" for key, value in known.items() if value is not None)
    negative = f"\n{_NEGATIVE} {params.negative_prompt.text}" if params.negative_prompt.text else ""
    return _clean(f"{_prompt(params)}{negative}\n{line}".strip())


def parse(text: str) -> dict[str, str]:
    """The fields of a text of this form, whoever wrote it, by the web UI's names, and the prompts as two more.

    As in the web UI a size is two fields, `Size-1` and `Size-2`. Text without a line of fields is a prompt.
    """
    *lines, last = text.strip().split("\n")
    fields = dict(_read_fields(last))
    if len(fields) < _FEWEST_FIELDS:
        lines, fields = [*lines, last], {}
    lines = [line.strip() for line in lines]
    start = next((index for index, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    negative = "\n".join(lines[start:]).removeprefix(_NEGATIVE)
    return {**fields, PROMPT: "\n".join(lines[:start]).strip(), NEGATIVE_PROMPT: negative.strip()}


def _prompt(params: GenerationParams) -> str:
    """The prompt as it was sent, if its tags alone choose the LoRAs; otherwise tags of all are at its end."""
    text = params.prompt.text
    if not params.loras or params.prompt.syntax == "plain" or _weights(params) == _tagged_weights(text):
        return text
    return f"{without_tags(text).rstrip()} {_tags(params)}".lstrip()


def _weights(params: GenerationParams) -> dict[str, float]:
    """The weights of LoRAs, by their names without folders."""
    return {_last(lora.name): weight for lora, weight in params.loras}


def _tagged_weights(text: str) -> dict[str, float]:
    weights = defaultdict[str, float](float)
    for tag in tags_in(text):
        weights[_last(tag.name)] += tag.weight
    return {name: weight for name, weight in weights.items() if weight}


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _tags(params: GenerationParams) -> str:
    return "".join(tag_of(lora.name, weight) for lora, weight in params.loras)


def _lora_hashes(params: GenerationParams) -> str | None:
    """The web UI's field: it finds a LoRA by this where it has it under another name."""
    tags = tags_in(_prompt(params)) if params.loras and params.prompt.syntax != "plain" else []
    written = {_last(tag.name): tag.name for tag in tags}
    named = {written.get(_last(lora.name), lora.name): lora.tensors_sha256[:_LORA_HASH] for lora, _ in params.loras}
    return ", ".join(f"{name.replace(',', '')}: {short}" for name, short in named.items()) or None


def _fields(params: GenerationParams, seed: int) -> dict[str, object]:
    names = sampler_names(params.scheduler)
    return {
        "Steps": params.num_inference_steps,
        "Sampler": names.sampler,
        "Schedule type": names.schedule_type,
        "CFG scale": params.guidance_scale,
        "Seed": seed,
        "Size": str(params.size),
    }


def _extra_fields(params: GenerationParams) -> dict[str, object]:
    """Fields that are written only if they say something: None is left out."""
    scheduler = params.scheduler
    return {
        "Denoising strength": params.init_image.strength if params.init_image else None,
        "Clip skip": params.clip_skip + 1 if params.clip_skip else None,  # the web UI counts from the last layer, 1
        "Lora hashes": _lora_hashes(params),
        "RNG": "CPU",  # the web UI's name of noise from torch's generator on the CPU
        "Eta DDIM" if scheduler.method == "ddim" else "Eta": scheduler.eta,
        "Skip Early CFG": params.guidance_start or None,
        "VAE Decoder": "TAESD" if params.decoder == "fast" else None,
        # Ours.
        **_size_conditions(params),
        "Guidance end": None if params.guidance_end == 1 else params.guidance_end,
        "Timestep spacing": scheduler.timestep_spacing,
        "Final sigmas type": scheduler.final_sigmas_type,
        "Loras": _tags(params) if params.loras and params.prompt.syntax == "plain" else None,
        "Prompt syntax": None if params.prompt.syntax == "a1111" else params.prompt.syntax,
        "Cache": None if params.cache == "off" else params.cache,
        "Full steps": params.full_steps,
        "Exact": True if params.isolated else None,
    }


def _size_conditions(params: GenerationParams) -> dict[str, object]:
    """Those that are not the defaults, each size as the image's is written."""
    own = (params.size.height, params.size.width)
    sizes = {"Original size": params.original_size, "Target size": params.target_size}
    top, left = params.crops_coords_top_left or (0, 0)
    return {
        **{name: f"{size[1]}x{size[0]}" for name, size in sizes.items() if size and size != own},
        "Crop top": top or None,
        "Crop left": left or None,
    }


def _text(value: object) -> str:
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if _QUOTED.search(text) else text


def _unquote(text: str) -> str:
    if not text.startswith('"'):
        return text
    try:
        found = json.loads(text, strict=False)
    except ValueError:
        return text
    return found if isinstance(found, str) else text


def _clean(text: str) -> str:
    """`text` without what no file can carry: control characters but tab and newline, and halves of surrogate pairs."""
    return _CONTROL.sub(" ", text).encode(errors="replace").decode()


def _read_fields(line: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(line):
        field = _FIELD.match(line, at)
        if field is None:
            at = line.find(",", at) + 1 or len(line)
            continue
        at = field.end()
        value = _unquote(field["value"].strip())
        if size := _SIZE.fullmatch(value):
            yield f"{field['key']}-1", size[1]
            yield f"{field['key']}-2", size[2]
        else:
            yield field["key"], value
