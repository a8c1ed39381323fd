"""Mixes of requests and their schedule."""

from __future__ import annotations

import pytest

from loadtest.analysis.results import LoadLevel
from loadtest.generator import request_schedule
from loadtest.mix import Mix, MixEntry, MixError, Wanted, abridged, plain_entries, read_entries


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ('{"prompt": "a"}\n{"prompt"', "Line 2 .* not valid JSON"),
        ('["a"]', "Line 1 .* not a JSON object"),
        ('{"prompt": "a", "weight": 0}', "weight is 0"),
        ('{"prompt": "a", "weight": "2"}', "weight is '2'"),
        ('{"prompt": "a", "weight": NaN}', "weight is nan"),
        ('\n{"num_inference_steps": 3}', "Line 2 .* no prompt"),
    ],
)
def test_invalid_line_is_named(text: str, message: str) -> None:
    with pytest.raises(MixError, match=message):
        read_entries(text)


def test_entries_are_drawn_by_weight_and_reproducibly() -> None:
    entries = read_entries('{"prompt": "a", "weight": 3}\n\n{"prompt": "b", "scheduler": "ddim"}')
    assert [(entry.name, entry.weight) for entry in entries] == [("line 1", 3), ("line 3", 1)]
    mix, again = Mix(entries, 1), Mix(entries, 1)
    picks = [mix.pick(number) for number in range(2000)]
    assert picks == [again.pick(number) for number in range(2000)]
    assert 0.70 < picks.count(0) / len(picks) < 0.80
    assert mix.mean([1.0, 5.0]) == 2.0


def test_seeds_differ_unless_given() -> None:
    mix = Mix((*plain_entries(Wanted(["a"], 3)), MixEntry(name="b", weight=1, fields={"prompt": "b", "seed": 5})), 7)
    first, second = (mix.fields(0, number) for number in (0, 1))
    assert first["seed"] != second["seed"]
    assert first == {"prompt": "a", "num_inference_steps": 3, "seed": first["seed"]}
    assert mix.fields(1, 0)["seed"] == 5


def test_models_and_loras_are_mixed() -> None:
    """An entry for each; a weight is what stands behind the last colon, if it is a number."""
    entries = plain_entries(Wanted(["a"], 3, models=["one", "two"], loras=["style:0.5", "a:b", "c"]))
    assert [(entry.fields["model"], entry.fields["loras"]) for entry in entries] == [
        (model, [lora])
        for model in ("one", "two")
        for lora in ({"name": "style", "weight": 0.5}, {"name": "a:b"}, {"name": "c"})
    ]
    assert len({entry.name for entry in entries}) == 6
    assert [entry.fields for entry in plain_entries(Wanted(["a"]))] == [{"prompt": "a"}]


def test_long_fields_are_abridged() -> None:
    assert abridged({"prompt": "a", "image": "x" * 1000}) == {"prompt": "a", "image": "(1000 characters)"}


def test_arrivals_are_poisson_and_reproducible() -> None:
    load, mix = LoadLevel(rate=20, warm_up=10, seconds=90), Mix(plain_entries(Wanted(["a", "b"])), 3)
    schedule = list(request_schedule(load, mix))
    assert schedule == list(request_schedule(load, mix))
    assert len(schedule) == pytest.approx(2000, rel=0.1)
    assert all(request.due < load.end for request in schedule)
    assert {request.entry for request in schedule} == {0, 1}
