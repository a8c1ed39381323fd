"""`build_engines.py` makes bundles from checkpoints on disk, and says in one line why it cannot."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

import build_engines
from engines.build import api
from engines.cli import parse
from engines.manifest import Manifest, Size
from server.requests.tokenizer import PromptTokenizer
from tests.support.loaded import Loaded
from tests.support.tiny import TOKENS, WIDTH


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert build_engines.main(arguments) == 1
    return capsys.readouterr().err.split("error: ")[1].strip()


def test_the_manifest_holds_the_checkpoints_facts(manifest: Manifest) -> None:
    assert manifest.name == "tiny-sd"
    assert manifest.resolutions == (Size(width=32, height=32), Size(width=48, height=32))
    assert manifest.rows == (2, 4, 8)
    assert (manifest.latent.channels, manifest.latent.downscale, manifest.latent.multiple) == (4, 2, 4)
    assert (manifest.context.tokens, manifest.context.width) == (TOKENS, WIDTH)
    assert manifest.noise_schedule.steps_offset == 1
    assert manifest.noise_schedule.set_alpha_to_one is False
    assert manifest.defaults.scheduler == "pndm"
    assert manifest.graphs["denoise"].inputs[0].shape == ("S", 5, 4, "h", "w")
    assert [(one.name, one.dtype) for one in manifest.graphs["decode"].outputs] == [
        ("images", "uint8"),
        ("is_finite", "float32"),
    ]


def test_weights_keep_their_names(bundle: Path) -> None:
    """The exporter folds linear layers' weights into transposed constants; they are named again."""
    weights = onnx.load(bundle / "onnx/denoise.onnx").graph.initializer
    large = [weight.name for weight in weights if np.prod(weight.dims) >= 256]
    assert large
    assert all(name.startswith("unet.") for name in large)
    assert "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight.T" in large


def test_encode_prompt_is_the_text_encoder(checkpoint: Path, bundle: Path, manifest: Manifest) -> None:
    tokenizer = PromptTokenizer(bundle / "tokenizer.json", tokens=TOKENS, pad=manifest.tokenizer.pad)
    prompt = tokenizer("a red cat BREAK on a blue hill BREAK rain")
    assert len(prompt.chunks) == 3
    rng = np.random.default_rng(0)
    ids, weights = np.array([chunk.ids for chunk in prompt.chunks]), rng.uniform(0.5, 2, (3, TOKENS))
    inputs = {"ids": ids, "layer": np.array([2, 1, 0]), "weights": weights.astype(np.float32)}
    encode = Loaded("onnxruntime", bundle / "onnx/encode_prompt.onnx")
    embeddings = encode(inputs, {"embeddings": np.empty((3, TOKENS, WIDTH), np.float32)})["embeddings"]
    with torch.inference_mode():
        encoder = CLIPTextModel.from_pretrained(checkpoint / "text_encoder").eval()
        made = encoder(input_ids=torch.from_numpy(ids), output_hidden_states=True)
        plain = [encoder.final_layer_norm(made.hidden_states[layer][n]) for n, layer in enumerate((2, 1, 0))]
        np.testing.assert_array_equal(plain[0], made.last_hidden_state[0])
    for ours, whole, weight in zip(embeddings, plain, weights, strict=True):
        weighted = whole.numpy() * weight[:, None]
        expected = weighted * whole.numpy().mean() / weighted.mean()
        assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red cat",
        "  A  Red\tCAT!! ",
        "naïve café 東京 🍎",
        "x" * 500,
        "don't stop",
        "a,b;c (d:1.3)",
        "<|endoftext|>",
    ],
)
def test_prompts_become_the_ids_that_transformers_makes(
    checkpoint: Path, bundle: Path, manifest: Manifest, text: str
) -> None:
    tokenizer = PromptTokenizer(bundle / "tokenizer.json", tokens=TOKENS, pad=manifest.tokenizer.pad)
    ours = tokenizer(text, syntax="plain")
    theirs = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")
    padded = theirs(text, padding="max_length", max_length=TOKENS, truncation=True)
    assert list(ours.chunks[0].ids) == padded.input_ids
    assert (len(ours.chunks) > 1) == (len(theirs(text).input_ids) > TOKENS)


def test_a_hub_id_without_a_network_fails_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = complaint(capsys, "--model", "OFA-Sys/small-stable-diffusion-v0", "--out", str(tmp_path / "out"))
    assert len(text.splitlines()) == 1
    assert text.startswith("OFA-Sys/small-stable-diffusion-v0 is no folder here, and the hub's cache, to which")
    assert "HF_HUB_OFFLINE" in text
    assert not (tmp_path / "out").exists()


def test_what_is_neither_a_folder_nor_a_hub_id_is_said_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = complaint(capsys, "--model", str(tmp_path / "no such folder"), "--out", str(tmp_path / "out"))
    assert "does not exist: check the path, or pass a hub id" in text


def test_a_size_the_unet_cannot_halve_is_refused(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    text = complaint(capsys, "--model", str(checkpoint), "--out", str(tmp_path), "--resolution", "33x32")
    assert "multiples of 4" in text


@pytest.mark.parametrize("wrong", [["--resolution", "big"], ["--rows", "2,x"], ["--rows", "0"]])
def test_malformed_flags_are_explained(wrong: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        build_engines.main(["--model", str(tmp_path), "--out", str(tmp_path), *wrong])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {wrong[0]}: {wrong[1]!r} is not a")


def test_flags_become_the_options_of_the_api() -> None:
    words = ["--model", "m", "--out", "o", "--name", "n", "--revision", "r", "--config", "c", "--allow-pickle"]
    words += ["--lora", "a.safetensors:0.5", "--lora", "b.safetensors", "--embedding", "e.safetensors:<e>"]
    words += ["--decoder", "d", "--vae", "v", "--steps", "3", "--guidance", "1.5", "--weights", "fp16", "--rows", "4,2"]
    words += ["--resolution", "512x512", "768x768", "--resolution", "64x32", "--decode-batch", "2"]
    words += ["--example", 'a cat, "oil"', "--example", "a dog", "--backend", "auto", "--backend", "openvino"]
    words += ["--precision", "int8", "--force", "--no-verify", "--variant", "fp16", "--preset", "hyper-4"]
    words += ["--scheduler", "DPM++ 2M Karras", "--timestep-spacing", "trailing", "--eta", "0.5", "--notes", "of ink"]
    arguments = parse(build_engines.BuildCommand, words)
    assert arguments.source() == api.CheckpointSource(
        "m",
        revision="r",
        config="c",
        loras=(api.Lora(Path("a.safetensors"), 0.5), api.Lora(Path("b.safetensors"))),
        embeddings=(api.Embedding(Path("e.safetensors"), "<e>"),),
        decoder="d",
        vae="v",
        allow_pickle=True,
        variant="fp16",
    )
    assert arguments.options() == api.ExportOptions(
        weights="fp16",
        rows=(2, 4),
        decode_batch=2,
        name="n",
        resolutions=tuple(Size(width=width, height=height) for width, height in ((512, 512), (768, 768), (64, 32))),
        preset="hyper-4",
        steps=3,
        guidance=1.5,
        scheduler="dpmpp_2m_karras",
        timestep_spacing="trailing",
        eta=0.5,
        notes="of ink",
        examples=('a cat, "oil"', "a dog"),
    )
    assert (arguments.out, arguments.backends()) == (Path("o"), ("auto", "openvino"))
    assert (arguments.precision, arguments.force, arguments.verify) == ("int8", True, False)


def test_flags_that_are_not_given_leave_the_defaults_of_the_api() -> None:
    arguments = parse(build_engines.BuildCommand, ["--model", "m", "--out", "o"])
    assert arguments.source() == api.CheckpointSource("m")
    assert arguments.options() == api.ExportOptions()
    assert (arguments.backends(), arguments.precision) == (("auto",), None)
    assert (arguments.force, arguments.verify) == (False, True)


def test_an_unknown_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        build_engines.main(["compil", "bundle"])
    assert ended.value.code == 2
    assert "did you mean compile?" in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["MODEL", "OUT", "NAME", "STEPS", "LATENTD_MODEL"])
def test_environment_variables_configure_no_build(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str
) -> None:
    monkeypatch.setenv(variable, "7")
    assert parse(build_engines.BuildCommand, ["--model", "m", "--out", "o"]).options() == api.ExportOptions()
    with pytest.raises(SystemExit):
        build_engines.main([])
    assert "required: --model, --out" in capsys.readouterr().err


def test_damaged_weights_are_an_error_that_names_the_checkpoint(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    weights = copied / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    text = complaint(capsys, "--model", str(copied), "--out", str(tmp_path / "out"), "--backend", "onnxruntime")
    assert "copy" in text
    assert not (tmp_path / "out").exists()


def test_weights_that_are_nan_are_an_error_before_anything_is_exported(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    path = copied / "vae" / "diffusion_pytorch_model.safetensors"
    weights = {name: weight.clone() for name, weight in load_file(path).items()}
    weights["decoder.conv_out.weight"][0, 0, 0, 0] = torch.nan
    save_file(weights, path)
    text = complaint(capsys, "--model", str(copied), "--out", str(tmp_path / "out"), "--backend", "onnxruntime")
    assert text == f"{path} holds NaN or infinity in vae.decoder.conv_out.weight: it is damaged. Download it again."
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backend", "onnxruntime", "--precision", "fp16"], "--weights fp16"),
        (["--backend", "onnxruntime_cuda", "--precision", "int8"], "fp16 or fp32, not in int8"),
        (["--backend", "openvino", "--precision", "fp16"], "fp32 or bf16 or int8, not in fp16"),
    ],
)
def test_a_precision_that_a_backend_lacks_is_refused_before_anything_is_built(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    assert words in complaint(capsys, "--model", str(checkpoint), "--out", str(tmp_path / "out"), *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("word", ["compile", "verify", "inspect"])
def test_a_folder_without_a_bundle_is_said_so(capsys: pytest.CaptureFixture[str], tmp_path: Path, word: str) -> None:
    assert "holds no manifest.json" in complaint(capsys, word, str(tmp_path))


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("export", "compile", "verify", "inspect"):
        with pytest.raises(SystemExit) as ended:
            build_engines.main([word, "--help"])
        assert ended.value.code == 0
        assert f"build_engines.py {word}" in capsys.readouterr().out


def test_results_and_warnings_come_before_the_command_that_serves(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Which is the last line, whatever was reported in between."""

    def build(*_: object, reporter: api.Reporter, **__: object) -> None:
        reporter.on_built(manifest, "onnxruntime")
        reporter.on_not_followed(["the config asks for a [thing]: this is not followed."])
        with reporter.progress.stage("the last stage"):
            reporter.progress.note("a note")

    monkeypatch.setattr(api, "build", build)
    assert build_engines.main(["--model", "m", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().err.splitlines()
    order = ["the last stage: ", "tiny-sd for onnxruntime", "warning: the config asks for a [thing]", "Serve it: "]
    found = [next(index for index, line in enumerate(lines) if line.startswith(start)) for start in order]
    assert found == sorted(found)
    assert found[-1] == len(lines) - 1
