"""Randomness for differential privacy: a client's secret key, and streams of numbers that only its holder can make."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import math
import os
import secrets
from pathlib import Path

import numpy as np

from apiary.core.errors import UserError

KEY_FILE = "privacy.key"
_KEY_BYTES = 32
_BLOCK = 1 << 18  # normal draws made at a time


def load_key(path: Path) -> bytes:
    """The client's 32 secret bytes; made, and readable by its owner alone, the first time.

    Raises:
        UserError: the file doesn't hold a key of the right length.
        OSError: it cannot be written.
    """
    if not path.exists():
        _make_key(path)
    key = path.read_bytes()
    if len(key) != _KEY_BYTES:
        raise UserError(
            f"the privacy key {str(path)!r} has {len(key)} bytes, not {_KEY_BYTES}: put a sound copy in its place, or "
            "remove it: a new one is made, and what is asked again is charged again"
        )
    return key


def _make_key(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    # Never readable by others, not for a moment.
    handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # another process was first: its key it is
            os.link(beside, path)
    finally:
        beside.unlink()


def request_digest(key: bytes, run: str, number: int, *parts: str) -> str:
    """Names a release: the run, the round, and digests of all that its bits follow from (32 hex digits).

    It is keyed: a client that lost its key, and so its noise, is charged again, and whoever sees the ledger cannot
    guess at the parts.

    Args:
        number: the round.
        parts: digests of the received adapter, of the rows, and of the settings.
    """
    return _derive(key, "request", json.dumps([run, number, *parts])).hex()[:32]


def _derive(key: bytes, purpose: str, text: str) -> bytes:
    return hmac.new(key, json.dumps([purpose, text]).encode(), hashlib.sha256).digest()


class SecretNoise:
    """A stream of random numbers that only the holder of the key can make, the same for the same request.

    AES-256 in counter mode. torch's and numpy's own generators will not do: who sees enough of their output knows the
    rest, and torch's CPU generator keeps 32 bits of its seed, which are soon tried out.

    Args:
        key: the client's own, from `load_key`.
        purpose: streams of different purposes are independent, e.g. "noise" and "rows".
        request: the release's name, from `request_digest`.
    """

    def __init__(self, key: bytes, purpose: str, request: str) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        cipher = Cipher(algorithms.AES(_derive(key, purpose, request)), modes.CTR(bytes(16)))
        self._stream = cipher.encryptor()

    def uniform(self, count: int) -> np.ndarray:
        """The next `count` numbers, uniform on the multiples of 2^-53 in [0, 1), float64."""
        words = np.frombuffer(self._stream.update(bytes(8 * count)), np.dtype("<u8"))
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normal(self, count: int) -> np.ndarray:
        """The next `count` standard normal numbers, float64.

        Each is half the sum of four from the transform of Box and Muller (1958). One alone leaves gaps between the
        values that it can take, which tell a noisy sum's true value (Mironov 2012); what four can add up to cannot be
        searched (Holohan and Braghin 2021, n = 2).
        """
        blocks = [self._normal(min(_BLOCK, count - at)) for at in range(0, count, _BLOCK)]
        return np.concatenate(blocks) if blocks else np.zeros(0)

    def _normal(self, count: int) -> np.ndarray:
        lengths, angles = self.uniform(8 * count).reshape(2, 4, count)
        four = np.sqrt(-2 * np.log1p(-lengths)) * np.cos(2 * math.pi * angles)  # 1 - u is never 0
        return np.asarray(four.sum(0) / 2)

    def chosen(self, rates: np.ndarray) -> np.ndarray:
        """A Poisson sample: row i is in it with chance `rates[i]`, each by itself; ascending row numbers, int64."""
        return np.flatnonzero(self.uniform(len(rates)) < rates)
