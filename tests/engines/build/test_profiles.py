"""A profile for each size and bucket, with fixed sides, and shapes that the server's calls lie within."""

from __future__ import annotations

import pytest

from engines.build.profiles import shapes
from engines.contract import LORA_GRAPHS, STEPS, GraphName
from engines.manifest import LoraCapacity, Manifest, Size
from engines.row_buckets import step_buckets


def test_the_denoising_has_a_profile_for_each_size_and_bucket(manifest: Manifest) -> None:
    made = shapes(manifest, "denoise")
    assert [(str(one.profile.size), one.profile.batch) for one in made] == [
        (size, rows) for size in ("32x32", "48x32") for rows in (2, 4, 8)
    ]
    inputs = {spec.name: spec for spec in manifest.graphs["denoise"].inputs}
    least, best, largest = made[4].of(inputs["state"])
    assert least == best == largest == (9, 5, 4, 16, 24)
    assert made[3].of(inputs["guidance"]) == ((2, 2), (2, 2), (2, 2))
    assert made[4].of(inputs["guidance"]) == ((3, 3), (4, 4), (4, 4))
    assert made[5].of(inputs["coef"]) == ((5, 5, 6), (8, 5, 6), (8, 5, 6))
    assert made[5].of(inputs["row_context"]) == ((5, 1), (8, 1), (8, 6))


def test_decoding_has_a_profile_for_each_batch(manifest: Manifest) -> None:
    several = manifest.model_copy(update={"decode_batch": 3, "resolutions": (Size(width=64, height=32),)})
    (slot,) = (spec for spec in manifest.graphs["decode"].inputs if spec.name == "slot")
    assert [one.of(slot) for one in shapes(several, "decode")] == [((n,), (n,), (n,)) for n in (1, 2, 3)]


@pytest.mark.parametrize("graph", STEPS)
def test_every_step_that_is_captured_lies_in_one_profile_with_the_pools_as_they_are(
    manifest: Manifest, graph: GraphName
) -> None:
    sizes = manifest.dims(manifest.resolutions[0])
    for bucket in step_buckets(manifest.rows):
        bound = {**sizes, "B": bucket.rows, "R": bucket.rows, "L": bucket.chunks, "n": bucket.rows}
        fitting = [
            one.profile.batch
            for one in shapes(manifest, graph)
            if all(least <= bound[dim] <= largest for dim, (least, _, largest) in one.dims.items())
        ]
        assert fitting == [min(rows for rows in manifest.rows if rows >= bucket.rows)]


def test_graphs_that_apply_loras_take_the_whole_pool_and_few_or_many_ranks_a_row(manifest: Manifest) -> None:
    with_loras = manifest.model_copy(update={"lora": LoraCapacity(slots=4, rank=8)})
    for name, variant in LORA_GRAPHS.items():
        for before, made in zip(shapes(with_loras, name), shapes(with_loras, variant), strict=True):
            assert made.profile == before.profile
            assert made.dims == {**before.dims, "Q": (33, 33, 33), "A": (4, 4, 16)}
        assert shapes(with_loras, name) == shapes(manifest, name)


def test_decoding_reads_the_staging_pool(manifest: Manifest) -> None:
    (state,) = (spec for spec in manifest.graphs["decode"].inputs if spec.name == "state")
    assert {shape[0] for shape in shapes(manifest, "decode")[0].of(state)} == {manifest.max_rows}
