"""A profile for each size and bucket, with fixed sides, and shapes that the server's calls lie within."""

from __future__ import annotations

from engines.build.profiles import shapes
from engines.manifest import Manifest, Size


def test_the_denoising_has_a_profile_for_each_size_and_bucket(manifest: Manifest) -> None:
    made = shapes(manifest, "denoise")
    assert [(str(one.profile.size), one.profile.batch) for one in made] == [
        (size, rows) for size in ("32x32", "48x32") for rows in (2, 4, 8)
    ]
    inputs = {spec.name: spec for spec in manifest.graphs["denoise"].inputs}
    least, best, largest = made[4].of(inputs["state"])
    assert (least, best, largest) == ((1, 5, 4, 16, 24), (9, 5, 4, 16, 24), (9, 5, 4, 16, 24))
    assert made[4].of(inputs["guidance"]) == ((1, 1), (4, 4), (4, 4))
    assert made[4].of(inputs["coef"]) == ((1, 5, 6), (4, 5, 6), (4, 5, 6))


def test_decoding_has_a_profile_for_each_batch(manifest: Manifest) -> None:
    several = manifest.model_copy(update={"decode_batch": 3, "resolutions": (Size(width=64, height=32),)})
    (slot,) = (spec for spec in manifest.graphs["decode"].inputs if spec.name == "slot")
    assert [one.of(slot) for one in shapes(several, "decode")] == [((n,), (n,), (n,)) for n in (1, 2, 3)]


def test_the_pools_of_the_server_lie_within(manifest: Manifest) -> None:
    """It allocates as many slots and context rows as the manifest says, and steps up to the largest bucket."""
    made = shapes(manifest, "denoise")[-1]
    assert made.dims["S"][2] == manifest.slots == manifest.max_rows + 1
    assert made.dims["C"][2] == manifest.context_rows >= manifest.max_rows
    assert made.dims["R"][2] == manifest.max_rows
