"""The text in images: written as AUTOMATIC1111 does, and read back."""

from __future__ import annotations

from dataclasses import replace
from itertools import starmap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engines.manifest import Manifest, Size
from engines.schedulers import METHODS, NAMES, Scheduler, find
from server.requests.infotext import parse, sampler_names, write
from server.requests.intake import Intake
from server.requests.params import GenerationParams, InitImage, Lora, WeightedLora
from server.requests.schemas import GenerateRequest
from server.requests.tokenizer import Prompt, PromptTokenizer

# What the web UI 1.10 lists. Its other samplers, such as DPM++ SDE, are methods that we do not have.
A1111_SAMPLERS = {
    *("DPM++ 2M", "DPM++ 2M SDE", "DPM++ 3M SDE", "Euler a", "Euler", "LMS", "Heun", "DPM2", "DPM2 a"),
    *("DDIM", "PLMS", "UniPC", "LCM"),
}
OURS = {"DDPM", "DPM++ 3M", "DPM++ 2S", "DPM++ 3S", "DEIS", "TCD"}
FILE_SHA256 = "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa"
PARAMS = GenerationParams(
    Prompt("a boat", ()),
    Prompt("", ()),
    Size(width=512, height=768),
    Scheduler("dpmpp_2m", "karras"),
    20,
    7.5,
    (42, 43),
)


def test_the_text_is_that_of_the_web_ui() -> None:
    params = replace(PARAMS, negative_prompt=Prompt("a bird,\nblurry", ()), clip_skip=1)
    assert write(params, seed=43, model="sd15").startswith(
        "a boat\nNegative prompt: a bird,\nblurry\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, "
        "CFG scale: 7.5, Seed: 43, Size: 512x768, Model: sd15, Clip skip: 2, RNG: CPU, Version: latentd "
    )


def test_the_model_s_hash_is_that_of_its_file() -> None:
    text = write(replace(PARAMS, model_sha256=FILE_SHA256), seed=42, model="sd15")
    assert "Size: 512x768, Model hash: 6ce0161689, Model: sd15" in text


@pytest.mark.parametrize("file_sha256", [FILE_SHA256, None], ids=["a file", "a folder"])
def test_requests_have_the_hash_of_their_model_s_file(
    bundle: Path, manifest: Manifest, file_sha256: str | None
) -> None:
    tokens, pad = manifest.context.tokens, manifest.tokenizer.pad
    tokenizer = PromptTokenizer(bundle / manifest.tokenizer.file.path, tokens=tokens, pad=pad)
    source = manifest.source.model_copy(update={"file_sha256": file_sha256})
    intake = Intake(manifest.model_copy(update={"source": source}), tokenizer)
    assert intake.request(GenerateRequest(prompt="a boat")).params.model_sha256 == file_sha256


def test_fields_that_say_nothing_are_left_out() -> None:
    assert list(parse(write(PARAMS, seed=42, model="sd15"))) == [
        *("Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size-1", "Size-2", "Model", "RNG", "Version"),
        *("Prompt", "Negative prompt"),
    ]


def test_every_setting_that_changes_the_image_is_written() -> None:
    params = replace(
        PARAMS,
        prompt=Prompt("a (boat)", (), syntax="plain"),
        scheduler=Scheduler("ddim", "default", "trailing", None, 0.25),
        guidance_start=0.1,
        guidance_end=0.8,
        clip_skip=2,
        init_image=InitImage(np.zeros((768, 512, 3), np.uint8), 0.55),
        isolated=True,
        cache="faster",
        full_steps=6,
    )
    fields = parse(write(params, seed=42, model="sd15"))
    assert fields.items() >= {
        ("Denoising strength", "0.55"),
        ("Clip skip", "3"),
        ("Eta DDIM", "0.25"),
        ("Skip Early CFG", "0.1"),
        ("Guidance end", "0.8"),
        ("Timestep spacing", "trailing"),
        ("Prompt syntax", "plain"),
        ("Cache", "faster"),
        ("Full steps", "6"),
        ("Exact", "True"),
    }


def test_size_conditions_are_written_where_they_are_not_the_size_of_the_image() -> None:
    usual = replace(PARAMS, unet_inputs={"time_ids": (768, 512, 0, 0, 768, 512)})
    assert write(usual, seed=42, model="sd15") == write(PARAMS, seed=42, model="sd15")
    other = replace(PARAMS, unet_inputs={"time_ids": (768, 1024, 3, 0, 512, 512)})
    assert ", Original size: 1024x768, Target size: 512x512, Crop top: 3, " in write(other, seed=42, model="sd15")


def test_samplers_have_the_names_of_the_web_ui() -> None:
    assert {sampler_names(find(name)).sampler for name in NAMES} == A1111_SAMPLERS | OURS


@pytest.mark.parametrize("name", NAMES)
def test_names_of_samplers_lead_back_to_the_scheduler(name: str) -> None:
    sampler, schedule_type = sampler_names(find(name))
    assert find(sampler if schedule_type == "Automatic" else f"{sampler} {schedule_type}").name == name


@pytest.mark.parametrize("model", ["a, b", "a: b", 'a "b"', '"', " a ", "a\nb", "SD 1.5 (café)", "\\", '"a", Seed: 1'])
def test_names_of_models_are_quoted_where_they_must_be(model: str) -> None:
    assert parse(write(PARAMS, seed=42, model=model)).items() >= {("Model", model), ("Seed", "42")}


def test_what_files_cannot_carry_is_replaced() -> None:
    params = replace(PARAMS, prompt=Prompt("a\x00b\x1b[31m\ud800\tc", ()))
    assert parse(write(params, seed=42, model="sd15"))["Prompt"] == "a b [31m?\tc"


_PROMPTS = st.text(st.characters(exclude_categories=["C"], include_characters="\n"), max_size=80).map(
    lambda text: "\n".join(line.strip() for line in text.strip().split("\n"))
)


@given(
    prompt=_PROMPTS,
    negative=_PROMPTS,
    model=st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=40),
    scheduler=st.sampled_from(NAMES),
    steps=st.integers(1, 200),
    guidance=st.floats(0, 50),
    seed=st.integers(0, 2**32 - 1),
)
@example(
    prompt="Steps: 1, Sampler: Euler, Seed: 1",
    negative="Steps: 1, Sampler: Euler, Seed: 1",
    model="m",
    scheduler="ddim",
    steps=20,
    guidance=1e-05,
    seed=0,
)
def test_what_is_written_is_read(
    *, prompt: str, negative: str, model: str, scheduler: str, steps: int, guidance: float, seed: int
) -> None:
    params = replace(
        PARAMS,
        prompt=Prompt(prompt, ()),
        negative_prompt=Prompt(negative, ()),
        scheduler=find(scheduler),
        num_inference_steps=steps,
        guidance_scale=guidance,
    )
    fields = parse(write(params, seed=seed, model=model))
    assert (fields["Prompt"], fields["Negative prompt"], fields["Model"]) == (prompt, negative, model)
    assert fields["Sampler"] == METHODS[params.scheduler.method].about.title
    assert (int(fields["Steps"]), float(fields["CFG scale"]), int(fields["Seed"])) == (steps, guidance, seed)
    assert (fields["Size-1"], fields["Size-2"]) == ("512", "768")


def test_a_text_of_the_web_ui_is_read() -> None:
    text = (
        "masterpiece, <lora:add_detail:0.7>\nNegative prompt: lowres, (worst quality:1.4)\n"
        "Steps: 25, Sampler: DPM++ SDE Karras, CFG scale: 7, Seed: 1, Size: 512x768, Model hash: 6ce0161689, "
        'Lora hashes: "add_detail: 7c6bad76eb54, b: 1", TI: "a \\"b\\"", Version: v1.10.1'
    )
    fields = parse(text)
    assert fields["Lora hashes"] == "add_detail: 7c6bad76eb54, b: 1"
    assert fields["TI"] == 'a "b"'
    assert (fields["Negative prompt"], fields["Version"]) == ("lowres, (worst quality:1.4)", "v1.10.1")


@pytest.mark.parametrize("text", ["", "a boat", "a boat, red: yes", "\n\n", ",,,", 'a: "'])
def test_text_without_a_line_of_fields_is_a_prompt(text: str) -> None:
    assert parse(text) == {"Prompt": text.strip(), "Negative prompt": ""}


@given(st.text('ab:," \\\n-/5x', max_size=400))
def test_any_text_is_read(text: str) -> None:
    assert set(parse(text)) >= {"Prompt", "Negative prompt"}


@pytest.mark.parametrize("piece", ["a", "ab ", "ab:", 'ab:"', 'ab:"\\",', " ", ",", 'ab:\\"', "\n"])
def test_long_texts_are_read_in_linear_time(piece: str) -> None:
    """A megabyte takes a fraction of a second, and would take hours if time grew as the square."""
    parse(piece * (2**20 // len(piece)))


INK = Lora("styles/ink", "a" * 64, np.zeros((1, 2), np.float16), True, True, tensors_sha256="7c6bad76eb54" + "0" * 52)
WASH = Lora("wash", "b" * 64, np.zeros((1, 2), np.float16), True, False, tensors_sha256="0123456789abcdef" * 4)


@pytest.mark.parametrize(
    ("prompt", "loras", "written"),
    [
        ("a boat <lora:ink:0.5>", {INK: 0.5}, "a boat <lora:ink:0.5>"),
        ("<lora:ink:0.5> a boat<lora:ink:0.25>", {INK: 0.75}, "<lora:ink:0.5> a boat<lora:ink:0.25>"),
        ("a boat", {INK: 0.1, WASH: -1.0}, "a boat <lora:styles/ink:0.1><lora:wash:-1>"),
        ("a boat <lora:ink:0.5>", {INK: 0.8}, "a boat <lora:styles/ink:0.8>"),
        ("a boat <lora:ink:0.5>", {INK: 0.5, WASH: 1.0}, "a boat <lora:styles/ink:0.5><lora:wash:1>"),
        ("", {WASH: 1.0}, "<lora:wash:1>"),
        ("a boat <lora:ink:0.5>", {}, "a boat <lora:ink:0.5>"),  # of a server without LoRAs, or of weight 0
    ],
)
def test_the_prompt_has_a_tag_of_every_lora(prompt: str, loras: dict[Lora, float], written: str) -> None:
    params = replace(PARAMS, prompt=Prompt(prompt, ()), loras=tuple(starmap(WeightedLora, loras.items())))
    fields = parse(write(params, seed=42, model="sd15"))
    assert fields["Prompt"] == written
    assert ("Lora hashes" in fields) == bool(loras)


def test_hashes_of_loras_have_the_names_of_their_tags() -> None:
    params = replace(PARAMS, loras=(WeightedLora(INK, 0.5), WeightedLora(WASH, 1.0)))
    tagged = replace(params, prompt=Prompt("a boat <lora:ink:0.5><lora:wash>", ()))
    assert parse(write(params, seed=42, model=""))["Lora hashes"] == "styles/ink: 7c6bad76eb54, wash: 0123456789ab"
    assert parse(write(tagged, seed=42, model=""))["Lora hashes"] == "ink: 7c6bad76eb54, wash: 0123456789ab"


def test_plain_prompts_have_no_tags() -> None:
    params = replace(PARAMS, prompt=Prompt("<lora:x:1>", (), syntax="plain"), loras=(WeightedLora(WASH, 0.5),))
    fields = parse(write(params, seed=42, model=""))
    assert (fields["Prompt"], fields["Loras"]) == ("<lora:x:1>", "<lora:wash:0.5>")
