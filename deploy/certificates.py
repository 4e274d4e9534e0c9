"""The federation's own authority, the server's certificate (RFC 5280), and the sites' keys, all as bytes of files."""

from __future__ import annotations

import datetime
import ipaddress

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
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


def check_server(ca: bytes, certificate: bytes, key: bytes) -> None:
    """Check that a server may be started with these files.

    Args:
        ca: the authority's certificate.
        certificate: the server's, with those between it and the authority after it.
        key: the server's key.

    Raises:
        ValueError: one cannot be read, they do not fit each other, or a time is over; the message says which.
    """
    authorities = _certificates(ca, "ca.crt")
    chain, now = _certificates(certificate, "server.crt"), datetime.datetime.now(datetime.UTC)
    try:
        private = load_pem_private_key(key, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ValueError("server.key is no private key without a password") from None
    if private.public_key() != chain[0].public_key():
        raise ValueError("server.key is not the key of server.crt; copy both")
    if not chain[0].not_valid_before_utc <= now <= chain[0].not_valid_after_utc:
        raise ValueError(
            f"server.crt holds from {chain[0].not_valid_before_utc:%Y-%m-%d} to {chain[0].not_valid_after_utc:%Y-%m-%d}"
            ": `apiary deploy renew`"
        )
    if not any(_issued(chain[-1], authority) for authority in authorities):
        raise ValueError("server.crt was not signed by the authority of ca.crt; are they of one federation?")


def _certificates(pem: bytes, name: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise ValueError(f"{name} is no certificate") from None


def _issued(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return certificate == authority
    return True


def check_site_key(key: bytes) -> None:
    """Check that Flower can sign with a site's key.

    Raises:
        ValueError: the text is no private key that Flower can sign with.
    """
    try:
        private = load_ssh_private_key(key, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ValueError("no private key in OpenSSH form without a password") from None
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise ValueError("not an elliptic curve key")


def public_pem(key: str) -> bytes:
    """A site's public key in the form in which Flower keeps it.

    Args:
        key: in OpenSSH form.

    Raises:
        ValueError: it is not one that Flower takes.
    """
    try:
        public = load_ssh_public_key(key.encode())
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("no public key in OpenSSH form") from None
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise ValueError("not an elliptic curve key")
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


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
