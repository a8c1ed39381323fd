"""The admitted requests, with what each holds on the device until its outcome."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

from engines.errors import DeviceLost
from server.requests.request import Failed, Outcome, Request, Started
from server.runtime import failures
from server.runtime.batching.batcher import Batcher
from server.runtime.models import Models
from server.runtime.monitoring.trace import Trace
from server.runtime.monitoring.watchdog import Watchdog
from server.runtime.pipeline.admission import Admission, Owned, Placement, Upload
from server.runtime.pipeline.pipeline import Pipeline


class HeldRequests:
    """Admits and places requests with the pipelines of their models, and ends them. For the executor's thread."""

    def __init__(
        self,
        models: Models,
        pipelines: Mapping[str, Pipeline],
        batcher: Batcher,
        *,
        trace: Trace,
        watchdog: Watchdog,
    ) -> None:
        self._models, self._pipelines, self._batcher = models, pipelines, batcher
        self._trace, self._watchdog = trace, watchdog
        self.owned: dict[Request, Owned] = {}
        self.encoding: list[Upload | Admission] = []

    def admit(self, *requests: Request) -> None:
        """Launch the encoding of their prompts and images."""
        for request in requests:
            request.finish_stage("queue")
            with self.fails_alone(request), self._trace.span("admit"), self.limit_of(request):
                admission = self.owned[request] = self._pipelines[request.params.model].admit(request)
                self.encoding.append(admission)

    def place_one(self) -> bool:
        """Place one of the requests that are encoded; returns whether there was one."""
        admissions = (one for one in self.encoding if isinstance(one, Admission))
        if not (admission := next((one for one in admissions if one.encoded.done()), None)):
            return False
        self.encoding.remove(admission)
        request = admission.request
        if request in self.owned:  # otherwise it was cancelled
            with self.fails_alone(request):
                self.owned[request] = self._pipelines[request.params.model].place(admission)
                request.finish_stage("encode")
                request.notify(Started())
        return True

    def upload_some(self) -> bool:
        """Write a part of the LoRAs of the request that is first; returns whether it was the last part of it."""
        if not (upload := next((one for one in self.encoding if isinstance(one, Upload)), None)):
            return False
        self.encoding.remove(upload)
        request = upload.request
        if request in self.owned:  # otherwise it was cancelled
            with self.fails_alone(request), self._trace.span("upload"), self.limit_of(request):
                stage = self.owned[request] = self._pipelines[request.params.model].upload(upload)
                self.encoding.insert(0, stage)
                return isinstance(stage, Admission)
        return True

    def wait_for_one(self) -> None:
        """Wait until the first of the requests that are being encoded is."""
        first = self.encoding[0]
        with self.limit_of(first.request):
            self._pipelines[first.request.params.model].await_encoding(first)

    def placements(self, requests: Iterable[Request]) -> list[Placement]:
        """Those of `requests` that can take a step; others are still being encoded."""
        return [one for one in map(self.owned.get, requests) if isinstance(one, Placement)]

    def holds(self, model: str) -> bool:
        """Whether any request holds something of `model`."""
        everyone = (*self.owned, *(stage.request for stage in self.encoding))
        return any(request.params.model == model for request in everyone)

    def limit_of(self, *requests: Request) -> AbstractContextManager[None]:
        """Watch what is done for `requests` of one batch key alone, before their first step and after their last."""
        model, size = requests[0].batch_key
        times = self._models.find(model).step_times
        total = sum([times.encode_decode(size, one.params.decoder) * one.images for one in requests])
        return self._watchdog.limit(total, f"Encoding or decoding an image at {size}")

    def fails_alone(self, *requests: Request) -> AbstractContextManager[None]:
        """What is done for `requests` alone: whatever goes wrong, only they fail, unless the device is lost.

        The pipeline holds nothing of a call that failed, so the others go on as if it had not been made.
        """
        return failures.contained(partial(self.fail, requests))

    def fail(self, requests: Sequence[Request], error: Exception) -> None:
        """Finish those whose call failed. A lost device ends the process instead."""
        if isinstance(error, DeviceLost):
            raise error
        failed = failures.failed(error, ", ".join(request.id for request in requests))
        for request in requests:
            self._batcher.leave(request)
            self.finish(request, failed)

    def finish(self, request: Request, outcome: Outcome) -> None:
        """Release what `request` holds, and give it its outcome."""
        if owned := self.owned.get(request):
            owned.release()
        self._models.find(request.params.model).health.observe(outcome)
        request.finish(outcome)
        self.owned.pop(request, None)  # not before: after a fault, those without an outcome are found here

    def finish_everyone(self, others: Iterable[Request], outcome: Failed) -> None:
        """Give the requests here, and `others`, their outcome. For any thread."""
        for request in (*others, *tuple(self.owned)):
            request.finish(outcome)

    def clear(self) -> None:
        self.owned.clear()
        self.encoding.clear()
