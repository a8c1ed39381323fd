"""Which replicas may take a request. Serve's class of replicas is replaced, where a cluster would be."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

from latentd_serve.forwarding import ForwardedRequest, Wanted
from latentd_serve.routing import HoldersFirst, ranks, two_of
from ray.serve.request_router import PendingRequest, RunningReplica


def _replica(name: str, models: Sequence[str] = ("sd",), loras: Sequence[str] = ()) -> RunningReplica:
    stats = {"models": list(models), "loras": list(loras)}
    made = SimpleNamespace(replica_id=SimpleNamespace(unique_id=name), routing_stats=stats)
    return cast(RunningReplica, made)


def _names(rank: Sequence[RunningReplica]) -> set[str]:
    return {one.replica_id.unique_id for one in rank}


def test_those_that_hold_the_model_and_loras_come_first_then_the_model_then_all() -> None:
    replicas = [_replica("a"), _replica("b", ["sd", "xl"]), _replica("c", ["sd", "xl"], ["ink"]), _replica("d")]
    found = ranks(replicas, Wanted("xl", ("ink",)))
    assert [_names(rank) for rank in found[:2]] == [{"c"}, {"b", "c"}]
    assert len(found) == 3
    assert len(found[2]) == 2


def test_the_default_model_is_that_of_every_replica() -> None:
    replicas = [_replica("a"), _replica("b", ["sd"], ["ink"])]
    assert _names(ranks(replicas, Wanted())[0]) == {"a", "b"}
    assert _names(ranks(replicas, Wanted("", ("ink",)))[0]) == {"b"}


def test_a_model_that_none_holds_goes_to_the_same_replica_from_every_ingress() -> None:
    replicas = [_replica(name) for name in "abcdef"]
    first = ranks(replicas, Wanted("xl"))[0]
    assert len(first) == 1
    assert all(ranks(replicas[::-1], Wanted("xl"))[0] == first for _ in range(20))
    assert len({_names(ranks(replicas, Wanted(f"model-{one}"))[0]).pop() for one in range(50)}) > 3


def test_a_replica_that_has_not_reported_yet_is_a_candidate() -> None:
    new = cast(RunningReplica, SimpleNamespace(replica_id=SimpleNamespace(unique_id="n"), routing_stats={}))
    assert new in ranks([new], Wanted("xl"))[0]


def test_two_are_chosen_by_chance_of_many() -> None:
    replicas = [_replica(name) for name in "abcdef"]
    pairs = {frozenset(_names(two_of(replicas))) for _ in range(200)}
    assert all(len(pair) == 2 for pair in pairs)
    assert len(pairs) > 5


def test_the_router_reads_what_is_wanted_from_the_forwarded_request() -> None:
    router = object.__new__(HoldersFirst)
    replicas = [_replica("a"), _replica("b", ["sd", "xl"])]
    request = ForwardedRequest(scope={}, body=b"", wanted=Wanted("xl"))
    pending = cast(PendingRequest, SimpleNamespace(args=[request]))
    found: Any = asyncio.run(router.choose_replicas(replicas, pending))
    assert _names(found[0]) == {"b"}
    assert _names(asyncio.run(router.choose_replicas(replicas))[0]) == {"a", "b"}


def test_a_retry_does_not_go_to_the_replica_that_was_lost_unless_there_is_no_other() -> None:
    router = object.__new__(HoldersFirst)
    replicas = [_replica("a"), _replica("b")]
    pending = cast(PendingRequest, SimpleNamespace(args=[ForwardedRequest(scope={}, body=b"", lost="a")]))
    assert _names(asyncio.run(router.choose_replicas(replicas, pending))[-1]) == {"b"}
    assert _names(asyncio.run(router.choose_replicas(replicas[:1], pending))[-1]) == {"a"}
