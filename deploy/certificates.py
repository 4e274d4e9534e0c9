"""The federation's own authority, the server's certificate (RFC 5280), and the sites' keys, all as bytes of files."""

from __future__ import annotations

import datetime
import ipaddress

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_CA_DAYS, _SERVER_DAYS = 3650, 1095


def authority() -> tuple[bytes, bytes]:
    """A new authority: its key and its certificate, which may sign servers but no further authority."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = _name("Apiary federation")
    certificate = (
        _certificate(name, name, key.public_key(), _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    return _pem(key), certificate.public_bytes(Encoding.PEM)


def server(ca: bytes, ca_key: bytes, host: str) -> tuple[bytes, bytes]:
    """A new key for the server and its certificate for `host` and this machine's own names.

    Args:
        ca: the authority's certificate.
        ca_key: its key.
        host: a name or an IP address.

    Raises:
        ValueError: the authority's files cannot be read.
    """
    signer, signing = x509.load_pem_x509_certificate(ca), load_pem_private_key(ca_key, password=None)
    if not isinstance(signing, ec.EllipticCurvePrivateKey):
        raise ValueError("the authority's key is not an elliptic curve key")
    key = ec.generate_private_key(ec.SECP256R1())
    # The server's own processes reach it at 127.0.0.1, whatever its name outside.
    names = dict.fromkeys([host, "localhost", "127.0.0.1"])
    known = [x509.IPAddress(ipaddress.ip_address(n)) if is_ip(n) else x509.DNSName(n) for n in names]
    certificate = (
        _certificate(_name("Apiary server"), signer.subject, key.public_key(), _SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(known), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False)
        .sign(signing, hashes.SHA384())
    )
    return _pem(key), certificate.public_bytes(Encoding.PEM)


def site_keys() -> tuple[bytes, bytes]:
    """A site's new key and its public half, in the OpenSSH form that Flower reads."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return private, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def is_ip(text: str) -> bool:
    """Whether `text` is an IP address of either version."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _certificate(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
