"""How near each scheduler is to diffusers, as a table and as pictures, its UNet calls, and how long its table takes.

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
from tests.tools.fidelity import distance

SD1 = NoiseSchedule(steps_offset=1, set_alpha_to_one=False)
STEPS = (2, 4, 10, 20, 30, 50)
TIMED = 50  # steps
SEEDS = (1, 2)  # of the pictures drawn by each


def largest_error(name: str, *, double: bool) -> float:
    """Of any x on the way, relative to its largest value, over step counts, predictions and spacings."""
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
    """UNet calls per step, from counting them."""
    extra = {len(table(find(name), n, SD1).steps) - n * METHODS[find(name).method].about.calls_per_step for n in STEPS}
    told = {(1, 0): "1", (1, 1): "1 (second 2)", (2, -1): "2 (last 1)"}
    return told[METHODS[find(name).method].about.calls_per_step, extra.pop()]


def milliseconds(name: str, *, repeats: int = 20) -> float:
    """The median time to work a table out, when nothing is remembered."""
    taken = []
    for _ in range(repeats):
        table.cache_clear()
        levels._alpha_bar.cache_clear()
        start = time.perf_counter()
        table(find(name), TIMED, SD1)
        taken.append(time.perf_counter() - start)
    return 1000 * statistics.median(taken)


def end_to_end(name: str, serving: Serving, pipeline: Any, manifest: Manifest) -> str:
    """The least PSNR of the served pictures of a bundle beside those of diffusers in FP32, by the model's defaults."""
    found = [distance(serving, pipeline, manifest, scheduler=name, seed=seed) for seed in SEEDS]
    return "identical" if min(found) == IDENTICAL else f"{min(found):.0f} dB"


def row(name: str, served: str) -> tuple[str, ...]:
    exact, as_it_is = (f"{largest_error(name, double=double):.0e}" for double in (True, False))
    return f"`{name}`", calls(name), exact, as_it_is, served, f"{milliseconds(name):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    given = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    head = ("scheduler", "UNet calls per step", "error", "of the class as it is", "picture", f"ms for {TIMED} steps")
    manifest, pipeline = Manifest.load(given.bundle), load_pipeline(given.checkpoint)
    with Serving(given.bundle) as serving:
        served = {name: end_to_end(name, serving, pipeline, manifest) for name in NAMES}
    for cells in chain([head, ("---", *["--:"] * 5)], (row(name, served[name]) for name in NAMES)):
        sys.stdout.write(f"| {' | '.join(cells)} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
