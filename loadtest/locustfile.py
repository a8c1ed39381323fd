"""The load test's users for Locust: the same mix, response formats and outcomes.

locust -f loadtest/locustfile.py --headless --host http://127.0.0.1:8000 --users 8 --run-time 60s
locust -f loadtest/locustfile.py --headless --master --expect-workers 2 --host … --users 64 --run-time 60s
locust -f loadtest/locustfile.py --worker --master-host …    on each machine that generates load

The master, or a Locust without workers, reads the mix once; its workers receive it with the other options.
"""

from __future__ import annotations

import itertools
import logging
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from typing import Any

import requests
from locust import HttpUser, events, task
from locust.clients import ResponseContextManager
from locust.env import Environment
from locust.runners import LocalRunner, Runner, WorkerRunner

from loadtest.mix import Mix, MixEntry, MixError, Wanted, choose_entries
from loadtest.options import BOTH_GIVEN, add_request_options, positive
from loadtest.response_formats import RESPONSE_FORMATS, BodyPart, RawResponse, RequestResult, ResponseFormat

_log = logging.getLogger(__name__)
_CONTROL_TIMEOUT = 10.0  # seconds, for the models
_NUMBERS_PER_WORKER = 2**24  # keeps request numbers, and so image seeds, apart between workers


class LatentdUser(HttpUser):
    """A user who sends requests one after another: at once after an image, after a pause otherwise."""

    mix: Mix
    response_format: ResponseFormat
    request_timeout: float  # seconds
    stages: bool
    numbers: Iterator[int]

    @task
    def generate(self) -> None:
        number = next(self.numbers)
        index = self.mix.pick(number)
        with self.client.post(
            self.response_format.path,
            name=self.mix.entries[index].name,
            json=self.response_format.body(self.mix.fields(index, number)),
            headers={"Accept": self.response_format.accept},
            timeout=self.request_timeout,
            catch_response=True,
        ) as response:
            result = _result(self.response_format, response)
            if result.outcome == "completed":
                response.success()
            else:
                response.failure(_failure_name(result))
        if self.stages:
            self._report_stages(result)
        time.sleep(result.pause)  # patched by gevent: other users run meanwhile

    def _report_stages(self, result: RequestResult) -> None:
        for stage, seconds in (result.stages or {}).items():
            self.environment.events.request.fire(
                request_type="stage",
                name=stage,
                response_time=seconds * 1000,
                response_length=0,
                exception=None,
                context={},
            )


@events.init_command_line_parser.add_listener
def add_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("latentd: what is sent")
    add_request_options(group)
    add = group.add_argument
    add(
        "--timeout",
        type=positive,
        default=120,
        metavar="S",
        help="seconds without a byte from the server after which a request ends (default: %(default)s)",
    )
    add("--stages", action="store_true", help="also list the server's stages, which Locust adds to its totals")


@events.init.add_listener
def read_mix(environment: Environment, runner: Runner | None, **_: Any) -> None:
    """Read the mix into the options, which the master sends to its workers."""
    given = environment.parsed_options
    if given is None or isinstance(runner, WorkerRunner):
        return
    try:
        given.entries = [entry.model_dump() for entry in _choose_entries(given, environment.host)]
    except (MixError, OSError) as error:  # OSError includes the errors of requests
        _log.error("%s", error)
        sys.exit(2)


@events.test_start.add_listener
def configure_users(environment: Environment, **_: Any) -> None:
    """Give the users of this process what to send."""
    given, runner = environment.parsed_options, environment.runner
    if given is None or not isinstance(runner, LocalRunner | WorkerRunner):
        return
    LatentdUser.mix = Mix(tuple(MixEntry.model_validate(entry) for entry in given.entries), given.seed)
    LatentdUser.response_format = RESPONSE_FORMATS[given.response_format]
    LatentdUser.request_timeout, LatentdUser.stages = given.timeout, given.stages
    LatentdUser.numbers = itertools.count(runner.worker_index * _NUMBERS_PER_WORKER)


def _choose_entries(given: Namespace, host: str | None) -> tuple[MixEntry, ...]:
    wanted = Wanted(given.prompt, given.steps, given.model, given.lora)
    if given.mix and wanted:
        raise MixError(BOTH_GIVEN)
    return choose_entries(given.mix, wanted, examples=lambda: _examples(host))


def _examples(host: str | None) -> Sequence[str]:
    if host is None:
        raise MixError("Name the server with --host, or give what to send with --mix or --prompt.")
    response = requests.get(f"{host.rstrip('/')}/models", timeout=_CONTROL_TIMEOUT)
    response.raise_for_status()
    found: list[dict[str, Any]] = response.json()
    return found[0]["examples"] if found else ()


def _result(response_format: ResponseFormat, response: ResponseContextManager) -> RequestResult:
    if response.status_code:
        body = [BodyPart(0.0, response.content)]
        return response_format.parse(RawResponse(response.status_code, response.headers, body))
    if isinstance(response.error, requests.Timeout):
        return RequestResult("client timeout")
    return RequestResult("failed", detail=type(response.error).__name__)


def _failure_name(result: RequestResult) -> str:
    """Return the name that Locust groups failures by: the outcome, with the server's message where it failed."""
    status = f" ({result.status})" if result.status else ""
    detail = f": {result.detail}" if result.detail and result.outcome == "failed" else ""
    return f"{result.outcome}{status}{detail}"
