"""Pin the Dockerfile's base image by the digest that its tag has in a registry now.

scripts/base-image https://REGISTRY                              the tag as it is, with today's digest
scripts/base-image https://REGISTRY --tag 3.13.17-slim-trixie    another tag
scripts/base-image https://REGISTRY --check                      only exit with 1 if the digest is another

REGISTRY is the address of Docker Hub's registry API, or of a mirror of it (OCI distribution specification).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.request import parse_http_list, parse_keqv_list

import httpx

from tests import ROOT

INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
ARCHITECTURES = {"amd64", "arm64"}  # that the Dockerfile has targets for
LINE = re.compile(r"^ARG BASE=(?P<name>[a-z0-9/._-]+):(?P<tag>[\w.-]+)@(?P<digest>sha256:[0-9a-f]{64})$", re.MULTILINE)


class PinFailed(Exception):
    """The registry has no digest that could be pinned; the message says what to do."""


@dataclass(frozen=True)
class Base:
    """A base image as the Dockerfile names it."""

    name: str
    tag: str
    digest: str

    @classmethod
    def of(cls, text: str) -> Base:
        """Read it from a Dockerfile's text. Raises PinFailed."""
        if not (found := LINE.search(text)):
            raise PinFailed("the Dockerfile has no line ARG BASE=NAME:TAG@sha256:DIGEST")
        return cls(**found.groupdict())

    def __str__(self) -> str:
        return f"{self.name}:{self.tag}@{self.digest}"

    @property
    def path(self) -> str:
        """Where a registry has the manifest of the tag. Docker's official images are in `library`."""
        return f"/v2/{self.name if '/' in self.name else f'library/{self.name}'}/manifests/{self.tag}"


def digest_of(registry: str, base: Base) -> str:
    """The digest that the tag of `base` has now: the hash of the index of its architectures. Raises PinFailed."""
    with httpx.Client(base_url=registry, timeout=30) as client:
        try:
            answer = manifest(client, base.path)
        except httpx.HTTPError as error:
            raise PinFailed(f"{registry} does not answer: {error}") from error
    if answer.status_code == httpx.codes.NOT_FOUND:
        raise PinFailed(f"{registry} has no {base.name}:{base.tag}: name a tag that it has")
    if answer.is_error:
        raise PinFailed(f"{registry} answers {answer.status_code} for {base.name}:{base.tag}: try again later")
    check_index(answer)
    digest = f"sha256:{hashlib.sha256(answer.content).hexdigest()}"
    if (stated := answer.headers.get("Docker-Content-Digest", digest)) != digest:
        raise PinFailed(f"the manifest is {digest}, and the registry calls it {stated}: try again")
    return digest


def manifest(client: httpx.Client, path: str) -> httpx.Response:
    """Ask for the manifest, with a token if the registry wants one. Not HEAD: what is pinned is what was hashed."""
    headers = {"Accept": ", ".join(INDEXES)}
    answer = client.get(path, headers=headers)
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        headers["Authorization"] = f"Bearer {token(client, answer.headers.get('WWW-Authenticate', ''))}"
        answer = client.get(path, headers=headers)
    return answer


def token(client: httpx.Client, challenge: str) -> str:
    """A token of the service that a registry's challenge names, for anonymous pulls. Raises PinFailed."""
    scheme, _, rest = challenge.partition(" ")
    asked = parse_keqv_list(parse_http_list(rest))
    if scheme.lower() != "bearer" or "realm" not in asked:
        raise PinFailed(
            f"the registry wants credentials of the kind {scheme or 'unknown'}: use one with anonymous pulls"
        )
    answer = client.get(asked.pop("realm"), params=asked)
    answer.raise_for_status()
    granted = answer.json()
    return str(granted.get("token") or granted["access_token"])


def check_index(answer: httpx.Response) -> None:
    """Raise PinFailed unless it is an index with every architecture: the manifest of one would fail on the others."""
    kind = answer.headers.get("Content-Type", "").partition(";")[0]
    if kind not in INDEXES:
        raise PinFailed(f"the registry answers with {kind or 'no type'}, which is no index of architectures")
    platforms = [entry.get("platform", {}) for entry in json.loads(answer.content)["manifests"]]
    has = {platform.get("architecture") for platform in platforms if platform.get("os") == "linux"}
    if missing := sorted(ARCHITECTURES - has):
        raise PinFailed(f"the image lacks {', '.join(missing)}: name another tag")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("registry")
    parser.add_argument("--tag")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--dockerfile", type=Path, default=ROOT / "Dockerfile", help=argparse.SUPPRESS)
    given = parser.parse_args()
    text = given.dockerfile.read_text(encoding="utf-8")
    try:
        old = Base.of(text)
        wanted = replace(old, tag=given.tag or old.tag)
        new = replace(wanted, digest=digest_of(given.registry, wanted))
    except PinFailed as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if new == old:
        sys.stdout.write(f"{old} is up to date\n")
        return 0
    sys.stdout.write(f"{old}\n-> {new}\n")
    if not given.check:
        given.dockerfile.write_text(text.replace(str(old), str(new)), encoding="utf-8")
    return int(given.check)


if __name__ == "__main__":
    sys.exit(main())
