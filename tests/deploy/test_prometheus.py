"""The scrape configurations and the alerts, with the real Prometheus and promtool."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from engines.demo import BUNDLE
from server.access import keys
from tests import ROOT
from tests.support.bare_server import wait_until
from tests.support.ports import free_ports
from tests.support.programs import program
from tests.support.serving import Serving

FOLDER = ROOT / "deploy/prometheus"
UNIT_TESTS = ROOT / "tests/deploy/alerts_test.yml"
CONFIGURATIONS = ["prometheus.yml", "compose.yml"]
KEY = "    # authorization:\n    #   credentials_file: /etc/prometheus/latentd.key\n"


def promtool(*arguments: str, given: str | None = None) -> str:
    """The output of `promtool`, which has to be content."""
    command = [program("promtool"), *arguments]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603 - our own command
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_configuration_and_its_rules_are_valid(name: str) -> None:
    rules = [rule for group in read(FOLDER / "alerts.yml")["groups"] for rule in group["rules"]]
    assert f"SUCCESS: {len(rules)} rules found" in promtool("check", "config", str(FOLDER / name))


def test_the_configurations_differ_in_where_servers_are_found() -> None:
    plain, compose = (read(FOLDER / name) for name in CONFIGURATIONS)
    assert plain["scrape_configs"][0].pop("static_configs")
    assert compose["scrape_configs"][0].pop("dns_sd_configs")
    assert plain == compose


def test_alerts_fire_when_they_should_and_only_then() -> None:
    assert "SUCCESS" in promtool("test", "rules", str(UNIT_TESTS))


def test_every_alert_has_a_case_in_which_it_fires() -> None:
    defined = {rule["alert"] for group in read(FOLDER / "alerts.yml")["groups"] for rule in group["rules"]}
    expected = "".join(
        sample["labels"]
        for case in read(UNIT_TESTS)["tests"]
        for test in case.get("promql_expr_test", [])
        for sample in test["exp_samples"]
    )
    fired = {
        test["alertname"]
        for case in read(UNIT_TESTS)["tests"]
        for test in case.get("alert_rule_test", [])
        if test["exp_alerts"]
    }
    assert {alert for alert in defined if f'alertname="{alert}"' not in expected} <= fired


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server that asks for keys; its `client` is the administrator."""
    key, file = keys.new_key(), tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(keys.entry("prometheus", key, admin=True))
    with Serving(BUNDLE, "--api-keys", str(file)) as running:
        running.client.headers["X-API-Key"] = key
        yield running


def test_promtool_has_nothing_to_say_about_the_metrics(keyed: Serving) -> None:
    assert keyed.generate(prompt="a red heart", num_inference_steps=1).status_code == 200
    assert not promtool("check", "metrics", given=keyed.client.get("/metrics").text)


@contextmanager
def prometheus(configuration: str, folder: Path) -> Iterator[httpx.Client]:
    """A Prometheus with this configuration beside our alerts, and a client of its API."""
    (folder / "prometheus.yml").write_text(configuration, encoding="utf-8")
    (folder / "alerts.yml").write_bytes((FOLDER / "alerts.yml").read_bytes())
    address = f"127.0.0.1:{free_ports(1)[0]}"
    options = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command = [program("prometheus"), *options, f"--web.listen-address={address}"]
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, stderr=log, cwd=folder) as process,  # noqa: S603 - our own command
        httpx.Client(base_url=f"http://{address}/api/v1", transport=httpx.HTTPTransport(retries=8)) as client,
    ):
        try:
            yield client
        finally:
            process.terminate()


def test_a_server_that_asks_for_keys_is_scraped(keyed: Serving, tmp_path: Path) -> None:
    def found() -> dict[str, str]:
        """The value by instance of the series that say that a server is ready."""
        answer = client.get("/query", params={"query": "latentd_ready"})
        series = answer.json()["data"]["result"] if answer.is_success else []
        return {one["metric"]["instance"]: one["value"][1] for one in series}

    key_file = tmp_path / "latentd.key"
    key_file.write_text(keyed.client.headers["X-API-Key"])
    instance = keyed.url.removeprefix("http://")
    replaced = {
        "127.0.0.1:8000": instance,
        "scrape_interval: 15s": "scrape_interval: 1s",
        KEY: KEY.replace("# ", "").replace("/etc/prometheus/latentd.key", str(key_file)),
    }
    configuration = (FOLDER / "prometheus.yml").read_text(encoding="utf-8")
    for old, new in replaced.items():
        assert old in configuration
        configuration = configuration.replace(old, new)
    with prometheus(configuration, tmp_path) as client:
        wait_until(lambda: found() == {instance: "1"})
        rules = client.get("/rules").json()["data"]["groups"]
        assert {rule["name"] for rule in rules[0]["rules"]} >= {"LatentdNotReady"}
