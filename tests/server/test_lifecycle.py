"""Every accepted request has exactly one ending: when callers leave, when the engine fails, when the server stops."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import PIL.Image
import pytest

from engines.manifest import NoiseSchedule, Size
from engines.schedulers import Scheduler, table
from server.requests.errors import Cancelled
from server.requests.params import GenerationParams
from server.requests.request import Completed, Event, Failed, Request
from server.requests.tokenizer import Prompt
from server.startup.http_server import listen
from tests.support.bare_server import wait_until
from tests.support.meeting import HeldServing
from tests.support.serving import Serving, run_server

EVENTS = {"Accept": "text/event-stream"}
LONG = {"prompt": "a red cat", "num_inference_steps": 200, "scheduler": "ddim", "seed": 1}
FULL = {**LONG, "num_images": 4}  # all of the engine's rows
SHORT = {"prompt": "a green bird", "num_inference_steps": 2, "seed": 2}


def stream(serving: Serving, **fields: Any) -> AbstractContextManager[httpx.Response]:
    return serving.client.stream("POST", "/generate", json=fields, headers=EVENTS)


def events(answer: httpx.Response) -> Iterator[tuple[str, Any]]:
    """The name and the document of each event."""
    name = ""
    for line in answer.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def wait_for_event(output: Iterator[tuple[str, Any]], name: str) -> None:
    assert name in (found for found, _ in output)


def endings(serving: Serving, outcome: str = "") -> float:
    """How many accepted requests have ended so, or at all."""
    return serving.total("latentd_requests_total", **({"outcome": outcome} if outcome else {}))


def unended(serving: Serving) -> float:
    metrics = serving.metrics()
    return metrics["latentd_requests_waiting"] + metrics["latentd_requests_running"]


def steps_run(serving: Serving) -> float:
    return serving.metrics()["latentd_steps_total"]


def post_and_hang(serving: Serving, **fields: Any) -> http.client.HTTPConnection:
    """Ask for JSON, and do not wait for it."""
    connection = http.client.HTTPConnection(serving.client.base_url.host, serving.client.base_url.port)
    connection.request("POST", "/generate", json.dumps(fields), {"Content-Type": "application/json"})
    return connection


def decoded(image: str) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(base64.b64decode(image)))


def test_a_stream_tells_each_thing_once_and_in_order(serving: Serving) -> None:
    params = {"prompt": "two old boats", "seed": 9, "scheduler": "ddim", "num_inference_steps": 7, "width": 48}
    with stream(serving, **params, preview_every=3) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        output = list(events(answer))
    assert [name for name, _ in output] == ["queued", "started", *["step"] * 7, "completed"]
    steps = [document for name, document in output if name == "step"]
    assert [(step["step"], step["steps"]) for step in steps] == [(step, 7) for step in range(1, 8)]
    previews = {step["step"]: step["preview"] for step in steps if step["preview"]}
    assert list(previews) == [3, 6]
    for preview in previews.values():
        picture = decoded(preview.removeprefix("data:image/jpeg;base64,"))
        assert (picture.format, picture.size) == ("JPEG", (24, 16)), "a pixel per latent"
    completed = output[-1][1]
    assert {output[0][1]["id"], output[1][1]["id"], completed["id"]} == {answer.headers["X-Request-Id"]}
    assert completed["images"] == serving.generate(**params).json()["images"]


def test_each_accepted_request_ends_once_whoever_leaves(serving: HeldServing) -> None:
    accepted, cancelled, steps = endings(serving), endings(serving, "cancelled"), steps_run(serving)
    with ThreadPoolExecutor(8) as pool, serving.held(), ExitStack() as leaving:
        streams = [leaving.enter_context(stream(serving, **FULL)) for _ in range(6)]
        for _ in range(6):
            leaving.enter_context(closing(post_and_hang(serving, **FULL)))
        stay = [pool.submit(serving.generate, **{**SHORT, "seed": seed}) for seed in range(8)]
        outputs = [events(answer) for answer in streams[:3]]  # the others leave without having heard anything
        for output in outputs:
            wait_for_event(output, "queued")
        serving.wait_for(20)
        serving.let(20)  # some run when they leave
        wait_until(lambda: steps_run(serving) >= steps + 20)
    assert [answer.result().status_code for answer in stay] == [200] * 8
    wait_until(lambda: endings(serving) - accepted >= 20)
    assert unended(serving) == 0
    assert endings(serving) - accepted == 20
    assert endings(serving, "cancelled") - cancelled == 12
    assert endings(serving, "failed") == 0


def test_who_leaves_frees_the_rows(serving: HeldServing) -> None:
    before = steps_run(serving)
    with serving.held():
        with ExitStack() as leaving:
            outputs = [events(leaving.enter_context(stream(serving, **LONG))) for _ in range(4)]
            for output in outputs:
                wait_for_event(output, "queued")
            serving.let(20)
            for output in outputs:
                wait_for_event(output, "step")
        serving.wait_for(0)
    assert serving.generate(**SHORT).status_code == 200
    assert steps_run(serving) - before < 100, "it waited for those who had left"


def test_a_client_that_is_killed_frees_the_rows(serving: HeldServing) -> None:
    client = f"""
import json, sys, urllib.request
headers = {{"Content-Type": "application/json", "Accept": "text/event-stream"}}
request = urllib.request.Request("{serving.url}/generate", json.dumps({FULL}).encode(), headers)
for line in urllib.request.urlopen(request):
    print(line.decode(), end="", flush=True)
"""
    cancelled, before = endings(serving, "cancelled"), steps_run(serving)
    command = [sys.executable, "-c", client]
    with serving.held():
        serving.let(20)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603 - our own command
            assert process.stdout is not None
            assert any(line == "event: step\n" for line in process.stdout)
            process.kill()
        serving.let(40)
        wait_until(lambda: endings(serving, "cancelled") == cancelled + 1)
    assert steps_run(serving) - before < 150


def test_the_queue_is_bounded(bundle: Path) -> None:
    with HeldServing(bundle, "--max-waiting", "1") as serving, ThreadPoolExecutor(1) as pool:
        with serving.held(), stream(serving, **{**FULL, "num_inference_steps": 20}) as running:
            output = events(running)
            serving.let(2)
            wait_for_event(output, "started")
            waiting = pool.submit(serving.generate, **{**FULL, "num_inference_steps": 15})  # too long to take turns
            wait_until(lambda: serving.metrics()["latentd_requests_waiting"] == 1)
            for _ in range(3):
                refused = serving.generate(**SHORT)
                assert refused.status_code == 429
                assert refused.headers["Content-Type"] == "application/problem+json"
                assert 1 <= int(refused.headers["Retry-After"]) <= 120
                assert refused.json()["detail"] == "1 requests are waiting: try again later."
            serving.let(100)
            wait_for_event(output, "completed")
        assert waiting.result().status_code == 200
        assert endings(serving, "completed") == 2


def connects(serving: Serving) -> bool:
    try:
        with socket.create_connection((serving.client.base_url.host, serving.client.base_url.port)):
            return True
    except ConnectionRefusedError:
        return False


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_server_told_to_stop_finishes_what_it_accepted(bundle: Path, how: signal.Signals) -> None:
    with HeldServing(bundle) as serving, ThreadPoolExecutor(1) as pool:
        with serving.held():
            accepted = pool.submit(serving.generate, **{**FULL, "num_inference_steps": 20})
            serving.wait_for(1)
            serving.process.send_signal(how)
            wait_until(lambda: not connects(serving))
        answer = accepted.result()
        assert answer.status_code == 200
        assert [decoded(image["image"]).size for image in answer.json()["images"]] == [(32, 32)] * 4
        assert serving.process.wait(60) == 0
        assert not [line for line in serving.stderr if "Traceback" in line]


def test_a_second_signal_ends_sooner_with_everyone_answered(bundle: Path) -> None:
    with HeldServing(bundle, "--drain-seconds", "600") as serving, ThreadPoolExecutor(16) as pool:
        with serving.held():
            answers = [pool.submit(serving.generate, **FULL) for _ in range(16)]
            serving.wait_for(16)
            serving.process.send_signal(signal.SIGINT)
            wait_until(lambda: not connects(serving))
            serving.process.send_signal(signal.SIGHUP)  # whoever hangs up does so beside other signals
            serving.let(5)
            assert not [answer for answer in answers if answer.done()]
            serving.process.send_signal(signal.SIGINT)
            assert serving.logged("accepted requests are cancelled;")
        assert Counter(answer.result().status_code for answer in answers) == {503: 16}
        assert serving.process.wait(60) == 0
        assert not [line for line in serving.stderr if "Traceback" in line]


def test_a_third_signal_ends_at_once(bundle: Path) -> None:
    with (
        HeldServing(bundle, "--drain-seconds", "600") as serving,
        serving.held(),
        closing(post_and_hang(serving, **FULL)),
    ):
        serving.wait_for(1)
        serving.process.send_signal(signal.SIGSTOP)  # so that nothing happens between the three
        for how in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGCONT):
            serving.process.send_signal(how)
        assert serving.process.wait(60) == 0


def test_a_drain_ends_whatever_clients_do(bundle: Path) -> None:
    with HeldServing(bundle, "--drain-seconds", "0") as serving, slow_clients(serving):
        with serving.held():
            serving.wait_for(1)
        assert serving.stop(seconds=60) == 0
        assert not [line for line in serving.stderr if "Traceback" in line]


@contextmanager
def slow_clients(serving: Serving) -> Iterator[None]:
    """A half-sent body, and a stream that nobody reads."""
    address = (serving.client.base_url.host, serving.client.base_url.port)
    with socket.create_connection(address) as half, socket.create_connection(address) as unread:
        half.sendall(
            b"POST /generate HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        )
        unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps({**LONG, "preview_every": 1}).encode()
        head = f"POST /generate HTTP/1.1\r\nHost: [::1]\r\nAccept: text/event-stream\r\nContent-Length: {len(body)}\r\n"
        unread.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        yield


def test_a_server_told_to_stop_while_it_loads_ends_without_a_word(bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "server", "--bundle", str(bundle), "--port", str(port), "--log-level", "warning"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603 - our own command
        wait_until(lambda: accepts(port))  # the engines' turn to be loaded
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert process.stderr
        assert process.stderr.read() == ""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_server_told_to_stop_before_anything_else_ends_in_order(bundle: Path, how: signal.Signals) -> None:
    """While it imports and checks its bundle."""
    command = [sys.executable, "-X", "importtime", "-m", "server", "--bundle", str(bundle), "--port", "0"]
    few = 4096  # bytes that it may write unread: it imports little more than what was heard of
    with subprocess.Popen(command, stderr=subprocess.PIPE, pipesize=few, text=True) as process:  # noqa: S603 - our own command
        assert process.stderr
        assert any(line.endswith(" numpy\n") for line in process.stderr)
        process.send_signal(how)
        output = process.stderr.read()
        assert process.wait(60) == 0
        assert "Traceback" not in output
        assert "is ready" not in output


def accepts(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


def test_a_server_that_may_not_drain_for_long_tells_those_who_wait(bundle: Path) -> None:
    def last_event() -> tuple[str, Any]:
        with stream(serving, **FULL) as answer:
            return list(events(answer))[-1]

    with HeldServing(bundle, "--drain-seconds", "1") as serving, ThreadPoolExecutor(16) as pool:
        with serving.held():  # a fast machine might serve some in a second
            streams = [pool.submit(last_event) for _ in range(8)]
            answers = [pool.submit(serving.generate, **FULL) for _ in range(8)]
            serving.wait_for(16)
            serving.let(60)
            assert serving.stop() == 0
        documents = [problem for _, problem in (future.result() for future in streams)]
        documents += [future.result().json() for future in answers]
        assert {document["title"] for document in documents} == {"Server stopping"}
        assert {future.result().status_code for future in answers} == {503}
        assert {future.result()[0] for future in streams} == {"error"}
        assert not [line for line in serving.stderr if "Traceback" in line]


def test_the_first_request_of_each_kind_imports_nothing(bundle: Path) -> None:
    """With few descriptors left an import fails, and with it the request."""
    image = io.BytesIO()
    PIL.Image.new("RGB", (32, 32)).save(image, "webp")
    with Serving(bundle, module="tests.support.importing_server") as serving:
        for kind in ("png", "jpeg", "webp"):
            assert serving.generate(**SHORT, image_format=kind).status_code == 200
        with stream(serving, **SHORT, preview_every=1) as answer:
            wait_for_event(events(answer), "completed")
        uploaded = {"image": image.getvalue(), "mask": image.getvalue()}
        assert serving.client.post("/generate", data=SHORT, files=uploaded).status_code == 200
        encoded = base64.b64encode(image.getvalue()).decode()
        assert serving.generate(**SHORT, image=encoded).status_code == 200
        assert serving.generate(prompt="(a:1.2) cat " * 40, cache="fast", num_inference_steps=5).status_code == 200
        assert serving.generate(num_inference_steps=0).status_code == 422
        assert serving.client.post("/generate", json=SHORT, params={"wait": "false"}).status_code == 202
        fields = {"prompt": "a cat", "steps": 2, "sampler_name": "DPM++ 2M Karras", "init_images": [encoded]}
        assert serving.client.post("/sdapi/v1/img2img", json=fields).status_code == 200
        assert serving.client.post("/v1/images/generations", json={"prompt": "a cat"}).status_code == 200
        for path in ("/", "/metrics", "/models", "/schedulers", "/docs", "/openapi.json", "/v2/health/ready", "/none"):
            serving.client.get(path)
        serving.stop()
        ready = next(number for number, line in enumerate(serving.stderr) if "is ready" in line)
        assert not [line for line in serving.stderr[ready:] if line.startswith("imported ")]


def test_a_server_without_descriptors_serves_its_connections(bundle: Path) -> None:
    with Serving(bundle) as serving:
        serving.metrics()  # the client keeps this connection
        used = len(os.listdir(f"/proc/{serving.process.pid}/fd"))
        resource.prlimit(serving.process.pid, resource.RLIMIT_NOFILE, (used, used))
        assert serving.generate(**SHORT).status_code == 200
        assert serving.generate(**SHORT, image_format="webp").status_code == 200


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"defaults": {"scheduler": "no-such"}}, "scheduler"),
        ({"noise_schedule": {"beta_start": 1e-300, "beta_end": 1e-300}}, "mend its betas"),
    ],
)
def test_a_bundle_whose_every_request_fails_is_refused(
    bundle: Path, tmp_path: Path, change: dict[str, dict[str, Any]], reason: str
) -> None:
    copied = tmp_path / "bundle"
    shutil.copytree(bundle, copied)
    document = json.loads((copied / "manifest.json").read_text())
    for part, values in change.items():
        document[part].update(values)
    (copied / "manifest.json").write_text(json.dumps(document))
    ended = run_server("--bundle", str(copied), "--port", "0")
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert reason in ended.stderr.splitlines()[-1]


@pytest.mark.parametrize("how", ["hangs", "is-lost"])
def test_a_device_that_breaks_ends_the_process_with_everyone_answered(bundle: Path, how: str) -> None:
    command = ("--watchdog", "0.001", "--drain-seconds", "60", how)
    with Serving(bundle, *command, module="tests.support.broken_server") as serving, slow_clients(serving):
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(serving.generate, **{**LONG, "seed": seed}) for seed in range(6)]
            documents = [future.result() for future in answers]
        assert {document.status_code for document in documents} == {503}
        assert {document.json()["detail"] for document in documents} == {
            "The server is stopping after a fault: ask another one."
        }
        assert serving.process.wait(60) == 70, "the supervisor is to start another, whatever slow clients do"
        if how == "hangs":
            assert serving.logged("took longer than")
            assert serving.logged("'slot': ["), "the last plan was not told"
            assert serving.logged('executor.py", line'), "no stack was dumped"


@pytest.mark.parametrize(
    ("arguments", "variables", "setting"),
    [
        (["--port", "65536"], {}, "--port"),
        (["--drain-seconds", "soon"], {}, "--drain-seconds"),
        (["--no-such-flag"], {}, "--no-such-flag"),
        ([], {"LATENTD_MAX_WAITING": "0"}, "--max-waiting"),
        ([], {"LATENTD_LOG_LEVEL": "loud"}, "--log-level"),
    ],
    ids=str,
)
def test_a_bad_setting_is_named(arguments: list[str], variables: dict[str, str], setting: str) -> None:
    ended = run_server(*arguments, **variables)
    assert ended.returncode == 2
    assert setting in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_a_port_that_is_taken_is_named(bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = run_server("--bundle", str(bundle), LATENTD_PORT=port)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert port in ended.stderr
    assert "already in use" in ended.stderr


def test_an_answer_waits_for_no_acknowledgement_of_its_headers() -> None:
    """Whichever event loop serves: one that is given a listener leaves its connections as they are."""
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_first_ending_is_the_only_one() -> None:
    heard: list[Event] = []
    params = GenerationParams(
        Prompt("", ()), Prompt("", ()), Size(width=64, height=64), Scheduler("ddim"), 2, 7.5, (0,)
    )
    steps = table(params.scheduler, 2, NoiseSchedule())
    request = Request(params, steps, (lambda _request, event: heard.append(event),), "a")
    first = Completed(())
    for outcome in (first, Failed(Cancelled("too late"))):
        request.finish(outcome)
    assert heard == [first]
    assert request.outcome is first
