"""Signed image files, verified by the library's reader."""

from __future__ import annotations

import io
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import c2pa
import numpy as np
import PIL.Image
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from engines.demo import BUNDLE
from engines.errors import EngineError
from server.requests.content_credentials import Signer
from server.requests.images import FORMATS, ImageFormat, encode
from server.requests.metadata import Metadata, SourceType
from tests.support.certificates import Chain, Key, make_chain
from tests.support.serving import Serving, run_server

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
FILES = {
    image_format: encode(PIXELS, image_format, metadata=Metadata("a boat\nSteps: 1", "trainedAlgorithmicMedia"))
    for image_format in FORMATS
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return make_chain(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def signer(chain: Chain) -> Signer:
    return Signer(chain.certificate, chain.key)


def read(file: bytes, image_format: ImageFormat, authority: str) -> tuple[str | None, dict[str, Any]]:
    """Whether the signature is valid, or even of a trusted authority, and what it says."""
    settings = {"trust": {"trust_anchors": authority}, "verify": {"verify_trust": True, "ocsp_fetch": False}}
    with c2pa.Reader(f"image/{image_format}", io.BytesIO(file), context=c2pa.Context.from_dict(settings)) as reader:
        store = json.loads(reader.json())
        return reader.get_validation_state(), store["manifests"][store["active_manifest"]]


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("source_type", ["trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"])
def test_a_file_is_signed(signer: Signer, chain: Chain, image_format: ImageFormat, source_type: SourceType) -> None:
    state, said = read(signer(FILES[image_format], image_format, source_type), image_format, chain.authority)
    assert state == "Trusted"
    assert said["claim_generator_info"][0]["name"] == "latentd"
    (assertion,) = said["assertions"]
    assert assertion["data"]["actions"] == [
        {
            "action": "c2pa.created",
            "digitalSourceType": f"http://cv.iptc.org/newscodes/digitalsourcetype/{source_type}",
        }
    ]


@pytest.mark.parametrize("image_format", FORMATS)
def test_pixels_and_metadata_stay(signer: Signer, image_format: ImageFormat) -> None:
    before = PIL.Image.open(io.BytesIO(FILES[image_format]))
    after = PIL.Image.open(io.BytesIO(signer(FILES[image_format], image_format, "trainedAlgorithmicMedia")))
    assert np.array_equal(np.asarray(before), np.asarray(after))
    assert after.getxmp() == before.getxmp()
    assert after.info.get("parameters") == before.info.get("parameters")
    assert after.getexif().tobytes() == before.getexif().tobytes()


def test_changed_pixels_are_noticed(signer: Signer, chain: Chain) -> None:
    file = bytearray(signer(FILES["png"], "png", "trainedAlgorithmicMedia"))
    file[file.index(b"IDAT") + 200] ^= 1
    assert read(bytes(file), "png", chain.authority)[0] == "Invalid"


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP384R1()),
        ec.generate_private_key(ec.SECP521R1()),
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 2048),
    ],
    ids=["P-384", "P-521", "Ed25519", "RSA"],
)
def test_the_algorithm_is_that_of_the_key(tmp_path: Path, key: Key) -> None:
    chain = make_chain(tmp_path, key=key)
    file = Signer(chain.certificate, chain.key)(FILES["png"], "png", "trainedAlgorithmicMedia")
    assert read(file, "png", chain.authority)[0] == "Trusted"


def test_threads_share_a_signer(signer: Signer, chain: Chain) -> None:
    with ThreadPoolExecutor(4) as pool:
        signed = list(pool.map(lambda _: signer(FILES["png"], "png", "trainedAlgorithmicMedia"), range(64)))
    assert {read(file, "png", chain.authority)[0] for file in signed} == {"Trusted"}


def test_what_cannot_be_signed_is_sent_as_it_is(signer: Signer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        assert signer(b"no image", "png", "trainedAlgorithmicMedia") == b"no image"
    assert "could not be signed" in caplog.text


def test_bad_certificates_are_an_error_that_says_so(tmp_path: Path, chain: Chain) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("no PEM", encoding="ascii")
    folders = [tmp_path / name for name in ("other", "server", "expired")]
    for folder in folders:
        folder.mkdir()
    other = make_chain(folders[0])
    server = make_chain(folders[1], usage=ExtendedKeyUsageOID.SERVER_AUTH)
    expired = make_chain(folders[2], days=-1)
    for certificate, key, words in (
        (tmp_path / "missing.pem", chain.key, "cannot be read"),
        (junk, chain.key, "cannot sign with"),
        (chain.certificate, junk, "no private key for C2PA"),
        (chain.certificate, chain.certificate, "no private key for C2PA"),
        (chain.certificate, other.key, "cannot sign with"),
        (server.certificate, server.key, "cannot sign with"),
        (expired.certificate, expired.key, "cannot sign with"),
    ):
        with pytest.raises(EngineError, match=words):
            Signer(certificate, key)


def test_a_server_signs_its_images(chain: Chain) -> None:
    with Serving(BUNDLE, "--c2pa-certificate", str(chain.certificate), "--c2pa-key", str(chain.key)) as serving:
        for image_format in FORMATS:
            headers = {"Accept": f"image/{image_format}"}
            answer = serving.client.post("/generate", json={"prompt": "a boat"}, headers=headers)
            assert read(answer.content, image_format, chain.authority)[0] == "Trusted"


def test_a_server_does_not_start_with_half_of_the_settings(chain: Chain) -> None:
    done = run_server("--c2pa-certificate", str(chain.certificate))
    assert done.returncode == 1
    assert "error: C2PA needs both --c2pa-certificate and --c2pa-key" in done.stderr
