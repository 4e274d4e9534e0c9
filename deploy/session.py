"""What a site's node leaves for the program that keeps it and the node that comes after it, and hears from the door."""

from __future__ import annotations

import base64
import contextlib
import json
from pathlib import Path
from typing import NamedTuple

from apiary.core.files import write_atomic

CONNECTED = "connected"  # how a line of the node's log ends when the server has taken it
REFUSED, NOT_TRUSTED = 3, 4  # its exit codes; the log's last line then says more
NOT_REGISTERED = "not registered yet"  # what the door says, with 503, to a key that the server has not taken up
_FILE = "node.json"


class Left(NamedTuple):
    """What a session left that was not closed."""

    node: int | None = None
    message: bytes = b""  # the head of the one that it was in the middle of


class Journal:
    """The file in the state folder that says which session is open, and in the middle of which message.

    It owns the file; without one no session is open.
    """

    def __init__(self, state: Path) -> None:
        self._path = state / _FILE

    def read(self) -> Left:
        """What is noted; nothing where the file is not there or cannot be read."""
        try:
            value = json.loads(self._path.read_text(encoding="utf-8"))
            return Left(int(value["node"]), base64.b64decode(value["message"]))
        except (OSError, ValueError, KeyError, TypeError):
            return Left()

    def note(self, node: int, message: bytes = b"") -> None:
        """Note an open session; a full disk is no reason to let a message fall that may yet be answered."""
        with contextlib.suppress(OSError):
            write_atomic(self._path, json.dumps({"node": str(node), "message": base64.b64encode(message).decode()}))

    def close(self) -> None:
        """Note that none is open."""
        self._path.unlink(missing_ok=True)
