"""What a site signs of each answer, and with what: so that an answer is known to be its own, and to which question.

A site's key also signs each call to the server (Flower's SuperNode authentication); what is signed here begins with a
line of its own, so that neither signature can stand for the other.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

_PURPOSE = b"apiary reply 1\n"


class Question(NamedTuple):
    """What is answered, and by whom."""

    run: str  # its name, which it keeps when it is resumed
    round: str  # "0" beside the rounds
    kind: str  # the type of the message, such as "train"
    message: str  # the id of the message, of which there is no second
    site: str


class Claim(NamedTuple):
    """What a site signs."""

    question: Question
    outcome: str  # "answer" or "error"
    digest: str  # SHA-256 of the answer's bytes, in hexadecimal digits

    def statement(self) -> bytes:
        """The bytes that are signed: no two claims have the same."""
        return _PURPOSE + json.dumps([*self.question, self.outcome, self.digest]).encode()


def digest(body: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(body).hexdigest()


def private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A site's key.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no elliptic curve key in OpenSSH form without a password.
    """
    key = load_ssh_private_key(path.read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("not an elliptic curve key")
    return key


def sign(key: ec.EllipticCurvePrivateKey, claim: Claim) -> str:
    """The signature of a claim (ECDSA, SHA-384), in base64."""
    return base64.b64encode(key.sign(claim.statement(), ec.ECDSA(hashes.SHA384()))).decode()


def is_signed(claim: Claim, signature: str, public: str) -> bool:
    """Whether a signature of a claim is that of a public key in OpenSSH form."""
    try:
        key = load_ssh_public_key(public.encode())
        if not isinstance(key, ec.EllipticCurvePublicKey):
            return False
        key.verify(base64.b64decode(signature, validate=True), claim.statement(), ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError, UnsupportedAlgorithm):
        return False
    return True


def fingerprint(public: str) -> str:
    """A public key in OpenSSH form as `ssh-keygen -l` shows it: SHA256 and 43 letters."""
    blob = base64.b64decode(public.split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")
