"""The load test's callers for Locust: the same mix, the same faces, and answers judged alike.

locust -f loadtest/locustfile.py --headless --host http://127.0.0.1:8000 --users 8 --run-time 60s
locust -f loadtest/locustfile.py --headless --master --expect-workers 2 --host … --users 64 --run-time 60s
locust -f loadtest/locustfile.py --worker --master-host …    on each machine that makes load

The mix is read once, where Locust is not a worker; workers are sent it with the other options.
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

from loadtest.mix import Entry, Mix, MixError
from loadtest.options import add_what, conflict, entries_of, positive
from loadtest.response_formats import FACES, Answer, Face, Part, Reply

_log = logging.getLogger(__name__)
_ASKING = 10.0  # seconds for the models
_APART = 2**24  # between the numbers that two workers give their callers, so that no two ask for the same picture


class Caller(HttpUser):
    """Asks again as soon as there is a picture, and after a pause where there is none."""

    mix: Mix
    face: Face
    patience: float  # seconds
    stages: bool
    numbers: Iterator[int]

    @task
    def ask(self) -> None:
        number = next(self.numbers)
        index = self.mix.pick(number)
        with self.client.post(
            self.face.path,
            name=self.mix.entries[index].name,
            json=self.face.body(self.mix.fields(index, number)),
            headers={"Accept": self.face.accept},
            timeout=self.patience,
            catch_response=True,
        ) as response:
            answer = _answer(self.face, response)
            if answer.outcome == "completed":
                response.success()
            else:
                response.failure(_told(answer))
        if self.stages:
            self._tell_stages(answer)
        time.sleep(answer.pause)  # gevent's, while others go on

    def _tell_stages(self, answer: Answer) -> None:
        for stage, seconds in (answer.stages or {}).items():
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
    add_what(group)
    add = group.add_argument
    add("--timeout", type=positive, default=120, metavar="S", help="silence of the server that ends a request")
    add("--stages", action="store_true", help="also list the server's stages, which Locust adds to its totals")


@events.init.add_listener
def read_mix(environment: Environment, runner: Runner | None, **_: Any) -> None:
    """Workers find the entries among the options that the master sends them."""
    given = environment.parsed_options
    if given is None or isinstance(runner, WorkerRunner):
        return
    try:
        if wrong := conflict(given):
            raise MixError(wrong)
        given.entries = [entry.model_dump() for entry in entries_of(given, lambda: _examples(environment.host))]
    except (MixError, OSError) as error:  # as all of requests' are
        _log.error("%s", error)
        sys.exit(2)


@events.test_start.add_listener
def begin(environment: Environment, **_: Any) -> None:
    given, runner = environment.parsed_options, environment.runner
    if given is None or not isinstance(runner, LocalRunner | WorkerRunner):
        return
    Caller.mix = Mix(_entries(given), given.seed)
    Caller.face = FACES[given.face]
    Caller.patience, Caller.stages = given.timeout, given.stages
    Caller.numbers = itertools.count(runner.worker_index * _APART)


def _entries(given: Namespace) -> tuple[Entry, ...]:
    return tuple(Entry.model_validate(entry) for entry in given.entries)


def _examples(host: str | None) -> Sequence[str]:
    if host is None:
        raise MixError("Say which server with --host, or what to send with --mix or --prompt.")
    reply = requests.get(f"{host.rstrip('/')}/models", timeout=_ASKING)
    reply.raise_for_status()
    found: list[dict[str, Any]] = reply.json()
    return found[0]["examples"] if found else ()


def _answer(face: Face, response: ResponseContextManager) -> Answer:
    if response.status_code:
        return face.answer(Reply(response.status_code, response.headers, [Part(0.0, response.content)]))
    if isinstance(response.error, requests.Timeout):
        return Answer("client timeout")
    return Answer("failed", detail=type(response.error).__name__)


def _told(answer: Answer) -> str:
    """What Locust counts failures by: few words, and the server's own only where they tell what broke."""
    status = f" ({answer.status})" if answer.status else ""
    detail = f": {answer.detail}" if answer.detail and answer.outcome == "failed" else ""
    return f"{answer.outcome}{status}{detail}"
