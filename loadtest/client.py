"""The HTTP client: sends one request, never retries it, and reads the server's health, models and metrics."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import httpx
from prometheus_client.parser import text_string_to_metric_families

from loadtest.response_formats import RESPONSE_FORMATS, BodyPart, RawResponse, RequestResult, ResponseFormat, detail_of

_CONTROL_TIMEOUT = 10.0  # seconds, for health, models and metrics
_STARTED = "process_start_time_seconds"
_LOOKS = 6  # at the metrics of a URL: half of those of two servers that answer in turns come from the other one

Found = TypeVar("Found")


class LoadTestError(Exception):
    """The server cannot be measured; the message says what to do next."""


class ServerLost(LoadTestError):
    """The server has died, or another has taken its place, while it was measured."""


@dataclass(frozen=True, slots=True)
class MetricsScrape:
    """One reading of /metrics: of a server, or the sums of several."""

    gauges: Mapping[str, float]
    step_rows: Mapping[float, float] = field(default_factory=dict)  # cumulative count of steps, by upper bound of rows
    # When each server's process began, which tells it from another at the same address; None where not exported.
    processes: tuple[float | None, ...] = (None,)


class ServerClient:
    """A client of one server, or of the balancer before `servers`; an async context manager.

    `timeout` is the limit for a whole request in seconds. Metrics are read from each of `servers`.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float,
        servers: Sequence[str] = (),
        response_format: ResponseFormat = RESPONSE_FORMATS["json"],
    ) -> None:
        self.url = url.rstrip("/")
        self._servers = [server.rstrip("/") for server in servers] or [self.url]
        self._answers_vary = False  # one server's metrics at a time, and which one's is the balancer's choice
        self._timeout = timeout
        self._format = response_format
        # One connection for each request in flight: waiting for one would be the client's queue, not the server's.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.AsyncClient(base_url=self.url, timeout=None, limits=limits, trust_env=False)  # noqa: S113 - below
        self._control = httpx.AsyncClient(timeout=_CONTROL_TIMEOUT, trust_env=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()
        await self._control.aclose()

    async def check_ready(self) -> None:
        """Raise LoadTestError unless the server is ready."""
        response = await self._get(f"{self.url}/v2/health/ready")
        if response.status_code == 404:
            raise LoadTestError(f"{self.url} is not a latentd server: it has no /v2/health/ready.")
        if response.status_code != 200:
            detail = detail_of(response.content)
            raise LoadTestError(f"The server is not ready ({detail}): wait until /v2/health/ready returns 200.")

    async def models(self) -> list[dict[str, Any]]:
        """Return the served models' metadata, as GET /models describes it.

        Raises LoadTestError, also where the servers have different ones.
        """
        return self._common("models", [await self._models(server) for server in self._servers])

    async def version(self) -> str | None:
        """Return the servers' version; None where their OpenAPI documents do not give one.

        Raises LoadTestError where they have different ones.
        """
        return self._common("versions", [await self._version(server) for server in self._servers])

    async def why_no_metrics(self) -> str | None:
        """Return why there are no metrics to read while a load runs, as at a balancer; None if there are."""
        if len(self._servers) > 1:
            return None
        looks = [await self._scrape_anew(self.url) for _ in range(_LOOKS)]
        processes = {look.processes for look in looks if look}
        self._answers_vary = len(processes) > 1
        if self._answers_vary:
            return f"Several servers answer at {self.url}"
        return None if processes else f"{self.url} has no metrics"

    async def scrape(self) -> MetricsScrape | None:
        """Read /metrics of all servers; None where one does not answer, for an overloaded one may not.

        Raises ServerLost where nothing listens any more.
        """
        if self._answers_vary:
            return None
        found = await asyncio.gather(*(self._scrape(self._control, server) for server in self._servers))
        scrapes = [scrape for scrape in found if scrape]
        return sum_of(scrapes) if len(scrapes) == len(found) else None

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

    async def _models(self, server: str) -> list[dict[str, Any]]:
        response = await self._get(f"{server}/models")
        try:
            found: list[dict[str, Any]] = response.raise_for_status().json()
        except (httpx.HTTPStatusError, ValueError) as error:
            raise LoadTestError(f"The server does not list its models: {error}") from None
        return found

    async def _version(self, server: str) -> str | None:
        response = await self._get(f"{server}/openapi.json")
        try:
            return str(response.raise_for_status().json()["info"]["version"])
        except (httpx.HTTPStatusError, ValueError, KeyError):
            return None

    def _common(self, what: str, found: Sequence[Found]) -> Found:
        """What all servers have. Raises LoadTestError where they differ."""
        for server, one in zip(self._servers, found, strict=True):
            if one != found[0]:
                text = f"{self._servers[0]} and {server} have different {what}: measure servers that are alike."
                raise LoadTestError(text)
        return found[0]

    async def _scrape(self, http: httpx.AsyncClient, server: str) -> MetricsScrape | None:
        try:
            response = await http.get(f"{server}/metrics")
        except httpx.ConnectError as error:
            raise ServerLost(f"nothing listens at {server} any more ({error})") from None
        except httpx.HTTPError:
            return None
        return read_metrics(response.text) if response.status_code == 200 else None

    async def _scrape_anew(self, server: str) -> MetricsScrape | None:
        """Read /metrics over a new connection: some balancers choose the server for each connection."""
        async with httpx.AsyncClient(timeout=_CONTROL_TIMEOUT, trust_env=False) as http:
            return await self._scrape(http, server)

    async def _get(self, url: str) -> httpx.Response:
        try:
            return await self._control.get(url)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            where = self.url if url.startswith(self.url) else url
            text = f"No server answers at {where} ({reason}): start one, or check --url and --server."
            raise LoadTestError(text) from None


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
    return MetricsScrape(gauges, rows, (gauges.get(_STARTED),))


def sum_of(scrapes: Sequence[MetricsScrape]) -> MetricsScrape:
    """Return the metrics of several servers together."""
    gauges: Counter[str] = Counter()
    rows: Counter[float] = Counter()
    for scrape in scrapes:
        gauges.update(scrape.gauges)
        rows.update(scrape.step_rows)
    return MetricsScrape(gauges, rows, tuple(process for scrape in scrapes for process in scrape.processes))
