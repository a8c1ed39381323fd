"""Compare each scheduler with diffusers: its table's error, images, UNet calls, and time to compute the table.

python -m tests.tools.schedulers_report --checkpoint demo-checkpoint --bundle engines/demo
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import diffusers

from engines.accuracy import IDENTICAL
from engines.manifest import Manifest, NoiseSchedule
from engines.schedulers import METHODS, NAMES, Spacing, find, levels, table
from tests.support.references import load_pipeline
from tests.support.serving import Serving
from tests.support.stepping import apart, run_diffusers, run_table
from tests.tools.fidelity import served_psnr

SD1 = NoiseSchedule(steps_offset=1, set_alpha_to_one=False)
STEPS = (2, 4, 10, 20, 30, 50)
TIMED = 50  # steps
SEEDS = (1, 2)  # of each scheduler's images


def largest_error(name: str, *, double: bool) -> float:
    """Return the largest relative error of any x, over step counts, prediction types and spacings.

    `double` is whether diffusers computes in float64.
    """
    about, worst = METHODS[find(name).method].about, 0.0
    spacings = get_args(Spacing) if "timestep_spacing" in about.options else (None,)
    for prediction in about.predictions:
        schedule = SD1.model_copy(update={"prediction_type": prediction})
        for scheduler in (find(name, timestep_spacing=spacing) for spacing in spacings):
            for num_steps in STEPS:
                ours = run_table(scheduler, num_steps, schedule)
                theirs = run_diffusers(scheduler, num_steps, schedule, double=double)
                worst = max(worst, *map(apart, ours.xs, theirs.xs))
    return worst


def calls(name: str) -> str:
    """Return the UNet calls per step, counted in tables."""
    extra = {len(table(find(name), n, SD1).steps) - n * METHODS[find(name).method].about.calls_per_step for n in STEPS}
    texts = {(1, 0): "1", (1, 1): "1 (second 2)", (2, -1): "2 (last 1)"}
    return texts[METHODS[find(name).method].about.calls_per_step, extra.pop()]


def milliseconds(name: str, *, repeats: int = 20) -> float:
    """Return the median time to compute a table without caches, in milliseconds."""
    taken = []
    for _ in range(repeats):
        table.cache_clear()
        levels._alpha_bar.cache_clear()
        start = time.perf_counter()
        table(find(name), TIMED, SD1)
        taken.append(time.perf_counter() - start)
    return 1000 * statistics.median(taken)


def end_to_end(name: str, serving: Serving, pipeline: Any, manifest: Manifest) -> str:
    """Return the minimum PSNR of a bundle's served images compared with diffusers' in FP32."""
    found = [served_psnr(serving, pipeline, manifest, scheduler=name, seed=seed) for seed in SEEDS]
    return "identical" if min(found) == IDENTICAL else f"{min(found):.0f} dB"


def row(name: str, served: str) -> tuple[str, ...]:
    in_double, as_is = (f"{largest_error(name, double=double):.0e}" for double in (True, False))
    return f"`{name}`", calls(name), in_double, as_is, served, f"{milliseconds(name):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    given = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    head = (
        "scheduler",
        "UNet calls per step",
        "error in float64",
        "error of the class as it is",
        "image",
        f"ms for {TIMED} steps",
    )
    manifest, pipeline = Manifest.load(given.bundle), load_pipeline(given.checkpoint)
    with Serving(given.bundle) as serving:
        served = {name: end_to_end(name, serving, pipeline, manifest) for name in NAMES}
    for cells in chain([head, ("---", *["--:"] * 5)], (row(name, served[name]) for name in NAMES)):
        sys.stdout.write(f"| {' | '.join(cells)} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
