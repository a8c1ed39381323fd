"""The Compose file, and the files by which Grafana finds its data source and the dashboard."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from server.startup.settings import ServerSettings
from server.startup.stopping import GRACE_SECONDS
from tests import ROOT
from tests.tools.docker_image import stages

FOLDER = ROOT / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SERVERS = ["cpu", "gpu"]
each_service = pytest.mark.parametrize("name", SERVICES)
each_server = pytest.mark.parametrize("name", SERVERS)


def mounts(name: str) -> dict[str, str]:
    """The place in the container of each file or volume of a service."""
    return dict(mount.split(":")[:2] for mount in SERVICES[name].get("volumes", []))


def seconds(duration: str) -> int:
    found = re.fullmatch(r"(\d+)s", duration)
    assert found, f"{duration}: write seconds, which this test reads"
    return int(found[1])


def test_it_is_valid_by_the_compose_specification() -> None:
    compose_spec = pytest.importorskip("compose_spec", reason="install the extra dev")
    text = json.dumps(COMPOSE).replace("on-failure:5", "on-failure")  # the parser lacks the number of tries
    parsed = compose_spec.PyCompose.from_json(text)
    parsed.validate()
    assert set(parsed.service_names()) == set(SERVICES)
    with pytest.raises(ValueError, match="stop_grace_periods"):
        compose_spec.PyCompose.from_json(text.replace("stop_grace_period", "stop_grace_periods"))


def test_the_cpu_serves_unless_another_profile_is_asked_for() -> None:
    profiles = {name: service.get("profiles", []) for name, service in SERVICES.items()}
    assert profiles == {"cpu": [], "gpu": ["gpu"], "prometheus": ["monitoring"], "grafana": ["monitoring"]}


@each_server
def test_a_server_drains_before_docker_kills(name: str) -> None:
    service = SERVICES[name]
    drain = int(service["environment"]["LATENTD_DRAIN_SECONDS"])
    assert drain + GRACE_SECONDS < seconds(service["stop_grace_period"])


@each_server
def test_a_server_s_variables_are_settings(name: str) -> None:
    ours = {variable.removeprefix("LATENTD_").lower() for variable in SERVICES[name]["environment"]}
    assert ours <= ServerSettings.model_fields.keys()


@each_server
def test_a_server_is_built_from_a_stage_of_the_dockerfile(name: str) -> None:
    build = SERVICES[name]["build"]
    assert (FOLDER / build["context"] / "Dockerfile").exists()
    assert build.get("target", "cpu") in stages(ROOT / "Dockerfile")


def test_a_gpu_is_reserved_and_its_engines_outlive_the_container() -> None:
    (device,) = SERVICES["gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert mounts("gpu") == {"bundles": "/bundles"}


@each_service
def test_a_service_may_do_no_more_than_it_must(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


@each_service
def test_only_this_machine_can_connect(name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name]["ports"])


def test_no_two_services_have_one_port() -> None:
    ports = [port.split(":")[1] for service in SERVICES.values() for port in service["ports"]]
    assert len(set(ports)) == len(ports)


@each_service
def test_a_service_s_health_is_checked(name: str) -> None:
    """By the image where it is ours: see tests/test_dockerfile.py."""
    assert ("healthcheck" in SERVICES[name]) == ("build" not in SERVICES[name])


@each_service
def test_an_image_of_others_has_a_version(name: str) -> None:
    service = SERVICES[name]
    assert "build" in service or re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", service["image"])


@each_service
def test_what_is_mounted_is_there_or_a_volume(name: str) -> None:
    for source in mounts(name):
        assert (FOLDER / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]


def test_prometheus_reads_its_configuration_and_the_alerts() -> None:
    configuration = yaml.safe_load((FOLDER / "prometheus/compose.yml").read_text(encoding="utf-8"))
    found = {place: source for source, place in mounts("prometheus").items()}
    assert found["/etc/prometheus/prometheus.yml"] == "./prometheus/compose.yml"
    assert all(found[f"/etc/prometheus/{file}"] == f"./prometheus/{file}" for file in configuration["rule_files"])
    (scrape,) = configuration["scrape_configs"]
    (discovery,) = scrape["dns_sd_configs"]
    assert discovery["names"] == SERVERS
    assert all(SERVICES[name]["ports"][0].endswith(f":{discovery['port']}") for name in SERVERS)


def provisioning(kind: str) -> Any:
    (document,) = yaml.safe_load((FOLDER / f"grafana/provisioning/{kind}/latentd.yml").read_text(encoding="utf-8"))[
        "providers" if kind == "dashboards" else kind
    ]
    return document


def test_grafana_asks_prometheus_at_the_scrape_interval() -> None:
    scraped = yaml.safe_load((FOLDER / "prometheus/compose.yml").read_text(encoding="utf-8"))
    source = provisioning("datasources")
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == scraped["global"]["scrape_interval"]


def test_grafana_has_the_dashboard_and_its_data_source() -> None:
    found = mounts("grafana")
    assert found["./grafana/provisioning"] == "/etc/grafana/provisioning"
    assert found["./grafana/latentd.json"] == f"{provisioning('dashboards')['options']['path']}/latentd.json"
    dashboard = json.loads((FOLDER / "grafana/latentd.json").read_text(encoding="utf-8"))
    asked = [one["query"] for one in dashboard["templating"]["list"] if one["type"] == "datasource"]
    assert asked == [provisioning("datasources")["type"]]
