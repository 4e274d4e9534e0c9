"""Flower's own command line, asked for JSON: how the SuperLink on this machine is told and asked things."""

from __future__ import annotations

import json
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy import kits, processes
from deploy.kits import Kit

CONNECTION = "apiary"  # the name of the SuperLink in Flower's configuration
_LONGEST_S = 120.0


class FlowerError(RuntimeError):
    """Flower refused what it was asked; the message is its own line."""


def configure(kit: Kit, state: Path, port: int) -> None:
    """Tell the command line where the SuperLink listens."""
    home = state / "flwr"
    home.mkdir(mode=0o700, exist_ok=True)
    lines = [
        "[superlink]",
        f'default = "{CONNECTION}"',
        f"[superlink.{CONNECTION}]",
        f'address = "127.0.0.1:{port}"',
        f"root-certificates = {json.dumps(str(kit.folder / kits.CA))}",
    ]
    kits.write(home / "config.toml", "\n".join(lines) + "\n")


def call(state: Path, *words: str, options: Sequence[str] = ()) -> dict[str, Any]:
    """The JSON answer to `flwr WORDS... CONNECTION OPTIONS...`.

    Raises:
        FlowerError: it refused, or gave no answer.
    """
    command = [processes.program("flwr"), *words, CONNECTION, *options, "--format", "json"]
    try:
        done = subprocess.run(
            command,
            env=processes.environment(state),
            cwd=state,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_LONGEST_S,
        )
    except subprocess.TimeoutExpired:
        raise FlowerError(f"no answer to `flwr {words[0]}` within {_LONGEST_S:g} s") from None
    start = done.stdout.find("{")
    try:
        answer: dict[str, Any] = json.loads(done.stdout[start:]) if start >= 0 else {}
    except ValueError:
        answer = {}
    if not answer.get("success"):
        raise FlowerError(_line(str(answer.get("error-message") or done.stderr or done.stdout)))
    return answer


def _line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines)[:400] or "no reason given"


def healthy(address: str, ca: Path, timeout_s: float = 5.0) -> bool:
    """Whether `/health` answers at HOST:PORT.

    Raises:
        ssl.SSLCertVerificationError: who answers there is not certified by `ca` for that name.
    """
    trust = ssl.create_default_context(cafile=str(ca))
    handler = urllib.request.HTTPSHandler(context=trust)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), handler)
    try:
        with opener.open(f"https://{address}/health", timeout=timeout_s) as answer:
            return bool(answer.status == 200)
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise error.reason from None
        return False
    except OSError:
        return False
