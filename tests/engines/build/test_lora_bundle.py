"""Bundles whose graphs apply LoRAs: what changes without an export, what their commands print, what is refused."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import build_engines
from engines.build.bundle import updated
from engines.build.checks import check_lora_pool, most_lora_ranks
from engines.build.keys import engine_key
from engines.build.onnxruntime_cuda.compare import check_same
from engines.build.onnxruntime_cuda.rewrite import rewrite
from engines.contract import LORA_GRAPHS, GraphName
from engines.errors import EngineError
from engines.lora.layout import width_of
from engines.manifest import MANIFEST, BundleError, LoraCapacity, Manifest, Profile


def build(*arguments: object) -> int:
    return build_engines.main([str(argument) for argument in arguments])


@pytest.fixture
def copied(lora_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lora_bundle, tmp_path / "copy"))


def test_slots_and_rank_need_no_export(copied: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (copied / "onnx").iterdir()}
    words = ["compile", copied, "--backend", "onnxruntime", "--no-verify"]
    assert build(*words, "--lora-slots", "2") == 0
    assert Manifest.load(copied).lora == LoraCapacity(slots=2, rank=8)
    assert build(*words, "--lora-rank", "4") == 0
    assert Manifest.load(copied).lora == LoraCapacity(slots=2, rank=4)
    assert {path: path.stat().st_mtime_ns for path in (copied / "onnx").iterdir()} == before


def test_a_pool_that_tensorrt_could_not_bind_is_refused(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert build("compile", copied, "--backend", "tensorrt_rtx", "--lora-slots", "1024", "--lora-rank", "1024") == 1
    most = most_lora_ranks(width_of(Manifest.read(copied).lora_layers))
    assert f"a pool of 1048576 ranks, and TensorRT's tensors have room for {most} " in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt_rtx", "onnxruntime", "onnxruntime_cuda"])
def test_the_largest_pool_of_tensorrt_is_taken_and_no_larger_one(lora_bundle: Path, backend: str) -> None:
    manifest = Manifest.read(lora_bundle)
    rank = 1024
    slots = most_lora_ranks(width_of(manifest.lora_layers)) // rank
    check_lora_pool(updated(manifest, lora=LoraCapacity(slots=slots, rank=rank)), [backend])
    larger = updated(manifest, lora=LoraCapacity(slots=slots + 1, rank=rank))
    with pytest.raises(EngineError, match="lower one") if "tensorrt" in backend else nullcontext():
        check_lora_pool(larger, ["openvino", backend])


def test_the_documented_limit_of_stable_diffusion_xl() -> None:
    assert most_lora_ranks(3_717_120) == 576
    assert 577 * 3_717_120 < 2**31 <= 578 * 3_717_120  # with the rank that stays zero


def test_a_bundle_without_such_graphs_names_the_command(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build("compile", bundle, "--backend", "onnxruntime", "--lora-slots", "2") == 1
    assert "export it once more with build_engines.py export --lora-slots N" in capsys.readouterr().err


def test_inspect_tells_of_the_pool_and_the_layers(lora_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build("inspect", lora_bundle) == 0
    shown = " ".join(re.sub("[│┃]", " ", capsys.readouterr().err).split())
    size = (4 * 8 + 1) * width_of(Manifest.read(lora_bundle).lora_layers) * 2  # and a rank that stays zero
    assert f"4 of rank 8 on the device ({size / 1e6:.1f} MB)" in shown
    assert "63 layers of the UNet and 12 of the text encoder are updated; 20 convolutions are not" in shown


def test_bisect_finds_nothing_in_graphs_that_agree(lora_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("polygraphy")
    assert build("verify", lora_bundle, "--bisect") == 0
    assert "Nothing diverges" in capsys.readouterr().err


@pytest.mark.parametrize("name", LORA_GRAPHS.values())
def test_every_fused_operator_of_the_plain_graph_is_in_its_variant(copied: Path, name: GraphName) -> None:
    manifest = Manifest.read(copied)
    base = next(graph for graph, variant in LORA_GRAPHS.items() if variant == name)
    paths = [copied / manifest.graphs[graph].onnx["fp32"].files[0].path for graph in (base, name)]
    plain, made = (rewrite(path, path.with_suffix(".cuda.onnx")) for path in paths)
    assert (made.attentions, made.group_norms, made.convolutions) == (
        plain.attentions,
        plain.group_norms,
        plain.convolutions,
    )
    assert made.attentions[0] == made.attentions[1] > 0
    assert check_same(name, manifest, paths[1], paths[1].with_suffix(".cuda.onnx")).largest < 1e-5


def test_other_slots_are_other_engines_of_these_graphs_alone(lora_bundle: Path) -> None:
    manifest = Manifest.read(lora_bundle)
    others = updated(manifest, lora=LoraCapacity(slots=2, rank=8))

    def key(one: Manifest, graph: GraphName) -> str:
        onnx = one.graphs[graph].onnx["fp32"]
        return engine_key(one, graph, onnx, backend="tensorrt", version="1", gpu=None, precision="fp16")

    for name, variant in LORA_GRAPHS.items():
        assert key(manifest, name) == key(others, name)
        assert key(manifest, variant) != key(others, variant)


def test_other_slots_drop_engines_whose_profiles_have_the_old_ones(lora_bundle: Path) -> None:
    manifest = Manifest.read(lora_bundle)
    made = manifest.builds["onnxruntime"]
    profiles = (Profile(size=None, batch=1),)
    engines = {
        name: engine.model_copy(update={"profiles": profiles}) if name.startswith("encode_prompt") else engine
        for name, engine in made.engines.items()
    }
    compiled = updated(manifest, builds={**manifest.builds, "tensorrt": made.model_copy(update={"engines": engines})})
    assert list(compiled.builds) == ["onnxruntime", "tensorrt"]
    assert list(updated(compiled, lora=compiled.lora).builds) == ["onnxruntime", "tensorrt"]
    assert list(updated(compiled, lora=LoraCapacity(slots=2, rank=8)).builds) == ["onnxruntime"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda fields: fields["lora_layers"][0].update(down=fields["lora_layers"][1]["down"]), "lie over those of"),
        (lambda fields: fields["lora_layers"][0].update(up=fields["lora_layers"][0]["up"] + 1), "within one rank"),
        (lambda fields: fields["lora_layers"][0].update(up=10**9 * fields["lora_layers"][0]["outputs"]), "within one"),
        (lambda fields: fields["lora_layers"].clear(), "no layers that LoRAs update"),
        (lambda fields: fields["graphs"].pop("denoise_shallow_lora"), "denoise_shallow_lora is missing"),
    ],
)
def test_a_damaged_layout_is_refused(copied: Path, change: Any, words: str) -> None:
    fields = json.loads((copied / MANIFEST).read_text())
    change(fields)
    (copied / MANIFEST).write_text(json.dumps(fields))
    with pytest.raises(BundleError, match=words):
        Manifest.read(copied)
