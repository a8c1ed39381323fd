"""Measures how fast the deep features of a model go stale, by which its full steps are placed.

    python -m engines.build.feature_drift --bundle engines/demo

It runs the bundle's FP32 graphs in ONNX Runtime on this machine's processor, and writes the result into the manifest.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from pydantic_settings import SettingsConfigDict
from rich.console import Console
from rich.progress import track

from engines.build.trajectory import RunGraph, Trajectory, prompts_of, reference
from engines.cli import CommandLine, RepeatableList, parse
from engines.contract import Array
from engines.errors import EngineError
from engines.manifest import FeatureDrift, Manifest

_X, _MODEL = 0, 1  # the lane, and the term, of a step's matrix
_DIGITS = 4
AGE = 3  # steps: reuse as old as is usual, since what features lose saturates


class FeatureDriftCommand(CommandLine):
    """Measure how fast a model's deep features go stale, and write it into the bundle's manifest.

    python -m engines.build.feature_drift --bundle engines/demo

    Takes a little longer than the images would on this machine's processor.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m engines.build.feature_drift")

    bundle: Path = Field(description="folder of the bundle")
    prompt: RepeatableList[str] = Field((), description="prompts, repeatable; unless given, the model's examples")
    images: PositiveInt = Field(24, description="how many images to follow, each from noise of its own")
    steps: int = Field(20, ge=2 * AGE, description="denoising steps of each")


def main(argv: Sequence[str] | None = None) -> int:
    options, console = parse(FeatureDriftCommand, sys.argv[1:] if argv is None else argv), Console(stderr=True)
    try:
        manifest = Manifest.load(options.bundle)
        prompts = options.prompt or manifest.examples or prompts_of(manifest)
        followed = list(islice(cycle(prompts), options.images))
        drift = measure(manifest, options.bundle, followed, steps=options.steps, console=console)
        manifest.model_copy(update={"feature_drift": drift}).save(options.bundle)
    except EngineError as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        return 1
    return 0


def measure(
    manifest: Manifest, bundle: Path, prompts: Sequence[str], *, steps: int, console: Console | None = None
) -> FeatureDrift:
    """The drift along a trajectory of `steps` steps to each of `prompts`. Raises EngineError."""
    graphs = reference(manifest, bundle)
    guidance = manifest.defaults.guidance_scale
    trajectories = [
        Trajectory(manifest, bundle, steps=steps, prompt=prompt, guidance=max(guidance, 1.0), seed=seed)
        for seed, prompt in enumerate(prompts, start=1)
    ]
    shown = track(trajectories, "measuring", console=console, disable=console is None)
    squares = np.mean([_squared_errors(trajectory, graphs) for trajectory in shown], axis=0)
    return FeatureDrift(
        log_snr=_rounded(trajectories[0].table.log_snr[::AGE]),
        total=_rounded(np.append(0, np.cumsum(np.sqrt(squares)))),
    )


def _squared_errors(trajectory: Trajectory, graphs: RunGraph) -> list[float]:
    """Mean squares of what every third step's model output lacks over the features of the third step before."""
    recording = trajectory.run(graphs)
    shallow = recording.shallow  # of each step but the first, with the features of the step before
    states = [*(inputs["state"] for inputs in recording.full[1:]), recording.state]
    return [
        _squared_error(
            graphs("denoise_shallow", {**shallow[step - 1], "features": shallow[step - AGE]["features"]})["state_next"],
            states[step],
            shallow[step - 1]["coef"],
        )
        for step in range(AGE, trajectory.steps, AGE)
    ]


def _squared_error(state: Array, expected: Array, coef: Array) -> float:
    """Of the model's output, by what it makes of x."""
    return float(np.mean(((state - expected)[:, _X] / coef[:, _X, _MODEL]) ** 2))


def _rounded(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(values.round(_DIGITS).tolist())


if __name__ == "__main__":
    sys.exit(main())
