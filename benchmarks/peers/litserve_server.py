"""LitServe with its batching of requests over diffusers' pipeline.

python -m benchmarks.peers.litserve_server --checkpoint DIR --port 8000 --threads 2
"""

import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import litserve  # type: ignore[import-not-found, unused-ignore]

from benchmarks.peers.server_pipeline import Body, Pipeline, answer, options

_BATCH = 8  # requests at most: as many guided pictures as the demo bundle's 16 rows hold
_WAIT = 0.02  # seconds in which others may join; without any, its worker looks for requests without pause


class Api(litserve.LitAPI):  # type: ignore[misc, unused-ignore]
    """Requests that came together are drawn together, as far as one call can: same steps, guidance and scheduler."""

    def __init__(self, checkpoint: Path, *, threads: int) -> None:
        super().__init__(max_batch_size=_BATCH, batch_timeout=_WAIT, api_path="/generate")
        self._checkpoint = checkpoint
        self._threads = threads

    def setup(self, _device: str) -> None:
        self._pipeline = Pipeline(self._checkpoint, threads=self._threads)

    def decode_request(self, request: Body) -> Body:
        """LitServe takes the body's type from here; a string of it, as of postponed annotations, it cannot read."""
        return request

    def batch(self, inputs: list[Body]) -> list[Body]:
        return inputs

    def predict(self, x: list[Body]) -> list[dict[str, Any]]:
        """Answers in the order of the batch. LitServe sends them when all are there."""
        answers: dict[int, dict[str, Any]] = {}
        began = time.perf_counter()
        for _, members in groupby(sorted(range(len(x)), key=lambda index: x[index].kind), lambda index: x[index].kind):
            answers |= self._draw(x, list(members), began)
        return [answers[index] for index in range(len(x))]

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def _draw(self, batch: Sequence[Body], group: Sequence[int], began: float) -> dict[int, dict[str, Any]]:
        """The part of the batch that is of one kind. How long it lay in LitServe's own queue is not known here."""
        before = time.perf_counter()
        pictures = self._pipeline.draw([batch[index] for index in group])
        call = time.perf_counter() - before
        return {
            index: answer(picture, body=batch[index], queue=before - began, call=call)
            for index, picture in zip(group, pictures, strict=True)
        }


def main() -> None:
    given = options(__doc__)
    api = Api(given.checkpoint, threads=given.threads)
    server = litserve.LitServer(api, accelerator="cpu", healthcheck_path="/v2/health/ready")
    server.run(host="127.0.0.1", port=given.port, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
