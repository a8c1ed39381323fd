"""Static checks of the web page; its behaviour in a browser is tested by hand."""

from __future__ import annotations

import re
from pathlib import Path

from server import playground
from server.requests import uploads
from server.requests.schemas import GenerateRequest

PAGE = (Path(playground.__file__).parent / "index.html").read_text(encoding="utf-8")


def constant(name: str) -> int:
    """The number, or product of numbers, that the script calls `name`."""
    (found,) = re.findall(rf"\b{name} = ([\d_ *]+)", PAGE)
    product = 1
    for factor in found.split("*"):
        product *= int(factor)
    return product


def test_it_rejects_the_images_that_the_server_would_reject() -> None:
    assert constant("MAX_FILE") == uploads.MAX_FILE
    assert constant("MAX_PIXELS") == uploads.MAX_PIXELS


def test_every_element_that_it_uses_exists_once() -> None:
    ids = re.findall(r'\bid="([\w-]+)"', PAGE)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'\$\("([\w-]+)"\)', PAGE)) <= set(ids)
    assert set(re.findall(r'\b(?:for|aria-describedby)="([\w-]+)"', PAGE)) <= set(ids)


def test_it_sends_only_known_fields() -> None:
    (body,) = re.findall(r"\nfunction body\(\) \{.*?return \{(.*?)\n  \};", PAGE, re.DOTALL)
    sent = set(re.findall(r"\b(\w+):", body)) | set(re.findall(r"(?<=, )(width|height)\b", body))
    assert {"prompt", "scheduler", "image", "mask", "strength"} <= sent <= GenerateRequest.model_fields.keys()


def test_it_is_one_small_file() -> None:
    assert len(PAGE.encode()) < 36_000
