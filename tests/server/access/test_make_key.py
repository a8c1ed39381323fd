"""The command that makes keys."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from server.access.__main__ import main
from server.access.key_file import KeyFile


def make(path: Path, *words: str) -> str:
    """The key that the command shows."""
    command = [sys.executable, "-m", "server.access", *words, "--file", str(path)]
    made = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - our own
    (key,) = made.stdout.splitlines()
    assert key not in made.stderr
    return key


def test_keys_are_shown_once_and_work(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    mine, admins = make(path, "me"), make(path, "boss@example.com", "--admin")
    file = KeyFile(path)
    assert not {mine, admins} & set(path.read_text().replace('"', " ").split())
    mine_found, admin_found = file.find(mine), file.find(admins)
    assert mine_found is not None
    assert admin_found is not None
    assert (mine_found.name, mine_found.is_admin) == ("me", False)
    assert (admin_found.name, admin_found.is_admin) == ("boss@example.com", True)


def test_a_file_written_by_hand_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.toml"
    before = f'# ours\n[[keys]]\nname = "old"\nsha256 = "{"0" * 64}"\nrate = "5/minute"'  # without a line break
    path.write_text(before)
    inode = path.stat().st_ino
    assert main(["me", "--file", str(path)]) == 0
    assert path.read_text().startswith(before)
    assert path.stat().st_ino == inode, "it may be mounted by itself"
    assert KeyFile(path).find(capsys.readouterr().out.strip()) is not None


@pytest.mark.parametrize("content", ["[[keys]", '[[keys]]\nname = "me"'])
def test_a_broken_file_is_left_alone(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(content)
    assert main(["me", "--file", str(path)]) == 1
    assert path.read_text() == content
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")


def test_what_cannot_be_written_is_an_error_of_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["me", "--file", str(tmp_path / "nowhere" / "keys.toml")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["", "a b", 'a"', "a\nb", "é", "-", "x" * 65])
def test_names_that_no_file_could_hold_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SystemExit):
        main(["--file", str(tmp_path / "keys.toml"), "--", name])
    assert not (tmp_path / "keys.toml").exists()
