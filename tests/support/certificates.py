"""Certificates for C2PA, made on the spot."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Key = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey
_USES = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
_OF_AN_AUTHORITY = ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")


@dataclass(frozen=True)
class Chain:
    """Files in PEM."""

    certificate: Path  # the leaf, then its authority
    key: Path
    authority: str


def make_chain(
    folder: Path,
    *,
    key: Key | None = None,
    usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.EMAIL_PROTECTION,
    days: int = 30,
) -> Chain:
    """A certificate that may be used for `usage` and ends in `days`, and the authority that issued it."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = _certificate(
        "Test authority", authority_key, issuer="Test authority", issuer_key=authority_key, usage=None
    )
    leaf = _certificate("Test signer", key, issuer="Test authority", issuer_key=authority_key, usage=usage, days=days)
    chain = Chain(folder / "chain.pem", folder / "key.pem", authority)
    chain.certificate.write_text(leaf + authority, encoding="ascii")
    chain.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return chain


def _certificate(
    name: str,
    key: Key,
    *,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    usage: x509.ObjectIdentifier | None,
    days: int = 30,
) -> str:
    now = datetime.datetime.now(datetime.UTC)
    may = {use: use == ("digital_signature" if usage else "key_cert_sign") for use in (*_USES, *_OF_AN_AUTHORITY)}
    builder = (
        x509.CertificateBuilder(_name(issuer), _name(name), key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=60))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=usage is None, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**may), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if usage:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    return builder.sign(issuer_key, SHA256()).public_bytes(Encoding.PEM).decode()


def _name(common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "latentd tests"),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )
