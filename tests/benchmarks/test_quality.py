"""The quality of each position of `cache`: measured on a few images, and the published figures."""

from __future__ import annotations

from pathlib import Path

import PIL.Image
import pytest

from benchmarks.quality.__main__ import main, write_page
from benchmarks.quality.results import CACHES, Cell, QualityResults, Spread, page_tables
from loadtest.provenance import begin_run
from tests import ROOT

DOCS = ROOT / "docs"
PAGE = "text\n<!-- begin of the tables -->\nold\n<!-- end of the tables -->\nmore\n"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run, stopped after its first half."""
    folder = tmp_path_factory.mktemp("quality")
    (folder / "page.md").write_text(PAGE)
    assert main(words(folder, "--steps", "5")) == 0
    return folder


def words(folder: Path, *more: str) -> list[str]:
    return ["--out", str(folder / "quality.json"), "--scheduler", "ddim", "--prompts", "2", *more]


def read(folder: Path) -> QualityResults:
    return QualityResults.model_validate_json((folder / "quality.json").read_bytes())


def test_a_cell_counts_calls_rows_and_images(out: Path) -> None:
    off, fast, faster = read(out).cells[:3]
    assert [cell.key for cell in (off, fast, faster)] == [("ddim", 5, cache) for cache in CACHES]
    assert (off.calls, off.full, off.rows) == (5, 5, 10)
    assert fast.full < 5
    assert fast.rows == 10
    assert faster.rows <= 10, "guidance may end"
    assert off.psnr is off.ssim is None
    assert fast.psnr is not None
    assert 10 < fast.psnr.p5 <= fast.psnr.median < 60
    assert all(cell.right <= min(cell.things, cell.backgrounds) <= 2 for cell in (off, fast, faster))


def test_a_second_run_goes_on_from_the_first(out: Path) -> None:
    before = read(out).cells
    sheet = out / "sheet.jpg"
    page = out / "page.md"
    assert (
        main(words(out, "--steps", "5", "6", "--page", str(page), "--sheet", str(sheet), "--sheet-prompts", "2")) == 0
    )
    after = read(out)
    assert after.cells[:3] == before[:3]
    assert [cell.steps for cell in after.cells] == [5, 5, 5, 6, 6, 6]
    assert page.read_text() == PAGE.replace("old", page_tables(after))
    with PIL.Image.open(sheet) as image:
        assert image.size == (3 * 128, 2 * 128)


def test_results_of_other_settings_are_kept(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read(out)
    assert main(["--out", str(out / "quality.json"), "--prompts", "3"]) == 2
    assert "has results of other settings" in capsys.readouterr().err
    assert read(out) == before


def test_tables_say_the_least_of_a_scheduler() -> None:
    def cell(scheduler: str, right: int) -> Cell:
        spread = Spread.of([20.0, 30.0])
        return Cell(
            scheduler=scheduler,
            steps=20,
            cache="fast",
            calls=20,
            full=6,
            rows=30,
            things=10,
            backgrounds=10,
            right=right,
            psnr=spread,
            ssim=spread,
        )

    results = QualityResults(
        run=begin_run([]), model="demo", backend="", prompts=10, guidance=4, cells=(cell("euler", 9), cell("ddim", 10))
    )
    assert "| 20 | `fast` | 30% | 75% | 95.0% | 90.0% | 25.0 dB | 25.000 |" in page_tables(results)


def test_the_published_page_has_the_tables_of_the_published_results(tmp_path: Path) -> None:
    results = QualityResults.model_validate_json((DOCS / "benchmarks" / "quality.json").read_bytes())
    page = tmp_path / "page.md"
    page.write_text((DOCS / "quality.md").read_text())
    write_page(page, results)
    assert page.read_text() == (DOCS / "quality.md").read_text()


def test_what_is_published_is_small() -> None:
    assert (DOCS / "benchmarks" / "quality.json").stat().st_size < 300_000
    assert (DOCS / "quality.jpg").stat().st_size < 400_000
