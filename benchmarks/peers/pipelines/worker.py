"""A pipeline in a process of its own: generates one image at a time for `benchmarks.peers.pipelines`.

The command line says what to load, as JSON. Each image is requested by a line of JSON on standard input, and answered
by a line on standard output. It may run under an interpreter that has none of our packages, so it imports only the
standard library and what it measures.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

Spec = Mapping[str, Any]  # kind, model, width, height, threads, guidance, force_fp32
Generate = Callable[[str, int, int], Any]  # prompt, seed, steps -> PIL image


def main() -> int:
    answers = _claim_standard_output()
    try:
        spec = json.loads(sys.argv[1])
        generate = LOADERS[spec["kind"]](spec)
        _answer(answers, {"ready": True})
        for line in sys.stdin:
            task = json.loads(line)
            began = time.perf_counter()
            image = generate(task["prompt"], task["seed"], task["steps"])
            seconds = time.perf_counter() - began
            image.save(task["out"])
            _answer(answers, {"seconds": seconds})
    except Exception as error:  # whatever a library raises, the parent process reports it
        _answer(answers, {"failed": f"{type(error).__name__}: {error}"})
        raise
    return 0


def _claim_standard_output() -> TextIO:
    """Reserve standard output for answers; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _answer(answers: TextIO, fields: Mapping[str, Any]) -> None:
    answers.write(json.dumps(fields) + "\n")
    answers.flush()


def _eager(spec: Spec) -> Generate:
    """diffusers' pipeline, unchanged."""
    return _as_diffusers(_torch_pipeline(spec), spec)


def _compiled(spec: Spec) -> Generate:
    """The same with UNet and decoder under torch.compile, which compiles at the first image: so one is generated."""
    torch, pipeline = import_module("torch"), _torch_pipeline(spec)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.unet = torch.compile(pipeline.unet, fullgraph=True)
    pipeline.vae.decode = torch.compile(pipeline.vae.decode, fullgraph=True)
    generate = _as_diffusers(pipeline, spec)
    generate("", 0, 1)
    return generate


def _torch_pipeline(spec: Spec) -> Any:
    torch, diffusers = import_module("torch"), import_module("diffusers")
    torch.set_num_threads(spec["threads"])
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        spec["model"],
        torch_dtype=torch.float32,
        local_files_only=True,
        safety_checker=None,
        requires_safety_checker=False,
    )
    pipeline.scheduler = _euler(pipeline)
    return pipeline


def _optimum(spec: Spec) -> Generate:
    """optimum-intel's pipeline, for one image of one size, as its documentation advises for CPUs."""
    intel = import_module("optimum.intel")
    import_module("torch").set_num_threads(spec["threads"])
    config = {"INFERENCE_NUM_THREADS": str(spec["threads"])}
    pipeline = intel.OVStableDiffusionPipeline.from_pretrained(spec["model"], compile=False, ov_config=config)
    pipeline.scheduler = _euler(pipeline)
    pipeline.reshape(batch_size=1, height=spec["height"], width=spec["width"], num_images_per_prompt=1)
    pipeline.compile()
    return _as_diffusers(pipeline, spec)


def _euler(pipeline: Any) -> Any:
    euler = import_module("diffusers").EulerDiscreteScheduler
    return euler.from_config(pipeline.scheduler.config, timestep_spacing="linspace")


def _as_diffusers(pipeline: Any, spec: Spec) -> Generate:
    torch = import_module("torch")
    pipeline.set_progress_bar_config(disable=True)

    def generate(prompt: str, seed: int, steps: int) -> Any:
        result = pipeline(
            prompt,
            width=spec["width"],
            height=spec["height"],
            num_inference_steps=steps,
            guidance_scale=spec["guidance"],
            generator=torch.Generator("cpu").manual_seed(seed),
        )
        return result.images[0]

    return generate


def _genai(spec: Spec) -> Generate:
    """openvino-genai's pipeline, in C++, over optimum-intel's export; its generator gives torch's noise."""
    genai, pillow = import_module("openvino_genai"), import_module("PIL.Image")
    pipeline = genai.Text2ImagePipeline(spec["model"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scheduler_config.json"
        own = json.loads((Path(spec["model"]) / "scheduler" / path.name).read_text(encoding="utf-8"))
        path.write_text(json.dumps({**own, "timestep_spacing": "linspace"}), encoding="utf-8")
        pipeline.set_scheduler(genai.Scheduler.from_config(path, genai.Scheduler.Type.EULER_DISCRETE))
    pipeline.reshape(1, spec["height"], spec["width"], spec["guidance"])
    precision = {"INFERENCE_PRECISION_HINT": "f32"} if spec["force_fp32"] else {}
    pipeline.compile("CPU", INFERENCE_NUM_THREADS=spec["threads"], **precision)

    def generate(prompt: str, seed: int, steps: int) -> Any:
        result = pipeline.generate(
            prompt,
            negative_prompt="",
            width=spec["width"],
            height=spec["height"],
            num_inference_steps=steps,
            guidance_scale=spec["guidance"],
            generator=genai.TorchGenerator(seed),
        )
        return pillow.fromarray(result.data[0])

    return generate


def _stable_diffusion_cpp(spec: Spec) -> Generate:
    """stable-diffusion.cpp, which reads a diffusers folder directly."""
    model = import_module("stable_diffusion_cpp").StableDiffusion(
        model_path=spec["model"], n_threads=spec["threads"], rng_type="cpu", sampler_rng_type="cpu"
    )

    def generate(prompt: str, seed: int, steps: int) -> Any:
        return model.generate_image(
            prompt=prompt,
            width=spec["width"],
            height=spec["height"],
            sample_steps=steps,
            cfg_scale=spec["guidance"],
            sample_method="euler",
            scheduler="discrete",
            seed=seed,
        )[0]

    return generate


LOADERS: Mapping[str, Callable[[Spec], Generate]] = {
    "eager": _eager,
    "compiled": _compiled,
    "optimum": _optimum,
    "genai": _genai,
    "stable-diffusion.cpp": _stable_diffusion_cpp,
}

if __name__ == "__main__":
    sys.exit(main())
