"""What is decided and checked before a build begins: before anything large is downloaded, read or exported."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from engines.backends.available import Choice, choose, gpu_here, installed, probe
from engines.backends.registry import ON_CPU, SPECS, TENSORRT, install_command
from engines.backends.tensorrt.compatibility import check_fp8
from engines.build.bundle import exporter_versions, geometry_of
from engines.build.compile import check_precision
from engines.build.options import ExportOptions
from engines.build.qdq.quantize import EIGHT_BITS, modelopt_version
from engines.build.request_defaults.choice import request_defaults
from engines.checkpoints.checkpoint import Checkpoint
from engines.errors import EngineError
from engines.limits import LONGEST_NAME
from engines.manifest import Defaults, Manifest, NoiseSchedule, Precision
from engines.progress import Progress
from engines.schedulers import complete, find, table

_FEWER_VALUES = 2**31  # than this TensorRT's tensors have
AUTO = "auto"  # in place of a backend's name: the best that runs here


def resolved_backends(backends: Sequence[str], progress: Progress) -> list[str]:
    """The names of the backends, in order and each once, with `AUTO` replaced by the best that runs here."""
    names: list[str] = []
    for backend in backends:
        if backend == AUTO:
            choice = choose()
            progress.note(f"backend {choice.backend} ({_reason_of(choice)})")
            names.append(choice.backend)
        else:
            names.append(_known(backend))
    return list(dict.fromkeys(names))


def _reason_of(choice: Choice) -> str:
    """Why the backend was chosen. Where there is no GPU, that says all: what CUDA says of it helps nobody."""
    if choice.backend in ON_CPU and probe().gpu is None:
        return "no usable NVIDIA GPU"
    return choice.reason


def _known(backend: str) -> str:
    if backend not in SPECS:
        raise EngineError(f"There is no backend {backend!r}: choose {AUTO} or one of {', '.join(SPECS)}.")
    return backend


def check_compilers(
    backends: Sequence[str], precision: Precision | None, optimization_level: int | None = None
) -> None:
    """Raise EngineError, with the command that installs it, for a backend that cannot compile here.

    Also if there is an `optimization_level`, 0 to 5, and no backend that has levels.
    """
    for backend in backends:
        check_precision(backend, precision)
        installed(backend)
        if backend == "tensorrt":
            gpu_here()
        if backend in TENSORRT and precision in EIGHT_BITS:
            modelopt_version()
        if backend in TENSORRT and precision == "fp8" and (gpu := probe().gpu):
            check_fp8(gpu)
    if optimization_level is not None and "tensorrt" not in backends:
        raise EngineError(
            f"--optimization-level is of --backend tensorrt alone, and this build is for {', '.join(backends)}: leave "
            "it out (tensorrt_rtx chooses kernels on the GPU that runs them)."
        )
    if precision == "int8" and not set(backends) <= set(TENSORRT) and find_spec("nncf") is None:
        raise EngineError(f"INT8 needs the package nncf: {install_command('int8')}")


def check_export(model: str, out: Path) -> None:
    """Raise EngineError unless the packages of an export are installed, and `out` is a place for a bundle."""
    exporter_versions()
    check_out(out)
    if Path(model).exists() and out.resolve().is_relative_to(Path(model).resolve()):
        raise EngineError(f"--out {out} lies in the model's own folder, which is left as it is: choose another --out.")


def check_out(out: Path) -> None:
    """Raise EngineError unless a bundle can be written to `out`."""
    places = (out, *out.absolute().parents)
    if broken := next((place for place in places if place.is_symlink() and not place.exists()), None):
        raise EngineError(f"--out {out}: {broken} is a link to nothing: choose another --out.")
    existing = next(place for place in places if place.exists())
    if not existing.is_dir():
        raise EngineError(f"--out {out}: {existing} is a file, not a folder: choose another --out.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise EngineError(
            f"--out {out}: {existing} cannot be written: change its permissions, or choose another --out."
        )


def check_options(checkpoint: Checkpoint, options: ExportOptions) -> None:
    """Raise EngineError unless the options fit the checkpoint, and requests that name no options can be served."""
    config = checkpoint.config
    geometry_of(checkpoint, options)
    name = options.name or checkpoint.name
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise EngineError(
            f"{name[:40]!r}… is no name for the API, which has at most {LONGEST_NAME} printable characters: pass "
            "another --name."
        )
    _check_requests(
        request_defaults(checkpoint, options),
        options.rows,
        config.noise_schedule,
        embeds_guidance=config.guidance_embedding is not None,
    )


def check_shapes(manifest: Manifest) -> None:
    """Raise EngineError unless requests that name no options can be served by engines of these shapes."""
    _check_requests(manifest.defaults, manifest.rows, manifest.noise_schedule, embeds_guidance=manifest.embeds_guidance)


def check_lora_pool(manifest: Manifest, backends: Sequence[str]) -> None:
    """Raise EngineError if the pool of LoRAs is larger than tensors of one of the backends may be."""
    if manifest.lora is None or not set(backends) & set(TENSORRT):
        return
    most = most_lora_ranks(manifest.dims(manifest.resolutions[0])["G"])
    if manifest.lora.ranks > most:
        slots, rank = manifest.lora.slots, manifest.lora.rank
        raise EngineError(
            f"--lora-slots {slots} --lora-rank {rank}: a pool of {slots * rank} ranks, and TensorRT's tensors have "
            f"room for {most} of this model: lower one of them. Nothing has to be exported again for that."
        )


def most_lora_ranks(width: int) -> int:
    """The ranks, each of `width` values, that a tensor of TensorRT holds besides the one that stays zero."""
    return (_FEWER_VALUES - 1) // width - 1


def _check_requests(defaults: Defaults, rows: Sequence[int], schedule: NoiseSchedule, *, embeds_guidance: bool) -> None:
    if defaults.guidance_scale > 1 and not embeds_guidance and max(rows) < 2:
        raise EngineError(
            f"--rows {max(rows)} leaves no room for a guided image, which takes two rows, and requests have guidance "
            f"{defaults.guidance_scale:g} by default: add 2 to --rows, or export with --guidance 1."
        )
    try:
        steps = defaults.num_inference_steps
        table(complete(find(defaults.scheduler), defaults, num_steps=steps), steps, schedule)
    except ValueError as error:
        raise EngineError(
            f"Requests have {defaults.num_inference_steps} steps of {defaults.scheduler} by default (--steps): {error}"
        ) from error
