"""How far a backend's engines stray from the FP32 graphs in ONNX Runtime, on noise and on the model's trajectory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from engines.accuracy import psnr, tolerance, worst_difference, worst_of
from engines.backends.registry import open_device
from engines.build.profiles import shapes
from engines.build.trajectory import (
    GraphRunner,
    NotFiniteError,
    Recording,
    Trajectory,
    decode_inputs,
    finite,
    reference,
)
from engines.contract import (
    LANES,
    MEMORY,
    STEPS,
    TERMS,
    Array,
    Arrays,
    GraphName,
    Port,
    build_inputs,
    plain,
    random_values,
    sizes_of,
)
from engines.errors import EngineError
from engines.manifest import Build, Difference, Manifest, Precision, Profile, Verification
from engines.progress import Progress
from engines.row_buckets import rank_buckets

STEPS_COMPARED = 6  # denoising steps of the trajectory that engines are compared on
_BATCH = frozenset("SBRn")  # dimensions that grow with the batch; pools of other dimensions are any row's to read
_CHUNKS = 2  # chunks per row in a random batch

_RANKS = 9  # of the LoRA pool, on which engines are compared: each takes megabytes

Case = tuple[Arrays, Arrays]  # an engine's inputs, and the reference's: those of the first image


class VerificationError(EngineError):
    """An engine computes something else than its graph."""


def verify(manifest: Manifest, bundle: Path, backend: str, *, progress: Progress) -> Build:
    """Compare the engines of `backend` with the FP32 graphs. Returns its build with the differences found.

    Raises:
        VerificationError: an engine differs by more than its precision explains, or computes NaN or infinity.
        EngineError: the backend does not run on this machine.
    """
    try:
        return _verified(manifest, bundle, backend, progress)
    except NotFiniteError as error:
        raise VerificationError(f"{error} The bundle no longer lists {backend}.") from error


def _verified(manifest: Manifest, bundle: Path, backend: str, progress: Progress) -> Build:
    build = manifest.builds[backend]
    trajectory = Trajectory(manifest, bundle, steps=STEPS_COMPARED)
    recording, cases = expected(manifest, bundle, build, trajectory, progress)
    files = {name: bundle / engine.files[0].path for name, engine in build.engines.items()}
    runner, engines = GraphRunner(manifest, open_device(backend), files), {}
    graphs = finite(runner, lambda name: _remedy(backend, build.engines[name].precision))
    for name, engine in build.engines.items():
        with progress.stage(f"verifying {name} of {backend}"):
            found = worst_of(worst_difference(graphs(name, inputs), outputs) for inputs, outputs in cases[name])
        _check_tolerance(backend, name, found, tolerance(engine.precision, manifest.graphs[name].outputs))
        engines[name] = engine.model_copy(update={"difference": found})
    with progress.stage(f"drawing an image on {backend}"):
        decibels = psnr(trajectory.run(graphs).images, recording.images)
    verification = Verification(psnr=round(decibels, 1), size=trajectory.size, steps=trajectory.steps)
    return build.model_copy(update={"engines": engines, "verification": verification})


def expected(
    manifest: Manifest, bundle: Path, build: Build, trajectory: Trajectory, progress: Progress
) -> tuple[Recording, dict[GraphName, list[tuple[Arrays, Arrays]]]]:
    """The trajectory on the FP32 graphs, and each graph's cases: inputs, and the expected outputs of the first image.

    Computed before the backend is opened, so that memory never holds the model twice.
    """
    graphs = reference(manifest, bundle)
    with progress.stage("drawing an image in FP32"):
        recording = trajectory.run(graphs)
    compared: dict[GraphName, list[tuple[Arrays, Arrays]]] = {}
    for name, engine in build.engines.items():
        with progress.stage(f"computing {name} in FP32"):
            cases = _cases(name, manifest, trajectory, recording=recording, profiles=engine.profiles)
            compared[name] = [(inputs, graphs(name, first)) for inputs, first in cases]
    return recording, compared


def _remedy(backend: str, precision: Precision) -> str:
    if precision == "fp32":
        return f"{backend} computes something else than the FP32 graph; compile it with another --backend"
    wider = "bf16, or fp32" if precision == "fp16" else "fp32"
    return f"{precision} on {backend} does not hold what FP32 does; compile it with --precision {wider}"


def _cases(
    name: GraphName, manifest: Manifest, trajectory: Trajectory, *, recording: Recording, profiles: Sequence[Profile]
) -> Iterator[Case]:
    if name != (base := plain(name)):
        cases = _cases(base, manifest, trajectory, recording=recording, profiles=profiles)
        yield from (_with_loras(case, name, manifest) for case in cases)
        return
    if name == "encode_prompt":
        recorded: Sequence[Arrays] = trajectory.chunks
    else:
        # Engines without profiles treat all shapes alike: one is enough.
        for profile in profiles or (shapes(manifest, name)[0].profile,):
            yield random_case(name, manifest, profile)
        recorded = {
            "denoise": recording.full,
            "denoise_shallow": recording.shallow,
            "decode": [decode_inputs(recording.state)],
            "decode_fast": [decode_inputs(recording.state)],
            "encode_image": [trajectory.encode_inputs(recording.images)],
            "safety": [{"images": recording.images}],
        }[name]
    yield from ((inputs, inputs) for inputs in recorded)


def _with_loras(case: Case, name: GraphName, manifest: Manifest) -> Case:
    """A case of a plain graph for its variant `name`: every row is updated by random LoRAs."""
    assert manifest.lora  # noqa: S101 - it has such a graph
    shared = manifest.inputs(plain(name))
    ports = [port for port in manifest.inputs(name) if port not in shared]
    batch, first = (sizes_of(shared, {name: array.shape for name, array in inputs.items()}) for inputs in case)
    sizes = {**manifest.dims(manifest.resolutions[0]), **batch, "Q": _RANKS, "A": rank_buckets(manifest.lora)[0]}
    loras = build_inputs(ports, sizes, make=random_values(np.random.default_rng(4)))
    kept = {port.name: loras[port.name][tuple(slice(first.get(str(dim))) for dim in port.dims)] for port in ports}
    return {**case[0], **loras}, {**case[1], **kept}


def random_case(name: GraphName, manifest: Manifest, profile: Profile) -> Case:
    """A full batch of unguided images for one profile, each in the slot and row of its own number."""
    assert profile.size is not None  # noqa: S101 - every graph but encode_prompt has one
    batch, generator = profile.batch, np.random.default_rng(3)
    ports = manifest.inputs(name)
    pools = {"C": min(batch, manifest.context_rows), "P": batch}
    sizes = {**manifest.dims(profile.size), **dict.fromkeys(_BATCH, batch), **pools, "L": _CHUNKS}
    draw = random_values(generator)

    def make(port: Port, sizes: Mapping[str, int]) -> Array:
        own = np.arange(batch, dtype=port.dtype).reshape(-1, *[1] * (len(port.dims) - 1))
        return np.broadcast_to(own, port.shape(sizes)) if port.below in _BATCH else draw(port, sizes)

    values = _step_values(batch) if name in STEPS else {}
    inputs = build_inputs(ports, sizes, values, make=make)
    if name in STEPS:
        _make_masks(inputs["inpaint"], inpaints=manifest.is_for_inpainting)
    return inputs, {port.name: inputs[port.name][_first(port)] for port in ports}


def _make_masks(inpaint: Array, *, inpaints: bool) -> None:
    """Turn the lane of `inpaint` that is a mask into one of half of each image, in place."""
    mask = 1 if inpaints else 2
    inpaint[:, mask] = inpaint[:, mask] > 0
    if inpaints:
        inpaint[:, 2] = 0  # nothing is kept by mixing


def _step_values(batch: int) -> dict[str, Array]:
    """The inputs of a step that keep numbers in the range that engines compute in: x becomes the model's output."""
    coef = np.zeros((batch, LANES, TERMS), np.float32)
    coef[:, 0, 1] = coef[:, 1 : 1 + MEMORY, 3:] = 1
    return {"guidance": np.eye(batch, dtype=np.float32), "scale": np.ones(batch, np.float32), "coef": coef}


def _first(port: Port) -> tuple[slice, ...]:
    """The part of a batch that belongs to its first image; pools that any row may read stay whole."""
    return tuple(slice(1) if dim in _BATCH else slice(None) for dim in port.dims)


def _check_tolerance(backend: str, name: GraphName, found: Difference, allowed: float) -> None:
    if not found.largest <= allowed:  # NaN fails too
        raise VerificationError(
            f"{name} of {backend} differs from the FP32 graph by {found.largest:.1e} of its range, more than "
            f"{allowed:.0e}. Its images would not be the model's, so the bundle no longer lists {backend}: "
            "compile it in a higher --precision."
        )
