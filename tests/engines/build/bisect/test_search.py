"""The bisection alone, over graphs whose faults are known."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import pytest

from engines.build.bisect.search import MARKS, first_divergent

Inputs = Mapping[int, Sequence[int]]  # by node: earlier ones that it reads


def bits(inputs: Inputs) -> dict[str, int]:
    sets: list[int] = []
    for node in sorted(inputs):
        inherited = 0
        for earlier in inputs[node]:
            inherited |= sets[earlier]
        sets.append(inherited | 1 << node)
    return {str(node): found for node, found in enumerate(sets)}


def search(inputs: Inputs, faults: Sequence[int]) -> tuple[str, list[int]]:
    """What is found, and how many tensors each round measured. A tensor differs if a fault leads to it."""
    ancestors = bits(inputs)
    faulty = sum(1 << fault for fault in faults)
    last, rounds = str(max(inputs)), list[int]()

    def passes(tensors: Sequence[str]) -> dict[str, bool]:
        rounds.append(len(tensors))
        return {name: not ancestors[name] & faulty for name in (*tensors, last)}  # outputs come along

    assert not passes([])[last]
    return first_divergent(ancestors, [last], passes), rounds[1:]


CHAIN: Inputs = {node: [node - 1] if node else [] for node in range(1000)}


@pytest.mark.parametrize("fault", [0, 1, 62, 500, 998, 999])
def test_a_fault_in_a_chain_is_found_in_a_few_rounds(fault: int) -> None:
    found, rounds = search(CHAIN, [fault])
    assert found == str(fault)
    assert len(rounds) <= 4
    assert max(rounds) <= MARKS


def test_of_two_faults_the_first_is_found() -> None:
    assert search(CHAIN, [700, 300])[0] == "300"


def test_a_fault_on_one_of_two_branches_is_found_though_later_tensors_of_the_other_agree() -> None:
    branches = {node: [max(node - 2, 0)] if node else [] for node in range(400)} | {400: [398, 399]}
    assert search(branches, [5])[0] == "5"
    assert search(branches, [6, 301])[0] == "6"
    assert search(branches, [301])[0] == "301"


@pytest.mark.parametrize("seed", range(20))
def test_the_first_of_any_faults_in_any_graph_is_found(seed: int) -> None:
    dice = random.Random(seed)
    inputs = {node: dice.sample(range(node), min(node, dice.randint(1, 3))) for node in range(300)}
    faults = [fault for fault in dice.sample(range(300), 4) if bits(inputs)["299"] >> fault & 1]
    if faults:
        assert search(inputs, faults)[0] == str(min(faults))
