"""The metrics of all replicas as one page, each sample labelled with its replica."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.types import Message


def merged_metrics(answers: Sequence[tuple[str, Sequence[Message]]]) -> list[Message]:
    """The response to `GET /metrics`, of the names of replicas and their responses."""
    registry = CollectorRegistry()
    registry.register(_Merged(answers))
    body = generate_latest(registry)
    start, *_ = answers[0][1]
    headers = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
    start = {**start, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
    return [start, {"type": "http.response.body", "body": body, "more_body": False}]


class _Merged(Collector):
    def __init__(self, answers: Iterable[tuple[str, Sequence[Message]]]) -> None:
        self._pages = [(name, b"".join(one.get("body", b"") for one in messages)) for name, messages in answers]

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for name, page in self._pages:
            for family in text_string_to_metric_families(page.decode()):
                merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    merged.samples.append(sample._replace(labels={**sample.labels, "replica": name}))
        yield from families.values()
