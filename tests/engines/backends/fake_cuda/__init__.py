"""CUDA's runtime over the host's memory: a stand-in for the module `cuda.bindings.runtime`, as asynchronous as CUDA.

Statuses are CUDA's own and are returned, never raised. Misuse that CUDA would not notice, or that would give undefined
results, is a fault: it is added to `faults`, which the tests require to be empty. So is a hazard: two streams that use
the same memory, one of them to write, without an event that orders them, whichever came first this time (`hazards`).

When a stream's work is done is up to a schedule (`schedules`): as soon as possible, in a thread of each stream; or as
late as the host allows, in an order that a seed or the priorities choose.
"""

from tests.engines.backends.fake_cuda.gpu import GIB
from tests.engines.backends.fake_cuda.runtime import FakeCuda, current
from tests.engines.backends.fake_cuda.schedules import ByPriority, Seeded, Threads
from tests.engines.backends.fake_cuda.streams import FakeStream, stream_of

__all__ = ["GIB", "ByPriority", "FakeCuda", "FakeStream", "Seeded", "Threads", "current", "stream_of"]
