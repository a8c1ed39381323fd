"""Several servers behind one URL: whose metrics are read, and what is said where that is unknown."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from engines.demo import BUNDLE as DEMO
from loadtest import __main__ as command
from loadtest.analysis.results import LoadTestSummary
from loadtest.client import LoadTestError, ServerClient, read_metrics, sum_of
from tests.support.proxies import proxied
from tests.support.serving import Serving


@contextmanager
def answering(processes: Sequence[float], *, version: str = "1") -> Iterator[str]:
    """The URL of a server whose answers come from one of `processes` after the other."""
    turns = itertools.cycle(processes)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answers = {
                "/metrics": f"process_start_time_seconds {next(turns)}\nlatentd_requests_running 2\n",
                "/openapi.json": json.dumps({"info": {"version": version}}),
            }
            content = answers[self.path].encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Nothing is logged."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_metrics_of_servers_that_take_turns_are_not_mixed() -> None:
    """Another process at each look would otherwise seem to be a server that was started again."""

    async def look(url: str) -> tuple[str | None, bool]:
        async with ServerClient(url, timeout=5) as client:
            return await client.why_no_metrics(), await client.scrape() is None

    with answering([1.0, 2.0]) as two, answering([1.0]) as one:
        assert asyncio.run(look(two)) == (f"Several servers answer at {two}", True)
        assert asyncio.run(look(one)) == (None, False)


def test_metrics_of_servers_that_are_named_are_added_up() -> None:
    async def look(url: str, servers: Sequence[str]) -> tuple[float, tuple[float | None, ...]]:
        async with ServerClient(url, timeout=5, servers=servers) as client:
            assert await client.why_no_metrics() is None
            scrape = await client.scrape()
            assert scrape is not None
            return scrape.gauges["latentd_requests_running"], scrape.processes

    with answering([1.0]) as first, answering([2.0]) as second:
        assert asyncio.run(look(first, [first, second])) == (4.0, (1.0, 2.0))


def test_steps_of_all_servers_count() -> None:
    texts = [
        f'latentd_step_rows_bucket{{le="2"}} {count}\nlatentd_step_rows_bucket{{le="+Inf"}} {count}\n'
        for count in (1, 4)
    ]
    assert sum_of([read_metrics(text) for text in texts]).step_rows[2.0] == 5


def test_servers_of_different_versions_are_not_measured_as_one() -> None:
    async def ask(servers: Sequence[str]) -> str | None:
        async with ServerClient(servers[0], timeout=5, servers=servers) as client:
            return await client.version()

    with answering([1.0]) as first, answering([2.0]) as same, answering([3.0], version="2") as other:
        assert asyncio.run(ask([first, same])) == "1"
        with pytest.raises(LoadTestError, match=f"{first} and {other} have different versions"):
            asyncio.run(ask([first, other]))


def test_two_servers_behind_nginx(tmp_path: Path) -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(Serving(DEMO)) for _ in range(2)]
        url = stack.enter_context(proxied("nginx", tmp_path, *(server.url for server in servers)))
        words = ["--url", url, "--rate", "6", "--steps", "1", "--duration", "2", "--warm-up", "0", "--slo", "60"]
        named = itertools.chain.from_iterable(("--server", server.url) for server in servers)
        command.main([*words, *named, "--out", str(tmp_path / "named")])
        command.main([*words, "--out", str(tmp_path / "unnamed")])
        asked = [server.total("latentd_requests_total") for server in servers]
    known, unknown = (
        LoadTestSummary.model_validate_json((tmp_path / name / "summary.json").read_bytes())
        for name in ("named", "unnamed")
    )
    assert all(asked)
    assert known.servers == tuple(server.url for server in servers)
    assert sum(known.points[0].step_rows.values()) > 0
    assert not any("metrics" in note for note in known.notes)
    assert unknown.points[0].step_rows == {}
    assert any(f"{url} has no metrics" in note and "--server" in note for note in unknown.notes)
