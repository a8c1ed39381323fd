"""How fast a model's deep features go stale: measured, and written into its manifest."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from engines.build.feature_drift import main, measure
from engines.build.trajectory import Trajectory, reference
from engines.manifest import Manifest
from tests import ROOT


@pytest.fixture
def demo() -> Path:
    return ROOT / "engines" / "demo"


def test_each_level_adds_what_a_shallow_step_errs_there(demo: Path) -> None:
    """The same by hand, from the lane of x0: a model that predicts the noise moves it by noise / signal."""
    manifest = Manifest.read(demo)
    drift = measure(manifest, demo, ["a cat"], steps=7)
    graphs = reference(manifest, demo)
    guidance = manifest.defaults.guidance_scale
    trajectory = Trajectory(manifest, demo, steps=7, prompt="a cat", guidance=guidance)
    recording = trajectory.run(graphs)
    errors = []
    for step in (3, 6):
        inputs = recording.shallow[step - 1]
        full = {name: array for name, array in inputs.items() if name not in {"features", "row_feature"}}
        old = graphs("denoise", recording.full[step - 3])["features"]
        x0 = graphs("denoise_shallow", {**inputs, "features": old})["state_next"][0, -1]
        expected = graphs("denoise", full)["state_next"][0, -1]
        signal, noise = trajectory.table.steps[step].level
        errors.append(np.sqrt(np.mean(((x0 - expected) * signal / noise) ** 2)))
    assert drift.total == pytest.approx([0, *np.cumsum(errors)], rel=1e-2, abs=2e-4)
    assert drift.total[-1] > 0
    assert drift.log_snr == pytest.approx(
        [2 * np.log(np.divide(*step.level)) for step in trajectory.table.steps[::3]], abs=1e-4
    )


def test_the_command_writes_it_into_the_manifest(demo: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(demo, tmp_path / "copy"))
    assert main(["--bundle", str(copied), "--images", "2", "--steps", "6", "--prompt", "a cat"]) == 0
    drift = Manifest.load(copied).feature_drift
    assert drift is not None
    assert len(drift.log_snr) == 2


def test_a_folder_without_a_bundle_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--bundle", str(tmp_path)]) == 1
    assert "holds no manifest.json" in capsys.readouterr().err
