"""LoRAs as a real bundle takes them: inspected, packed once, and refused with the reason."""

from __future__ import annotations

import errno
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from engines.errors import CheckpointError
from engines.lora.pack import pack_lora
from engines.manifest import Manifest
from server.loras import model_loras
from server.loras.catalogue import Catalogue
from server.loras.model_loras import ModelLoras
from server.loras.packed import PackedLoras
from server.requests.errors import LoraUnreadable
from server.requests.loras import UnusableLora
from tests.support.lora_files import write_lora

ROOM = 1 << 20  # bytes


@pytest.fixture(scope="module")
def able(lora_bundle: Path) -> Manifest:
    return Manifest.load(lora_bundle)


@pytest.fixture
def folder(tmp_path: Path, able: Manifest) -> Path:
    hints = {"ss_output_name": "Ink", "ss_base_model_version": "sd_v1"}
    write_lora(tmp_path / "loras/ink.safetensors", able, metadata=hints)
    write_lora(tmp_path / "loras/styles/wash.safetensors", able, rank=3, seed=1, parts=["unet"])
    (tmp_path / "loras/broken.safetensors").write_bytes(b"no LoRA")
    write_lora(tmp_path / "loras/large.safetensors", able, rank=9)
    return tmp_path / "loras"


def open_folder(folder: Path, manifest: Manifest) -> ModelLoras:
    return ModelLoras(Catalogue(folder), PackedLoras(ROOM), manifest)


def test_the_folder_is_described(folder: Path, able: Manifest) -> None:
    loras = open_folder(folder, able)
    described = {lora.name: lora for lora in loras.describe()}
    assert list(described) == ["broken", "ink", "large", "styles/wash"]
    assert [lora.usable for lora in described.values()] == [False, True, False, True]
    ink, wash = described["ink"], described["styles/wash"]
    assert (ink.rank, ink.parts, ink.title, ink.base_model) == (2, ["text_encoder", "unet"], "Ink", "sd_v1")
    assert (wash.rank, wash.parts, wash.reason, wash.sha256) == (3, ["unet"], None, None)
    assert ink.size == (folder / "ink.safetensors").stat().st_size
    assert "rank 9" in str(described["large"].reason)
    assert "broken.safetensors" in str(described["broken"].reason)
    assert not [lora for lora in described.values() if str(folder) in lora.model_dump_json()]


def test_a_lora_is_packed_and_known_by_its_hashes(folder: Path, able: Manifest) -> None:
    loras = open_folder(folder, able)
    assert loras.find("wash") == ("styles/wash", 3)
    lora = loras.load("wash")
    assert (lora.name, lora.ranks, lora.updates_unet, lora.updates_text_encoder) == ("styles/wash", 3, True, False)
    content = (folder / "styles/wash.safetensors").read_bytes()
    assert lora.sha256 == hashlib.sha256(content).hexdigest()
    assert lora.tensors_sha256 == hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    assert np.array_equal(lora.values, pack_lora(folder / "styles/wash.safetensors", able).values)
    assert {one.name: one.sha256 for one in loras.describe()}["styles/wash"] == lora.sha256


def test_many_requests_pack_it_once(folder: Path, able: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[Path] = []

    def counting(path: Path, manifest: Manifest) -> object:
        packed.append(path)
        return pack_lora(path, manifest)

    monkeypatch.setattr(model_loras, "pack_lora", counting)
    loras = open_folder(folder, able)
    with ThreadPoolExecutor(32) as threads:
        assert len({id(lora) for lora in threads.map(loras.load, ["ink"] * 32)}) == 1
    assert len(packed) == 1


def test_models_of_one_layout_share_what_is_packed(folder: Path, able: Manifest) -> None:
    catalogue, packed = Catalogue(folder), PackedLoras(ROOM)
    one, other = ModelLoras(catalogue, packed, able), ModelLoras(catalogue, packed, able)
    assert one.load("ink") is other.load("ink")
    shorter = able.model_copy(update={"lora_layers": able.lora_layers[:-1]})
    with pytest.raises(UnusableLora):
        ModelLoras(catalogue, packed, shorter).load("ink")


def test_a_replaced_file_is_another_lora_and_those_that_run_keep_theirs(folder: Path, able: Manifest) -> None:
    loras = open_folder(folder, able)
    before = loras.load("ink")
    kept = before.values.copy()
    write_lora(folder / "new", able, rank=4, seed=9).rename(folder / "ink.safetensors")
    after = loras.load("ink")
    assert (before.ranks, after.ranks) == (2, 4)
    assert before.sha256 != after.sha256
    assert np.array_equal(before.values, kept)
    assert loras.find("ink").ranks == 4


def test_a_file_that_is_cut_after_it_was_found_is_refused(folder: Path, able: Manifest) -> None:
    loras = open_folder(folder, able)
    assert loras.find("ink").ranks == 2
    os.truncate(folder / "ink.safetensors", 1000)
    with pytest.raises(UnusableLora, match=r"ink\.safetensors") as caught:
        loras.load("ink")
    assert str(folder) not in str(caught.value)
    write_lora(folder / "ink.safetensors", able)
    assert loras.load("ink").ranks == 2


def test_a_file_that_cannot_be_read_now_is_said_to_be_so(
    folder: Path, able: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    loras = open_folder(folder, able)

    def failing(path: Path, _manifest: Manifest) -> None:
        raise CheckpointError(f"{path} cannot be read") from OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(model_loras, "pack_lora", failing)
        with pytest.raises(LoraUnreadable, match=r"^ink.safetensors cannot be read: try again\.$"):
            loras.load("ink")
    assert loras.load("ink").ranks == 2


def test_a_removed_file_is_forgotten(folder: Path, able: Manifest) -> None:
    loras = open_folder(folder, able)
    loras.load("ink")
    (folder / "ink.safetensors").unlink()
    with pytest.raises(UnusableLora, match="no LoRA ink"):
        loras.load("ink")
    assert "ink" not in {lora.name for lora in loras.describe()}


def test_a_model_without_room_lists_why(folder: Path, manifest: Manifest) -> None:
    described = open_folder(folder, manifest).describe()
    assert not [lora for lora in described if lora.usable]
    assert "--lora-slots" in str(described[1].reason)
