"""Raw connections to a real server: large, half-sent, compressed and unread, beside callers who are served."""

from __future__ import annotations

import base64
import json
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import httpx
import pytest

from engines.demo import BUNDLE
from server.api.bodies import MAX_BODY
from server.requests.uploads import MAX_FILE
from tests.support.bare_server import read_all, read_until, wait_until
from tests.support.meeting import HeldServing
from tests.support.serving import Serving

QUICK = {"prompt": "a red heart", "num_inference_steps": 1}
LONG = {"prompt": "a red heart", "num_inference_steps": 200, "num_images": 4}
INVALID = json.dumps({"prompt": "a", "image": "A" * (MAX_FILE * 4 // 3) + "!"}).encode()


@pytest.fixture(scope="module")
def server() -> Iterator[HeldServing]:
    with HeldServing(BUNDLE, "--max-waiting", "1", "--max-body-memory", "64") as running:
        yield running
        assert running.client.get("/v2/health/ready").status_code == 200
        assert not [line for line in running.stderr if "Traceback" in line]


def connect(serving: Serving) -> socket.socket:
    return socket.create_connection((serving.client.base_url.host, serving.client.base_url.port), timeout=60)


def post(*headers: str, body: bytes = b"", accept: str = "image/png") -> bytes:
    kind = "Content-Type: application/json"
    lines = ["POST /generate HTTP/1.1", "Host: localhost", kind, f"Accept: {accept}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def quick(*headers: str) -> bytes:
    body = json.dumps(QUICK).encode()
    return post(f"Content-Length: {len(body)}", *headers, body=body)


def unended(serving: Serving) -> float:
    metrics = serving.metrics()
    return metrics["latentd_requests_waiting"] + metrics["latentd_requests_running"]


def is_running(serving: Serving, count: int) -> bool:
    return serving.metrics()["latentd_requests_running"] >= count


def check_refused(answer: bytes, status: int, *words: str) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()), answer[:300]
    assert all(word in json.loads(body)["detail"] for word in words), body


def test_an_offer_of_http_2_is_ignored(server: Serving) -> None:
    with connect(server) as connection:
        connection.sendall(quick("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk"))
        connection.shutdown(socket.SHUT_WR)
        answer = read_all(connection)
    assert b"HTTP/1.1 200" in answer
    assert b"\x89PNG" in answer


def test_who_closes_only_their_end_gets_the_picture(server: Serving) -> None:
    with connect(server) as connection:
        connection.sendall(quick())
        connection.shutdown(socket.SHUT_WR)
        assert b"\x89PNG" in read_all(connection)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "gzip, identity"])
def test_a_compressed_body_is_refused_by_name(server: Serving, encoding: str) -> None:
    answer = server.client.post(
        "/generate", content=b"\x1f\x8b", headers={"Content-Type": "application/json", "Content-Encoding": encoding}
    )
    assert answer.status_code == 415
    assert encoding in answer.json()["detail"]
    assert "uncompressed" in answer.json()["detail"]


def test_identity_is_no_compression(server: Serving) -> None:
    assert server.client.post("/generate", json=QUICK, headers={"Content-Encoding": "identity"}).status_code == 200


@pytest.mark.parametrize("expect", [(), ("Expect: 100-continue",)], ids=["", "100-continue"])
def test_a_body_beyond_the_bound_is_refused_before_it_is_sent(server: Serving, expect: tuple[str, ...]) -> None:
    with connect(server) as connection:
        connection.sendall(post(f"Content-Length: {MAX_BODY + 1}", *expect))
        check_refused(read_all(connection), 413, str(MAX_BODY))


def test_an_endless_body_is_refused_once(server: Serving) -> None:
    sent = 0
    with connect(server) as connection:
        connection.sendall(post("Transfer-Encoding: chunked"))
        try:
            while sent < 2**30:
                connection.sendall(b"100000\r\n" + bytes(2**20) + b"\r\n")
                sent += 2**20
        except ConnectionError:
            pass
        assert sent < MAX_BODY + 32 * 2**20, "which the kernel buffers"
        check_refused(read_all(connection), 413, str(MAX_BODY))


def test_bodies_share_a_budget(server: Serving) -> None:
    announced = post(f"Content-Length: {30 * 2**20}", body=b"{")
    with ExitStack() as senders:
        for _ in range(2):
            senders.enter_context(connect(server)).sendall(announced + b" " * (30 * 2**20 - 2))
        wait_until(lambda: b" 503 " in answer_to(server, announced))
        answer = answer_to(server, announced)
        check_refused(answer, 503, "64 MiB", "try again")
        assert b"retry-after: " in answer.lower()
        assert server.generate(**QUICK).status_code == 200, "small bodies are not counted"
    large = {**QUICK, "image": base64.b64encode(bytes(MAX_FILE)).decode()}
    wait_until(lambda: server.generate(**large).status_code == 422)  # the holders' share is free: it is read


def test_who_announces_much_and_sends_little_takes_no_memory(server: Serving) -> None:
    with ExitStack() as senders:
        for _ in range(5):
            senders.enter_context(connect(server)).sendall(post(f"Content-Length: {30 * 2**20}", body=b"{"))
        large = {**QUICK, "image": base64.b64encode(bytes(MAX_FILE)).decode()}
        assert server.generate(**large).status_code == 422


def answer_to(server: Serving, head: bytes) -> bytes:
    """What the server answers to a request that is begun, within a moment."""
    with connect(server) as connection:
        connection.settimeout(1)
        connection.sendall(head)
        try:
            return read_until(connection, b'"errors":[]}')
        except TimeoutError:
            return b""


def test_a_full_queue_refuses_before_the_body_is_sent(server: HeldServing) -> None:
    with server.held(), ExitStack() as leaving:
        server.let(40)
        body = json.dumps(LONG).encode()
        for started in (1, 2, 3):  # the third has no rows, and waits
            stream = leaving.enter_context(connect(server))
            stream.sendall(post(f"Content-Length: {len(body)}", body=body, accept="text/event-stream"))
            read_until(stream, b"\r\n\r\n")
            wait_until(partial(is_running, server, min(started, 2)))
        wait_until(lambda: server.metrics()["latentd_requests_waiting"] >= 1)
        with connect(server) as connection:
            connection.sendall(post(f"Content-Length: {30 * 2**20}"))
            check_refused(read_until(connection, b'"errors":[]}'), 429, "waiting")
    wait_until(lambda: unended(server) == 0)


def test_large_invalid_bodies_leave_the_server_responsive(server: Serving) -> None:
    """Each is parsed in a thread, piece by piece; before, every one held the event loop."""
    headers = {"Content-Type": "application/json"}
    answers = 0
    with ThreadPoolExecutor(4) as pool:
        url = f"{server.url}/generate"
        attacks = [pool.submit(httpx.post, url, content=INVALID, headers=headers, timeout=60) for _ in range(12)]
        while not all(attack.done() for attack in attacks):
            assert server.client.get("/v2/health/live").status_code == 200
            answers += 1
        statuses = {attack.result().status_code for attack in attacks}
    assert statuses <= {422, 503}
    assert 422 in statuses
    assert answers > 4 * len(attacks), "between two of them, the event loop answered several times"


def test_half_sent_requests_do_not_delay_a_stop() -> None:
    starts = post("Content-Length: 1000", body=b"{"), post()[:-2], b""
    with Serving(BUNDLE, "--drain-seconds", "60") as server, ExitStack() as senders:
        connections = [senders.enter_context(connect(server)) for _ in starts]
        for connection, start in zip(connections, starts, strict=True):
            connection.sendall(start)
        assert server.generate(**QUICK).status_code == 200  # what was sent before has arrived
        server.stop(how=signal.SIGTERM, seconds=30)
        answers = [read_all(connection) for connection in connections]
        check_refused(answers[0], 503, "shutting down")
        assert answers[1:] == [b"", b""]
