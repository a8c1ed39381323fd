"""The markers of a JPEG file (ITU T.81, annex B), without decoding it."""

from __future__ import annotations

import re

# Within the data of a scan 0xFF is followed by 0 or by a restart marker. More 0xFF before a marker are fill, of which
# only the last is matched: a repetition would begin again at each of twelve million.
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
_TEMPORARY, _START, _END, _SCAN = 0x01, 0xD8, 0xD9, 0xDA
_MAX_MARKERS = 20_000  # empty segments cost four bytes each; a file of ten scans has some tens


def too_many_scans(content: bytes, most: int) -> bool:
    """Whether the image has more than `most` scans, or too many segments to tell.

    What follows the image, as some cameras append a video or a preview, and a thumbnail in its header do not count.
    """
    at = scans = 0
    for _ in range(_MAX_MARKERS):
        marker = _MARKER.search(content, at)
        if marker is None or marker[1][0] == _END:
            return False
        at = marker.end()
        if marker[1][0] not in (_TEMPORARY, _START):
            at += int.from_bytes(content[at : at + 2])
        scans += marker[1][0] == _SCAN
        if scans > most:
            return True
    return True
