"""Which replicas may take a request: those that hold its model and LoRAs first. Among them Serve balances."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from latentd_serve.forwarding import ForwardedRequest, Wanted

MODELS, LORAS = "models", "loras"  # what replicas report that they hold


class HoldersFirst(FIFOMixin, RequestRouter):
    """Power of two choices among the replicas that hold most of what a request wants, then among all.

    Serve's multiplexing has a list of its own of what a replica has loaded, which our eviction by memory and
    administrators' unloading would make wrong, and one id per request, where a request has a model and LoRAs. Here
    replicas report what they hold.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of candidates: Serve takes the less loaded replica of the first rank that has room."""
        request = _forwarded(pending_request)
        if request is None:
            return [two_of(candidate_replicas)]
        others = [one for one in candidate_replicas if one.replica_id.unique_id != request.lost]
        return ranks(others or candidate_replicas, request.wanted)


def ranks(replicas: Sequence[RunningReplica], wanted: Wanted) -> list[list[RunningReplica]]:
    """Two of those that hold the model and LoRAs, of those that hold the model, and of all.

    Where none holds the model, the first is the same one for every ingress, so that it is loaded once.
    """
    with_model = [one for one in replicas if not wanted.model or wanted.model in one.routing_stats.get(MODELS, ())]
    if not with_model and replicas:
        return [[_own(replicas, wanted.model)], two_of(replicas)]
    loras = set(wanted.loras)
    with_loras = [one for one in with_model if loras <= set(one.routing_stats.get(LORAS, ()))] if loras else []
    return [two_of(one) for one in (with_loras, with_model, replicas) if one]


def two_of(replicas: Sequence[RunningReplica]) -> list[RunningReplica]:
    """At most two, by chance."""
    return random.sample(replicas, min(2, len(replicas)))


def _own(replicas: Sequence[RunningReplica], model: str) -> RunningReplica:
    """Rendezvous hashing: every ingress chooses the same replica for a model."""
    return max(replicas, key=lambda one: hashlib.sha256(f"{model} {one.replica_id.unique_id}".encode()).digest())


def _forwarded(pending: PendingRequest | None) -> ForwardedRequest | None:
    arguments: Sequence[Any] = pending.args if pending else ()
    request = arguments[0] if arguments else None
    return request if isinstance(request, ForwardedRequest) else None
