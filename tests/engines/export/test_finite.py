"""Graphs that compute NaN, or leave FP16's range, are refused before minutes go into exporting them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from engines.checkpoints.find import find_checkpoint
from engines.checkpoints.loading.modules import Modules
from engines.contract import GraphName
from engines.export.run import export_graphs
from engines.export.trace import ExportError, largest_value, traced_graphs
from engines.manifest import ComputeDtype, Graph, Manifest, Size
from engines.progress import NullProgress, Progress
from tests.support.checkpoints import NoteRecorder, load
from tests.support.tiny import make_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("finite") / "tiny")


@pytest.fixture
def modules(folder: Path) -> Modules:
    return load(find_checkpoint(str(folder)))


def export(
    folder: Path,
    modules: Modules,
    out: Path,
    *typed: tuple[GraphName, ComputeDtype],
    known: Mapping[GraphName, Graph] = MappingProxyType({}),
    progress: Progress = NullProgress(),  # noqa: B008 - has no state
) -> dict[GraphName, Graph]:
    config = find_checkpoint(str(folder)).config
    size = Size(width=32, height=32)
    return export_graphs(
        config, modules, out, storage="fp32", typed=typed, size=size, known=dict(known), progress=progress
    )


@pytest.mark.parametrize(
    ("graph", "part", "weight"),
    [
        ("decode", "vae", "decoder.conv_in.weight"),
        ("encode_image", "vae", "encoder.conv_in.weight"),
        ("denoise", "unet", "conv_in.weight"),
        ("encode_prompt", "text_encoder", "final_layer_norm.weight"),
    ],
)
def test_a_graph_that_computes_nan_in_torch_is_refused(
    folder: Path, modules: Modules, tmp_path: Path, graph: str, part: str, weight: str
) -> None:
    """Where weights are finite and their products are not, as these would be: both sides of a comparison are NaN."""
    with torch.no_grad():
        getattr(modules, part).get_parameter(weight).fill_(torch.nan)
    with pytest.raises(ExportError, match=rf"^{graph} computes no finite values in torch in FP32 .* download it again"):
        export(folder, modules, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [7e4, -7e4])
def test_a_weight_beyond_fp16_names_the_precisions_that_hold_it(
    folder: Path, modules: Modules, tmp_path: Path, value: float
) -> None:
    with torch.no_grad():
        modules.unet.conv_in.bias[1] = value
    complaint = (
        r"unet\.conv_in\.bias of denoise reaches 70000, and FP16 ends at 65504: build it with --precision bf16, or"
    )
    with pytest.raises(ExportError, match=complaint):
        export(folder, modules, tmp_path, ("denoise", "fp16"))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def known(bundle: Path) -> dict[GraphName, Graph]:
    """The graphs of the bundle of the same checkpoint, so that none has to be exported in FP32."""
    return dict(Manifest.load(bundle).graphs)


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def test_a_vae_beyond_fp16_is_exported_in_bf16_and_the_reason_told(
    folder: Path, modules: Modules, copied: Path, known: dict[GraphName, Graph]
) -> None:
    with torch.no_grad():
        modules.vae.decoder.conv_in.bias[1] = 7e4
    notes = NoteRecorder()
    known.pop("decode")
    made = export(folder, modules, copied, ("decode", "fp16"), known=known, progress=notes)
    assert [name for name, graph in made.items() if graph.exceeds_fp16] == ["decode"]
    assert set(made["decode"].onnx) == {"fp32", "bf16"}
    assert notes.notes == [
        "vae.decoder.conv_in.bias of decode reaches 70000, and FP16 ends at 65504: it computes in BF16 where the "
        "others compute in FP16"
    ]
    assert export(folder, modules, copied, ("decode", "fp16"), known=made, progress=notes) == made
    assert len(notes.notes) == 1


def test_nan_inside_a_graph_counts_as_beyond_every_range(folder: Path, modules: Modules) -> None:
    config = find_checkpoint(str(folder)).config
    traced = traced_graphs(modules, config.latent, config.context)["decode"]
    assert 0 < largest_value(traced, traced.random_inputs()) < 65504
    with torch.no_grad():
        modules.vae.decoder.conv_in.weight.fill_(torch.nan)
    assert largest_value(traced, traced.random_inputs()) == torch.inf
