"""LitServe with its batching of requests over diffusers' pipeline.

python -m benchmarks.peers.servers.litserve_server --checkpoint DIR --port 8000 --threads 2
"""

import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import litserve  # type: ignore[import-not-found, unused-ignore]

from benchmarks.peers.servers.diffusers_pipeline import DiffusersPipeline, DiffusersRequest, answer, options

_BATCH = 8  # requests at most: as many guided images as fit in the demo bundle's 16 rows
_WAIT = 0.02  # seconds in which others may join; with 0, its worker polls without pause


class Api(litserve.LitAPI):  # type: ignore[misc, unused-ignore]
    """Requests that arrive together share a pipeline call if their steps, guidance and scheduler are the same."""

    def __init__(self, checkpoint: Path, *, threads: int) -> None:
        super().__init__(max_batch_size=_BATCH, batch_timeout=_WAIT, api_path="/generate")
        self._checkpoint = checkpoint
        self._threads = threads

    def setup(self, _device: str) -> None:
        self._pipeline = DiffusersPipeline(self._checkpoint, threads=self._threads)

    def decode_request(self, request: DiffusersRequest) -> DiffusersRequest:
        """LitServe reads the body's type from this annotation, which must not be a postponed string."""
        return request

    def batch(self, inputs: list[DiffusersRequest]) -> list[DiffusersRequest]:
        return inputs

    def predict(self, x: list[DiffusersRequest]) -> list[dict[str, Any]]:
        """Answers in the order of the batch. LitServe sends them when all are complete."""
        answers: dict[int, dict[str, Any]] = {}
        began = time.perf_counter()
        for _, members in groupby(sorted(range(len(x)), key=lambda index: x[index].kind), lambda index: x[index].kind):
            answers |= self._generate(x, list(members), began)
        return [answers[index] for index in range(len(x))]

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def _generate(
        self, batch: Sequence[DiffusersRequest], group: Sequence[int], began: float
    ) -> dict[int, dict[str, Any]]:
        """Requests of one kind. The time in LitServe's own queue is not known here."""
        before = time.perf_counter()
        images = self._pipeline.generate([batch[index] for index in group])
        call = time.perf_counter() - before
        return {
            index: answer(image, body=batch[index], queue=before - began, call=call)
            for index, image in zip(group, images, strict=True)
        }


def main() -> None:
    given = options(__doc__)
    api = Api(given.checkpoint, threads=given.threads)
    server = litserve.LitServer(api, accelerator="cpu", healthcheck_path="/v2/health/ready")
    server.run(host="127.0.0.1", port=given.port, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
