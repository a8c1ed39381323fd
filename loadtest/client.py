"""The HTTP client: sends one request, never retries it, and reads the server's health, models and metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import httpx
from prometheus_client.parser import text_string_to_metric_families

from loadtest.response_formats import RESPONSE_FORMATS, BodyPart, RawResponse, RequestResult, ResponseFormat, detail_of

_CONTROL_TIMEOUT = 10.0  # seconds, for health, models and metrics


class LoadTestError(Exception):
    """The server cannot be measured; the message says what to do next."""


class ServerLost(LoadTestError):
    """The server has died, or another has taken its place, while it was measured."""


@dataclass(frozen=True, slots=True)
class MetricsScrape:
    """One reading of /metrics."""

    gauges: Mapping[str, float]
    step_rows: Mapping[float, float] = field(default_factory=dict)  # cumulative count of steps, by upper bound of rows

    @property
    def process(self) -> float | None:
        """When the server's process began, which tells it from another at the same address; None if not exported."""
        return self.gauges.get("process_start_time_seconds")


class ServerClient:
    """A client of one server; an async context manager.

    `timeout` is the limit for a whole request in seconds.
    """

    def __init__(self, url: str, *, timeout: float, response_format: ResponseFormat = RESPONSE_FORMATS["json"]) -> None:
        self.url = url.rstrip("/")
        self._timeout = timeout
        self._format = response_format
        # One connection for each request in flight: waiting for one would be the client's queue, not the server's.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.AsyncClient(base_url=self.url, timeout=None, limits=limits, trust_env=False)  # noqa: S113 - below
        self._control = httpx.AsyncClient(base_url=self.url, timeout=_CONTROL_TIMEOUT, trust_env=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()
        await self._control.aclose()

    async def check_ready(self) -> None:
        """Raise LoadTestError unless the server is ready."""
        response = await self._get("/v2/health/ready")
        if response.status_code == 404:
            raise LoadTestError(f"{self.url} is not a latentd server: it has no /v2/health/ready.")
        if response.status_code != 200:
            detail = detail_of(response.content)
            raise LoadTestError(f"The server is not ready ({detail}): wait until /v2/health/ready returns 200.")

    async def models(self) -> list[dict[str, Any]]:
        """Return the served models' metadata, as GET /models describes it. Raises LoadTestError."""
        response = await self._get("/models")
        try:
            found: list[dict[str, Any]] = response.raise_for_status().json()
        except (httpx.HTTPStatusError, ValueError) as error:
            raise LoadTestError(f"The server does not list its models: {error}") from None
        return found

    async def version(self) -> str | None:
        """Return the server's version; None where its OpenAPI document does not give one."""
        response = await self._get("/openapi.json")
        try:
            return str(response.raise_for_status().json()["info"]["version"])
        except (httpx.HTTPStatusError, ValueError, KeyError):
            return None

    async def scrape(self) -> MetricsScrape | None:
        """Read /metrics; None where the server does not answer, for an overloaded one may not.

        Raises ServerLost where nothing listens any more.
        """
        try:
            response = await self._control.get("/metrics")
        except httpx.ConnectError as error:
            raise ServerLost(f"nothing listens at {self.url} any more ({error})") from None
        except httpx.HTTPError:
            return None
        return read_metrics(response.text) if response.status_code == 200 else None

    async def send(self, fields: Mapping[str, Any]) -> RequestResult:
        """Send one request and wait for its outcome; failures are outcomes too, and never raised."""
        try:
            async with asyncio.timeout(self._timeout):
                return self._format.parse(await self._post(fields))
        except TimeoutError:
            return RequestResult("client timeout", detail=f"no response within {self._timeout:g} s")
        except httpx.HTTPError as error:
            return RequestResult("failed", detail=f"{type(error).__name__}: {error}")

    async def _post(self, fields: Mapping[str, Any]) -> RawResponse:
        fmt, began = self._format, time.perf_counter()
        headers = {"Accept": fmt.accept}
        async with self._http.stream("POST", fmt.path, json=fmt.body(fields), headers=headers) as response:
            parts = [BodyPart(time.perf_counter() - began, content) async for content in response.aiter_bytes()]
        return RawResponse(response.status_code, response.headers, parts)

    async def _get(self, path: str) -> httpx.Response:
        try:
            return await self._control.get(path)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise LoadTestError(f"No server answers at {self.url} ({reason}): start one, or check --url.") from None


def read_metrics(text: str) -> MetricsScrape:
    """Parse a Prometheus exposition: unlabelled samples by name, and the histogram of rows per step."""
    gauges: dict[str, float] = {}
    rows: dict[float, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "latentd_step_rows_bucket":
                rows[float(sample.labels["le"])] = sample.value
            elif not sample.labels:
                gauges[sample.name] = sample.value
    return MetricsScrape(gauges, rows)
