"""How the SuperLink on this machine is told and asked things: in JSON, or by Flower's own command line."""

from __future__ import annotations

import contextlib
import http.client
import json
import sqlite3
import ssl
import subprocess
import tomllib
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apiary.core.errors import UserError
from deploy import kits, processes
from deploy.kits import Kit

CONNECTION = "apiary"  # the name of the SuperLink in Flower's configuration
DATABASE = "superlink.db"
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
        f"root-certificates = {toml(str(kit.folder / kits.CA))}",
    ]
    kits.write(home / "config.toml", "\n".join(lines) + "\n")


def toml(value: str | int) -> str:
    """A value as TOML writes it: unlike JSON it knows no halves of a character beyond U+FFFF, and no bare U+007F."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def call(state: Path, *words: str, options: Sequence[str] = ()) -> dict[str, Any]:
    """The JSON answer to `flwr WORDS... CONNECTION OPTIONS...`; what our SuperLink answers itself takes no process.

    Raises:
        FlowerError: the SuperLink refused the call, or gave no answer.
    """
    match words:
        case ("list",):
            return ask(state, "runs", run=options[1] if options else None)
        case ("supernode", "list"):
            return ask(state, "nodes")
        case ("supernode", "unregister", node):
            return ask(state, "unregister", node=node)
        case ("stop", run):
            return ask(state, "stop", run=run)
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


def register(state: Path, keys: Mapping[str, bytes]) -> dict[str, str | FlowerError]:
    """Enter public keys, all in one call.

    Args:
        state: of the server.
        keys: PEM by the name of the site.

    Returns:
        By name the node that Flower knows the key by, or why it takes none.

    Raises:
        FlowerError: no answer.
    """
    answer = ask(state, "register", keys={name: key.decode() for name, key in keys.items()})
    return {
        name: str(told["node-id"]) if told["success"] else FlowerError(str(told["error-message"]))
        for name, told in answer["sites"].items()
    }


def ask(state: Path, what: str, **fields: Any) -> dict[str, Any]:
    """What our SuperLink answers in JSON (`deploy.superlink`).

    Raises:
        FlowerError: it refused, or gave no answer.
    """
    try:
        known = tomllib.loads((state / "flwr" / "config.toml").read_text(encoding="utf-8"))["superlink"][CONNECTION]
        trust = ssl.create_default_context(cafile=known["root-certificates"])
        request = urllib.request.Request(
            f"https://{known['address']}/apiary/{what}",
            json.dumps(fields).encode(),
            {"content-type": "application/json"},
        )
        with _opener(trust).open(request, timeout=_LONGEST_S) as reply:
            answer: dict[str, Any] = json.loads(reply.read())
    except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
        refused = isinstance(getattr(error, "reason", None), ConnectionRefusedError)
        why = "it is being started again, or `apiary deploy server` has ended" if refused else _line(str(error))
        raise FlowerError(f"the SuperLink gives no answer: {why}") from None
    if not answer.get("success"):
        raise FlowerError(_line(str(answer.get("error-message"))))
    return answer


def _opener(trust: ssl.SSLContext) -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trust))


def node_of(state: Path, public: bytes) -> tuple[str, bool] | None:
    """The node that has a public key, and whether it was struck off; None where Flower knows no such key.

    Args:
        state: of the server.
        public: the key as PEM.

    Raises:
        FlowerError: the database cannot be read.
    """
    # The command line lists no keys. Table and columns are private to flwr 1.41; node ids lie there as signed numbers.
    try:
        with contextlib.closing(sqlite3.connect((state / DATABASE).as_uri() + "?mode=ro", uri=True)) as database:
            row = database.execute("SELECT node_id, status FROM node WHERE public_key = ?", (public,)).fetchone()
    except sqlite3.Error as error:
        raise FlowerError(f"Flower's database cannot be read: {error}") from None
    return (str(int(row[0]) % 2**64), row[1] == "unregistered") if row else None


def _line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines)[:400] or "no reason given"


def check_trust(ca: Path) -> None:
    """Check that certificates can be checked by a file.

    Raises:
        UserError: the file holds no certificate of an authority.
    """
    try:
        ssl.create_default_context(cafile=str(ca))
    except (ssl.SSLError, OSError) as error:
        raise UserError(f"{str(ca)!r} is no certificate ({error.strerror or error}); copy it from the kit") from None


def healthy(address: str, ca: Path, timeout_s: float = 5.0) -> bool:
    """Whether `/health` answers at HOST:PORT.

    Raises:
        ssl.SSLCertVerificationError: who answers there is not certified by `ca` for that name.
    """
    trust = ssl.create_default_context(cafile=str(ca))
    try:
        with _opener(trust).open(f"https://{address}/health", timeout=timeout_s) as answer:
            return bool(answer.status == 200)
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise error.reason from None
        return False
    except OSError:
        return False
