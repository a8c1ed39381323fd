"""Makes what the systems load: checkpoints, exports and bundles."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.models import adapted
from benchmarks.peers.pipelines.systems import INSTALL, System
from benchmarks.process import ROOT, failure_reason
from engines.backends.available import precision_of
from engines.errors import EngineError
from engines.manifest import BundleError, Manifest

_ROWS = 2  # UNet rows, all that one guided image takes: no other system is prepared for more
_WRITE_CHECKPOINT = (
    "import sys; from pathlib import Path; from benchmarks.models import checkpoint_of, find_model; "
    "checkpoint_of(find_model(sys.argv[1], Path(sys.argv[2])))"
)


class ArtifactBuilder:
    """Makes the artifacts of systems, each once, by the commands that users run."""

    def __init__(
        self, folder: Path, *, logs: Path, sizes: Sequence[str], python: str, packages: Mapping[str, str]
    ) -> None:
        """Artifacts go under `folder`; `packages` are those of the interpreter `python`, which exports for peers."""
        self._folder, self._logs, self._sizes = folder, logs, tuple(sizes)
        self._python, self._packages = python, packages

    def artifact_of(self, system: System) -> Path:
        """What the system loads, made if missing.

        Raises:
            EngineError: it cannot be made, or the system's packages are not installed.
        """
        for package in system.packages:
            if package not in self._packages:
                raise EngineError(f"{package} is not installed: {INSTALL[package]}")
        home = self._folder / system.model
        artifact = home / system.artifact
        match system.artifact:
            case "checkpoint":
                self._write_checkpoint(home)
            case "optimum-fp32" | "optimum-int8":
                self._export(home, artifact)
            case _:
                self._build_bundle(home, artifact, system.backend)
        return artifact

    def _write_checkpoint(self, home: Path) -> Path:
        checkpoint = home / "checkpoint"
        if not (checkpoint / "model_index.json").exists():
            command = [sys.executable, "-c", _WRITE_CHECKPOINT, home.name, str(self._folder)]
            self._run(command, f"{home.name}-checkpoint")
        return checkpoint

    def _export(self, home: Path, artifact: Path) -> None:
        """Export with optimum-intel into a temporary folder, since a partial export looks complete."""
        if artifact.exists():
            return
        checkpoint, temporary = self._write_checkpoint(home), artifact.with_name(f".{artifact.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        precision = artifact.name.removeprefix("optimum-")
        command = [self._python, "-m", "optimum.commands.optimum_cli", "export", "openvino"]
        command += ["--model", str(checkpoint), "--task", "text-to-image", "--library", "diffusers"]
        command += ["--weight-format", precision, str(temporary)]
        self._run(command, f"{home.name}-{artifact.name}")
        temporary.rename(artifact)

    def _build_bundle(self, home: Path, artifact: Path, backend: str) -> None:
        """Build a bundle; other precisions start from the FP32 bundle, whose graphs take minutes and gigabytes."""
        plain, _, precision = artifact.name.partition("-")
        if _is_built(artifact, self._sizes, backend, precision or "fp32"):
            return
        if precision and not artifact.exists():
            self._build_bundle(home, home / plain, backend)
            shutil.copytree(home / plain, artifact)  # onnx refuses links, as a possible attack
        command = [sys.executable, str(ROOT / "build_engines.py"), "--model", str(self._write_checkpoint(home))]
        command += ["--name", home.name, "--out", str(artifact)]
        command += ["--resolution", *self._sizes, "--rows", str(_ROWS), "--backend", "openvino"]
        command += ["--precision", precision] if precision else ["--backend", "onnxruntime"]
        self._run([*command, "--no-verify"], f"{home.name}-{artifact.name}")

    def _run(self, command: Sequence[str], name: str) -> None:
        """Run a command to its end, in a process so that its memory is free again afterwards."""
        self._logs.mkdir(parents=True, exist_ok=True)
        path = self._logs / f"{name}.log"
        with path.open("w", encoding="utf-8") as log:
            done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=False)  # noqa: S603 - our own
        if done.returncode:
            reason = failure_reason(path.read_text(encoding="utf-8", errors="replace"))
            raise EngineError(f"{name} could not be made, exit code {done.returncode} ({reason}): see {path}")


def for_size(bundle: Path, size: str, folder: Path) -> Path:
    """The bundle in `folder` for one image size alone, as the other systems are prepared."""
    resolutions = tuple(one for one in Manifest.read(bundle).resolutions if str(one) == size)
    return adapted(bundle, folder, resolutions=resolutions)


def _is_built(bundle: Path, sizes: Sequence[str], backend: str, precision: str) -> bool:
    with suppress(BundleError):
        manifest = Manifest.read(bundle)
        built = backend in manifest.builds and precision_of(manifest, backend) == precision
        return built and manifest.max_rows == _ROWS and set(sizes) <= set(map(str, manifest.resolutions))
    return False
