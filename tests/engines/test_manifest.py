"""The manifest verifies its files and its graphs' inputs, and is written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engines.backends import available, memory
from engines.backends.registry import open_device
from engines.errors import EngineError
from engines.manifest import MANIFEST, BundleError, File, Manifest
from tests import ROOT
from tests.support.executing import Running

DEMO = ROOT / "engines" / "demo"
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return Manifest.load(DEMO)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the demo bundle."""
    shutil.copytree(DEMO / "onnx", tmp_path / "copy" / "onnx")
    for name in (MANIFEST, "tokenizer.json"):
        shutil.copy(DEMO / name, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def described(tmp_path: Path) -> Path:
    """The demo bundle's manifest in a folder without the files."""
    shutil.copy(DEMO / MANIFEST, tmp_path)
    return tmp_path


def one_line(bundle: Path) -> str:
    """Why the bundle is not loaded."""
    with pytest.raises(BundleError) as refused:
        Manifest.load(bundle)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600
    return str(refused.value)


def test_what_was_saved_is_what_is_loaded(copied: Path, manifest: Manifest) -> None:
    (copied / MANIFEST).unlink()
    manifest.save(copied)
    assert Manifest.load(copied) == manifest


def test_every_file_is_verified(copied: Path, manifest: Manifest) -> None:
    for file in manifest.files:
        path = copied / file.path
        content = path.read_bytes()
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        with pytest.raises(BundleError, match=path.name):
            Manifest.load(copied)
        path.unlink()
        with pytest.raises(BundleError, match=f"{path.name} is missing"):
            Manifest.load(copied)
        path.write_bytes(content)
    assert Manifest.load(copied) == manifest


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda fields: fields["graphs"].pop("decode"), "graph decode is missing"),
        (lambda fields: fields.update(format=3), "has format 3, and this version reads format 4. Build it again"),
        (
            lambda fields: fields["graphs"]["decode"]["outputs"].pop(),
            "outputs of the graph decode are images, and this version has images, is_finite. Build it again",
        ),
        (
            lambda fields: fields["graphs"]["denoise"]["inputs"][0].update(shape=["S", 4, 4, "h", "w"]),
            r"inputs of the graph denoise: state is float32 .*4, 4, .*, not float32 \['S', 5, 'c', 'h', 'w'\]",
        ),
        (
            lambda fields: fields["graphs"]["denoise_shallow"]["inputs"][4].update(dtype="int32"),
            "slot is int32 .*, not int64",
        ),
        (lambda fields: fields["graphs"]["decode"]["onnx"].pop("fp32"), "graph in fp32"),
        (
            lambda fields: fields["builds"].update(openvino=build(fields, without="decode")),
            "engine of decode is missing",
        ),
        (lambda fields: fields.update(rows=[4, 2]), "do not ascend"),
        (lambda fields: fields["preview"][0].pop(), "not for 4 channels and a constant"),
        (lambda fields: fields["preview"].pop(), "preview: .* at least 3 items"),
        (lambda fields: fields["noise_schedule"].update(trained_betas=[0.1, 0.2]), "2 trained_betas for 1000"),
        (
            lambda fields: with_input(fields, "guidance_embedded", ["R"], "denoise"),
            "only one of the graphs denoise and denoise_shallow has the input guidance_embedded",
        ),
        (
            lambda fields: with_input(fields, "text_embeds", ["C", 24], "denoise", "denoise_shallow"),
            "the graph denoise reads text_embeds, which encode_prompt does not return",
        ),
        (lambda fields: fields["tokenizer"].update(pad_2=1), "has a pad_2 only for a graph encode_prompt with ids_2"),
    ],
)
def test_invalid_fields_are_refused(described: Path, change: Change, words: str) -> None:
    fields = json.loads((described / MANIFEST).read_text())
    change(fields)
    (described / MANIFEST).write_text(json.dumps(fields))
    assert re.search(words, one_line(described))


def with_input(fields: dict[str, Any], name: str, shape: list[str | int], *graphs: str) -> None:
    for graph in graphs:
        fields["graphs"][graph]["inputs"].append({"name": name, "dtype": "float32", "shape": shape})


def build(fields: dict[str, Any], *, without: str) -> dict[str, Any]:
    """A build of the FP32 graphs, but for one."""
    engines = {
        name: {"files": graph["onnx"]["fp32"]["files"], "precision": "fp32", "key": "", "seconds": 0, "memory": 0}
        for name, graph in fields["graphs"].items()
        if name != without
    }
    return {"version": "1", "engines": engines}


def of_demo(*path: str | int, value: object) -> Change:
    """Set the field at `path` to `value`."""

    def change(fields: dict[str, Any]) -> None:
        at: Any = fields
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return change


ZEROS = "0" * 64
SIDE = {"width": 64, "height": 64}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (of_demo("rows", value=[10**6]), "rows.0: Input should be less than or equal to 1024"),
        (of_demo("rows", value=[0]), "rows.0: Input should be greater than 0"),
        (of_demo("rows", value=[]), "rows: .* at least 1 item"),
        (of_demo("rows", value=list(range(1, 100))), "rows: .* at most 64 items"),
        (of_demo("decode_batch", value=10**9), "decode_batch: .* 1024"),
        (of_demo("resolutions", value=[{"width": 10**9, "height": 64}]), "resolutions.0.width: .* 8192"),
        (of_demo("resolutions", value=[SIDE, SIDE]), "64x64 is listed 2 times"),
        (of_demo("resolutions", value=[{"width": 72, "height": 64}]), "72x64 does not fit.* multiples of 16"),
        (of_demo("latent", "multiple", value=6), "multiple 6 is not a multiple of downscale 4"),
        (of_demo("latent", "channels", value=10**9), "latent.channels"),
        (of_demo("latent", "channels", value=8), "encode_prompt|denoise: state has 4 for c, not 8"),
        (of_demo("latent", "scaling_factor", value=float("nan")), "scaling_factor|Invalid JSON"),
        (of_demo("context", "tokens", value=10**9), "context.tokens"),
        (of_demo("context", "tokens", value=2), "context.tokens: .* greater than 2"),
        (of_demo("context", "tokens", value=77), "encode_prompt: ids has 32 for T, not 77"),
        (of_demo("context", "width", value=10**9), "context.width"),
        (of_demo("context", "width", value=64), "embeddings has 128 for D, not 64"),
        (of_demo("context", "layers", value=10**9), "context.layers"),
        (of_demo("graphs", "denoise", "outputs", 2, "shape", 1, value=10**12), "features has 1000000000000 for f"),
        (of_demo("graphs", "denoise", "outputs", 2, "shape", 1, value=32), "denoise_shallow: features has 64 for f"),
        (of_demo("noise_schedule", "num_train_timesteps", value=10**12), "num_train_timesteps: .* 10000"),
        (of_demo("noise_schedule", "beta_start", value=-0.1), "beta_start: .* greater than 0"),
        (of_demo("noise_schedule", "beta_end", value=1.5), "beta_end: .* less than 1"),
        (of_demo("noise_schedule", "beta_start", value=0.5), "beta_start 0.5 is above beta_end 0.012"),
        (of_demo("noise_schedule", "steps_offset", value=1000), "steps_offset 1000 leaves none of 1000"),
        (of_demo("noise_schedule", "trained_betas", value=[0.0] * 1000), "trained_betas.0"),
        (of_demo("tokenizer", "pad", value=10**10), "tokenizer.pad"),
        (of_demo("tokenizer", "pad", value=-1), "tokenizer.pad"),
        (of_demo("tokenizer", "embeddings", value={"<cat>": 10**9}), "embedding <cat> has 1000000000 vectors"),
        (of_demo("tokenizer", "embeddings", value={"a\nb": 1}), "control characters"),
        (of_demo("defaults", "num_inference_steps", value=10**6), "num_inference_steps: .* 1000"),
        (of_demo("defaults", "guidance_scale", value=-5), "guidance_scale"),
        (of_demo("defaults", "scheduler", value="x" * 300), "defaults.scheduler: .* at most 200 characters"),
        (of_demo("name", value="a\u001b[31m"), "name: .* control characters"),
        (of_demo("tokenizer", "file", "path", value="onnx/\nx"), "control characters"),
        (of_demo("tokenizer", "file", "path", value="onnx/decode.onnx"), "onnx/decode.onnx is listed twice"),
        (of_demo("tokenizer", "file", "size", value=-1), "tokenizer.file.size"),
        (of_demo("trained_size", value={"width": 0, "height": 64}), "trained_size.width"),
        (of_demo("a\nfield", value=1), r"a\?field: Extra inputs are not permitted"),
        (
            lambda fields: fields.update(
                rows=[1024], resolutions=[{"width": 8192, "height": 8192 - 16 * n} for n in range(64)]
            ),
            "1024 rows of 64 sizes: .* TiB of memory",
        ),
    ],
)
def test_absurd_values_are_refused_in_one_line_that_names_them(described: Path, change: Change, words: str) -> None:
    test_invalid_fields_are_refused(described, change, words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "Invalid JSON"),
        (b"[]", "Input should be an object"),
        (b"\xff\xfe{}", "Invalid JSON"),
        (b"[" * 100_000, "Invalid JSON: recursion limit exceeded"),
        (b'{"format": 4, "name": "\xff"}', "Invalid JSON"),
        (b"{" + b'"a": 1, ' * 1000 + b'"b": 2}', "Field required|Extra inputs"),
    ],
)
def test_what_is_no_manifest_is_said_in_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    assert re.search(words, one_line(tmp_path))


def sparse(path: Path) -> None:
    """A gigabyte that takes no space."""
    with path.open("wb") as file:
        file.truncate(2**30)


@pytest.mark.parametrize(
    ("put", "words"),
    [
        (os.mkfifo, "named pipe, and a regular file is expected"),
        (lambda path: path.symlink_to("/dev/zero"), "a device, and a regular file is expected"),
        (Path.mkdir, "a folder, and a regular file is expected"),
        (sparse, "1073741824 bytes, and at most 8388608 are expected"),
        (lambda path: path.symlink_to(path), "cannot be read"),
    ],
)
def test_only_a_regular_file_of_a_sensible_size_is_read(tmp_path: Path, put: Callable[[Path], Any], words: str) -> None:
    """The others would hang, or fill the memory."""
    put(tmp_path / MANIFEST)
    assert re.search(words, one_line(tmp_path))


def linked_folder(bundle: Path) -> None:
    (bundle / "onnx").rename(bundle.parent / "elsewhere")
    (bundle / "onnx").symlink_to(bundle.parent / "elsewhere")


def replaced_by(put: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        (bundle / "onnx/decode.onnx").unlink()
        put(bundle / "onnx/decode.onnx")

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (linked_folder, "encode_prompt.onnx leads out of the bundle, to .*elsewhere"),
        (replaced_by(os.mkfifo), "decode.onnx cannot be read: it is a named pipe"),
        (replaced_by(Path.mkdir), "decode.onnx cannot be read: it is a folder"),
        (replaced_by(lambda path: path.symlink_to("/dev/zero")), "decode.onnx leads out of the bundle, to /dev/zero"),
        (replaced_by(lambda path: path.symlink_to(path)), "decode.onnx cannot be read"),
        (replaced_by(sparse), "decode.onnx has 1073741824 bytes, and [0-9]+ were built"),
        (replaced_by(lambda _: None), "decode.onnx is missing: copy the whole bundle again"),
        (replaced_by(lambda path: path.write_bytes(b"half")), "decode.onnx has 4 bytes, and [0-9]+ were built"),
    ],
)
def test_a_damaged_file_is_named_and_not_waited_for(copied: Path, change: Callable[[Path], None], words: str) -> None:
    change(copied)
    assert re.search(words, one_line(copied))


def test_links_within_the_bundle_are_followed(copied: Path, manifest: Manifest) -> None:
    (copied / "onnx").rename(copied / "graphs")
    (copied / "onnx").symlink_to("graphs")
    assert Manifest.load(copied) == manifest


def test_the_memory_of_the_pools_is_what_a_server_allocates(manifest: Manifest) -> None:
    with Running(DEMO, partial(open_device, "onnxruntime"), manifest=manifest) as running:
        used = running.device.memory()
    allocated = sum(size for purpose, size in used.items() if purpose != "plans")
    assert 0.9 < manifest.pool_bytes / allocated < 1.1


def test_pools_larger_than_the_memory_are_refused(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    available.check_pools_fit(manifest, "onnxruntime")
    monkeypatch.setattr(memory, "limit", lambda: manifest.pool_bytes - 1)
    available.check_pools_fit(manifest, "tensorrt")  # whose memory is another
    with pytest.raises(EngineError, match=r"16 rows at 1 sizes take 0 GiB of memory.* fewer --rows"):
        available.check_pools_fit(manifest, "onnxruntime")


def test_the_published_schema_is_the_manifests() -> None:
    published = ROOT / "docs" / "manifest.schema.json"
    assert json.loads(published.read_text()) == Manifest.model_json_schema(), "run scripts/schema"


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../other", "onnx/../../other", "a\\b"])
def test_no_path_leaves_the_folder(path: str) -> None:
    with pytest.raises(ValueError, match="leaves the bundle's folder"):
        File(path=path, size=0, sha256="0" * 64)
