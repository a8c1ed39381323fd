"""Every family of checkpoints, from the diffusers folder to the served picture, which is diffusers' own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import build_engines
from engines.accuracy import psnr
from engines.build.compile import engine_precisions
from engines.build.onnxruntime_cuda.compare import check_same
from engines.build.onnxruntime_cuda.rewrite import rewrite
from engines.build.profiles import shapes
from engines.build.trt.parent import build_engine
from engines.checkpoints.find import find_checkpoint
from engines.contract import GRAPHS, LORA_GRAPHS, STEPS, GraphName, plain
from engines.export.run import export_graphs
from engines.manifest import FusionReport, Manifest
from engines.progress import NullProgress
from tests.support.checkpoints import load
from tests.support.fused import fused_difference
from tests.support.ldm import write_single_file
from tests.support.references import draw, load_pipeline
from tests.support.serving import Serving, pictures
from tests.support.shared import reused_graphs
from tests.support.tiny import make_checkpoint

BODY: dict[str, Any] = {"prompt": "two old boats", "negative_prompt": "rain", "width": 32, "height": 32}
CHANGED = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v"  # by the LoRA
LORA_SCALE = 0.5
WORD = "<boat>"  # of the embedding: two vectors
REWRITTEN: tuple[GraphName, ...] = ("encode_prompt", "denoise", "encode_prompt_lora", "denoise_lora")
PARITY = 1e-3  # of a graph's range, between torch and ONNX Runtime, and between that and OpenVINO


@pytest.fixture(scope="module", params=["sd1", "sd2", "lcm"])
def family(
    request: pytest.FixtureRequest, bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """A family's name, its checkpoint and its bundle for both CPU backends. All have the same VAE."""
    name = str(request.param)
    folder = tmp_path_factory.mktemp(name)
    checkpoint, out = make_checkpoint(folder / "checkpoint", name), folder / "bundle"
    command = [*source(name, checkpoint), "--out", str(out), "--rows", "2,4", "--lora-slots", "4", "--lora-rank", "8"]
    with reused_graphs(bundle, out, "decode", "encode_image"):
        assert build_engines.main([*command, "--backend", "onnxruntime", "--backend", "openvino"]) == 0
    return name, checkpoint, out


def source(name: str, checkpoint: Path) -> list[str]:
    """One family comes as a single file and with a learned word, one with a LoRA, one as it is."""
    if name == "sd1":
        single = write_single_file(checkpoint, checkpoint.parent / "one.safetensors")
        word = checkpoint.parent / "word.safetensors"
        save_file({WORD: torch.randn(2, 32, generator=torch.Generator().manual_seed(0))}, word)
        lora = checkpoint.parent / "lcm-lora-sdv1-5" / "pytorch_lora_weights.safetensors"  # as it is published
        lora.parent.mkdir()
        up, down = lora_factors()
        key = f"lora_unet_{CHANGED.replace('.', '_')}"
        save_file(
            {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(2.0)}, lora
        )
        return ["--model", str(single), "--config", str(checkpoint), "--embedding", str(word), "--lora", str(lora)]
    if name == "lcm":
        lora = checkpoint.parent / "style.safetensors"
        up, down = lora_factors()
        save_file({f"unet.{CHANGED}.lora_B.weight": up, f"unet.{CHANGED}.lora_A.weight": down}, lora)
        return ["--model", str(checkpoint), "--lora", f"{lora}:{LORA_SCALE}", "--preset", "lcm"]
    return ["--model", str(checkpoint)]


def lora_factors() -> tuple[torch.Tensor, torch.Tensor]:
    """Of a layer 16 wide, at rank 4."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(16, 4, generator=generator), torch.randn(4, 16, generator=generator)


def reference_of(name: str, checkpoint: Path) -> Any:
    pipeline = load_pipeline(checkpoint)
    if name in ("lcm", "sd1"):  # alpha is half the rank there
        up, down = lora_factors()
        with torch.no_grad():
            pipeline.unet.get_submodule(CHANGED).weight += LORA_SCALE * up @ down
    if name == "sd1":
        pipeline.load_textual_inversion(str(checkpoint.parent / "word.safetensors"))
    return pipeline


def test_graphs_agree_with_torch_and_with_each_other(family: tuple[str, Path, Path]) -> None:
    graphs_agree(Manifest.load(family[2]))


def test_graphs_of_xl_agree_with_torch(xl_bundle: Path) -> None:
    manifest = Manifest.load(xl_bundle)
    graphs_agree(manifest)
    assert (manifest.context.width, manifest.context.layers) == (80, 2)
    assert manifest.context.force_zeros_for_empty_prompt
    assert manifest.tokenizer.pad_2 not in {None, manifest.tokenizer.pad}


def graphs_agree(manifest: Manifest) -> None:
    for name, graph in manifest.graphs.items():
        found = [build.engines[name].difference for build in manifest.builds.values()]
        for difference in [graph.onnx["fp32"].difference, *found]:
            assert difference
            assert difference.mean <= PARITY
            assert difference.largest <= (2 / 255 if name == "decode" else PARITY)  # rounding to the next level


@pytest.fixture(scope="module")
def served(family: tuple[str, Path, Path]) -> Iterator[Serving]:
    with Serving(family[2], "--backend", "onnxruntime") as running:
        yield running


def test_the_server_draws_what_diffusers_draws(family: tuple[str, Path, Path], served: Serving) -> None:
    draws_as_diffusers(served, family)


def test_openvino_draws_it_too(family: tuple[str, Path, Path]) -> None:
    with Serving(family[2], "--backend", "openvino") as serving:
        draws_as_diffusers(serving, family)


def draws_as_diffusers(serving: Serving, family: tuple[str, Path, Path]) -> None:
    name, checkpoint, _bundle = family
    reference = reference_of(name, checkpoint)
    cases: list[dict[str, Any]] = [
        {"scheduler": "lcm" if name == "lcm" else "ddim", "num_inference_steps": 4, "guidance_scale": 5.0},
        {"scheduler": "dpmpp_2m", "num_inference_steps": 10, "guidance_scale": 1.0},
    ]
    body = {**BODY, "prompt": f"two old {WORD} at night"} if name == "sd1" else BODY
    for case in cases:
        ours = pictures(serving.generate(**body, **case, seed=11))[0]
        theirs = draw(reference, seed=11, **body, **case)
        assert theirs.std() > 3, "the reference is a flat picture: it proves nothing"
        assert psnr(ours, theirs) >= 45, case


# What the model cards pass: of the LoRA that was fused, and of latent consistency models.
CARDS: dict[str, dict[str, Any]] = {
    "sd1": {"scheduler": "lcm", "num_inference_steps": 4, "guidance_scale": 0.0},
    "lcm": {"scheduler": "lcm", "num_inference_steps": 4, "guidance_scale": 8.0},
    "sd2": {"scheduler": "ddim", "num_inference_steps": 50, "guidance_scale": 7.5},
}


def test_a_request_that_names_nothing_is_drawn_as_its_model_card_says(
    family: tuple[str, Path, Path], served: Serving
) -> None:
    name, checkpoint, _bundle = family
    answer = served.generate(prompt="two old boats", seed=11)
    assert answer.json()["parameters"].items() >= CARDS[name].items()
    theirs = draw(reference_of(name, checkpoint), seed=11, prompt="two old boats", width=32, height=32, **CARDS[name])
    assert psnr(pictures(answer)[0], theirs) >= 45


def test_a_model_that_is_told_its_guidance_has_no_interval_of_it(
    family: tuple[str, Path, Path], served: Serving
) -> None:
    answer = served.generate(**BODY, num_inference_steps=2, guidance_end=0.5)
    assert answer.status_code == (422 if family[0] == "lcm" else 200), answer.text


def test_the_manifest_knows_its_family(family: tuple[str, Path, Path]) -> None:
    name, _checkpoint, bundle = family
    manifest = Manifest.load(bundle)
    assert manifest.embeds_guidance == (name == "lcm")
    loras = {"lcm": ("style.safetensors:0.5",), "sd1": ("pytorch_lora_weights.safetensors:1",)}
    assert manifest.source.loras == loras.get(name, ())
    assert manifest.name == {"sd1": "one"}.get(name, "checkpoint")
    assert manifest.noise_schedule.prediction_type == ("v_prediction" if name == "sd2" else "epsilon")
    assert manifest.context.width == (64 if name == "sd2" else 32)
    assert manifest.defaults.scheduler == {"sd2": "ddim"}.get(name, "lcm")


@pytest.mark.parametrize("graph", LORA_GRAPHS.values())
def test_loras_of_each_row_are_as_in_the_weights(family: tuple[str, Path, Path], graph: GraphName) -> None:
    name, checkpoint, bundle = family
    pipeline = reference_of(name, checkpoint)
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    assert fused_difference(graph, Manifest.load(bundle), bundle, parts) <= PARITY


@pytest.mark.parametrize("graph", LORA_GRAPHS.values())
def test_loras_of_two_encoders_are_as_in_the_weights(xl_checkpoint: Path, xl_bundle: Path, graph: GraphName) -> None:
    modules = load(find_checkpoint(str(xl_checkpoint)))
    parts = {part: getattr(modules, part) for part in ("unet", "text_encoder", "text_encoder_2")}
    assert fused_difference(graph, Manifest.load(xl_bundle), xl_bundle, parts) <= PARITY


@pytest.mark.parametrize("graph", REWRITTEN)
def test_onnxruntime_on_gpus_computes_the_same(
    family: tuple[str, Path, Path], graph: GraphName, tmp_path: Path
) -> None:
    """By its fused operators, which replace all that they support of every family."""
    rewritten_is_the_same(family[2], graph, tmp_path)


@pytest.mark.parametrize("graph", REWRITTEN)
def test_onnxruntime_on_gpus_computes_the_same_for_xl(xl_bundle: Path, graph: GraphName, tmp_path: Path) -> None:
    rewritten_is_the_same(xl_bundle, graph, tmp_path)


def rewritten_is_the_same(bundle: Path, graph: GraphName, folder: Path) -> None:
    manifest = Manifest.load(bundle)
    copied = Path(shutil.copytree(bundle / "onnx", folder / "onnx"))  # the rewritten graph lies beside its weights
    exported = copied / Path(manifest.graphs[graph].onnx["fp32"].files[0].path).name
    made = exported.with_suffix(".cuda.onnx")
    counts = rewrite(exported, made)
    assert counts.attentions[0] == counts.attentions[1] > 0
    assert counts.convolutions[0] == counts.convolutions[1]
    assert counts.group_norms[0] == counts.group_norms[1]
    if graph == plain(graph):  # those of LoRAs transpose their factors too
        assert counts.transposes == (3 if graph == "denoise" else 0)
    assert check_same(graph, manifest, exported, made).largest < 1e-5


def test_sd2_computes_in_bf16_on_gpus(family: tuple[str, Path, Path], tmp_path: Path) -> None:
    """Its attention leaves FP16's range. The weights on disk stay what they are, and TensorRT takes the casts."""
    name, folder, bundle = family
    if name != "sd2":
        pytest.skip("the other families take FP16, as the tests of TensorRT's engines show")
    checkpoint = find_checkpoint(str(folder))
    precisions = engine_precisions("tensorrt_rtx", None, exceeding=checkpoint.exceeding_fp16)
    assert precisions == {graph: "bf16" if graph in STEPS else "fp16" for graph in GRAPHS}
    manifest = Manifest.load(bundle)
    made = export_graphs(
        checkpoint.config,
        load(checkpoint),
        bundle,
        storage=manifest.weights,
        typed=[("denoise", "bf16")],
        size=manifest.resolutions[0],
        known=dict(manifest.graphs),
        progress=NullProgress(),
    )["denoise"]
    graph, weights = made.onnx["bf16"].files
    assert weights == manifest.graphs["denoise"].onnx["fp32"].files[1]
    profile = shapes(manifest, "denoise")[0]
    ranges = [{spec.name: profile.of(spec) for spec in made.inputs}]
    report = build_engine(
        "tensorrt_rtx", bundle / graph.path, tmp_path / "made.engine", ranges, progress=NullProgress()
    )
    layers = FusionReport.model_validate(report.layers)
    assert layers.precisions["BFloat16"] > layers.precisions.get("Half", 0)
