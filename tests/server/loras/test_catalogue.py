"""The folder of LoRAs: names, links, changes, and names that no file has."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.loras import catalogue
from server.loras.catalogue import Catalogue
from server.requests.errors import LoraUnreadable
from server.requests.loras import UnusableLora


def write(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "loras"
    for name in ("ink.safetensors", "styles/wash.SAFETENSORS", "a/oil.safetensors", "b/oil.safetensors", "notes.txt"):
        write(root / name)
    write(root / ".cache/hidden.safetensors")
    for name in ("peft/adapter_model.safetensors", "peft/adapter_config.json", "both/unet/adapter_model.safetensors"):
        write(root / name)
    write(root / "trained/pytorch_lora_weights.safetensors")
    return root


def names(folder: Catalogue) -> list[str]:
    return [file.name for file in folder.files()]


def why_not(folder: Catalogue, name: str) -> str:
    with pytest.raises(UnusableLora) as caught:
        folder.find(name)
    return str(caught.value)


def test_names_are_paths_without_suffix(folder: Path) -> None:
    assert names(Catalogue(folder)) == ["a/oil", "b/oil", "both/unet", "ink", "peft", "styles/wash", "trained"]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("ink", "ink.safetensors"),
        (" ink ", "ink.safetensors"),
        ("ink.safetensors", "ink.safetensors"),
        ("styles/wash", "styles/wash.SAFETENSORS"),
        ("wash", "styles/wash.SAFETENSORS"),
        ("a/oil", "a/oil.safetensors"),
        ("peft", "peft/adapter_model.safetensors"),
        ("unet", "both/unet/adapter_model.safetensors"),
    ],
)
def test_a_name_finds_its_file(folder: Path, name: str, file: str) -> None:
    assert Catalogue(folder).find(name).path == folder / file


def test_what_is_not_clear_is_refused_with_the_choices(folder: Path) -> None:
    known = Catalogue(folder)
    assert why_not(known, "oil") == "There are several LoRAs oil: write one of a/oil, b/oil."
    assert why_not(known, "wosh") == "There is no LoRA wosh: did you mean styles/wash?"
    assert why_not(known, "zebra") == "There is no LoRA zebra: GET /loras lists those there are."
    assert why_not(known, "") == "There is no LoRA : GET /loras lists those there are."


def test_two_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("ink.safetensors", "ink.SAFETENSORS", "style.safetensors", "style/adapter_model.safetensors"):
        write(tmp_path / name)
    known = Catalogue(tmp_path)
    listed = {file.name: file.problem for file in known.files()}
    assert listed.pop("ink.safetensors") == "There are two LoRAs ink: rename one of the files."
    assert listed == {"ink": "", "style": "", "style/adapter_model": ""}
    assert known.find("style").path.name == "style.safetensors"


def test_names_that_tags_cannot_have_are_listed_with_the_reason(tmp_path: Path) -> None:
    for name in ("a:b", "a>b", "new\nline", "caf\u00e9"):
        write(tmp_path / f"{name}.safetensors")
    (tmp_path / os.fsdecode(b"\xff.safetensors")).write_bytes(b"x")
    listed = {file.name: file.problem for file in Catalogue(tmp_path).files()}
    assert listed.pop("caf\u00e9") == ""
    assert len(listed) == 4
    assert all("a tag cannot have this name: rename the file" in problem for problem in listed.values())
    assert "rename the file" in why_not(Catalogue(tmp_path), "a:b")


def test_unicode_has_several_spellings(tmp_path: Path) -> None:
    write(tmp_path / "cafe\u0301.safetensors")
    assert Catalogue(tmp_path).find("caf\u00e9").path.exists()
    assert Catalogue(tmp_path).find("cafe\u0301").name == "caf\u00e9"


def test_changes_are_noticed_without_being_asked(folder: Path) -> None:
    known = Catalogue(folder)
    before = known.find("ink")
    assert known.find("ink") == before
    write(folder / "ink.safetensors", b"replaced")
    assert known.find("ink").stamp != before.stamp
    write(folder / "deep/er/new.safetensors")
    assert known.find("new").name == "deep/er/new"
    (folder / "ink.safetensors").unlink()
    assert "There is no LoRA ink" in why_not(known, "ink")
    (folder / "a/oil.safetensors").unlink()
    assert known.find("oil").name == "b/oil"
    before = known.find("peft")
    os.utime(folder / "peft/adapter_config.json", (1, 1))
    assert known.find("peft").stamp != before.stamp


def test_a_folder_that_does_not_change_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        os.utime(path, (1, 1))  # long ago, so that times tell of every change
    known = Catalogue(folder)
    with monkeypatch.context() as patched:
        scandir = Mock(wraps=os.scandir)
        patched.setattr(os, "scandir", scandir)
        assert "no LoRA" in why_not(known, "zebra")
        once = scandir.call_count
        assert "no LoRA" in why_not(known, "zebra")
        assert known.find("ink")
        assert scandir.call_count == once > 0


def test_links_out_of_the_folder_are_not_followed(folder: Path, tmp_path: Path) -> None:
    outside = write(tmp_path / "outside/secret.safetensors")
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "linked").symlink_to(outside.parent)
    (folder / "loop").symlink_to(folder)
    (folder / "self.safetensors").symlink_to("self.safetensors")
    (folder / "itself").symlink_to("itself")
    (folder / "inside.safetensors").symlink_to("styles/wash.SAFETENSORS")
    known = Catalogue(folder)
    assert names(known) == ["a/oil", "b/oil", "both/unet", "ink", "inside", "peft", "styles/wash", "trained"]
    assert "no LoRA" in why_not(known, "secret")
    (folder / "inside.safetensors").unlink()
    (folder / "inside.safetensors").symlink_to(outside)
    assert "no LoRA" in why_not(known, "inside")


def test_the_folder_itself_may_be_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert Catalogue(tmp_path / "link").find("wash").name == "styles/wash"


def test_folders_are_read_to_a_depth(tmp_path: Path) -> None:
    write(tmp_path / "/".join("abcdef") / "deepest.safetensors")
    write(tmp_path / "/".join("abcdefg") / "deeper.safetensors")
    assert names(Catalogue(tmp_path)) == ["a/b/c/d/e/f/deepest"]


def test_what_is_no_file_is_no_lora(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert names(Catalogue(tmp_path)) == []


def test_a_folder_that_disappears_and_comes_back(folder: Path, tmp_path: Path) -> None:
    known = Catalogue(folder)
    assert known.find("ink")
    folder.rename(tmp_path / "away")
    with pytest.raises(LoraUnreadable, match="cannot be read now"):
        known.find("ink")
    with pytest.raises(LoraUnreadable, match="cannot be read now"):
        known.files()
    (tmp_path / "away").rename(folder)
    assert known.find("ink")
    shutil.rmtree(folder / "styles")
    assert "no LoRA" in why_not(known, "wash")


NASTY = ["../ink", "..", "/etc/passwd", "ink\0", "\0", "a" * 10_000, "CON", "NUL", "\ud800", "ink/../ink", "./ink", "~"]


@given(st.text() | st.sampled_from(NASTY))
@example("../outside")
def test_no_name_leads_out_of_the_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    root = tmp_path_factory.getbasetemp() / "fuzzed"
    write(root / "loras/ink.safetensors")
    write(root / "outside.safetensors")
    try:
        found = Catalogue(root / "loras").find(name)
    except UnusableLora as error:
        found, message = None, str(error)
    if found is None:
        assert len(message.encode()) < 600
    else:
        assert found.name == "ink"


def test_a_thousand_files_are_found_quickly(tmp_path: Path) -> None:
    for number in range(1000):
        write(tmp_path / f"{number % 20}/style-{number}.safetensors")
    known = Catalogue(tmp_path)
    began = time.process_time()
    for _ in range(20):
        known.find("style-7")
    assert "did you mean" in why_not(known, "style-10000")
    assert time.process_time() - began < 3


def test_no_more_files_are_read_than_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "_MOST_FILES", 3)
    for number in range(5):
        write(tmp_path / f"{number}.safetensors")
    assert names(Catalogue(tmp_path)) == ["0", "1", "2"]
