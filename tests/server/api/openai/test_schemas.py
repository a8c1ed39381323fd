"""Bodies of OpenAI's API as requests to `/generate`."""

from __future__ import annotations

import pytest

from server.api.openai.schemas import GenerationsBody
from server.requests.depths import Cache


@pytest.mark.parametrize("cache", [None, "off", "fast", "faster"])
def test_cache_is_an_extension_that_is_passed_on_or_left_to_the_server(cache: Cache | None) -> None:
    assert GenerationsBody(prompt="a", cache=cache).native(steps=5).cache == cache
