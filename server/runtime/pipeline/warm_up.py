"""What a pipeline runs before it serves requests: every call, until it is captured, and steps to measure them."""

from __future__ import annotations

import time
from collections.abc import Callable

from server.requests.depths import Depth
from server.runtime.batching.step_times import StepTimeModel, kind_of
from server.runtime.pipeline.latent_pool import LatentPool
from server.runtime.pipeline.pieces import Pieces
from server.runtime.pipeline.plan import Plan, StepShape
from server.runtime.pipeline.prompt_pool import PromptPool
from server.runtime.pipeline.step_shapes import StepShapes
from server.runtime.pipeline.streams import Streams

_CAPTURED_AFTER = 2  # launches of a call: the first is plain, the second is captured
_MEASURED = 4  # steps
_LONG = 0.5  # seconds of a step, after which a device without captured graphs is warm enough
_BRIEF = 0.05  # seconds of a step that is measured twice: allocating memory dominates the first run


class WarmUp:
    """Runs the calls of a pipeline without requests."""

    def __init__(
        self,
        *,
        streams: Streams,
        prompts: PromptPool,
        shapes: StepShapes,
        step_times: StepTimeModel,
        plan: Callable[[LatentPool, StepShape], Plan],
        pads: bool,
    ) -> None:
        """`plan` makes a plan of no requests; `pads` says whether the device captures calls."""
        self._streams = streams
        self._prompts = prompts
        self._shapes = shapes
        self._step_times = step_times
        self._plan = plan
        self._pads = step_times.pads = pads

    def run(self, pool: LatentPool) -> Pieces[None]:
        """Run every call of one image size, and measure it, shape by shape. Raises EngineError."""
        for depth in pool.depths:  # steps first: an engine's weights are in memory twice while it first runs
            yield from self._run_steps(pool, depth)
        self._run_encode_decode(pool)
        yield

    def _run_steps(self, pool: LatentPool, depth: Depth) -> Pieces[None]:
        """Measure steps of `depth`, as far as that is worth the time."""
        too_long = set[bool]()  # steps with LoRAs, and those without
        for shape in self._shapes.to_warm_up(depth):
            loras = bool(shape.ranks)
            if loras in too_long:
                continue
            seconds = self._measure_step(pool, shape)
            if shape.chunks == 1:
                self._step_times.observe(kind_of(pool.size, depth, loras=loras), shape.rows, seconds)
            if not self._pads and seconds > _LONG:
                too_long.add(loras)
            yield

    def _run_encode_decode(self, pool: LatentPool) -> None:
        """Encode blank images, and decode as many as one call may with each decoder; measure one of each."""
        repeats = range(_CAPTURED_AFTER + 1 if self._pads else 1)
        for _ in repeats:
            began = time.perf_counter()
            pool.encode_blank()
            encoded = time.perf_counter()
            self._prompts.warm_up()
            ended = time.perf_counter()
        for decoder in pool.decoders:
            for images in range(pool.decode_chunk, 0, -1):
                for _ in repeats:
                    decoding = time.perf_counter()
                    pool.decode_blank(images, decoder)
            seconds = ended - began + time.perf_counter() - decoding
            self._step_times.observe_encode_decode(pool.size, seconds, init_image=encoded - began, decoder=decoder)

    def _measure_step(self, pool: LatentPool, shape: StepShape) -> float:
        """Take steps without requests; returns the seconds of one."""
        plan = self._plan(pool, shape)
        if self._pads:
            first = self._time_steps(pool, plan, 2 * _CAPTURED_AFTER)  # from each state buffer to the other
            return self._time_steps(pool, plan, _MEASURED) if shape.chunks == 1 else first
        first = self._time_steps(pool, plan, 1)
        return first if first > _BRIEF else self._time_steps(pool, plan, 1)

    def _time_steps(self, pool: LatentPool, plan: Plan, steps: int) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            pool.step(plan)
        self._streams.steps.record().wait()
        return (time.perf_counter() - started) / steps
