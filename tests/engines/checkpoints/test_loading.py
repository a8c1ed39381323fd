"""Weights are loaded as they were saved; damaged ones and pickles are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.checkpoints.find import find_checkpoint
from engines.checkpoints.loading.modules import Modules
from engines.errors import CheckpointError
from tests.support.checkpoints import PARTS, Harmful, NoteRecorder, assert_same, edit, load, pickle_weights


def test_damaged_or_missing_weights_name_the_part(copied: Path) -> None:
    path = copied / "text_encoder" / "model.safetensors"
    whole = {name: weight.clone() for name, weight in load_file(path).items()}  # load_file returns views of the file
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"copy/text_encoder/model\.safetensors is incomplete"):
        load(find_checkpoint(str(copied)))
    whole.pop("final_layer_norm.weight")
    save_file(whole, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"text_encoder lacks 1 .* final_layer_norm\.weight"):
        load(find_checkpoint(str(copied)))
    path.rename(path.with_name("other.safetensors"))
    with pytest.raises(CheckpointError, match=r"holds other\.safetensors but no model\.safetensors: .* rename"):
        find_checkpoint(str(copied))


def test_pickled_folders_need_allow_pickle(plain: Modules, copied: Path) -> None:
    pickle_weights(copied)
    with pytest.raises(CheckpointError, match=r"can run code: .* --allow-pickle"):
        find_checkpoint(str(copied))
    progress = NoteRecorder()
    checkpoint = find_checkpoint(str(copied), allow_pickle=True, progress=progress)
    assert [note.split(":")[0] for note in progress.notes] == [str(copied / part) for part in PARTS]
    assert_same(load(checkpoint), plain)


@pytest.mark.parametrize("part", ["text_encoder", "unet"])
def test_pickles_never_run_code(copied: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    monkeypatch.chdir(copied)
    pickle_weights(copied)
    path = next((copied / part).glob("*.bin"))
    torch.save({**torch.load(path), "harmful": Harmful()}, path)
    with pytest.raises(CheckpointError, match=f"cannot be loaded: {part}"):
        load(find_checkpoint(str(copied), allow_pickle=True))
    assert not (copied / "harmed").exists()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_file_and_tensor(copied: Path, part: str, value: float) -> None:
    path = next((copied / part).glob("*.safetensors"))
    tensors = {name: weight.clone() for name, weight in load_file(path).items()}
    name = next(name for name, weight in tensors.items() if weight.ndim >= 2)
    tensors[name].view(-1)[5] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as raised:
        load(find_checkpoint(str(copied)))
    assert str(raised.value).startswith(f"{path} holds NaN or infinity in {part}.{name.removeprefix('text_model.')}: ")
    assert str(raised.value).endswith("Download it again.")


@pytest.mark.parametrize("part", PARTS)
def test_a_shape_that_the_config_does_not_describe_names_file_tensor_and_shapes(copied: Path, part: str) -> None:
    path = next((copied / part).glob("*.safetensors"))
    tensors = {name: weight.clone() for name, weight in load_file(path).items()}
    name, weight = next((name, weight) for name, weight in tensors.items() if weight.ndim >= 2)
    tensors[name] = weight[1:].contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as raised:
        load(find_checkpoint(str(copied)))
    (line,) = str(raised.value).splitlines()
    shapes = f"{list(tensors[name].shape)}, and its config.json describes {list(weight.shape)}"
    assert f"{path} holds {name} with the shape {shapes}. Take both from the same checkpoint." in line
    assert "ignore_mismatched_sizes" not in line


def test_truncated_weights_say_how_much_is_missing(copied: Path) -> None:
    path = next((copied / "unet").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"is incomplete \([\d,]+ of [\d,]+ bytes\): download it again\.$"):
        load(find_checkpoint(str(copied)))


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("unet/config.json", {"conv_in_kernel": "x"}),
        ("unet/config.json", {"dropout": "x"}),
        ("vae/config.json", {"act_fn": "other"}),
        ("text_encoder/config.json", {"hidden_act": "other"}),
    ],
)
def test_a_config_that_the_library_refuses_is_explained_in_one_line(
    copied: Path, file: str, changes: dict[str, object]
) -> None:
    """Keys that are not checked in advance, since no checkpoint of this family differs in them."""
    edit(copied / file, **changes)
    part = Path(file).parent.name
    with pytest.raises(CheckpointError, match=f"weights of copy cannot be loaded: {part}") as refused:
        load(find_checkpoint(str(copied)))
    assert len(str(refused.value).splitlines()) == 1
