"""Which bundles `--bundle` stands for, and what their models are called."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from engines.cli import parse
from engines.demo import BUNDLE as DEMO
from engines.errors import EngineError
from engines.manifest import MANIFEST, Manifest
from server.startup.bundles import find_bundles
from server.startup.settings import ServerSettings


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """A folder of two bundles, of which only the manifests are there, and of what is none."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        Manifest.read(DEMO).model_copy(update={"name": name.title()}).save(tmp_path / name)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "read.me").write_text("no bundle")
    return tmp_path


def names(*given: str) -> list[str]:
    return [bundle.name for bundle in find_bundles(given)]


def test_a_bundle_is_served_by_its_own_name(shelf: Path) -> None:
    (found,) = find_bundles([str(shelf / "one")])
    assert (found.name, found.folder, found.manifest.name) == ("One", shelf / "one", "One")


def test_a_folder_of_bundles_stands_for_all_of_them(shelf: Path) -> None:
    assert names(str(shelf)) == ["One", "Two"]
    assert names(str(DEMO), str(shelf)) == ["latentd-demo", "One", "Two"]


def test_a_bundle_may_have_another_name(shelf: Path) -> None:
    (found,) = find_bundles([f"sd-1.5={shelf / 'one'}"])
    assert (found.name, found.manifest.name) == ("sd-1.5", "One")


def test_a_folder_may_have_an_equals_sign(shelf: Path) -> None:
    shutil.move(shelf / "one", shelf / "a=b")
    assert names(str(shelf / "a=b")) == ["One"]
    assert names(f"x={shelf / 'a=b'}") == ["x"]


def test_equal_names_are_refused_with_the_remedy(shelf: Path) -> None:
    shutil.copy(shelf / "one" / MANIFEST, shelf / "two")
    with pytest.raises(EngineError) as refused:
        find_bundles([str(shelf)])
    assert str(refused.value) == (
        f"{shelf / 'one'} and {shelf / 'two'} are both named One: give one another name, as "
        f"--bundle NAME={shelf / 'two'}."
    )
    assert names(str(shelf / "one"), f"Other={shelf / 'two'}") == ["One", "Other"]


@pytest.mark.parametrize("name", ["", "-x", "a b", "a,b", "ä", "x" * 101, ".."])
def test_names_that_no_path_can_hold_are_refused(shelf: Path, name: str) -> None:
    with pytest.raises(EngineError, match="the name before = may have letters"):
        find_bundles([f"{name}={shelf / 'one'}"])


@pytest.mark.parametrize("given", ["{0}/missing", "x={0}/missing", "{0}/notes", "x={0}"])
def test_what_is_no_bundle_is_refused(shelf: Path, given: str) -> None:
    with pytest.raises(EngineError, match=MANIFEST):
        find_bundles([given.format(shelf)])


def test_the_variable_separates_bundles_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTD_BUNDLE", "/bundles/a, b=/bundles/b,")
    assert parse(ServerSettings, []).bundle == ("/bundles/a", "b=/bundles/b")
    assert parse(ServerSettings, ["--bundle", "c,d", "--bundle", "e"]).bundle == ("c,d", "e")


def test_without_a_bundle_the_demo_is_served() -> None:
    assert names(*parse(ServerSettings, []).bundle) == ["latentd-demo"]


def test_no_bundle_at_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTD_BUNDLE", ",")
    with pytest.raises(EngineError, match="give --bundle DIR"):
        find_bundles(parse(ServerSettings, []).bundle)
