"""Packed LoRAs are the updates that the files mean, to the rounding of FP16, in every form."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from engines.checkpoints.adapters.lora import Lora
from engines.checkpoints.find import find_checkpoint
from engines.checkpoints.loading.fuse_lora import fuse_lora
from engines.checkpoints.loading.modules import Modules
from engines.errors import CheckpointError
from engines.lora.layout import width_of
from engines.lora.names import Target
from engines.lora.pack import PackedLora, inspect_lora, pack_lora
from engines.manifest import Manifest
from tests.support.checkpoints import load
from tests.support.loras import FORMS, Changes, Factors, FileForm, early_layers, make_changes, shapes_in, write_lora

ROUNDING = 1.001 * 2**-10  # of the product of two numbers in FP16, relative


def packed_change(packed: PackedLora, manifest: Manifest, target: Target) -> NDArray[np.float64]:
    """Σ up⊗down over the ranks: [out, in]."""
    (place,) = (layer for layer in manifest.lora_layers if (layer.part, layer.name) == target)
    values = packed.values.astype(np.float64)
    return values[:, place.up : place.up + place.outputs].T @ values[:, place.down : place.down + place.inputs]


def assert_packed(packed: PackedLora, manifest: Manifest, changes: Changes, scale: float) -> None:
    """Every layer has its change, and the others none; each term of a sum is off by no more than FP16 rounds it."""
    for target in shapes_in(manifest):
        found = packed_change(packed, manifest, target)
        if target not in changes:
            assert not found.any()
            continue
        up, down = (factor.flatten(1).double().numpy() for factor in changes[target])
        allowed = ROUNDING * abs(scale) * np.abs(up) @ np.abs(down)
        assert (np.abs(found - scale * up @ down) <= allowed + 1e-9).all(), target


def changes_for(form: FileForm, manifest: Manifest, *, seed: int = 3, rank: int = 4) -> Changes:
    shapes = shapes_in(manifest)
    return make_changes(early_layers(shapes) if form == "early" else shapes, seed=seed, rank=rank)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("alpha", [4.0, 1.0, -6.0])
def test_every_form_is_packed_with_its_scale(
    lora_manifest: Manifest, tmp_path: Path, form: FileForm, alpha: float
) -> None:
    changes = changes_for(form, lora_manifest)
    path = write_lora(tmp_path / "style.safetensors", changes, form, alpha=alpha)
    packed = pack_lora(path, lora_manifest)
    assert packed.values.shape == (4, width_of(lora_manifest.lora_layers))
    assert packed.values.dtype == np.float16
    assert packed.parts == {"unet", "text_encoder"}
    assert packed.info.form == form.removesuffix("-old")
    assert packed.info == inspect_lora(path, lora_manifest)
    assert_packed(packed, lora_manifest, changes, alpha / 4)


@pytest.mark.parametrize("form", FORMS)
def test_packed_updates_are_what_fusing_adds(
    checkpoint: Path, lora_manifest: Manifest, tmp_path: Path, form: FileForm
) -> None:
    path = write_lora(tmp_path / "style.safetensors", changes_for(form, lora_manifest), form, alpha=3)
    packed = pack_lora(path, lora_manifest)
    modules: Modules = load(find_checkpoint(str(checkpoint)))
    before = {target: weight_of(modules, target).clone() for target in shapes_in(lora_manifest)}
    fuse_lora(Lora(path), modules.lora_parts)
    for target, weight in before.items():
        fused = (weight_of(modules, target) - weight).flatten(1).numpy()
        found = packed_change(packed, lora_manifest, target)
        assert np.abs(found - fused).max() <= 2**-9 * np.abs(fused).max() + 1e-7, target


def weight_of(modules: Modules, target: Target) -> torch.Tensor:
    weight: torch.Tensor = getattr(modules, target.part).get_submodule(target.name).weight
    return weight.detach()


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_every_dtype_is_read_as_what_it_holds(lora_manifest: Manifest, tmp_path: Path, dtype: torch.dtype) -> None:
    changes = changes_for("kohya", lora_manifest)
    packed = pack_lora(write_lora(tmp_path / "a.safetensors", changes, alpha=2, dtype=dtype), lora_manifest)
    rounded = {target: Factors(*(factor.to(dtype).float() for factor in pair)) for target, pair in changes.items()}
    assert_packed(packed, lora_manifest, rounded, 2 / 4)


def test_an_integer_is_no_factor(lora_manifest: Manifest, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.safetensors", changes_for("kohya", lora_manifest), dtype=torch.int8)
    with pytest.raises(CheckpointError, match=r"a\.safetensors holds lora_\S+ in I8, which is not supported: convert"):
        pack_lora(path, lora_manifest)


def test_factors_of_very_different_sizes_are_balanced(lora_manifest: Manifest, tmp_path: Path) -> None:
    """As they are, FP16 could hold neither: each rank has its own sizes, which are made equal."""
    target = Target("unet", "down_blocks.0.attentions.0.proj_in")
    (made,) = make_changes({target: shapes_in(lora_manifest)[target]}, seed=1, rank=3).values()
    sizes = torch.tensor([1e-9, 1.0, 1e9])
    changes = {target: Factors(made.up * sizes, made.down / sizes[:, None])}
    packed = pack_lora(write_lora(tmp_path / "a.safetensors", changes), lora_manifest)
    assert_packed(packed, lora_manifest, changes, 1)
    place = next(layer for layer in lora_manifest.lora_layers if layer.name == target.name)
    up, down = packed.values[:, place.up :][:, : place.outputs], packed.values[:, place.down :][:, : place.inputs]
    np.testing.assert_allclose(np.abs(up).max(axis=1), np.abs(down).max(axis=1), rtol=2**-10)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_layers_ranks_and_alphas_are_packed(lora_manifest: Manifest, tmp_path: Path, data: st.DataObject) -> None:
    shapes = shapes_in(lora_manifest)
    chosen = data.draw(st.lists(st.sampled_from(sorted(shapes)), min_size=1, max_size=5, unique=True))
    form: FileForm = data.draw(st.sampled_from([form for form in FORMS if form != "early"]))
    rank, alpha = data.draw(st.integers(1, 8)), data.draw(st.floats(-64, 64, width=32))
    seed, strength = data.draw(st.integers(0, 2**16)), data.draw(st.floats(1e-3, 30))
    changes = make_changes({target: shapes[target] for target in chosen}, seed=seed, rank=rank, strength=strength)
    packed = pack_lora(write_lora(tmp_path / "a.safetensors", changes, form, alpha=alpha), lora_manifest)
    assert packed.parts == {target.part for target in chosen}
    assert_packed(packed, lora_manifest, changes, alpha / rank)


def test_layers_of_lower_rank_end_in_zeros(lora_manifest: Manifest, tmp_path: Path) -> None:
    shapes = shapes_in(lora_manifest)
    first, second = list(shapes)[2:4]
    changes = {
        **make_changes({first: shapes[first]}, seed=1, rank=2),
        **make_changes({second: shapes[second]}, seed=2, rank=5),
    }
    path = write_lora(tmp_path / "a.safetensors", changes, alpha=5)
    packed = pack_lora(path, lora_manifest)
    assert packed.values.shape[0] == packed.info.rank == 5
    assert_packed(packed, lora_manifest, _scaled(changes, 5), 1)
    place = next(layer for layer in lora_manifest.lora_layers if layer.name == first.name)
    assert not packed.values[2:, place.up : place.up + place.outputs].any()


def _scaled(changes: Changes, alpha: float) -> Changes:
    return {target: Factors(pair.up * (alpha / len(pair.down)), pair.down) for target, pair in changes.items()}


def test_a_layer_that_is_updated_under_two_names_has_both_updates(lora_manifest: Manifest, tmp_path: Path) -> None:
    """As fusing adds both."""
    target = Target("text_encoder", "encoder.layers.0.mlp.fc1")
    shape = {target: shapes_in(lora_manifest)[target]}
    first, second = (make_changes(shape, seed=seed, rank=3) for seed in (1, 2))
    one, two = (write_lora(tmp_path / f"{name}.safetensors", made) for name, made in (("1", first), ("2", second)))
    renamed = {key.replace("lora_te_", "lora_te1_"): value for key, value in load_file(two).items()}
    save_file({**load_file(one), **renamed}, tmp_path / "both.safetensors")
    packed = pack_lora(tmp_path / "both.safetensors", lora_manifest)
    ups, downs = zip(first[target], second[target], strict=True)
    both = {target: Factors(torch.cat(ups, 1), torch.cat(downs, 0))}
    assert packed.info.rank == 6
    assert_packed(packed, lora_manifest, both, 1)


def test_the_hash_is_of_the_file_and_of_the_config_that_decides(lora_manifest: Manifest, tmp_path: Path) -> None:
    changes = changes_for("kohya", lora_manifest)
    path = write_lora(tmp_path / "kohya" / "a.safetensors", changes)
    (path.parent / "adapter_config.json").write_text("{}")  # of another file
    assert pack_lora(path, lora_manifest).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    path = write_lora(tmp_path / "peft" / "adapter_model.safetensors", changes, "peft", alpha=2)
    before = pack_lora(path, lora_manifest).sha256
    (path.parent / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4}))
    assert pack_lora(path, lora_manifest).sha256 != before


@pytest.mark.parametrize("stabilized", [False, True])
def test_the_scale_of_peft_is_in_the_factors(lora_manifest: Manifest, tmp_path: Path, stabilized: bool) -> None:
    """With patterns for layers of both parts, by names with and without the wrapper `text_model`."""
    shapes = shapes_in(lora_manifest)
    query = next(target for target in shapes if target.name.endswith("attn1.to_q"))
    text = Target("text_encoder", "encoder.layers.1.mlp.fc2")
    other = Target("text_encoder", "encoder.layers.0.mlp.fc2")
    changes = make_changes({target: shapes[target] for target in (query, text, other)}, seed=1)
    path = write_lora(tmp_path / "adapter_model.safetensors", changes, "peft")
    config = {
        "lora_alpha": 16,
        "use_rslora": stabilized,
        "alpha_pattern": {"to_q": 2, "text_model.encoder.layers.1.mlp.fc2": 12},
    }
    path.with_name("adapter_config.json").write_text(json.dumps(config))
    packed = pack_lora(path, lora_manifest)
    for target, alpha in ((query, 2), (text, 12), (other, 16)):
        wanted = alpha / (math.sqrt(4) if stabilized else 4) * changes[target].product().numpy()
        np.testing.assert_allclose(
            packed_change(packed, lora_manifest, target), wanted, atol=2e-3 * np.abs(wanted).max()
        )
