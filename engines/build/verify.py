"""How far a backend's engines stray from the FP32 graphs in ONNX Runtime, on noise and on the model's own way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engines.backends.registry import open_device
from engines.build.profiles import shapes
from engines.build.trajectory import Graphs, Inputs, Table, Trajectory, Walk, decode_inputs, reference
from engines.contract import INPAINT_LANES, LANES, TERMS, Array, GraphName, TensorSpec
from engines.errors import EngineError
from engines.manifest import Build, Difference, Manifest, Precision, Profile, Size, Verification
from engines.progress import Progress

STEPS = 6  # of the trajectory that engines are compared on
_TOLERANCE = {"fp32": 1e-3, "fp16": 5e-2, "bf16": 2e-1, "int8": 2.5e-1}  # largest error, relative to the range
_ROUNDING = 2 / 255  # of pictures: a value between two levels may become either
IDENTICAL = 999.0  # dB, of equal pictures
_POOLS = ("context", "features")  # that any row may look into


class VerificationError(EngineError):
    """An engine computes something else than its graph."""


def verify(manifest: Manifest, bundle: Path, backend: str, *, table: Table, progress: Progress) -> Build:
    """Run the engines of `backend` beside the FP32 graphs; the build, with what was found written in.

    Raises:
        EngineError: the backend does not run on this machine, or an engine differs by more than its precision explains.
    """
    build = manifest.builds[backend]
    trajectory = Trajectory(manifest, bundle, table, size=manifest.resolutions[0])
    walk, cases = _expected(manifest, bundle, build, trajectory, progress)
    files = {name: bundle / engine.files[0].path for name, engine in build.engines.items()}
    graphs, engines = Graphs(manifest, open_device(backend), files), {}
    for name, engine in build.engines.items():
        with progress.stage(f"verifying {name} of {backend}"):
            worst = _worst(worst_difference(graphs(name, inputs), right) for inputs, right in cases[name])
        _refuse(backend, name, worst, tolerance(engine.precision, manifest.graphs[name].outputs))
        engines[name] = engine.model_copy(update={"difference": worst})
    with progress.stage(f"drawing a picture on {backend}"):
        decibels = psnr(trajectory.walk(graphs).pictures, walk.pictures)
    beside = Verification(psnr=round(decibels, 1), size=trajectory.size, steps=len(table.steps))
    return build.model_copy(update={"engines": engines, "verification": beside})


def _expected(
    manifest: Manifest, bundle: Path, build: Build, trajectory: Trajectory, progress: Progress
) -> tuple[Walk, dict[GraphName, list[tuple[Inputs, Mapping[str, Array]]]]]:
    """What the FP32 graphs make of the trajectory, and of each graph's cases: inputs, and what is right for the first.

    Worked out before the backend is opened, so that memory never holds the model twice.
    """
    exact = reference(manifest, bundle)
    with progress.stage("drawing a picture in FP32"):
        walk = trajectory.walk(exact)
    cases: dict[GraphName, list[tuple[Inputs, Mapping[str, Array]]]] = {}
    for name, engine in build.engines.items():
        with progress.stage(f"computing {name} in FP32"):
            made = _cases(name, manifest, trajectory, walk=walk, profiles=engine.profiles)
            cases[name] = [(inputs, exact(name, first)) for inputs, first in made]
    return walk, cases


def worst_difference(actual: Mapping[str, Array], expected: Mapping[str, Array]) -> Difference:
    """The worst of all outputs, in as many of their first entries as are expected. Raises VerificationError."""
    return _worst(difference_of(actual[name][: len(right)], right) for name, right in expected.items())


def difference_of(actual: Array, expected: Array) -> Difference:
    """Errors relative to the largest expected value. Raises VerificationError where there are values that are none."""
    wide, wanted = actual.astype(np.float64), expected.astype(np.float64)
    if not np.isfinite(wide).all():
        raise VerificationError("The output holds NaN or infinity.")
    errors = np.abs(wide - wanted) / max(float(np.abs(wanted).max()), 1e-6)
    return Difference(largest=float(errors.max()), mean=float(errors.mean()))


def tolerance(precision: Precision, outputs: Iterable[TensorSpec]) -> float:
    """The largest error, relative to the range, that computing in `precision` explains, in whichever output."""
    rounded = any(output.dtype == "uint8" for output in outputs)
    return max(_TOLERANCE[precision], _ROUNDING if rounded else 0.0)


def psnr(picture: Array, expected: Array) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures, dB."""
    error = float(np.mean((picture.astype(np.float64) - expected.astype(np.float64)) ** 2))
    return 10 * float(np.log10(255**2 / error)) if error else IDENTICAL


def _cases(
    name: GraphName, manifest: Manifest, trajectory: Trajectory, *, walk: Walk, profiles: Sequence[Profile]
) -> Iterator[tuple[Inputs, Inputs]]:
    """Inputs for the engines, and the part of them that their reference is worked out for: the first image."""
    if name == "encode_prompt":
        own: Sequence[Inputs] = trajectory.chunks
    else:
        # What takes any shape takes them all alike.
        for profile in profiles or (shapes(manifest, name)[0].profile,):
            yield _random_case(name, manifest, profile)
        noise = np.ones((1, *walk.state.shape[2:]), np.float32)
        own = {
            "denoise": walk.inputs,
            "denoise_shallow": walk.shallow,
            "decode": [decode_inputs(walk.state)],
            "encode_image": [{"images": walk.pictures, "noise": noise}],
        }[name]
    yield from ((inputs, inputs) for inputs in own)


def _random_case(name: GraphName, manifest: Manifest, profile: Profile) -> tuple[Inputs, Inputs]:
    """A full batch of noise for one profile; the reference computes its first image only."""
    assert profile.size is not None  # noqa: S101 - every graph but encode_prompt has one
    maker: Any = {
        "denoise": _random_denoise,
        "denoise_shallow": _random_shallow,
        "decode": _random_decode,
        "encode_image": _random_encode,
    }[name]
    inputs: Inputs = maker(manifest, profile.size, profile.batch, np.random.default_rng(3))
    alone = {
        key: array[:1, :1] if key == "guidance" else array if key in _POOLS else array[:1]
        for key, array in inputs.items()
    }
    return inputs, alone


def _latents(manifest: Manifest, size: Size) -> tuple[int, int, int]:
    latent = manifest.latent
    return latent.channels, size.height // latent.downscale, size.width // latent.downscale


def _random_denoise(manifest: Manifest, size: Size, batch: int, random: np.random.Generator) -> Inputs:
    """A batch of unguided images, each in the slot of its own number."""
    latents = _latents(manifest, size)
    told = {"guidance_embedded": random.uniform(0, 10, batch).astype(np.float32)} if manifest.embeds_guidance else {}
    context = (min(batch, manifest.context_rows), manifest.context.tokens, manifest.context.width)
    coef = np.zeros((batch, LANES, TERMS), np.float32)
    coef[:, 0, 1] = coef[:, 1:4, 3:6] = 1  # x becomes the model's output
    return {
        "state": random.standard_normal((batch, LANES, *latents), np.float32),
        "context": random.standard_normal(context, np.float32),
        "kept": _random_kept(batch, latents, random),
        "noise": random.standard_normal((batch, *latents), np.float32),
        "slot": np.arange(batch),
        "row_image": np.arange(batch),
        "row_context": np.stack([np.arange(batch), np.arange(batch)[::-1]], axis=1),  # two chunks each
        "timestep": random.uniform(0, manifest.noise_schedule.num_train_timesteps - 1, batch).astype(np.float32),
        "guidance": np.eye(batch, dtype=np.float32),
        "scale": np.ones(batch, np.float32),
        "coef": coef,
        "level": random.standard_normal((batch, 2), np.float32),
        **told,
    }


def _random_shallow(manifest: Manifest, size: Size, batch: int, random: np.random.Generator) -> Inputs:
    shape = (batch, manifest.feature_channels, *_latents(manifest, size)[1:])
    features: Inputs = {
        "features": random.standard_normal(shape, np.float32),
        "row_feature": np.arange(batch)[::-1].copy(),
    }
    return {**_random_denoise(manifest, size, batch, random), **features}


def _random_kept(batch: int, latents: tuple[int, int, int], random: np.random.Generator) -> Array:
    """Noise to keep where half of each image stays as it is."""
    kept = random.standard_normal((batch, INPAINT_LANES, *latents), np.float32)
    kept[:, 2] = kept[:, 2] > 0
    return kept


def _random_decode(manifest: Manifest, size: Size, batch: int, random: np.random.Generator) -> Inputs:
    state = random.standard_normal((batch, LANES, *_latents(manifest, size)), np.float32)
    return {"state": state, "slot": np.arange(batch)}


def _random_encode(manifest: Manifest, size: Size, batch: int, random: np.random.Generator) -> Inputs:
    images = random.integers(0, 256, (batch, size.height, size.width, 3), np.uint8)
    return {"images": images, "noise": random.standard_normal((batch, *_latents(manifest, size)), np.float32)}


def _worst(differences: Iterable[Difference]) -> Difference:
    found = list(differences)
    return Difference(largest=max(one.largest for one in found), mean=max(one.mean for one in found))


def _refuse(backend: str, name: GraphName, found: Difference, allowed: float) -> None:
    if not found.largest <= allowed:
        raise VerificationError(
            f"{name} of {backend} differs from the FP32 graph by {found.largest:.1e} of its range, more than "
            f"{allowed:.0e}. Its pictures would not be the model's, so the bundle no longer lists {backend}: "
            "compile it in a higher --precision."
        )
