"""Single files of Stable Diffusion XL, with two text encoders and SGM names, load as their folders do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engines.checkpoints.checkpoint import count_parameters
from engines.checkpoints.find import find_checkpoint
from engines.checkpoints.loading.convert import as_folder
from engines.checkpoints.loading.modules import Modules, load_modules
from engines.checkpoints.single_file import layout_of
from engines.errors import CheckpointError
from tests.support.checkpoints import Families, NoteRecorder, assert_same, load
from tests.support.ldm import single_file

CLIP, OPEN_CLIP = "conditioner.embedders.0.", "conditioner.embedders.1."
VAE, UNET = "first_stage_model.", "model.diffusion_model."


@pytest.fixture(scope="module")
def folder(families: Families) -> Path:
    return families("xl")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Modules:
    return load(find_checkpoint(str(folder)))


@pytest.fixture
def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in single_file(folder).items()}


def written(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path)
    return path


def without(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}


def test_the_names_are_those_of_published_files(tensors: dict[str, Tensor]) -> None:
    """By those that diffusers recognises files by, and some of sd_xl_base_1.0."""
    assert {
        "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight",
        "conditioner.embedders.1.model.positional_embedding",
        "conditioner.embedders.1.model.text_projection",
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight",
        "model.diffusion_model.label_emb.0.0.weight",
        "model.diffusion_model.label_emb.0.2.bias",
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight",
        "first_stage_model.decoder.mid.attn_1.q.weight",
    } <= tensors.keys()
    layout = layout_of("xl", {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    assert (layout.version, layout.channels, layout.width, layout.strays) == ("XL", 4, 32 + 48, ())
    assert layout.default_configs == "stabilityai/stable-diffusion-xl-base-1.0"


def test_what_is_beside_the_model_is_ignored_with_a_note(
    folder: Path, whole: Modules, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    """Some text encoders lack the wrapper `text_model`; positions, a scale and sigmas are in many files."""
    renamed = {
        name.replace(f"{CLIP}transformer.text_model.", f"{CLIP}transformer."): one for name, one in tensors.items()
    }
    extra = {
        f"{CLIP}transformer.text_model.embeddings.position_ids": torch.arange(16)[None],
        f"{OPEN_CLIP}model.logit_scale": torch.tensor(4.6),
        "denoiser.sigmas": torch.zeros(1000),
        "lora_unet_x.lora_down.weight": torch.zeros(1),
    }
    path, progress = written(tmp_path / "one.safetensors", renamed | extra), NoteRecorder()
    checkpoint = find_checkpoint(str(path), config=str(folder))
    with as_folder(checkpoint, progress) as config:
        assert_same(load_modules(config, checkpoint), whole)
    assert progress.notes == [
        "one.safetensors: ignoring 1 tensors that are not of the model, such as lora_unet_x.lora_down.weight"
    ]
    assert count_parameters(checkpoint)["denoise"] == count_parameters(find_checkpoint(str(folder)))["denoise"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_files_keep_their_type_until_they_are_loaded(
    folder: Path, tensors: dict[str, Tensor], tmp_path: Path, dtype: torch.dtype
) -> None:
    """So that the folder takes no more room than the file; the VAE, which is often in FP32, has a type of its own."""
    given = {name: tensor if name.startswith(VAE) else tensor.to(dtype) for name, tensor in tensors.items()}
    checkpoint = find_checkpoint(str(written(tmp_path / "one.safetensors", given)), config=str(folder))
    with as_folder(checkpoint, NoteRecorder()) as config:
        modules = load_modules(config, checkpoint)
        sizes = {part: sum(path.stat().st_size for path in config.weights(part)) for part in config.parts}
    for module, name, prefix in (
        (modules.unet.add_embedding.linear_1.weight, "label_emb.0.0.weight", UNET),
        (modules.text_encoder_2.text_projection.weight.T, "model.text_projection", OPEN_CLIP),
        (modules.vae.decoder.conv_in.weight, "decoder.conv_in.weight", VAE),
    ):
        assert torch.equal(module, given[f"{prefix}{name}"].float())
    stored = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith(UNET))
    assert 2 * stored <= sizes["unet"] < 2.5 * stored


@pytest.mark.parametrize(
    ("prefix", "complaint"),
    [
        (CLIP, "holds no first text encoder: pass a file that holds all parts"),
        (OPEN_CLIP, "holds no second text encoder: pass a file that holds all parts"),
        ("conditioner.", "holds no first text encoder and no second text encoder"),
        (VAE, r"holds no VAE: pass one with --vae\."),
        (UNET, "holds no UNet"),
    ],
)
def test_a_part_that_is_missing_is_named(
    folder: Path, tensors: dict[str, Tensor], tmp_path: Path, prefix: str, complaint: str
) -> None:
    path = written(tmp_path / "pruned.safetensors", without(prefix, tensors))
    with pytest.raises(CheckpointError, match=complaint):
        find_checkpoint(str(path), config=str(folder))


def test_a_file_without_a_vae_takes_that_of_a_folder(
    folder: Path, whole: Modules, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    path = written(tmp_path / "pruned.safetensors", without(VAE, tensors))
    assert_same(load(find_checkpoint(str(path), config=str(folder), vae=str(folder))), whole)


def test_a_mark_of_v_prediction_is_followed(folder: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """As NoobAI's files have it."""
    path = written(tmp_path / "v.safetensors", tensors | {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)})
    progress = NoteRecorder()
    with as_folder(find_checkpoint(str(path), config=str(folder)), progress) as config:
        schedule = config.noise_schedule
    assert (schedule.prediction_type, schedule.rescale_betas_zero_snr) == ("v_prediction", True)
    assert progress.notes == ["v.safetensors (its tensor v_pred) says that the UNet predicts v_prediction: built so"]


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        ("edm_mean", "is a model with the noise schedule of EDM, such as Playground"),
        ("edm_vpred.sigma_max", "is a model with the noise schedule of EDM, such as Playground v2.5 or CosXL"),
        (f"{UNET}time_embed.cond_proj.weight", "latent consistency model in one file"),
    ],
)
def test_models_with_the_same_names_that_are_of_another_kind_are_refused(
    folder: Path, tensors: dict[str, Tensor], tmp_path: Path, extra: str, complaint: str
) -> None:
    path = written(tmp_path / "one.safetensors", tensors | {extra: torch.zeros(1)})
    with pytest.raises(CheckpointError, match=complaint):
        find_checkpoint(str(path), config=str(folder))


def test_a_refiner_is_refused(folder: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    refiner = {name.replace(OPEN_CLIP, CLIP): one for name, one in without(CLIP, tensors).items()}
    with pytest.raises(CheckpointError, match=r"is a Stable Diffusion XL refiner \(pass the base model\)"):
        find_checkpoint(str(written(tmp_path / "refiner.safetensors", refiner)), config=str(folder))


def test_configs_of_another_family_are_refused(
    families: Families, folder: Path, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    path = written(tmp_path / "one.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"80 wide \(Stable Diffusion XL\), but the configs .* that takes 32"):
        find_checkpoint(str(path), config=str(families("sd1")))
    other = written(tmp_path / "sd1.safetensors", {k: v.contiguous() for k, v in single_file(families("sd1")).items()})
    with pytest.raises(CheckpointError, match=r"32 wide \(Stable Diffusion 1\), but the configs .* that takes 80"):
        find_checkpoint(str(other), config=str(folder))
