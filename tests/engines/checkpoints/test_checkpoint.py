"""Checkpoints are found wherever they are, recognised before their weights are read, and loaded as they were saved."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engines.checkpoints.checkpoint import Checkpoint, CheckpointConfig, CheckpointError, Lora, find_checkpoint
from engines.checkpoints.load import Modules, load_modules, opened
from engines.progress import Silent
from tests import ROOT
from tests.support.ldm import single_file, write_single_file
from tests.support.tiny import FAMILIES, make_checkpoint, make_decoder

PARTS = ("text_encoder", "unet", "vae")
Families = Callable[[str], Path]


class Noting(Silent):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    """A checkpoint of each family, made when it is first asked for: copy what you alter."""
    root = tmp_path_factory.mktemp("families")

    def family(name: str) -> Path:
        return root / name if (root / name).exists() else make_checkpoint(root / name, name)

    return family


@pytest.fixture(scope="module")
def plain(families: Families) -> Modules:
    """The modules of `sd1`: leave them as they are."""
    return load(find_checkpoint(str(families("sd1"))))


@pytest.fixture
def copied(families: Families, tmp_path: Path) -> Path:
    return Path(shutil.copytree(families("sd1"), tmp_path / "copy"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pickle_weights(folder: Path) -> None:
    """Turn the folder's safetensors into pickles, as older checkpoints have them."""
    for stem, pickled in (("model", "pytorch_model"), ("diffusion_pytorch_model", "diffusion_pytorch_model")):
        for path in folder.glob(f"*/{stem}.safetensors"):
            torch.save(load_file(path), path.with_name(f"{pickled}.bin"))
            path.unlink()


def load(checkpoint: Checkpoint) -> Modules:
    with opened(checkpoint, Silent()) as config:
        return load_modules(config, checkpoint)


def assert_same(modules: Modules, others: Modules) -> None:
    for part in PARTS:
        here, there = getattr(modules, part).state_dict(), getattr(others, part).state_dict()
        assert here.keys() == there.keys()
        assert all(torch.equal(here[name], there[name]) for name in here)


# --- families


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_found_and_loaded(families: Families, family: str) -> None:
    checkpoint = find_checkpoint(str(families(family)))
    assert checkpoint.name == family
    modules = load(checkpoint)
    assert all(not getattr(modules, part).training for part in PARTS)
    assert {weight.dtype for part in PARTS for weight in getattr(modules, part).parameters()} == {torch.float32}
    assert modules.text_encoder.config._attn_implementation == "sdpa"
    assert checkpoint.config.context.width == modules.unet.config.cross_attention_dim


def test_what_sets_families_apart(families: Families) -> None:
    configs = {family: find_checkpoint(str(families(family))).config for family in FAMILIES}
    assert configs["sd2"].noise_schedule.prediction_type == "v_prediction"
    assert [name for name, config in configs.items() if config.prefers_bf16] == ["sd2"]
    assert {name: config.guidance_embedding for name, config in configs.items()} == {
        **dict.fromkeys(FAMILIES),
        "lcm": 32,
    }
    assert (configs["lcm"].scheduler, configs["sd2"].scheduler, configs["sd1"].scheduler) == ("lcm", "ddim", "pndm")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"_class_name": "EulerDiscreteScheduler"}, "euler"),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, "euler_karras"),
        ({"_class_name": "KDPM2AncestralDiscreteScheduler", "use_beta_sigmas": True}, "kdpm2_ancestral_beta"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "dpmpp_2m"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3, "use_karras_sigmas": True},
            "dpmpp_3m_karras",
        ),
        (
            {
                "_class_name": "DPMSolverMultistepScheduler",
                "algorithm_type": "sde-dpmsolver++",
                "use_exponential_sigmas": True,
            },
            "dpmpp_2m_sde_exponential",
        ),
        ({"_class_name": "DPMSolverSinglestepScheduler", "solver_order": 3}, "dpmpp_3s"),
        ({"_class_name": "DPMSolverSinglestepScheduler", "solver_type": "bh2"}, "dpmpp_2s"),
        ({"_class_name": "UniPCMultistepScheduler", "solver_order": 2, "disable_corrector": []}, "unipc"),
        ({"_class_name": "DEISMultistepScheduler", "use_karras_sigmas": True}, "deis_karras"),
        ({"_class_name": "TCDScheduler"}, "tcd"),
        ({"_class_name": "DDIMScheduler", "use_karras_sigmas": True}, "ddim"),  # which that class ignores
    ],
)
def test_the_scheduler_is_named_after_its_config(copied: Path, config: dict[str, object], name: str) -> None:
    (copied / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    assert CheckpointConfig(copied, "copy").scheduler == name


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "IPNDMScheduler"},
        {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"},
        {"_class_name": "DPMSolverMultistepScheduler", "solver_type": "heun"},
        {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 1},
        {"_class_name": "DPMSolverMultistepScheduler", "use_lu_lambdas": True},
        {"_class_name": "DPMSolverSinglestepScheduler", "algorithm_type": "sde-dpmsolver++"},
        {"_class_name": "DEISMultistepScheduler", "solver_order": 3},
        {"_class_name": "UniPCMultistepScheduler", "solver_order": 3},
        {"_class_name": "UniPCMultistepScheduler", "predict_x0": False},
        {"_class_name": "UniPCMultistepScheduler", "disable_corrector": [0]},
        {},
    ],
)
def test_a_scheduler_without_a_table_falls_to_the_one_of_sd1(copied: Path, config: dict[str, object]) -> None:
    (copied / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    assert CheckpointConfig(copied, "copy").scheduler == "pndm"


def test_zero_terminal_snr_is_a_fact_of_the_noise_schedule(copied: Path) -> None:
    assert not CheckpointConfig(copied, "copy").noise_schedule.rescale_betas_zero_snr
    edit(copied / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True)
    assert CheckpointConfig(copied, "copy").noise_schedule.rescale_betas_zero_snr


def test_a_wide_context_prefers_bf16_too(copied: Path) -> None:
    edit(copied / "unet" / "config.json", cross_attention_dim=1024)
    assert CheckpointConfig(copied, "copy").prefers_bf16


def test_a_scheduler_we_have_no_words_for_is_an_error(copied: Path) -> None:
    edit(copied / "scheduler" / "scheduler_config.json", beta_schedule="sigmoid")
    with pytest.raises(CheckpointError, match=r"scheduler config of copy .* beta_schedule"):
        _ = find_checkpoint(str(copied)).config.noise_schedule


# --- what is not built


@pytest.mark.parametrize(
    ("file", "changes", "complaint"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "StableDiffusionXLPipeline"),
        ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, "StableDiffusion3Pipeline"),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "FluxPipeline"),
        ("model_index.json", {"_class_name": "StableDiffusionInpaintPipeline"}, "StableDiffusionInpaintPipeline"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "AutoencoderTiny as vae"),
        ("model_index.json", {"tokenizer": ["transformers", "T5Tokenizer"]}, "T5Tokenizer as tokenizer"),
        ("unet/config.json", {"in_channels": 9}, r"9 input channels \(inpainting\)"),
        ("unet/config.json", {"in_channels": 5}, r"5 input channels \(depth"),
        ("unet/config.json", {"in_channels": 7}, r"7 input channels \(upscaling"),
        ("unet/config.json", {"class_embed_type": "projection"}, "class_embed_type 'projection'"),
        ("unet/config.json", {"num_class_embeds": 1000}, "num_class_embeds 1000"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type 'text_time'"),
        ("unet/config.json", {"encoder_hid_dim": 4096}, "encoder_hid_dim 4096"),
        ("unet/config.json", {"cross_attention_dim": 768}, "768 wide, its text encoder writes 32"),
    ],
)
def test_other_folders_are_refused_by_name(copied: Path, file: str, changes: dict[str, Any], complaint: str) -> None:
    edit(copied / file, **changes)
    with pytest.raises(CheckpointError, match=complaint):
        find_checkpoint(str(copied))


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        (["conditioner.embedders.1.model.ln_final.weight"], "Stable Diffusion XL checkpoint"),
        (["conditioner.embedders.0.model.ln_final.weight"], "Stable Diffusion XL refiner"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "Stable Diffusion 3"),
        (["double_blocks.0.img_attn.qkv.weight"], "Flux"),
        (["blocks.0.cross_attn.k.weight"], "diffusion transformer"),
        (["control_model.time_embed.0.weight"], "ControlNet"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], "a VAE alone"),
        (["first_stage_model.encoder.conv_in.weight"], "no UNet and no text encoder"),
        (["down_blocks.0.resnets.0.conv1.weight"], "one part of a diffusers checkpoint"),
        (["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"], "pass it with --lora"),
        (["unet.mid_block.attentions.0.proj_in.lora_A.weight"], "pass it with --lora"),
        (["model.diffusion_model.label_emb.0.0.weight"], "needs a class or an image"),
        (["model.diffusion_model.time_embed.cond_proj.weight"], "latent consistency model in one file"),
        (["emb_params"], "no checkpoint that we know"),
    ],
)
def test_other_single_files_are_refused_by_name(tmp_path: Path, keys: list[str], complaint: str) -> None:
    save_file({key: torch.zeros(1) for key in keys}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=complaint):
        find_checkpoint(str(tmp_path / "other.safetensors"))


def test_an_inpainting_file_is_refused(families: Families, tmp_path: Path) -> None:
    tensors = single_file(families("sd1"))
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(16, 9, 3, 3)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "inpaint.safetensors")
    with pytest.raises(CheckpointError, match="9 input channels"):
        find_checkpoint(str(tmp_path / "inpaint.safetensors"), config=str(families("sd1")))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip file, as pickles are", b"\x08\0\0\0\0\0\0\0not json"])
def test_what_is_no_safetensors_file_is_said_so(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"no \.safetensors file, or a damaged one"):
        find_checkpoint(str(path))


def test_paths_that_lead_nowhere_are_said_so(tmp_path: Path, families: Families) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        find_checkpoint(str(tmp_path / "model.safetensors"))
    (tmp_path / "model.onnx").touch()
    with pytest.raises(CheckpointError, match="no checkpoint: pass a diffusers folder"):
        find_checkpoint(str(tmp_path / "model.onnx"))
    with pytest.raises(CheckpointError, match="--config describes a single file"):
        find_checkpoint(str(families("sd1")), config=str(families("sd1")))
    with pytest.raises(CheckpointError, match="neither a folder here nor a hub id"):
        find_checkpoint(str(tmp_path / "no such folder"))


# --- weights


def test_damaged_or_missing_weights_name_the_part(copied: Path) -> None:
    path = copied / "text_encoder" / "model.safetensors"
    whole = {name: weight.clone() for name, weight in load_file(path).items()}  # what it returns lies in the file
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="weights of copy cannot be loaded: text_encoder"):
        load(find_checkpoint(str(copied)))
    whole.pop("final_layer_norm.weight")
    save_file(whole, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"text_encoder lacks 1 .* final_layer_norm\.weight"):
        load(find_checkpoint(str(copied)))
    path.rename(path.with_suffix(".fp16.safetensors"))
    with pytest.raises(CheckpointError, match=r"holds model\.fp16\.safetensors but no model\.safetensors: .* rename"):
        find_checkpoint(str(copied))


def test_pickled_folders_are_read_only_where_that_is_allowed(plain: Modules, copied: Path) -> None:
    pickle_weights(copied)
    with pytest.raises(CheckpointError, match=r"can run code: .* --allow-pickle"):
        find_checkpoint(str(copied))
    progress = Noting()
    checkpoint = find_checkpoint(str(copied), allow_pickle=True, progress=progress)
    assert [note.split(":")[0] for note in progress.notes] == [str(copied / part) for part in PARTS]
    assert_same(load(checkpoint), plain)


class Harmful:
    """Runs code when it is unpickled without care."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harmed",)


@pytest.mark.parametrize("part", ["text_encoder", "unet"])
def test_a_pickle_never_runs_code(copied: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    monkeypatch.chdir(copied)
    pickle_weights(copied)
    path = next((copied / part).glob("*.bin"))
    torch.save({**torch.load(path), "harmful": Harmful()}, path)
    with pytest.raises(CheckpointError, match=f"cannot be loaded: {part}"):
        load(find_checkpoint(str(copied), allow_pickle=True))
    assert not (copied / "harmed").exists()


# --- single files


@pytest.mark.parametrize("family", ["sd1", "sd15", "no-mid", "sd2"])
def test_a_single_file_is_the_folder_it_was_made_of(families: Families, tmp_path: Path, family: str) -> None:
    folder = families(family)
    path = write_single_file(folder, tmp_path / f"{family}-one.safetensors")
    checkpoint = find_checkpoint(str(path), config=str(folder))
    assert (checkpoint.name, checkpoint.source.name) == (path.stem, path.stem)
    with opened(checkpoint, Silent()) as config:
        assert config.folder != folder
        assert config.noise_schedule == checkpoint.config.noise_schedule == CheckpointConfig(folder, "").noise_schedule
        assert {file.name for file in (config.folder / "tokenizer").iterdir()} >= {"vocab.json", "merges.txt"}
        assert_same(load_modules(config, checkpoint), load(find_checkpoint(str(folder))))
    assert not config.folder.exists()


def test_a_pickled_single_file_is_read_only_where_that_is_allowed(
    families: Families, plain: Modules, tmp_path: Path
) -> None:
    path = write_single_file(families("sd1"), tmp_path / "one.ckpt")
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        find_checkpoint(str(path), config=str(families("sd1")))
    progress = Noting()
    checkpoint = find_checkpoint(str(path), config=str(families("sd1")), allow_pickle=True, progress=progress)
    assert len(progress.notes) == 1
    assert_same(load(checkpoint), plain)


def test_a_pickled_single_file_is_recognised_once_it_is_read(
    families: Families, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for content, complaint in (
        ({"conditioner.embedders.1.model.x": torch.zeros(1)}, "Stable Diffusion XL"),
        ({"state_dict": {}, "harmful": Harmful()}, "cannot be read as bare tensors"),
    ):
        torch.save(content, "one.ckpt")
        checkpoint = find_checkpoint("one.ckpt", config=str(families("sd1")), allow_pickle=True)
        with pytest.raises(CheckpointError, match=complaint):
            load(checkpoint)
    assert not Path("harmed").exists()


@pytest.mark.parametrize(
    ("family", "config", "complaint"),
    [
        ("sd2", "sd1", r"64 wide \(Stable Diffusion 2\), the configs .* are for 32"),
        ("sd15", "sd1", "expected shape"),
        ("sd1", "no-mid", "its UNet has 208 weights, not 162"),
        ("no-mid", "sd1", "weights are missing"),
    ],
)
def test_configs_that_describe_another_file_are_refused(
    families: Families, tmp_path: Path, family: str, config: str, complaint: str
) -> None:
    path = write_single_file(families(family), tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError, match=complaint) as told:
        load(find_checkpoint(str(path), config=str(families(config))))
    assert "ass --config with a checkpoint of its kind" in str(told.value)


def test_a_file_of_sd2_asks_what_it_predicts(families: Families, tmp_path: Path) -> None:
    path = write_single_file(families("sd2"), tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError, match="does not say what its UNet predicts: pass --config"):
        find_checkpoint(str(path))


# --- LoRA


def changes(modules: Modules, *, seed: int) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """Random factors up and down of rank 4, for layers of each kind in both parts."""
    generator = torch.Generator().manual_seed(seed)
    wanted = (
        "attn1.to_q",
        "attn2.to_out.0",
        "ff.net.0.proj",
        "proj_in",
        "resnets.0.conv1",
        "self_attn.v_proj",
        "mlp.fc1",
    )
    return {
        (part, name): (
            0.1 * torch.randn(len(layer.weight), 4, *[1] * (layer.weight.ndim - 2), generator=generator),
            0.1 * torch.randn(4, *layer.weight.shape[1:], generator=generator),
        )
        for part in ("unet", "text_encoder")
        for name, layer in getattr(modules, part).named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and name.endswith(wanted)
    }


def write_lora(path: Path, made: dict[tuple[str, str], tuple[Tensor, Tensor]], style: str, *, alpha: float) -> Path:
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, float] = {}
    for (part, name), (up, down) in made.items():
        full = name if part == "unet" else f"text_model.{name}"
        if style == "kohya":
            layer = f"lora_{'unet' if part == 'unet' else 'te'}_{full.replace('.', '_')}"
            tensors |= {
                f"{layer}.lora_up.weight": up,
                f"{layer}.lora_down.weight": down,
                f"{layer}.alpha": torch.tensor(alpha),
            }
        else:
            tensors |= {f"{part}.{full}.lora_B.weight": up, f"{part}.{full}.lora_A.weight": down}
            metadata[f"{part}.lora_alpha"] = alpha
    save_file(tensors, path, metadata={"lora_adapter_metadata": json.dumps(metadata)} if metadata else None)
    return path


def expected(modules: Modules, *added: tuple[float, dict[tuple[str, str], tuple[Tensor, Tensor]]]) -> dict[str, Tensor]:
    weights = {
        f"{part}.{name}": weight.clone()
        for part in PARTS
        for name, weight in getattr(modules, part).state_dict().items()
    }
    for scale, made in added:
        for (part, name), (up, down) in made.items():
            weight = weights[f"{part}.{name}.weight"]
            weight += scale * torch.einsum("or,r...->o...", up.flatten(1), down)
    return weights


@pytest.mark.parametrize("style", ["kohya", "peft"])
def test_loras_add_up_and_leave_plain_modules(families: Families, plain: Modules, tmp_path: Path, style: str) -> None:
    first, second = changes(plain, seed=1), changes(plain, seed=2)
    loras = (
        Lora(write_lora(tmp_path / "a.safetensors", first, style, alpha=2.0), 0.75),
        Lora(write_lora(tmp_path / "b.safetensors", second, style, alpha=4.0), -0.5),
    )
    checkpoint = find_checkpoint(str(families("sd1")), loras=loras)
    assert checkpoint.source.loras == ("a.safetensors:0.75", "b.safetensors:-0.5")
    untouched = find_checkpoint(str(families("sd1"))).source
    fused = load(checkpoint)
    wanted = expected(plain, (0.75 * 2 / 4, first), (-0.5, second))
    for part in PARTS:
        assert [type(module) for module in getattr(fused, part).modules()] == [
            type(module) for module in getattr(plain, part).modules()
        ]
        for name, weight in getattr(fused, part).state_dict().items():
            assert torch.allclose(weight, wanted[f"{part}.{name}"], atol=1e-6), name
    assert len(first) > 10
    assert (
        find_checkpoint(str(families("sd1"))).source == untouched
    )  # weights are mapped into memory, and changed in it alone


def test_a_lora_without_alpha_takes_its_rank_for_it(families: Families, plain: Modules, tmp_path: Path) -> None:
    weight = plain.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora"
    up, down = torch.ones(len(weight), 2), torch.ones(2, weight.shape[1])
    save_file({f"{layer}.up.weight": up, f"{layer}.down.weight": down}, tmp_path / "old.safetensors")
    fused = load(find_checkpoint(str(families("sd1")), loras=[Lora(tmp_path / "old.safetensors", 0.5)]))
    there = fused.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    assert torch.allclose(there, weight + 1.0, atol=1e-6)


QUERY = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("shapes", "complaint"),
    [
        ({"conv_in.weight": (16, 4, 3, 3)}, "is not a LoRA"),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 8)}, "Stable Diffusion XL"),
        ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (4, 8)}, "diffusion transformer"),
        ({f"lora_unet_{QUERY}.hada_w1_a": (4, 8)}, "a LoHa"),
        ({f"lora_unet_{QUERY}.lora_down.weight": (4, 16), f"lora_unet_{QUERY}.dora_scale": (1,)}, "a DoRA"),
        ({f"lora_unet_{QUERY}.lora_down.weight": (4, 320), f"lora_unet_{QUERY}.lora_up.weight": (320, 4)}, "shape"),
        ({f"lora_unet_{QUERY}.lora_down.weight": (4, 16)}, "shape"),
        ({f"lora_unet_{QUERY}.lora_down.weight": (4, 16), f"lora_unet_{QUERY}.diff_b": (1,)}, "no factor of a LoRA"),
        (
            {"lora_unet_down_blocks_7_attn1_to_q.lora_down.weight": (4, 8)},
            "changes the layer lora_unet_down_blocks_7_attn1_to_q, which is not here: it was made for another model",
        ),
    ],
)
def test_what_cannot_be_fused_is_refused(
    families: Families, tmp_path: Path, shapes: dict[str, tuple[int, ...]], complaint: str
) -> None:
    path = tmp_path / "style.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    with pytest.raises(CheckpointError, match=complaint):
        load(find_checkpoint(str(families("sd1")), loras=[Lora(path)]))


def test_a_lora_trained_in_a_way_we_do_not_fuse_is_refused(families: Families, tmp_path: Path) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({"unet.use_rslora": True})}
    save_file({"unet.conv_in.lora_A.weight": torch.zeros(1, 4, 3, 3)}, tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match="use_rslora"):
        load(find_checkpoint(str(families("sd1")), loras=[Lora(tmp_path / "a.safetensors")]))


def test_loras_are_written_with_their_scale() -> None:
    assert Lora.parse("style.safetensors") == Lora(Path("style.safetensors"), 1.0)
    assert Lora.parse("a/style.safetensors:0.8") == Lora(Path("a/style.safetensors"), 0.8)
    assert Lora.parse(r"C:\style.safetensors") == Lora(Path(r"C:\style.safetensors"))
    assert Lora.parse(r"C:\style.safetensors:-1").scale == -1
    assert str(Lora(Path("a/style.safetensors"))) == "style.safetensors:1"


@pytest.mark.parametrize(
    "text", ["style.pt", "style.safetensors:", "style.safetensors:big", "style.safetensors:nan", ""]
)
def test_malformed_loras_are_explained(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"write"):
        Lora.parse(text)


def test_a_missing_lora_is_said_so(families: Families, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        find_checkpoint(str(families("sd1")), loras=[Lora(tmp_path / "style.safetensors")])


# --- identity


def test_the_identity_is_that_of_every_file_that_decides(copied: Path, tmp_path: Path) -> None:
    def identity(*loras: Lora) -> str:
        return find_checkpoint(str(copied), loras=loras).source.sha256

    seen = [identity()]
    (copied / "README.md").write_text("unrelated")
    (copied / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"a variant that is not loaded")
    assert identity() == seen[0]
    save_file({"unet.conv_in.lora_A.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    seen += [identity(Lora(tmp_path / "a.safetensors")), identity(Lora(tmp_path / "a.safetensors", 0.5))]
    save_file({"unet.conv_in.lora_A.weight": torch.ones(1)}, tmp_path / "a.safetensors")
    seen += [identity(Lora(tmp_path / "a.safetensors"))]
    for file in ("unet/config.json", "scheduler/scheduler_config.json", "text_encoder/config.json"):
        edit(copied / file, note="changed")
        seen += [identity()]
    with (copied / "tokenizer" / "merges.txt").open("a") as merges:
        merges.write("x y\n")
    seen += [identity()]
    with (copied / "vae" / "diffusion_pytorch_model.safetensors").open("ab") as weights:
        weights.write(b"\0")
    seen += [identity()]
    assert max(Counter(seen).values()) == 1


def test_the_identity_of_a_single_file_holds_its_configs(copied: Path, tmp_path: Path) -> None:
    path = write_single_file(copied, tmp_path / "one.safetensors")
    checkpoint = find_checkpoint(str(path), config=str(copied))
    assert checkpoint.source is checkpoint.source
    (copied / "unet" / "diffusion_pytorch_model.safetensors").unlink()  # its weights are not those that count
    assert find_checkpoint(str(path), config=str(copied)).source == checkpoint.source
    edit(copied / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    assert find_checkpoint(str(path), config=str(copied)).source != checkpoint.source


# --- the hub


class Hub(ThreadingHTTPServer):
    """As much of the hub as a snapshot download asks for: revisions, their files, and the files' contents."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.models: dict[str, dict[str, Path]] = {}  # folders by model and revision
        self.private: set[str] = set()
        self.fetched: list[str] = []
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, model: str, revision: str) -> str | None:
        """Stands for the revision's commit, and for itself."""
        commits = {name: hashlib.sha1(f"{model}@{name}".encode()).hexdigest() for name in self.models[model]}  # noqa: S324 - a commit's name
        return revision if revision in commits.values() else commits.get(revision)

    def folder(self, model: str, commit: str) -> Path:
        return next(path for name, path in self.models[model].items() if self.commit(model, name) == commit)


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.tokens.add(self.headers.get("Authorization"))
        path = self.path.split("?")[0].strip("/")
        model, _, rest = path.removeprefix("api/models/").partition("/")
        name, _, rest = rest.partition("/")
        model = f"{model}/{name}"
        if model not in self.server.models or (model in self.server.private and not self.headers.get("Authorization")):
            self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        kind, _, rest = rest.partition("/")
        revision, _, file = rest.partition("/")
        commit = self.server.commit(model, revision)
        if commit is None:
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif kind == "resolve":
            self.content(self.server.folder(model, commit), file, commit)
        else:
            listed = self.listing(self.server.folder(model, commit))
            info = {"id": model, "sha": commit, "siblings": [{"rfilename": entry["path"]} for entry in listed]}
            self.answer(
                200, json.dumps(listed if kind == "tree" else info).encode(), {"Content-Type": "application/json"}
            )

    def listing(self, folder: Path) -> list[dict[str, Any]]:
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return [
            {
                "type": "file",
                "path": path.relative_to(folder).as_posix(),
                "size": path.stat().st_size,
                "oid": digest(path),
            }
            for path in files
        ]

    def content(self, folder: Path, file: str, commit: str) -> None:
        if self.command == "GET":
            self.server.fetched.append(file)
        path = folder / file
        self.answer(200, path.read_bytes(), {"ETag": f'"{digest(path)}"', "X-Repo-Commit": commit})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


def digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()  # noqa: S324 - git's name of a file


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


# The client reads its endpoint and cache when it is imported, so each test has a process of its own, without torch.
FIND = """
import json, sys
from contextlib import contextmanager
from engines.checkpoints.checkpoint import CheckpointError, find_checkpoint

class Telling:
    def __init__(self): self.told = {"stages": [], "bytes": [], "notes": []}
    @contextmanager
    def stage(self, name): self.told["stages"].append(name); yield self
    def update(self, done, total): self.told["bytes"].append([done, total])
    def note(self, text): self.told["notes"].append(text)

outcomes = []
for arguments in json.loads(sys.argv[1]):
    progress = Telling()
    try:
        checkpoint = find_checkpoint(arguments.pop("model"), progress=progress, **arguments)
        told = {"name": checkpoint.name, "folder": str(checkpoint.config.folder), "sha256": checkpoint.source.sha256}
    except CheckpointError as error:
        told = {"error": str(error)}
    outcomes.append(told | progress.told)
assert not {"torch", "diffusers", "transformers"} & set(sys.modules)
print(json.dumps(outcomes))
"""


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Run `find` with each set of arguments, in one process that knows the hub at a URL."""

    def ask(url: str, *calls: dict[str, Any], token: str = "") -> list[dict[str, Any]]:
        environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        environment |= {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": token}
        command = [sys.executable, "-c", FIND, json.dumps(calls)]
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)  # noqa: S603 - our own
        assert ended.returncode == 0, ended.stderr
        assert not ended.stderr
        outcomes: list[dict[str, Any]] = json.loads(ended.stdout)
        return outcomes

    return ask


Ask = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def published(copied: Path) -> Path:
    """A checkpoint with what hub repositories hold beside what we need."""
    for extra in ("README.md", "unet/diffusion_pytorch_model.fp16.safetensors", "safety_checker/model.safetensors"):
        (copied / extra).parent.mkdir(exist_ok=True)
        (copied / extra).write_bytes(b"not needed")
    shutil.copy(copied / "vae/config.json", copied / "safety_checker/config.json")
    (copied / "unet/diffusion_pytorch_model.bin").write_bytes(b"a pickle beside safetensors")
    return copied


def test_a_hub_checkpoint_is_downloaded_pinned_and_counted(
    hub: Hub, ask: Ask, published: Path, families: Families
) -> None:
    hub.models["us/tiny"] = {"main": published, "v1": families("sd15")}
    main, again, pinned, unknown = ask(
        hub.url,
        {"model": "us/tiny"},
        {"model": "us/tiny"},
        {"model": "us/tiny", "revision": "v1"},
        {"model": "us/tiny", "revision": "v2"},
    )
    assert main["name"] == "us/tiny"
    assert main["sha256"] == again["sha256"] == find_checkpoint(str(published)).source.sha256
    assert pinned["sha256"] == find_checkpoint(str(families("sd15"))).source.sha256
    assert "us/tiny has no revision 'v2'" in unknown["error"]
    weights = sum(path.stat().st_size for path in published.glob("[tuv]*/*model.safetensors"))
    assert main["stages"] == ["downloading us/tiny"] * 2
    assert main["bytes"][-1] == [weights, weights]
    assert not again["bytes"]
    extra = {"README.md", "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin", "safety_checker"}
    assert not extra & {name for file in hub.fetched for name in file.split("/")}
    assert max(Counter(hub.fetched).values()) == 2  # once for each revision
    assert hub.tokens == {None}


def test_another_architecture_is_refused_before_its_weights_are_downloaded(hub: Hub, ask: Ask, published: Path) -> None:
    edit(published / "model_index.json", _class_name="StableDiffusionXLPipeline")
    hub.models["us/xl"] = {"main": published}
    (told,) = ask(hub.url, {"model": "us/xl"})
    assert "us/xl is a StableDiffusionXLPipeline" in told["error"]
    assert hub.fetched
    assert not [file for file in hub.fetched if file.endswith(".safetensors")]


def test_pickles_are_downloaded_only_where_that_is_allowed(hub: Hub, ask: Ask, copied: Path) -> None:
    pickle_weights(copied)
    hub.models["us/pickled"] = {"main": copied}
    (refused,) = ask(hub.url, {"model": "us/pickled"})
    assert "us/pickled has no .safetensors weights for text_encoder, unet, vae" in refused["error"]
    assert "pass --allow-pickle" in refused["error"]
    assert not [file for file in hub.fetched if file.endswith(".bin")]
    (allowed,) = ask(hub.url, {"model": "us/pickled", "allow_pickle": True})
    assert allowed["sha256"] == find_checkpoint(str(copied), allow_pickle=True).source.sha256
    assert len(allowed["notes"]) == 3


def test_a_private_checkpoint_needs_the_environments_token(hub: Hub, ask: Ask, published: Path) -> None:
    hub.models["us/secret"] = {"main": published}
    hub.private.add("us/secret")
    (refused,) = ask(hub.url, {"model": "us/secret"})
    assert "set HF_TOKEN" in refused["error"]
    (allowed,) = ask(hub.url, {"model": "us/secret"}, token="hf_of_a_test")  # noqa: S106 - opens nothing
    assert allowed["name"] == "us/secret"
    assert hub.tokens == {None, "Bearer hf_of_a_test"}


def test_a_single_files_configs_come_from_the_hub(hub: Hub, ask: Ask, published: Path, tmp_path: Path) -> None:
    path = write_single_file(published, tmp_path / "one.safetensors")
    hub.models |= {"us/tiny": {"main": published}, "stable-diffusion-v1-5/stable-diffusion-v1-5": {"main": published}}
    given, default = ask(hub.url, {"model": str(path), "config": "us/tiny"}, {"model": str(path)})
    assert given["sha256"] == default["sha256"] == find_checkpoint(str(path), config=str(published)).source.sha256
    assert not [file for file in hub.fetched if file.endswith((".safetensors", ".bin"))]


def test_a_decoder_comes_from_the_hub(hub: Hub, ask: Ask, copied: Path, tmp_path: Path) -> None:
    decoder = make_decoder(tmp_path / "decoder")
    (decoder / "taesd_decoder.safetensors").write_bytes(b"not needed")
    hub.models["us/taesd"] = {"main": decoder}
    (told,) = ask(hub.url, {"model": str(copied), "decoder": "us/taesd"})
    assert told["sha256"] == find_checkpoint(str(copied), decoder=str(decoder)).source.sha256
    assert hub.fetched == ["config.json", "diffusion_pytorch_model.safetensors"]
    edit(decoder / "config.json", _class_name="AutoencoderKL")
    hub.models["us/vae"] = {"main": decoder}
    (told,) = ask(hub.url, {"model": str(copied), "decoder": "us/vae"})
    assert "us/vae is of kind AutoencoderKL" in told["error"]
    assert hub.fetched[2:] == ["config.json"]


def test_a_hub_out_of_reach_is_said_so(ask: Ask, families: Families, tmp_path: Path) -> None:
    path = write_single_file(families("sd1"), tmp_path / "one.safetensors")
    with closed_port() as url:
        model, configs = ask(url, {"model": "us/tiny"}, {"model": str(path)})
    assert model["error"].startswith("us/tiny could not be downloaded")
    assert "check the name and the network" in model["error"]
    assert "The configs that describe one.safetensors are missing" in configs["error"]
    assert "Pass --config DIR" in configs["error"]


@contextmanager
def closed_port() -> Iterator[str]:
    """A URL that nobody answers, kept from others."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
