"""What a reply says about its images: the web UI's `info`, JSON in a string."""

from __future__ import annotations

import json
from collections.abc import Sequence

from server.api.sdapi.tasks import Task
from server.api.sdapi.translation.checkpoint import checkpoint_of
from server.api.sdapi.translation.plan import Plan
from server.requests.infotext import sampler_names, write
from server.requests.request import Request
from server.runtime.models import Model
from server.version import VERSION


def info(plan: Plan, task: Task, requests: Sequence[Request], flagged: Sequence[bool | None], model: Model) -> str:
    """Describe the images of `requests`, the first of which is there."""
    params = requests[0].params
    checkpoint = checkpoint_of(model)
    seeds = [seed for request in requests for seed in request.params.seeds]
    texts = [
        write(request.params, seed=seed, model=checkpoint.name) for request in requests for seed in request.params.seeds
    ]
    document = {
        "prompt": params.prompt.text,
        "all_prompts": [params.prompt.text] * len(seeds),
        "negative_prompt": params.negative_prompt.text,
        "all_negative_prompts": [params.negative_prompt.text] * len(seeds),
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": seeds[0],
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": params.size.width,
        "height": params.size.height,
        "sampler_name": sampler_names(params.scheduler).sampler,
        "cfg_scale": params.guidance_scale,
        "steps": params.num_inference_steps,
        "batch_size": plan.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": checkpoint.name,
        "sd_model_hash": checkpoint.short_hash,
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": params.init_image.strength if params.init_image else None,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [],
        "job_timestamp": task.timestamp,
        "clip_skip": params.clip_skip + 1,
        "is_using_inpainting_conditioning": params.masked is not None,
        "version": f"latentd {VERSION}",
        "nsfw_content_detected": list(flagged),
        "warnings": list(dict.fromkeys([*plan.warnings, *params.warnings])),
    }
    return json.dumps(document)
