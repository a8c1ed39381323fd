"""What one connection may do, byte by byte, on both event loops."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress

import pytest

from server.transport.limits import Limits
from server.transport.protocol import MAX_HEAD, MAX_HEADERS
from tests.support.bare_server import BLOB, BareServer, bare_server, read_all, read_until, wait_until

HOST = b"Host: here\r\n"
GET = b"GET /path HTTP/1.1\r\n" + HOST + b"\r\n"
CLOSING = b"GET /path HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
SHORT = Limits(header_seconds=0.3, body_seconds=0.3, keep_alive_seconds=1)


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def server(request: pytest.FixtureRequest) -> Iterator[BareServer]:
    with bare_server(loop=request.param) as running:
        yield running


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def hasty(request: pytest.FixtureRequest) -> Iterator[BareServer]:
    """A server with short time limits."""
    with bare_server(SHORT, loop=request.param) as running:
        yield running


@pytest.fixture(params=["uvloop", "asyncio"])
def held(request: pytest.FixtureRequest) -> Iterator[BareServer]:
    """A server whose requests wait for the test."""
    with bare_server(loop=request.param) as running:
        yield running


def ask(server: BareServer, *pieces: bytes) -> bytes:
    with server.connect() as connection:
        for piece in pieces:
            connection.sendall(piece)
        return read_all(connection)


def post(path: str, *headers: str, body: bytes = b"") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: here", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


@pytest.mark.parametrize("offer", ["h2c", "websocket", "TLS/1.0", "h2c, websocket"])
def test_an_offered_upgrade_is_ignored(server: BareServer, offer: str) -> None:
    headers = [f"Upgrade: {offer}", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABkAAQAAP__"]
    request = post("/echo", *headers, "Content-Length: 5", body=b"hello")
    answer = ask(server, request + CLOSING)
    assert answer.count(b"HTTP/1.1 200 OK") == 2
    assert b"hello" in answer
    assert answer.endswith(b"/path")


def test_an_upgrade_may_come_in_pieces(server: BareServer) -> None:
    request = post("/echo", "Upgrade: h2c", "Connection: Upgrade, close", "Transfer-Encoding: chunked")
    answer = ask(server, request[:30], request[30:], b"3\r\nabc\r\n", b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(b"abc")


def test_connect_is_refused(server: BareServer) -> None:
    assert ask(server, b"CONNECT a.example:443 HTTP/1.1\r\nHost: a.example\r\n\r\n")[9:12] in (b"400", b"404", b"405")


def test_http_1_0_is_answered(server: BareServer) -> None:
    assert ask(server, b"GET /path HTTP/1.0\r\n\r\n").endswith(b"\r\n\r\n/path")


def test_pipelined_requests_are_answered_in_order(server: BareServer) -> None:
    bodies = [b"first", b"second", b"third"]
    requests = [post("/echo", f"Content-Length: {len(body)}", body=body) for body in bodies]
    answer = ask(server, b"".join(requests) + CLOSING)
    assert answer.count(b"HTTP/1.1 200 OK") == 4
    assert sorted(bodies, key=answer.index) == bodies


def check_closes(answer: bytes, status: bytes) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 " + status), answer[:200]
    assert b"connection: close" in head.lower()
    assert b"application/problem+json" in head
    assert b'"detail"' in body
    for header in (b"cache-control: no-store", b"x-content-type-options: nosniff", b"content-security-policy: default"):
        assert header in head.lower()


@pytest.mark.parametrize(
    ("start", "size"),
    [
        (b"GET /a", 2**16),
        (b"GET / HTTP/1.1\r\nA: b", 100),
        (b"GET / HTTP/1.1\r\nA: b", 2**20),
        (b"GET / HTTP/1.1\r\nA", 2**16),
        (b"", 2**16),
    ],
    ids=["request line", "value in pieces", "value", "name", "line breaks"],
)
def test_headers_are_bounded(server: BareServer, start: bytes, size: int) -> None:
    sent = 0
    with server.connect() as connection:
        try:
            connection.sendall(start)
            while sent < 64 * 2**20:
                connection.sendall((b"a" if start else b"\r") * size if start else b"\r\n" * (size // 2))
                sent += size
        except ConnectionError:
            pass
        assert sent < 16 * 2**20, "what the kernel buffers"
        check_closes(read_all(connection), b"431")


def test_the_number_of_headers_is_bounded(server: BareServer) -> None:
    lines = [f"X-{index}: 1" for index in range(MAX_HEADERS)]
    check_closes(ask(server, post("/echo", *lines)), b"431")
    assert ask(server, post("/echo", *lines[3:], "Connection: close")).startswith(b"HTTP/1.1 200")


def test_large_headers_within_the_bound_are_accepted(server: BareServer) -> None:
    request = post("/echo", "X: " + "a" * (MAX_HEAD - 200), "Content-Length: 200000", "Connection: close")
    assert ask(server, request, b"b" * 200_000).endswith(b"b" * 200_000)


def test_many_requests_on_a_connection_share_no_bound(server: BareServer) -> None:
    request = post("/echo", "X: " + "a" * 30_000, "Content-Length: 3", body=b"abc")
    assert ask(server, *[request] * 9, CLOSING).count(b"HTTP/1.1 200 OK") == 10


def test_trailers_and_chunk_extensions_are_bounded(server: BareServer) -> None:
    start = post("/wait", "Transfer-Encoding: chunked")
    for endless in (b"0\r\nTrailer: ", b"1;"):
        with server.connect() as connection, pytest.raises(ConnectionError):  # noqa: PT012
            connection.sendall(start + endless)
            for _ in range(64):
                connection.sendall(b"a" * 2**20)


def test_a_trailer_is_not_a_header(server: BareServer) -> None:
    request = post("/echo", "Transfer-Encoding: chunked", "Connection: close")
    assert ask(server, request, b"3\r\nabc\r\n0\r\nX: y\r\n\r\n").endswith(b"abc")


@pytest.mark.parametrize(
    "noise", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"hello\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"]
)
def test_what_is_not_http_is_refused(server: BareServer, noise: bytes) -> None:
    check_closes(ask(server, noise), b"400")


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"hello\r\n\r\n", "MalformedRequest"),
        (post("/echo", "X: " + "a" * MAX_HEAD), "HeadersTooLarge"),
        (post("/echo", *[f"X-{index}: 1" for index in range(MAX_HEADERS)]), "HeadersTooLarge"),
        (GET[:-2], "TooSlow"),
        (post("/echo", "Content-Length: 9"), "TooSlow"),
    ],
)
def test_each_refusal_is_counted_once(hasty: BareServer, sent: bytes, reason: str) -> None:
    before = len(hasty.refused)
    assert b"HTTP/1.1 4" in ask(hasty, sent)
    assert hasty.refused[before:] == [reason]


# Half-closed connections


@pytest.mark.parametrize("request_", [GET, post("/echo", "Content-Length: 3", body=b"abc")], ids=["GET", "POST"])
def test_who_closes_only_their_end_is_answered(server: BareServer, request_: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(request_)
        connection.shutdown(socket.SHUT_WR)
        assert read_all(connection).partition(b"\r\n\r\n")[2] in (b"/path", b"abc")


def test_who_closes_only_their_end_may_wait(held: BareServer) -> None:
    with held.connect() as connection:
        connection.sendall(post("/wait", "Content-Length: 0"))
        connection.shutdown(socket.SHUT_WR)
        held.waiting.acquire()
        assert read_until(connection, b"100 Continue\r\n\r\n" * 1).startswith(b"HTTP/1.1 100")
        read_until(connection, b"100 Continue\r\n\r\n")
        read_until(connection, b"100 Continue\r\n\r\n")
        held.go_on.set()
        assert read_all(connection).endswith(b"done"), "and then the connection is closed"
    assert not held.left


@pytest.mark.parametrize("path", ["/wait", "/events"])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_who_is_gone_is_noticed(held: BareServer, path: str, version: str) -> None:
    with held.connect() as connection:
        connection.sendall(f"POST {path} HTTP/{version}\r\nHost: here\r\nContent-Length: 0\r\n\r\n".encode())
        assert held.waiting.acquire(timeout=60)
        if path == "/events":
            read_until(connection, b"first")
    wait_until(lambda: held.left == [path[1:]])
    wait_until(lambda: held.connections == 0)


def test_who_leaves_after_closing_their_end_is_noticed(held: BareServer) -> None:
    with held.connect() as connection:
        connection.sendall(post("/wait", "Content-Length: 0"))
        connection.shutdown(socket.SHUT_WR)
        read_until(connection, b"100 Continue\r\n\r\n")
    wait_until(lambda: held.left == ["wait"])


def test_who_closes_within_the_request_is_gone(server: BareServer) -> None:
    with server.connect() as connection:
        connection.sendall(post("/echo", "Content-Length: 10", body=b"abc"))
        connection.shutdown(socket.SHUT_WR)
        assert read_all(connection) == b""


def test_an_event_stream_goes_on_for_who_closes_their_end(held: BareServer) -> None:
    with held.connect() as connection:
        connection.sendall(b"GET /events HTTP/1.1\r\nHost: here\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        read_until(connection, b"\r\n:\n\n\r\n")  # a comment
        held.go_on.set()
        assert read_all(connection).endswith(b"data: last\n\n\r\n0\r\n\r\n")
    assert not held.left


# Refusals before the body


def flood(connection: socket.socket, piece: bytes) -> int:
    """Send until the connection is closed; the bytes that were taken."""
    sent = 0
    try:
        while sent < 2**30:
            connection.sendall(piece)
            sent += len(piece)
    except ConnectionError:
        pass
    return sent


@pytest.mark.parametrize("length", ["Transfer-Encoding: chunked", f"Content-Length: {2**33}"])
def test_a_refused_body_is_not_read(server: BareServer, length: str) -> None:
    with server.connect() as connection:
        connection.sendall(post("/refuse", length))
        answer = read_until(connection, b"no")
        assert b"HTTP/1.1 413" in answer
        assert b"connection: close" in answer
        assert flood(connection, b"10000\r\n" + b"a" * 2**16 + b"\r\n") < 32 * 2**20


def test_a_short_body_is_read_after_its_refusal(server: BareServer) -> None:
    with server.connect() as connection:
        connection.sendall(post("/refuse", "Content-Length: 1000000"))
        read_until(connection, b"no")
        connection.sendall(bytes(1_000_000) + CLOSING)
        assert read_all(connection).endswith(b"/path")


def test_an_expected_body_is_refused_before_it_is_sent(server: BareServer) -> None:
    answer = ask(server, post("/refuse", "Content-Length: 1000", "Expect: 100-continue"))
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in answer


def test_an_expected_body_is_asked_for(server: BareServer) -> None:
    with server.connect() as connection:
        connection.sendall(post("/echo", "Content-Length: 3", "Expect: 100-continue", "Connection: close"))
        assert read_until(connection, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"abc")
        assert read_all(connection).endswith(b"abc")


# Time limits


def test_silent_connections_are_closed(hasty: BareServer) -> None:
    assert ask(hasty) == b""


@pytest.mark.parametrize("start", [b"G", GET[:-2], GET + b"GET"], ids=["a letter", "headers", "a second request"])
def test_half_sent_headers_time_out(hasty: BareServer, start: bytes) -> None:
    check_closes(b"HTTP/1.1 " + ask(hasty, start).rpartition(b"HTTP/1.1 ")[2], b"408")


@pytest.mark.parametrize("length", ["Transfer-Encoding: chunked", "Content-Length: 9"])
def test_half_sent_bodies_time_out(hasty: BareServer, length: str) -> None:
    check_closes(ask(hasty, post("/echo", length, body=b"3\r\nab")), b"408")


def test_a_trickling_body_times_out(hasty: BareServer) -> None:
    with hasty.connect() as connection:
        connection.sendall(post("/echo", f"Content-Length: {2**20}"))
        connection.settimeout(0.05)
        received = b""
        while not received:
            connection.send(b"a")
            try:
                received = connection.recv(1000)
            except TimeoutError:
                continue
        check_closes(received, b"408")


def test_a_steady_body_is_given_time(hasty: BareServer) -> None:
    """Once: on a busy machine, this sender may be slow too."""
    pieces = [b"a" * 4096] * 8
    answers = (send_steadily(hasty, pieces) for _ in range(20))
    assert any(answer.endswith(b"".join(pieces)) for answer in answers)


def send_steadily(server: BareServer, pieces: Sequence[bytes]) -> bytes:
    """The answer to a body that is sent for twice the limit."""
    with server.connect() as connection, suppress(ConnectionError):
        connection.sendall(post("/echo", f"Content-Length: {sum(map(len, pieces))}", "Connection: close"))
        for piece in pieces:
            time.sleep(0.1)
            connection.sendall(piece)
        return read_all(connection)
    return b""


def test_an_idle_connection_is_closed(hasty: BareServer) -> None:
    assert ask(hasty, GET).endswith(b"/path")


def test_who_does_not_read_is_disconnected(hasty: BareServer) -> None:
    with hasty.connect() as connection:
        connection.sendall(b"GET /blob HTTP/1.1\r\nHost: here\r\n\r\n")
        wait_until(lambda: hasty.connections == 1)
        wait_until(lambda: hasty.connections == 0)
        assert len(read_all(connection)) < len(BLOB)


def test_who_does_not_read_events_is_disconnected(hasty: BareServer) -> None:
    with hasty.connect() as connection:
        connection.sendall(b"GET /flood HTTP/1.1\r\nHost: here\r\n\r\n")
        wait_until(lambda: hasty.left == ["flood"])
        assert len(read_all(connection)) < 64 * 2**20, "what the kernel buffers"


# Many connections


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_idle_connections_make_room(loop: str) -> None:
    with bare_server(Limits(connections=10), loop=loop) as server:
        silent = [server.connect() for _ in range(100)]
        with server.connect() as connection:
            connection.sendall(CLOSING)
            assert read_all(connection).endswith(b"/path")
        wait_until(lambda: server.connections <= 10)
        for one in silent:
            one.close()


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_connections_at_work_make_none(loop: str) -> None:
    with bare_server(Limits(connections=3), loop=loop) as server:
        working = [server.connect() for _ in range(3)]
        for one in working:
            one.sendall(post("/wait", "Content-Length: 0"))
            server.waiting.acquire()
        check_closes(ask(server), b"503")
        assert server.refused == ["TooManyConnections"]
        server.go_on.set()
        for one in working:
            assert read_until(one, b"done").startswith(b"HTTP/1.1 200")
            one.close()


# Stopping


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize(
    "start",
    [
        b"",
        GET[:-2],
        post("/echo", "Content-Length: 9", body=b"abc"),
        b"GET /blob HTTP/1.1\r\nHost: here\r\n\r\n",
    ],
    ids=["silent", "half-sent headers", "half-sent body", "slow reader"],
)
def test_nobody_delays_a_stop(loop: str, start: bytes) -> None:
    with bare_server(loop=loop) as server, server.connect() as connection:
        connection.sendall(start)
        wait_until(lambda: server.connections == 1)
        with server.connect() as other:  # which is answered: so the start has arrived
            other.sendall(CLOSING)
            read_all(other)
        server.stop(seconds=10)
        if b"POST" in start:
            check_closes(read_all(connection), b"503")
            assert server.refused == ["ConnectionStopping"]


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_who_waits_is_answered_while_the_server_stops(loop: str) -> None:
    with bare_server(loop=loop) as server, server.connect() as connection:
        connection.sendall(post("/wait", "Content-Length: 0"))
        server.waiting.acquire()
        server.server.should_exit = True
        wait_until(lambda: not server.server.servers[0].is_serving())
        server.go_on.set()
        assert read_all(connection).endswith(b"done")
