"""INT8 makes nearly the pictures of FP32, in half the space, without a word."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from tokenizers import Tokenizer

from engines.backends.openvino.device import TAKES_BF16
from engines.backends.openvino.package import openvino
from engines.backends.registry import install_command
from engines.build.quantize import compress, quantize
from engines.contract import INPAINT_LANES, LANES, Array
from engines.demo import BUNDLE as DEMO
from engines.errors import EngineError
from engines.manifest import NoiseSchedule
from engines.schedulers import Scheduler, table
from tests.support.loaded import Loaded

TOKENS, LAYERS = 32, 2
LATENTS = (4, 16, 16)
STEPS = 10
GUIDANCE = 4.0
CALIBRATED_ON = ("a red heart on a yellow background", "a penguin on a blue background")
DRAWN = ("a rocket on a black background", "an owl on an orange background", "a cactus on a pink background")


@pytest.fixture(scope="module")
def exact() -> Loaded:
    return Loaded("onnxruntime", DEMO / "onnx" / "denoise.onnx")


@pytest.fixture(scope="module")
def files(exact: Loaded, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    pictures = (steps(exact, (prompt,), seed=seed) for seed, prompt in enumerate(CALIBRATED_ON))
    trajectory = [inputs for picture in pictures for inputs, _state in picture]
    return quantize(DEMO / "onnx" / "denoise.onnx", tmp_path_factory.mktemp("int8"), trajectory)


@pytest.fixture(scope="module")
def int8(files: tuple[Path, ...]) -> Loaded:
    return Loaded("openvino", files[0])


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A graph of a norm and four convolutions, for what does not depend on the model."""
    ops = openvino.opset13
    channels = ops.parameter([-1, 4, -1, -1], np.float32, name="x")
    channels.output(0).tensor.set_names({"x"})
    node = ops.mvn(channels, [2, 3], normalize_variance=True, eps=1e-5, eps_mode="inside_sqrt")
    for seed in range(4):
        weights = np.random.default_rng(seed).standard_normal((4, 4, 3, 3), np.float32)
        node = ops.convolution(node, weights, [1, 1], [1, 1], [1, 1], [1, 1])
    path = tmp_path / "small.xml"
    openvino.save_model(openvino.Model([node], [channels]), path)
    return path


def small_trajectory(count: int = 3) -> list[dict[str, Array]]:
    random = np.random.default_rng(0)
    return [{"x": random.standard_normal((1, 4, 8, 8), np.float32)} for _ in range(count)]


def encode(prompts: tuple[str, ...]) -> Array:
    """Embeddings [1 + prompts, TOKENS, D], the empty prompt's first."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS, pad_id=tokenizer.token_to_id("<|endoftext|>"))
    ids = np.array([tokenizer.encode(prompt).ids for prompt in ("", *prompts)], np.int64)
    encode = Loaded("onnxruntime", DEMO / "onnx" / "encode_prompt.onnx")
    plain = {"layer": np.full(len(ids), LAYERS), "weights": np.ones(ids.shape, np.float32)}
    return encode({"ids": ids, **plain}, {"embeddings": np.empty((len(ids), TOKENS, 128), np.float32)})["embeddings"]


def steps(denoise: Loaded, prompts: tuple[str, ...], *, seed: int) -> Iterator[tuple[dict[str, Array], Array]]:
    """The inputs and the next state of each step that draws `prompts` in one batch, two rows each, with DDIM."""
    images = len(prompts)
    ways = table(Scheduler("ddim"), STEPS, NoiseSchedule(timestep_spacing="leading", steps_offset=1))
    state = np.zeros((images, LANES, *LATENTS), np.float32)
    state[:, 0] = ways.init_scale * np.random.default_rng(seed).standard_normal((images, *LATENTS))
    each = np.arange(images)
    facts = {
        "context": encode(prompts),
        "noise": np.zeros((images, *LATENTS), np.float32),
        "slot": each,
        "row_image": each.repeat(2),
        "row_context": np.stack([each + 1, 0 * each], axis=1).reshape(-1, 1),
        "guidance": np.kron(np.eye(images), [[GUIDANCE, 1 - GUIDANCE]]).astype(np.float32),
        "scale": np.ones(images, np.float32),
        "inpaint": np.zeros((images, INPAINT_LANES, *LATENTS), np.float32),
        "level": np.zeros((images, 2), np.float32),
    }
    for way in ways.steps:
        coef = np.tile(way.matrix.astype(np.float32), (images, 1, 1))
        timestep = np.full(2 * images, way.timestep, np.float32)
        inputs = {**facts, "state": state, "timestep": timestep, "coef": coef}
        state = stepped(denoise, inputs)
        yield inputs, state


def stepped(denoise: Loaded, inputs: dict[str, Array]) -> Array:
    """The next state."""
    features = np.empty((len(inputs["row_image"]), 64, *inputs["state"].shape[3:]), np.float16)
    effect = np.empty(len(inputs["slot"]), np.float32)
    like = {"state_next": inputs["state"], "features": features, "guidance_effect": effect}
    return denoise(inputs, like)["state_next"]


def pictures(denoise: Loaded) -> Array:
    """Pictures of `DRAWN`, [3, 64, 64, 3] in 0..255."""
    *_, (_inputs, state) = steps(denoise, DRAWN, seed=5)
    slots = np.arange(len(DRAWN))
    decode = Loaded("onnxruntime", DEMO / "onnx" / "decode.onnx")
    images, is_finite = np.empty((len(DRAWN), 64, 64, 3), np.uint8), np.empty(len(DRAWN), np.float32)
    made = decode({"state": state, "slot": slots}, {"images": images, "is_finite": is_finite})
    assert made["is_finite"].all()
    return made["images"].astype(np.float64)


def test_pictures_stay_what_they_were(exact: Loaded, int8: Loaded) -> None:
    """Other prompts, and six rows where it was calibrated on two."""
    errors = ((pictures(int8) - pictures(exact)) ** 2).mean(axis=(1, 2, 3))
    assert (10 * np.log10(255**2 / errors) > 35).all()  # dB; 41 to 46 were measured


@pytest.mark.parametrize(("images", "rows", "h", "w"), [(1, 1, 8, 8), (2, 3, 24, 16), (4, 9, 16, 16)])
def test_any_rows_and_sizes(exact: Loaded, int8: Loaded, images: int, rows: int, h: int, w: int) -> None:
    random = np.random.default_rng(rows)
    state = random.standard_normal((6, LANES, 4, h, w), np.float32)
    coef = np.zeros((images, LANES, LANES + 1), np.float32)
    coef[:, 0, 1] = 1  # x becomes the model's output
    inputs: dict[str, Array] = {
        "state": state,
        "context": random.standard_normal((5, TOKENS, 128), np.float32),
        "noise": np.zeros((images, 4, h, w), np.float32),
        "slot": random.permutation(6)[:images],
        "row_image": random.integers(images, size=rows),
        "row_context": random.integers(5, size=(rows, 2)),
        "inpaint": np.zeros((6, INPAINT_LANES, 4, h, w), np.float32),
        "level": np.zeros((images, 2), np.float32),
        "timestep": random.uniform(0, 999, rows).astype(np.float32),
        "guidance": random.standard_normal((images, rows), np.float32),
        "scale": np.ones(images, np.float32),
        "coef": coef,
    }
    expected, actual = (stepped(denoise, inputs) for denoise in (exact, int8))
    error = np.sqrt(((actual - expected) ** 2)[inputs["slot"], 0].mean())
    assert error < 0.2 * np.sqrt((expected**2)[inputs["slot"], 0].mean())
    resting = np.setdiff1d(np.arange(6), inputs["slot"])
    assert np.array_equal(actual[resting], state[resting])


def test_an_image_breaks_alone(int8: Loaded) -> None:
    inputs, state = next(steps(int8, DRAWN, seed=5))
    broken = inputs | {"state": inputs["state"].copy()}
    broken["state"][1, 0, 2, 3, 3] = np.nan
    beside = stepped(int8, broken)
    np.testing.assert_array_equal(beside[[0, 2]], state[[0, 2]])
    assert not np.isfinite(beside[1, 0]).all()


def test_weights_take_a_byte_each(files: tuple[Path, ...]) -> None:
    """The graph that they come from stores them in FP16, two bytes each, and its nodes beside them.

    Those of the two convolutions that read a doubled image are 16/9 as many.
    """
    assert [file.name for file in files] == ["denoise.xml", "denoise.bin"]
    assert files[1].stat().st_size < 0.54 * (DEMO / "onnx" / "denoise.weights").stat().st_size
    model = openvino.Core().read_model(files[0])
    bytes_of: Counter[str] = Counter()
    for node in model.get_ops():
        if node.get_type_name() == "Constant":
            bytes_of[node.get_element_type().get_type_name()] += node.get_byte_size()
    assert bytes_of["u8"] + bytes_of["i8"] > 0.97 * bytes_of.total()


def test_only_what_is_robust_computes_in_eight_bits(files: tuple[Path, ...]) -> None:
    model = openvino.Core().read_model(files[0])
    convolutions = [node for node in model.get_ordered_ops() if node.get_type_name() == "Convolution"]
    linears = [node for node in model.get_ordered_ops() if node.get_type_name() == "MatMul" and reads_eight_bits(node)]
    quantized = {node.get_friendly_name() for node in convolutions if reads_eight_bits(node)}
    fake = [node for node in model.get_ops() if node.get_type_name() == "FakeQuantize"]
    readers = {port.get_node().get_type_name() for node in fake for port in node.output(0).get_target_inputs()}
    assert readers == {"Convolution", "MatMul"}
    assert len(quantized) == 46  # of 56: the rest are two at the ends and eight shortcuts
    assert len(linears) == 56  # eight of each of seven blocks: not the two that read the prompt
    assert not {convolutions[0].get_friendly_name(), convolutions[-1].get_friendly_name()} & quantized


def reads_eight_bits(convolution: Any) -> bool:
    return bool(convolution.input(0).get_source_output().get_node().get_type_name() == "FakeQuantize")


def test_a_steps_own_arithmetic_and_the_timestep_take_no_bf16(files: tuple[Path, ...]) -> None:
    """The rest does, where the processor has it."""
    model = openvino.Core().read_model(files[0])
    assert model.has_rt_info(TAKES_BF16)
    layers = ElementTree.parse(files[0]).iter("layer")  # noqa: S314 - our own
    marked = {layer.get("name") for layer in layers if layer.find("rt_info/attribute[@name='precise']") is not None}
    kinds: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for node in model.get_ops():
        kinds[node.get_friendly_name() in marked][node.get_type_name()] += 1
    assert (kinds[True]["Sin"], kinds[True]["Cos"], kinds[True]["MatMul"]) == (1, 1, 3)
    assert not {"Sin", "Cos", "ScatterNDUpdate"} & kinds[False].keys()
    assert not {"Convolution", "FakeQuantize", "MVN", "Softmax", "Constant"} & kinds[True].keys()
    compiled = openvino.Core().compile_model(model, "CPU")
    facts = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    kept = {one["runtimePrecision"].value for one in facts if one["layerType"].value in ("MatMul", "Math")}
    assert kept == {"f32"}


def test_in_a_decoder_neither_its_beginning_nor_its_end(tmp_path: Path) -> None:
    """What reads latents before the first norm, and what writes the picture, keep FP32 arithmetic."""
    state = np.random.default_rng(0).standard_normal((1, LANES, *LATENTS), np.float32)
    graph, _weights = quantize(
        DEMO / "onnx" / "decode.onnx", tmp_path, [{"state": state, "slot": np.zeros(1, np.int64)}]
    )
    ordered = openvino.Core().read_model(graph).get_ordered_ops()
    kinds = [node.get_type_name() for node in ordered]
    norm = next(place for place, kind in enumerate(kinds) if kind in ("MVN", "GroupNormalization"))
    before = [node for node in ordered[:norm] if node.get_type_name() == "Convolution"]
    *behind, last = [node for node in ordered[norm:] if node.get_type_name() == "Convolution"]
    assert before
    assert not any(reads_eight_bits(node) for node in (*before, last))
    assert sum(map(reads_eight_bits, behind)) > len(behind) / 2


def test_compressing_leaves_arithmetic_alone(tmp_path: Path) -> None:
    """The text encoder: weights of a byte each, and nearly the same embeddings."""
    graph = DEMO / "onnx" / "encode_prompt.onnx"
    files = compress(graph, tmp_path)
    assert [file.name for file in files] == ["encode_prompt.xml", "encode_prompt.bin"]
    assert files[1].stat().st_size < 0.55 * (DEMO / "onnx" / "encode_prompt.weights").stat().st_size
    model = openvino.Core().read_model(files[0])
    assert not [node for node in model.get_ops() if node.get_type_name() == "FakeQuantize"]
    ids = np.random.default_rng(0).integers(0, 49, (2, TOKENS))
    inputs = {"ids": ids, "layer": np.full(2, LAYERS), "weights": np.ones(ids.shape, np.float32)}
    like = {"embeddings": np.empty((2, TOKENS, 128), np.float32)}
    exact, compressed = (
        Loaded(backend, path)(inputs, like)["embeddings"]
        for backend, path in (("onnxruntime", graph), ("openvino", files[0]))
    )
    assert 0 < np.abs(compressed - exact).max() < 0.05 * np.abs(exact).max()


def test_dimensions_still_vary(files: tuple[Path, ...]) -> None:
    model = openvino.Core().read_model(files[0])
    names = {port.any_name: port.get_partial_shape().rank.get_length() for port in model.inputs}
    assert names.keys() >= {"state", "context", "timestep", "guidance", "coef"}
    assert all(port.get_partial_shape().is_dynamic for port in (*model.inputs, *model.outputs))
    assert {port.any_name for port in model.outputs} == {"state_next", "guidance_effect", "features"}


def test_nothing_is_printed_and_nothing_else_is_written(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    quantize(small, out, small_trajectory())
    assert sorted(path.name for path in out.iterdir()) == ["small.bin", "small.xml"]
    assert capfd.readouterr() == ("", "")


def test_an_interrupted_write_leaves_what_was_there(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_model: Any, path: Path, **_options: Any) -> None:
        path.with_suffix(".bin").write_bytes(b"half")
        raise KeyboardInterrupt

    out = tmp_path / "out"
    out.mkdir()
    (out / "small.bin").write_bytes(b"before")
    monkeypatch.setattr(openvino, "save_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(small, out, small_trajectory())
    assert [(path.name, path.read_bytes()) for path in out.iterdir()] == [("small.bin", b"before")]


def test_what_is_missing_is_named(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="nothing to calibrate"):
        quantize(small, tmp_path, [])
    with pytest.raises(EngineError, match=r"takes \['x'\], the recording has \['y'\]"):
        quantize(small, tmp_path, [{"y": np.zeros(1)}])
    with pytest.raises(EngineError, match="cannot be calibrated"):
        quantize(small, tmp_path, [{"x": np.zeros((1, 3, 8, 8), np.float32)}])
    with pytest.raises(EngineError, match=r"OpenVINO cannot read .*absent\.onnx"):
        quantize(tmp_path / "absent.onnx", tmp_path, small_trajectory())
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(EngineError, match=re.escape(install_command("int8"))):
        quantize(small, tmp_path, small_trajectory())


def test_nobody_is_told_of_it(tmp_path: Path) -> None:
    """Both packages report home when they are imported, unless something stops them; they leave files when they do."""
    code = "import sys, engines.build.quantize, nncf; sys.exit(sys.modules['openvino_telemetry'] is not None)"
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)  # noqa: S603 - our own
    assert done.returncode == 0
    assert not list(tmp_path.iterdir())


def test_layers_without_a_bias_that_feed_a_residual_block(tmp_path: Path) -> None:
    """OpenVINO scales the output of a convolution in eight bits twice where a norm and a sum read it."""
    random, ops = np.random.default_rng(7), openvino.opset13
    x = ops.parameter([-1, 32, -1, -1], np.float32, name="x")
    x.output(0).tensor.set_names({"x"})

    def convolution(node: Any) -> Any:
        weights = ops.constant((random.standard_normal((32, 32, 3, 3)) / 17).astype(np.float32))
        return ops.convolution(node, weights, [1, 1], [1, 1], [1, 1], [1, 1])

    def normed(node: Any) -> Any:
        return ops.swish(ops.mvn(node, [1, 2, 3], True, 1e-6, "inside_sqrt"))

    stream = convolution(normed(x))
    stream = ops.add(stream, convolution(normed(stream)))
    last = convolution(normed(stream))
    last.output(0).tensor.set_names({"y"})
    graph = tmp_path / "decoder.xml"
    openvino.save_model(openvino.Model([last, stream], [x], "decoder"), graph, compress_to_fp16=False)
    calls = [{"x": random.standard_normal((1, 32, 16, 16), np.float32)}]
    (tmp_path / "int8").mkdir()
    quantize(graph, tmp_path / "int8", calls)
    exact, int8 = (
        openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(calls[0])
        for file in (graph, tmp_path / "int8/decoder.xml")
    )
    for place in (0, 1):
        assert np.abs(int8[place] - exact[place]).std() < 0.05 * exact[place].std()
