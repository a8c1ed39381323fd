"""What `/metrics` has before anything happened, and whether the documents tell of it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

from server.requests.context import APIS
from server.requests.errors import STATUS, BrokenPicture, ContentBlocked, QueueFull, StepFailed
from server.runtime.monitoring.gpu import GpuMetrics
from server.runtime.monitoring.metrics import Metrics
from tests import ROOT
from tests.server.runtime.monitoring.fake_nvml import GPU, FakeNvml
from tests.support.serving import Serving

NAME = re.compile(r"`((?:latentd|process)_[a-z_]+)`")

OUTCOMES = ("completed", "failed", "cancelled", "blocked")


def samples(metrics: Metrics) -> Mapping[tuple[str, ...], float]:
    """Values by name and label values."""
    families = text_string_to_metric_families(metrics.render().decode())
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_outcomes_and_refusals_have_their_series_before_the_first() -> None:
    found = samples(Metrics(max_rows=2, models=["a", "b"]))
    outcomes = {name[1:]: value for name, value in found.items() if name[0] == "latentd_requests_total"}
    assert outcomes == {(api, model, outcome): 0 for api in APIS for outcome in OUTCOMES for model in "ab"}
    reasons = {name[1]: value for name, value in found.items() if name[0] == "latentd_requests_rejected_total"}
    assert reasons == {
        error.__name__: 0 for error in STATUS if error not in (StepFailed, BrokenPicture, ContentBlocked)
    }
    assert found["latentd_prompt_lookups_total", "miss"] == 0


def test_a_refusal_is_counted_in_its_series() -> None:
    metrics = Metrics(max_rows=2)
    metrics.rejected(QueueFull("64 requests are waiting: try again later."))
    assert samples(metrics)["latentd_requests_rejected_total", "QueueFull"] == 1


def test_a_counter_that_somebody_else_keeps_is_read_at_every_scrape() -> None:
    metrics, kept = Metrics(max_rows=2), iter([3, 5])
    metrics.add_counter("latentd_somethings", "Things.", lambda: next(kept))
    assert samples(metrics)["latentd_somethings_total",] == 3
    assert samples(metrics)["latentd_somethings_total",] == 5


def test_calls_without_a_graph_are_read_at_every_scrape() -> None:
    metrics, kept = Metrics(max_rows=2), {"denoise": 0, "decode": 1}
    metrics.watch_captures(lambda: kept)
    assert samples(metrics)["latentd_uncaptured_calls", "denoise"] == 0
    kept["denoise"] = 2
    assert samples(metrics)["latentd_uncaptured_calls", "denoise"] == 2
    assert samples(metrics)["latentd_uncaptured_calls", "decode"] == 1


def of_a_gpu() -> Metrics:
    metrics = Metrics(max_rows=2)
    metrics.add_collector(GpuMetrics(GPU, FakeNvml()))
    return metrics


def test_the_documents_name_each_metric_and_no_others(serving: Serving) -> None:
    """A counter by the name that is queried, which ends in _total; anything else by its family's."""
    section = (ROOT / "docs/operation.md").read_text(encoding="utf-8").partition("## Metrics")[2].partition("\n## ")[0]
    documented = {
        name for row in section.splitlines() if row.startswith("| `") for name in NAME.findall(row.split("|")[1])
    }
    families = list(text_string_to_metric_families(serving.client.get("/metrics").text))
    families += text_string_to_metric_families(of_a_gpu().render().decode())
    exported = {f"{family.name}_total" if family.type == "counter" else family.name for family in families}
    assert {name for name in exported if not name.endswith("_created")} == documented
    assert all(family.documentation.endswith(".") for family in families)
