"""The scans of a JPEG file: those of the image, not those of a thumbnail before it or of a file behind it."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.requests.errors import InvalidRequest
from server.requests.jpeg import too_many_scans
from server.requests.uploads import MAX_FILE, MAX_SCANS, read
from tests.support.image_files import noise, saved

BASELINE = saved(noise(), "jpeg")
PROGRESSIVE = saved(noise(), "jpeg", progressive=True)
SCANS = b"\xff\xda" * (MAX_SCANS + 1)


def last_scan(content: bytes) -> bytes:
    return content[content.rfind(b"\xff\xda") : -2]


def many(content: bytes, scans: int) -> bytes:
    """`content`, with so many more scans."""
    return content[:-2] + last_scan(content) * scans + content[-2:]


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2) + content


@pytest.mark.parametrize(
    "content",
    [
        BASELINE + SCANS,
        PROGRESSIVE + PROGRESSIVE * MAX_SCANS,
        BASELINE + np.random.default_rng(5).bytes(MAX_FILE - len(BASELINE)),
        BASELINE[:2] + segment(0xE1, b"Exif\0\0" + SCANS) + BASELINE[2:],
        PROGRESSIVE[: PROGRESSIVE.rfind(b"\xff\xda")] + segment(0xFE, SCANS) + last_scan(PROGRESSIVE) + b"\xff\xd9",
        BASELINE[:2] + b"\xff" * 9 + BASELINE[2:],
        many(PROGRESSIVE, MAX_SCANS - 20),
    ],
    ids=["markers behind", "images behind", "a video behind", "EXIF", "a comment between scans", "fill", "54 scans"],
)
def test_only_the_scans_of_the_image_count(content: bytes) -> None:
    assert read(content, field="image").size == noise().size


@pytest.mark.parametrize(
    "content",
    [
        many(PROGRESSIVE, MAX_SCANS),
        # An end of image within a comment ends nothing.
        PROGRESSIVE[:-2] + segment(0xFE, b"\xff\xd9") + last_scan(PROGRESSIVE) * MAX_SCANS + b"\xff\xd9",
        # Nor does a restart marker, or a zero behind 0xFF.
        PROGRESSIVE[:-2] + b"\xff\xd0\xff\0" + last_scan(PROGRESSIVE) * MAX_SCANS,
        PROGRESSIVE[:-2] + segment(0xFE, b"") * 30_000 + last_scan(PROGRESSIVE) * MAX_SCANS,
    ],
    ids=["scans", "behind a comment", "behind a restart", "behind 30,000 comments"],
)
def test_an_image_of_many_scans_is_rejected(content: bytes) -> None:
    with pytest.raises(InvalidRequest, match="more than 64 scans"):
        read(content, field="image")


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.binary(max_size=5) | st.sampled_from([b"\xff\xd8", b"\xff\xda", b"\xff", b"\xff\xe1\xff\xff", b"\0\2"])
    ).map(b"".join)
)
def test_any_bytes_are_walked(content: bytes) -> None:
    assert too_many_scans(content, MAX_SCANS) in (True, False)
    assert not too_many_scans(content, content.count(b"\xda"))


def test_twelve_megabytes_of_markers_are_walked_at_once() -> None:
    for crumb in (b"\xff\x01", b"\xff\xfe\0\2", b"\xff\xd8"):
        assert too_many_scans(crumb * (MAX_FILE // len(crumb)), MAX_SCANS)
    assert not too_many_scans(b"\xff\xd8" + b"\xff" * MAX_FILE, MAX_SCANS)
    assert not too_many_scans(b"\xff\xd8" + b"\xff\0" * (MAX_FILE // 2), MAX_SCANS)
    assert not too_many_scans(PIL.Image.new("RGB", (1, 1)).tobytes(), MAX_SCANS)
