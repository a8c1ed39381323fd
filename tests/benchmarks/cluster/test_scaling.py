"""Real servers behind nginx: its configuration, and what the benchmark writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.cluster import scaling
from benchmarks.cluster.nginx import CONFIGURATION, configuration
from benchmarks.cluster.scaling import ScalingResults
from tests.support.programs import program

SERVERS = ["http://127.0.0.1:5001", "http://127.0.0.1:5002", "http://127.0.0.1:5003"]


def test_the_servers_take_the_place_of_those_in_the_configuration() -> None:
    text = configuration(CONFIGURATION.read_text(), SERVERS, port=5000)
    upstream = text.partition("upstream latentd {")[2].partition("\n}")[0]
    for server in SERVERS:
        assert f"server {server.removeprefix('http://')} max_fails" in upstream
    assert upstream.count("    server ") == len(SERVERS)
    assert "least_conn" in upstream
    assert "listen 127.0.0.1:5000;" in text


def test_a_configuration_without_servers_is_an_error() -> None:
    with pytest.raises(ValueError, match="no line"):
        configuration("upstream latentd {}", SERVERS, port=5000)


@pytest.mark.faults
def test_two_servers_of_timed_steps_complete_more_than_one(tmp_path: Path) -> None:
    """Three servers are started one after the other, and six loads of seconds each."""
    program("nginx")
    out = tmp_path / "scaling.json"
    assert scaling.main(["--out", str(out), "--device", "timed", "--servers", "2", "--seconds", "4"]) == 0
    found = ScalingResults.model_validate_json(out.read_bytes())
    alone, two = found.arrangements
    assert (alone.front, two.front) == ("none", "nginx")
    assert two.closed.images_per_second > 1.5 * alone.closed.images_per_second
    assert min(two.closed.by_server) > 0.7 * max(two.closed.by_server)
    assert two.open.without_image == 0
