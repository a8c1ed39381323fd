"""The parameters of an answer: every field of a request, with its default filled in."""

from __future__ import annotations

from engines.manifest import Size
from engines.schedulers import Scheduler
from server.requests.params import GenerationParams
from server.requests.schemas import GenerateRequest, Parameters
from server.requests.tokenizer import Prompt

NOT_ECHOED = {
    "priority",
    "timeout_s",
    "guidance_rescale",  # only 0 is accepted
    "sigmas",  # part of the scheduler's name
    "image_format",  # stated with each image
    "preview_every",  # changes the stream of events, not the images
    "image",  # too large to repeat
    "mask",
}


def test_every_field_of_a_request_is_echoed_or_listed() -> None:
    assert set(GenerateRequest.model_fields) == set(Parameters.model_fields) | NOT_ECHOED
    assert not set(Parameters.model_fields) & NOT_ECHOED


def test_values_are_those_of_the_request() -> None:
    params = GenerationParams(
        Prompt("a boat", ()),
        Prompt("a bird", ()),
        Size(width=64, height=48),
        Scheduler("ddim", eta=0.5),
        7,
        3.5,
        (5, 6),
        guidance_end=0.5,
        clip_skip=1,
        unet_inputs={"time_ids": (48, 64, 1, 2, 96, 128)},
        isolated=True,
        cache="faster",
        full_steps=3,
        decoder="fast",
    )
    assert Parameters.of(params).model_dump(exclude={"prompt_syntax", "timestep_spacing", "final_sigmas_type"}) == {
        "model": "",
        "prompt": "a boat",
        "negative_prompt": "a bird",
        "loras": [],
        "clip_skip": 1,
        "width": 64,
        "height": 48,
        "original_size": (48, 64),
        "crops_coords_top_left": (1, 2),
        "target_size": (96, 128),
        "num_inference_steps": 7,
        "guidance_scale": 3.5,
        "guidance_start": 0.0,
        "guidance_end": 0.5,
        "seed": 5,
        "num_images": 2,
        "scheduler": "ddim",
        "eta": 0.5,
        "strength": None,
        "exact": True,
        "cache": "faster",
        "full_steps": 3,
        "decoder": "fast",
    }
