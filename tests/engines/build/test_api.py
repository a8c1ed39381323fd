"""The build as a Python API: the documented example, options, and results that a program can rely on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from engines.build import api
from engines.build import verify as verification
from engines.contract import GRAPHS
from engines.errors import EngineError
from engines.manifest import BundleError, Manifest, Size
from engines.progress import NullProgress, Stage
from tests.support.shared import reused_graphs


class Notes(NullProgress):
    """Progress that collects the notes."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


class Stages(NullProgress):
    """Progress that collects the names of the outermost stages, and of those that were announced."""

    def __init__(self) -> None:
        self.expected: list[str] = []
        self.begun: list[str] = []
        self._depth = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        if not self._depth:
            self.begun.append(name)
        self._depth += 1
        yield self
        self._depth -= 1

    def expect(self, stages: Sequence[str]) -> None:
        self.expected = list(stages)


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def test_the_example_of_the_docstring_builds_a_bundle(
    checkpoint: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One graph is traced; the others are those of the session's bundle, so that their stages are skipped."""
    monkeypatch.chdir(tmp_path)
    code = "\n".join(line[4:] for line in (api.__doc__ or "").splitlines() if line.startswith("    "))
    hub_id = "OFA-Sys/small-stable-diffusion-v0"
    assert hub_id in code
    stages = Stages()
    code = code.replace(hub_id, str(checkpoint)).replace("    options=", "    reporter=reporter, options=")
    out = tmp_path / "bundles" / "small-sd"
    reused = [name for name in GRAPHS if name != "encode_prompt"]
    with reused_graphs(bundle, out, *reused):
        exec(compile(code, "example", "exec"), {"reporter": api.Reporter(progress=stages)})  # noqa: S102 - our own
    skipped = {words for name in reused for words in (f"exporting {name}", f"checking {name}.onnx against torch")}
    assert skipped < set(stages.expected)
    assert stages.begun == [stage for stage in stages.expected if stage not in skipped]
    assert "psnr=999" in capsys.readouterr().out
    manifest = api.inspect(out)
    assert manifest.name == "tiny-sd"
    assert manifest.rows == (2, 4)
    assert list(manifest.builds) == ["onnxruntime"]


def test_a_reporter_receives_plans_and_results(copied: Path) -> None:
    notes, plans, built = Notes(), list[api.BackendPlan](), list[str]()
    reporter = api.Reporter(progress=notes, on_plan=plans.append, on_built=lambda _, backend: built.append(backend))
    shapes = api.ShapeOptions(rows=(4,), resolutions=(Size(width=64, height=32),), decode_batch=2)
    manifest = api.compile(copied, backends=["onnxruntime"], shapes=shapes, verify=False, reporter=reporter)
    assert (manifest.rows, manifest.decode_batch, [*map(str, manifest.resolutions)]) == ((4,), 2, ["64x32"])
    assert manifest == Manifest.load(copied)
    (plan,) = plans
    assert (plan.backend, plan.geometry.rows) == ("onnxruntime", (4,))
    assert plan.precisions == dict.fromkeys(GRAPHS, "fp32")
    assert built == ["onnxruntime"]


def test_shapes_that_are_not_given_stay(copied: Path) -> None:
    before = Manifest.load(copied)
    after = api.compile(copied, backends=["onnxruntime"], verify=False)
    assert (after.rows, after.resolutions, after.decode_batch) == (before.rows, before.resolutions, before.decode_batch)
    assert after.builds == before.builds


def test_auto_is_the_best_backend_that_runs_here_and_counts_once(copied: Path) -> None:
    notes = Notes()
    manifest = api.compile(
        copied, backends=["auto", "auto"], precision="fp32", verify=False, reporter=api.Reporter(progress=notes)
    )
    assert notes.texts[0].startswith("backend ")
    assert set(manifest.builds) >= {notes.texts[0].split()[1]}


def test_an_unknown_backend_is_an_error_that_names_the_known_ones(copied: Path, checkpoint: Path) -> None:
    source = api.CheckpointSource(str(checkpoint))
    with pytest.raises(EngineError, match="no backend 'cudnn': choose auto or one of tensorrt"):
        api.compile(copied, backends=["cudnn"])
    with pytest.raises(EngineError, match="no backend 'cudnn'"):
        api.export(source, copied, backends=["cudnn"])


def test_a_backend_without_engines_cannot_be_verified(copied: Path) -> None:
    with pytest.raises(EngineError, match="holds no engines for openvino: compile them first"):
        api.verify(copied, backends=["openvino"])


def test_what_holds_no_bundle_is_an_error(tmp_path: Path) -> None:
    for function in (api.inspect, api.verify, api.compile):
        with pytest.raises(BundleError, match=r"holds no manifest\.json"):
            function(tmp_path)


def test_engines_that_differ_are_dropped_from_the_manifest(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def differs(*_: object, **__: object) -> None:
        raise verification.VerificationError("denoise differs")

    monkeypatch.setattr(verification, "verify", differs)
    with pytest.raises(EngineError, match="denoise differs"):
        api.verify(copied)
    assert not Manifest.load(copied).builds
