"""The one who calls: HTTP to a server, one ending for each request, and what its metrics say meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import httpx
from prometheus_client.parser import text_string_to_metric_families

from loadtest.response_formats import FACES, Answer, Face, Part, Reply, detail_of

_ASKING = 10.0  # seconds for health, models and metrics


class Unusable(Exception):
    """The server cannot be measured; the message says what to do next."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """One reading of /metrics."""

    gauges: Mapping[str, float]
    step_rows: Mapping[float, float] = field(default_factory=dict)  # steps so far, by the most rows they had


class Node:
    """A server. An async context manager."""

    def __init__(self, url: str, *, timeout: float, face: Face = FACES["json"]) -> None:
        self.url = url.rstrip("/")
        self._timeout = timeout
        self._face = face
        # As many connections as there are callers: waiting for one would be the client's queue, not the server's.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.AsyncClient(base_url=self.url, timeout=None, limits=limits, trust_env=False)  # noqa: S113 - below
        self._side = httpx.AsyncClient(base_url=self.url, timeout=_ASKING, trust_env=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()
        await self._side.aclose()

    async def check_ready(self) -> None:
        """Raises Unusable unless requests are answered."""
        reply = await self._ask("/v2/health/ready")
        if reply.status_code == 404:
            raise Unusable(f"What answers at {self.url} is no latentd server: it has no /v2/health/ready.")
        if reply.status_code != 200:
            raise Unusable(f"The server is not ready ({detail_of(reply.content)}): wait until /v2/health/ready is 200.")

    async def models(self) -> list[dict[str, Any]]:
        reply = await self._ask("/models")
        try:
            found: list[dict[str, Any]] = reply.raise_for_status().json()
        except (httpx.HTTPStatusError, ValueError) as error:
            raise Unusable(f"The server does not tell its models: {error}") from None
        return found

    async def version(self) -> str | None:
        reply = await self._ask("/openapi.json")
        try:
            return str(reply.raise_for_status().json()["info"]["version"])
        except (httpx.HTTPStatusError, ValueError, KeyError):
            return None

    async def scrape(self) -> Scrape | None:
        """None where the server did not answer: it has more to do than to be watched."""
        try:
            reply = await self._side.get("/metrics")
        except httpx.HTTPError:
            return None
        return read_metrics(reply.text) if reply.status_code == 200 else None

    async def send(self, fields: Mapping[str, Any]) -> Answer:
        """One request to its end, whatever that is."""
        try:
            async with asyncio.timeout(self._timeout):
                return self._face.answer(await self._post(fields))
        except TimeoutError:
            return Answer("client timeout", detail=f"no answer within {self._timeout:g} s")
        except httpx.HTTPError as error:
            return Answer("failed", detail=f"{type(error).__name__}: {error}")

    async def _post(self, fields: Mapping[str, Any]) -> Reply:
        face, began = self._face, time.perf_counter()
        headers = {"Accept": face.accept}
        async with self._http.stream("POST", face.path, json=face.body(fields), headers=headers) as reply:
            parts = [Part(time.perf_counter() - began, content) async for content in reply.aiter_bytes()]
        return Reply(reply.status_code, reply.headers, parts)

    async def _ask(self, path: str) -> httpx.Response:
        try:
            return await self._side.get(path)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise Unusable(f"No server answers at {self.url} ({reason}): start one, or check --url.") from None


def read_metrics(text: str) -> Scrape:
    """Gauges and the process' counters by name, and the histogram of rows in a step."""
    gauges: dict[str, float] = {}
    rows: dict[float, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "latentd_step_rows_bucket":
                rows[float(sample.labels["le"])] = sample.value
            elif not sample.labels:
                gauges[sample.name] = sample.value
    return Scrape(gauges, rows)
