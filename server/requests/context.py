"""What is known of a request apart from its body: who sends it, through which API, and what its headers ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Api = Literal["generate", "jobs", "huggingface", "openai", "sdapi"]
APIS: tuple[Api, ...] = get_args(Api)
Priority = Literal["interactive", "batch"]


@dataclass(frozen=True, slots=True)
class Allowance:
    """What one caller may take. None: as much as the server's settings say."""

    rate: str | None = None  # requests in a time, such as 60/minute
    concurrency: int | None = None  # requests that wait or run


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request. The queue is fair between callers."""

    name: str = ""  # of the API key, or the network address
    is_admin: bool = False
    allowance: Allowance = Allowance()


@dataclass(frozen=True, slots=True)
class RequestContext:
    """Who sends a request, through which API, and what its headers ask for."""

    caller: Caller = Caller()
    api: Api = "generate"
    request_id: str | None = None  # chosen by the caller
    timeout: float | None = None  # seconds from arrival
    arrived: float | None = None  # on perf_counter's clock; None: now
    traceparent: str | None = None  # W3C Trace Context


ANONYMOUS = RequestContext()
