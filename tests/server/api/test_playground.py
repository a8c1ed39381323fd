"""The page at /: what it takes for granted of the server, and of itself. Run in a browser it is by hand."""

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


def test_it_refuses_the_pictures_that_the_server_would_refuse() -> None:
    assert constant("MAX_FILE") == uploads.MAX_FILE
    assert constant("MAX_PIXELS") == uploads.MAX_PIXELS


def test_every_element_it_asks_for_is_there_once() -> None:
    ids = re.findall(r'\bid="([\w-]+)"', PAGE)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'\$\("([\w-]+)"\)', PAGE)) <= set(ids)
    assert set(re.findall(r'\b(?:for|aria-describedby)="([\w-]+)"', PAGE)) <= set(ids)


def test_it_sends_only_fields_that_requests_have() -> None:
    (body,) = re.findall(r"\nfunction body\(\) \{.*?return \{(.*?)\n  \};", PAGE, re.DOTALL)
    sent = set(re.findall(r"\b(\w+):", body)) | set(re.findall(r"(?<=, )(width|height)\b", body))
    assert {"prompt", "scheduler", "image", "mask", "strength"} <= sent <= GenerateRequest.model_fields.keys()


def test_it_stays_one_small_file_under_a_strict_policy() -> None:
    assert len(PAGE.encode()) < 36_000
    (policy,) = re.findall(r'"Content-Security-Policy" content="([^"]+)"', PAGE)
    assert " ".join(policy.split()) == (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'"
    )
