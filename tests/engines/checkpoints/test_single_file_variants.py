"""Single files as people have them: other names, other types, parts that are missing, tensors that are too many."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import Tensor

from engines.checkpoints.checkpoint import Checkpoint, count_parameters
from engines.checkpoints.find import find_checkpoint
from engines.checkpoints.loading.convert import as_folder
from engines.checkpoints.loading.modules import Modules, load_modules
from engines.errors import CheckpointError
from tests.support.checkpoints import PARTS, Families, NoteRecorder, assert_same, edit, load
from tests.support.ldm import single_file
from tests.support.tiny import make_decoder

VAE = "first_stage_model."


def write(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata or None)
    return path


def find(path: Path, families: Families, **options: Any) -> Checkpoint:
    return find_checkpoint(str(path), config=str(families("sd1")), **options)


def loaded(checkpoint: Checkpoint) -> tuple[Modules, list[str]]:
    progress = NoteRecorder()
    with as_folder(checkpoint, progress) as config:
        return load_modules(config, checkpoint), progress.notes


def test_a_text_encoder_without_its_wrapper_is_the_same(families: Families, plain: Modules, tmp_path: Path) -> None:
    """As NovelAI's."""
    tensors = {name.replace(".text_model.", "."): tensor for name, tensor in single_file(families("sd1")).items()}
    assert "cond_stage_model.transformer.embeddings.token_embedding.weight" in tensors
    assert_same(load(find(write(tmp_path / "nai.safetensors", tensors), families)), plain)


def test_tensors_beside_a_complete_model_are_ignored_with_a_note(
    families: Families, plain: Modules, tmp_path: Path
) -> None:
    strays = ["lora_unet_x.lora_down.weight", "control_model.a", "model.diffusion_model.extra.0.weight", "embeddings.y"]
    expected = ["model_ema.diffusion_modelout2bias", "betas", "alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "logvar"]
    tensors = single_file(families("sd1")) | {name: torch.zeros(2) for name in (*strays, *expected)}
    modules, notes = loaded(find(write(tmp_path / "full.safetensors", tensors), families))
    assert_same(modules, plain)
    (note,) = notes
    assert re.match(r"full\.safetensors: ignoring 4 tensors that are not of the model, such as \S+$", note)


def test_ema_weights_beside_the_model_are_not_mixed_in(families: Families, plain: Modules, tmp_path: Path) -> None:
    tensors = single_file(families("sd1"))
    averaged = {
        f"model_ema.{name.removeprefix('model.').replace('.', '')}": tensor + 1
        for name, tensor in tensors.items()
        if name.startswith("model.diffusion_model.")
    }
    modules, notes = loaded(find(write(tmp_path / "full.safetensors", tensors | averaged), families))
    assert_same(modules, plain)
    assert not notes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_every_type_are_loaded_in_fp32(families: Families, tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in single_file(families("sd1")).items()}
    modules = load(find(write(tmp_path / "half.safetensors", tensors), families))
    for part in PARTS:
        assert {tensor.dtype for tensor in getattr(modules, part).parameters()} == {torch.float32}
    stored = tensors["model.diffusion_model.input_blocks.0.0.weight"].float()
    assert torch.equal(modules.unet.conv_in.weight, stored)


def test_scaled_fp8_is_refused(families: Families, tmp_path: Path) -> None:
    tensors = single_file(families("sd1")) | {"scaled_fp8": torch.zeros(2)}
    with pytest.raises(CheckpointError, match=r"is quantized, .* \(pass it in FP16, BF16, FP32 or plain FP8"):
        find(write(tmp_path / "scaled.safetensors", tensors), families)


def test_a_truncated_file_says_so_before_anything_is_loaded(families: Families, tmp_path: Path) -> None:
    path = write(tmp_path / "one.safetensors", single_file(families("sd1")))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"is incomplete \([\d,]+ of [\d,]+ bytes\): download it again"):
        find(path, families)


def test_weights_that_are_not_finite_name_the_single_file(families: Families, tmp_path: Path) -> None:
    tensors = single_file(families("sd1"))
    tensors[f"{VAE}decoder.conv_in.weight"][0, 0] = float("nan")
    path = write(tmp_path / "one.safetensors", tensors)
    with pytest.raises(CheckpointError, match=rf"{path} holds NaN or infinity in vae\.decoder\.conv_in\.weight"):
        load(find(path, families))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([torch.zeros(1)], "holds a list and not tensors by name"),
        (torch.zeros(1), "holds a Tensor and not tensors by name"),
        ({"state_dict": [1]}, "holds a list and not tensors by name"),
        ({"state_dict": {}}, "not a checkpoint of a known layout"),
        ({1: torch.zeros(1)}, "not a checkpoint of a known layout"),
    ],
)
def test_pickles_that_are_no_state_dict_are_refused(
    families: Families, tmp_path: Path, content: object, complaint: str
) -> None:
    torch.save(content, tmp_path / "one.ckpt")
    with pytest.raises(CheckpointError, match=complaint) as raised:
        load(find(tmp_path / "one.ckpt", families, allow_pickle=True))
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", r"is incomplete \(0 bytes\): download it again"),
        (b"\x80\x02}q\x00", "cannot be read as plain tensors"),
        (b"not a pickle", "cannot be read as plain tensors"),
        (None, r"is incomplete \([\d,]+ bytes\): download it again"),
    ],
    ids=["empty", "cut", "text", "cut archive"],
)
def test_pickles_that_are_damaged_are_refused(
    families: Families, tmp_path: Path, content: bytes | None, complaint: str
) -> None:
    path = tmp_path / "one.ckpt"
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(CheckpointError, match=complaint) as raised:
        load(find(path, families, allow_pickle=True))
    assert len(str(raised.value).splitlines()) == 1


# --vae


def without_vae(families: Families) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in single_file(families("sd1")).items() if not name.startswith(VAE)}


def test_a_file_without_a_vae_asks_for_one(families: Families, tmp_path: Path) -> None:
    path = write(tmp_path / "pruned.safetensors", without_vae(families))
    with pytest.raises(CheckpointError, match=r"pruned\.safetensors holds no VAE: pass one with --vae\.$"):
        find(path, families)
    tensors = {name: tensor for name, tensor in without_vae(families).items() if name.startswith("model.")}
    with pytest.raises(CheckpointError, match="holds no VAE and no text encoder: pass a file that holds all parts"):
        find(write(tmp_path / "unet.safetensors", tensors), families)
    with pytest.raises(CheckpointError, match="holds no text encoder: pass a file that holds all parts"):
        find(tmp_path / "unet.safetensors", families, vae=str(families("sd1")))


@pytest.mark.parametrize("form", ["bare", "prefixed", "folder", "checkpoint", "file of a folder"])
def test_a_vae_from_elsewhere_is_the_same(families: Families, plain: Modules, tmp_path: Path, form: str) -> None:
    folder = families("sd1")
    whole = {name: tensor for name, tensor in single_file(folder).items() if name.startswith(VAE)}
    bare = {name.removeprefix(VAE): tensor for name, tensor in whole.items()} | {"loss.logvar": torch.zeros(1)}
    given = {
        "bare": lambda: write(tmp_path / "vae.safetensors", bare),
        "prefixed": lambda: write(tmp_path / "vae.safetensors", whole),
        "folder": lambda: folder / "vae",
        "checkpoint": lambda: folder,
        "file of a folder": lambda: folder / "vae" / "diffusion_pytorch_model.safetensors",
    }[form]()
    checkpoint = find(write(tmp_path / "pruned.safetensors", without_vae(families)), families, vae=str(given))
    assert_same(load(checkpoint), plain)
    assert count_parameters(checkpoint) == count_parameters(find_checkpoint(str(folder)))


def test_a_vae_replaces_that_of_a_folder_and_decides_the_export(
    families: Families, plain: Modules, tmp_path: Path
) -> None:
    whole = {name: 2 * tensor for name, tensor in single_file(families("sd1")).items() if name.startswith(VAE)}
    path = write(tmp_path / "vae.safetensors", whole)
    checkpoint = find_checkpoint(str(families("sd1")), vae=str(path))
    assert checkpoint.source != find_checkpoint(str(families("sd1"))).source
    modules = load(checkpoint)
    assert torch.equal(modules.vae.decoder.conv_in.weight, 2 * plain.vae.decoder.conv_in.weight)
    assert modules.decoder is None


def test_a_vae_that_does_not_fit_is_refused(families: Families, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(families("sd1") / "vae", tmp_path / "other"))
    edit(folder / "config.json", scaling_factor=0.13025)
    with pytest.raises(CheckpointError, match=r"its scaling_factor is 0\.13025, the model's 0\.18215"):
        find_checkpoint(str(families("sd1")), vae=str(folder))
    kernel = {"decoder.conv_in.weight": torch.zeros(16, 16, 3, 3), "encoder.conv_in.weight": torch.zeros(16, 3, 3, 3)}
    with pytest.raises(CheckpointError, match="its latent_channels is 16, the model's 4"):
        find_checkpoint(str(families("sd1")), vae=str(write(tmp_path / "vae.safetensors", kernel)))
    kernel["decoder.conv_in.weight"] = torch.zeros(7, 4, 3, 3)
    with pytest.raises(CheckpointError, match=r"vae does not fit sd1: its vae has \S+ with the shape \[.*\], not \["):
        load(find_checkpoint(str(families("sd1")), vae=str(write(tmp_path / "vae.safetensors", kernel))))


def test_what_is_no_vae_is_explained(families: Families, tmp_path: Path) -> None:
    def complaint(given: Path) -> str:
        with pytest.raises(CheckpointError) as raised:
            find_checkpoint(str(families("sd1")), vae=str(given))
        return str(raised.value)

    decoder = write(tmp_path / "taesd.safetensors", {"decoder.layers.0.weight": torch.zeros(8, 4, 3, 3)})
    assert "A decoder alone, such as TAESD, is passed with --decoder" in complaint(decoder)
    lone = shutil.copy(families("sd1") / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "x.safetensors")
    assert "without its config.json: pass the folder that holds both" in complaint(Path(lone))
    assert "neither a .safetensors file nor a folder" in complaint(tmp_path / "vae.pt")
    assert "does not exist" in complaint(tmp_path / "nothing.safetensors")
    assert "is of class UNet2DConditionModel" in complaint(families("sd1") / "unet")
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in complaint(tmp_path / "empty")


# What the UNet predicts


@pytest.mark.parametrize("written", ["yaml", "quoted yaml", "metadata", "tensor"])
def test_a_file_that_predicts_v_is_built_so(families: Families, tmp_path: Path, written: str) -> None:
    path, tensors = tmp_path / "vpred.safetensors", single_file(families("sd1"))
    before = find(write(path, tensors), families).source
    if written == "tensor":
        write(path, tensors | {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)})
    elif written == "metadata":
        write(path, tensors, **{"modelspec.prediction_type": "v"})
    else:
        value = '"v"' if "quoted" in written else "v"
        text = (
            f"model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n    parameterization: {value}\n"
        )
        path.with_suffix(".yaml").write_text(text)
    checkpoint, progress = find(path, families), NoteRecorder()
    assert checkpoint.source != before
    with as_folder(checkpoint, progress) as config:
        assert config.noise_schedule.prediction_type == "v_prediction"
        assert config.noise_schedule.rescale_betas_zero_snr == (written == "tensor")
    (note,) = progress.notes
    assert note.endswith("says that the UNet predicts v_prediction: built so")


def test_a_yaml_that_agrees_changes_nothing(families: Families, tmp_path: Path) -> None:
    path = write(tmp_path / "one.safetensors", single_file(families("sd1")))
    for text in ("parameterization: eps\n", "model: {}\n", "\x00\xff", ""):
        path.with_suffix(".yaml").write_text(text)
        progress = NoteRecorder()
        with as_folder(find(path, families), progress) as config:
            assert config.noise_schedule.prediction_type == "epsilon"
        assert not progress.notes


def test_a_yaml_beside_an_sd2_file_is_named_where_configs_are_missing(families: Families, tmp_path: Path) -> None:
    path = write(tmp_path / "two.safetensors", single_file(families("sd2")))
    path.with_suffix(".yaml").write_text("    parameterization: v\n")
    with pytest.raises(CheckpointError, match=r"two\.yaml says that its UNet predicts v_prediction: pass --config"):
        find_checkpoint(str(path))


# A distilled decoder in a file


def taesd_names(folder: Path) -> dict[str, Tensor]:
    """The decoder under the names of TAESD's own repository, whose layers are numbered from a clamp."""
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    named = {name.removeprefix("decoder.layers."): tensor for name, tensor in tensors.items() if "decoder." in name}
    return {re.sub(r"^\d+", lambda found: str(int(found[0]) + 1), name): tensor for name, tensor in named.items()}


@pytest.mark.parametrize("form", ["taesd", "taesd with a prefix", "diffusers"])
def test_a_decoder_in_a_file_decodes_as_its_folder(families: Families, tmp_path: Path, form: str) -> None:
    folder = make_decoder(tmp_path / "taesd", scaling_factor=1.0, num_decoder_blocks=(3, 1))
    tensors = taesd_names(folder)
    if form == "diffusers":
        tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    elif "prefix" in form:
        tensors = {f"decoder.{name}": tensor for name, tensor in tensors.items()}
    path = write(tmp_path / "taesd_decoder.safetensors", {name: tensor.clone() for name, tensor in tensors.items()})
    checkpoint = find_checkpoint(str(families("sd1")), decoder=str(path))
    assert checkpoint.source.decoder == "taesd_decoder"
    decoder = load(checkpoint).decoder
    latents = torch.randn(1, 4, 8, 8)
    with torch.inference_mode():
        expected = AutoencoderTiny.from_pretrained(folder).decode(latents).sample
        assert torch.equal(decoder.decode(latents).sample, expected)


def test_a_bare_decoder_is_no_model(families: Families, tmp_path: Path) -> None:
    folder = make_decoder(tmp_path / "taesd")
    for tensors in (taesd_names(folder), load_file(folder / "diffusion_pytorch_model.safetensors")):
        path = write(tmp_path / "taesd.safetensors", {name: tensor.clone() for name, tensor in tensors.items()})
        with pytest.raises(CheckpointError, match=r"is a distilled decoder, such as TAESD \(pass it with --decoder"):
            find(path, families)


def test_what_is_no_decoder_is_explained(families: Families, tmp_path: Path) -> None:
    def complaint(tensors: dict[str, Tensor]) -> str:
        path = write(tmp_path / "decoder.safetensors", tensors)
        with pytest.raises(CheckpointError) as raised:
            load(find_checkpoint(str(families("sd1")), decoder=str(path)))
        return str(raised.value)

    tensors = {name: tensor.clone() for name, tensor in taesd_names(make_decoder(tmp_path / "taesd")).items()}
    last = max(
        (name for name in tensors if re.fullmatch(r"\d+\.weight", name)), key=lambda name: int(name.split(".")[0])
    )
    ends = {"1.weight": torch.zeros(16, 3, 3, 3), last: torch.zeros(4, 16, 3, 3)}
    assert "it is an encoder" in complaint(tensors | ends)
    assert "not a distilled decoder" in complaint({"emb_params": torch.zeros(1, 8)})
    first = min(name for name in tensors if ".conv.2." in name)
    assert "not a distilled decoder" in complaint({name: value for name, value in tensors.items() if name != first})
    wide = tensors | {"1.weight": torch.zeros(16, 16, 3, 3)}
    assert "16 channels" in complaint(wide)


def test_configs_name_what_they_do_not_describe(families: Families, tmp_path: Path) -> None:
    tensors = single_file(families("sd1"))
    tensors["model.diffusion_model.out.2.bias"] = torch.zeros(5)
    with pytest.raises(CheckpointError) as raised:
        load(find(write(tmp_path / "one.safetensors", tensors), families))
    assert "its unet has conv_out.bias with the shape [5], not [4]" in str(raised.value)
    assert json.dumps(str(raised.value)).count("\\n") == 0
