"""The server that most people write: FastAPI, diffusers' pipeline, and a lock around it.

python -m benchmarks.peers.servers.fastapi_server --checkpoint DIR --port 8000 --threads 2
"""

from __future__ import annotations

import threading
import time
from typing import Any

import uvicorn
from fastapi import FastAPI

from benchmarks.peers.servers.diffusers_pipeline import DiffusersPipeline, DiffusersRequest, answer, options


def make_app(pipeline: DiffusersPipeline) -> FastAPI:
    app = FastAPI(title="FastAPI and diffusers")
    lock = threading.Lock()

    @app.get("/v2/health/ready")
    async def ready() -> None:
        """It is ready as soon as it listens."""

    @app.post("/generate")
    def generate(body: DiffusersRequest) -> dict[str, Any]:
        """A plain function, which FastAPI runs in its thread pool."""
        received = time.perf_counter()
        with lock:
            began = time.perf_counter()
            (image,) = pipeline.generate([body])
            done = time.perf_counter()
        return answer(image, body=body, queue=began - received, call=done - began)

    return app


def main() -> None:
    given = options(__doc__)
    app = make_app(DiffusersPipeline(given.checkpoint, threads=given.threads))
    uvicorn.run(app, host="127.0.0.1", port=given.port, log_level="warning")


if __name__ == "__main__":
    main()
