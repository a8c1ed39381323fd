"""A server that is watched: its ledger, what it holds, and how soon it says that it lives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults.callers import Answer, Ending, Tally
from benchmarks.faults.ledger import Resources, settle
from benchmarks.faults.probe import Prober
from engines.demo import BUNDLE as DEMO
from tests.support.serving import Serving

SHORT = {"prompt": "a red heart on a yellow background", "num_inference_steps": 2, "seed": 1}
LONG = {"prompt": "a penguin on a blue background", "num_inference_steps": 100, "seed": 2}
_MEMORY = 96 * 2**20  # bytes that may stay: arenas, caches and buffers of a server that has worked for the first time
_THREADS = 16  # that may be added: pools fill as they are used, and have bounds of their own
_LIVE = 5.0  # seconds, for machines that do other work; the benchmark's bound is 0.2
_SETTLE = 30.0  # seconds


@dataclass(slots=True)
class Watched:
    """The server and everything its callers have seen: put each request into `tally`."""

    serving: Serving
    tally: Tally = field(default_factory=Tally)

    @property
    def url(self) -> str:
        return self.serving.url

    def count(self, ending: Ending, count: int) -> None:
        """Count requests that others than `Caller` have sent."""
        self.tally.sent += count
        self.tally.answers += [Answer(ending, 0.0)] * count


@contextmanager
def watched(*arguments: str, bundle: Path = DEMO, live: float = _LIVE, memory: int = _MEMORY) -> Iterator[Watched]:
    """A server that must keep its promises meanwhile: one outcome each, nothing kept, and alive all the time."""
    with Serving(bundle, *arguments) as serving:
        one = Watched(serving)
        for steps in (2, 3):  # the first requests load what only they need
            assert serving.generate(**{**SHORT, "num_inference_steps": steps}).status_code == 200
        account, held = settle(serving.url, serving.process.pid, Resources(0, 10**6, 0), seconds=_SETTLE)
        with Prober(serving.url) as prober:
            yield one
            after, holds = settle(serving.url, serving.process.pid, held, seconds=_SETTLE)
        assert not prober.probes.failures, prober.probes.failures
        assert prober.probes.slowest < live, f"/live took {prober.probes.slowest:.2f} s"
        found = [*after.since(account).faults(one.tally), *holds.growth(held, memory=memory, threads=_THREADS)]
        assert not found, found
        assert serving.generate(**SHORT).status_code == 200, "nobody is served any more"
        assert fills_the_batch(serving), "rows of requests that have ended are still taken"


def fills_the_batch(serving: Serving) -> bool:
    """Whether a request that needs every row of the engines is served."""
    rows: int = serving.client.get("/models").json()[0]["max_rows"]
    return serving.generate(**SHORT, num_images=rows // 2).status_code == 200
