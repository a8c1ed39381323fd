"""The graphs for ONNX Runtime's CUDA provider compute what the exported graphs do, by its fused operators."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from engines.build.onnxruntime_cuda import attention
from engines.build.onnxruntime_cuda.compare import check_same, compute, small_inputs
from engines.build.onnxruntime_cuda.group_norm import is_supported
from engines.build.onnxruntime_cuda.rewrite import IR_VERSION, Counts, rewrite
from engines.contract import GRAPHS, GraphName
from engines.demo import BUNDLE
from engines.errors import EngineError
from engines.manifest import Manifest

DEMO: dict[GraphName, Counts] = {
    "encode_prompt": Counts(attentions=(2, 2), group_norms=(0, 0), convolutions=(0, 0), transposes=0, operators=0),
    "denoise": Counts(attentions=(14, 14), group_norms=(30, 30), convolutions=(50, 50), transposes=3, operators=0),
    "denoise_shallow": Counts(attentions=(0, 0), group_norms=(3, 3), convolutions=(5, 5), transposes=3, operators=0),
    "decode": Counts(attentions=(1, 1), group_norms=(18, 18), convolutions=(23, 23), transposes=1, operators=0),
    "encode_image": Counts(attentions=(1, 1), group_norms=(12, 12), convolutions=(17, 17), transposes=1, operators=0),
}
CLOSE = 1e-5  # of two orders of the same sums in FP32, relative to the range


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's graphs in a folder that can be written to."""
    return Path(shutil.copytree(BUNDLE / "onnx", tmp_path_factory.mktemp("demo") / "onnx"))


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return Manifest.read(BUNDLE)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_of_the_demo(demo: Path, manifest: Manifest, name: GraphName) -> None:
    """Everything is replaced, activations are transposed at the ends alone, and nothing else is computed."""
    exported, made = demo / f"{name}.onnx", demo / f"{name}.cuda.onnx"
    assert replace(rewrite(exported, made), operators=0) == DEMO[name]
    found = check_same(name, manifest, exported, made)
    assert found.largest < (2 / 255 if name == "decode" else CLOSE)
    graph = onnx.load(made, load_external_data=False)
    before = onnx.load(exported, load_external_data=False)
    assert graph.ir_version == IR_VERSION
    assert (list(graph.graph.input), list(graph.graph.output)) == (list(before.graph.input), list(before.graph.output))


@pytest.fixture(scope="module")
def rewritten(demo: Path) -> Path:
    rewrite(demo / "denoise.onnx", demo / "denoise.other.onnx")
    return demo / "denoise.other.onnx"


def test_the_weights_are_those_of_the_exported_graph(demo: Path, rewritten: Path) -> None:
    """Each file of weights serves both: the new graph adds nothing but vectors of GroupNorm."""
    files = [
        {entry.value for weight in graph.graph.initializer for entry in weight.external_data if entry.key == "location"}
        for graph in (onnx.load(path, load_external_data=False) for path in (demo / "denoise.onnx", rewritten))
    ]
    assert files[0] == files[1] == {"denoise.weights"}
    assert rewritten.stat().st_size < 1.2 * (demo / "denoise.onnx").stat().st_size


@pytest.mark.parametrize(
    ("op_type", "attribute", "right", "wrong"),
    [
        ("MultiHeadAttention", "num_heads", 1, 2),
        ("MultiHeadAttention", "unidirectional", 0, 1),
        ("GroupNorm", "activation", 1, 0),
        ("GroupNorm", "groups", 16, 8),
        ("NhwcConv", "pads", (1, 1, 1, 1), (2, 2, 0, 0)),
    ],
)
def test_a_graph_that_strays_is_refused(
    demo: Path, manifest: Manifest, op_type: str, attribute: str, right: object, wrong: int | tuple[int, ...]
) -> None:
    """Every replaced operator counts: one wrong attribute of one of them, and the graph is not the model's."""
    exported, made = demo / "encode_image.onnx", demo / f"encode_image.{attribute}.onnx"
    rewrite(exported, made)
    model = ir.load(made)
    node = next(one for one in model.graph if one.op_type == op_type and one.attributes[attribute].value == right)
    node.attributes[attribute] = ir.convenience.convert_attribute(attribute, wrong)
    ir.save(model, made)
    with pytest.raises(EngineError, match=r"differs from encode_image\.onnx by .* of its range, more than 1e-03"):
        check_same("encode_image", manifest, exported, made)


def test_a_graph_that_cannot_be_checked_is_told(demo: Path, manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "denoise.onnx"
    path.write_bytes((demo / "denoise.onnx").read_bytes())  # without its weights
    with pytest.raises(EngineError, match=r"ONNX Runtime cannot compute .* on the CPU, to check it"):
        compute(path, small_inputs("denoise", manifest))


def test_attention_with_wider_heads_stays_as_it_is(
    demo: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the VAE's of real models, with one head of 512 channels. What lies around it is rewritten all the same."""
    monkeypatch.setattr(attention, "LARGEST_HEAD", 95)
    exported, made = demo / "encode_image.onnx", demo / "encode_image.wide.onnx"
    counts = rewrite(exported, made)
    assert (counts.attentions, counts.group_norms, counts.convolutions) == ((0, 1), (12, 12), (17, 17))
    assert check_same("encode_image", manifest, exported, made).largest < CLOSE


def test_norms_may_share_their_scales(demo: Path, manifest: Manifest) -> None:
    """Exporters store equal vectors once, such as those of an untrained model."""
    exported, made = demo / "shared.onnx", demo / "shared.cuda.onnx"
    model = ir.load(demo / "encode_image.onnx")
    scales = [node.inputs[1] for node in model.graph if node.op_type == "Mul" and _is_scale(node.inputs[1])]
    for scale in scales[1:]:
        if scale and scales[0] and scale.shape == scales[0].shape:
            scale.replace_all_uses_with(scales[0])
    ir.save(model, exported)
    assert rewrite(exported, made).group_norms == (12, 12)
    assert check_same("encode_image", manifest, exported, made).largest < CLOSE


def _is_scale(value: ir.Value | None) -> bool:
    return value is not None and "norm" in str(value.name) and str(value.name).endswith("weight")


@pytest.mark.parametrize(
    ("channels", "groups", "supported"),
    [(320, 32, True), (128, 32, True), (512, 1, True), (96, 32, False), (100, 32, False), (1024, 1, False)],
)
def test_group_norms_that_the_kernel_supports(channels: int, groups: int, supported: bool) -> None:
    """Two channels of a group by each thread, and up to 512 by each block."""
    assert is_supported(channels, groups) == supported
