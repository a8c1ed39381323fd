"""Content credentials (C2PA): a signed statement in each image file that a model made it. Needs the extra `c2pa`."""

from __future__ import annotations

import io
import json
import logging
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from engines.errors import EngineError
from server.requests import images
from server.requests.images import ImageFormat
from server.requests.metadata import SourceType, source_type_uri
from server.version import VERSION

_log = logging.getLogger(__name__)

_ALGORITHMS = ("es256", "es384", "es512", "ps256", "ed25519")  # a key fits one of them


class Signer:
    """Signs image files. For any thread.

    There is no time-stamp authority, so that nothing depends on the network: a signature is valid for as long as the
    certificate.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        """Read the certificate chain, leaf first, and the private key, both PEM, and sign an image with them.

        Raises:
            EngineError: a file cannot be read, or C2PA does not accept what it holds.
        """
        self._c2pa = _library()
        self._certificate, self._key = certificate, key
        self._context = self._make_context(verify=True)
        try:
            self._sign(images.encode(np.zeros((8, 8, 3), np.uint8), "png"), "png", "trainedAlgorithmicMedia")
        except self._c2pa.C2paError as error:
            raise EngineError(
                f"C2PA cannot sign with {certificate} and {key} ({error}): give the chain of this key in PEM, leaf "
                "first, whose leaf is valid now and may sign (extended key usage emailProtection, for example)."
            ) from error
        self._context = self._make_context(verify=False)

    def __call__(self, file: bytes, image_format: ImageFormat, source_type: SourceType) -> bytes:
        """Sign `file`. If that fails it is logged, and the file stays unsigned."""
        try:
            return self._sign(file, image_format, source_type)
        except self._c2pa.C2paError as error:
            _log.error("an image could not be signed and is sent without content credentials: %s", error)
            return file

    def _sign(self, file: bytes, image_format: ImageFormat, source_type: SourceType) -> bytes:
        signed = io.BytesIO()
        with self._c2pa.Builder.from_json(_statement(source_type), context=self._context) as builder:
            builder.sign(f"image/{image_format}", io.BytesIO(file), signed)
        return signed.getvalue()

    def _make_context(self, *, verify: bool) -> Any:
        """The library's settings and signer. `verify` reads each file again when it is signed."""
        settings = {
            "builder": {"thumbnail": {"enabled": False}},  # it would be larger than a small image
            "verify": {"verify_after_sign": verify, "remote_manifest_fetch": False, "ocsp_fetch": False},
        }
        return self._c2pa.Context.from_dict(settings, signer=self._make_signer())

    def _make_signer(self) -> Any:
        """A signer with the algorithm that the key is for."""
        certificate, key = _read(self._certificate), _read(self._key)
        reason: Exception | None = None
        for algorithm in _ALGORITHMS:
            try:
                return self._c2pa.Signer.from_info(self._c2pa.C2paSignerInfo(algorithm, certificate, key, None))
            except self._c2pa.C2paError as error:
                reason = reason or error
        raise EngineError(
            f"{self._key} is no private key for C2PA ({reason}): give a key in PKCS #8 (BEGIN PRIVATE KEY), without a "
            "password, of P-256, P-384, P-521, RSA or Ed25519."
        ) from reason


def _library() -> ModuleType:
    try:
        import c2pa  # noqa: PLC0415 - optional, and only loaded where it is asked for
    except ImportError as error:
        raise EngineError("C2PA needs the package c2pa-python: install the extra c2pa.") from error
    found: ModuleType = c2pa
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EngineError(f"{path} cannot be read ({error.strerror}): name a PEM file.") from error


@cache
def _statement(source_type: SourceType) -> str:
    """The manifest's definition: who says so, and what was done."""
    created = {"action": "c2pa.created", "digitalSourceType": source_type_uri(source_type)}
    return json.dumps(
        {
            "claim_generator_info": [{"name": "latentd", "version": VERSION}],
            "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [created]}}],
        }
    )
