"""The server that most people write: FastAPI, diffusers' pipeline, and a lock around it.

python -m benchmarks.peers.fastapi_server --checkpoint DIR --port 8000 --threads 2
"""

from __future__ import annotations

import threading
import time
from typing import Any

import uvicorn
from fastapi import FastAPI

from benchmarks.peers.server_pipeline import Body, Pipeline, answer, options


def make_app(pipeline: Pipeline) -> FastAPI:
    app = FastAPI(title="FastAPI and diffusers")
    lock = threading.Lock()

    @app.get("/v2/health/ready")
    async def ready() -> None:
        """It is, as soon as it listens."""

    @app.post("/generate")
    def generate(body: Body) -> dict[str, Any]:
        """A plain function, which FastAPI runs in its pool of threads."""
        came = time.perf_counter()
        with lock:
            began = time.perf_counter()
            (picture,) = pipeline.draw([body])
            done = time.perf_counter()
        return answer(picture, body=body, queue=began - came, call=done - began)

    return app


def main() -> None:
    given = options(__doc__)
    app = make_app(Pipeline(given.checkpoint, threads=given.threads))
    uvicorn.run(app, host="127.0.0.1", port=given.port, log_level="warning")


if __name__ == "__main__":
    main()
