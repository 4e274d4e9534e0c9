"""Who is at the other end of a connection on this machine: by the kernel's own table of sockets (Linux)."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_LOOKS, _BETWEEN_S = 3, 0.01  # a table that changes while it is read may leave a row out
_ORDER = -1 if sys.byteorder == "little" else 1
_UID, _INODE = 6, 8  # among the fields of a row, from the local end on; no inode where no process holds it any more


def is_own(transport: asyncio.BaseTransport) -> bool:
    """Whether the other end of a connection is a process of this machine under our own user, or under root.

    Anything else is not: another user, another machine, or a caller that has gone already.
    """
    theirs, ours = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
    if not _is_internet(theirs) or not _is_internet(ours):
        return False
    rows = [f" {local} {remote} ".encode() for local, remote in zip(_written(theirs), _written(ours), strict=False)]
    for look in range(_LOOKS):
        if look:
            time.sleep(_BETWEEN_S)
        for uid in _holders(rows):
            return uid in (0, os.geteuid())
    return False


def guarded(protocol: Any) -> Any:
    """A protocol of uvicorn's, but that it ends each connection whose other end is not ours before it is heard."""

    class Guarded(protocol):  # type: ignore[misc]
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if not is_own(transport):
                transport.abort()

    return Guarded


def _is_internet(name: object) -> bool:
    return isinstance(name, tuple) and len(name) >= 2


def _written(name: tuple[Any, ...]) -> list[str]:
    """An end as the kernel may write it, in its table of IPv4 first where it has that.

    It is words of four bytes in the machine's own order, and a port, all hexadecimal. An IPv6 socket may speak to an
    IPv4 address too, which then stands within one of IPv6.
    """
    address = ipaddress.ip_address(str(name[0]).partition("%")[0])
    plain = (isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped) or address
    packed = [plain.packed] + [b"\0" * 10 + b"\xff" * 2 + plain.packed] * (plain.version == 4)
    words = ([whole[at : at + 4][::_ORDER] for at in range(0, len(whole), 4)] for whole in packed)
    return [f"{b''.join(each).hex().upper()}:{int(name[1]):04X}" for each in words]


def _holders(rows: Sequence[bytes]) -> Iterator[int]:
    """The users of the processes that hold a socket between these ends.

    This is the SuperLink's one thread that all its calls go through, and a table may have tens of thousands of rows:
    they are searched as they are written, and the rows found alone are read.
    """
    for table in _TABLES:
        with contextlib.suppress(OSError):  # no IPv6 here
            written = table.read_bytes()
            for found in re.finditer(b"(?:" + b"|".join(map(re.escape, rows)) + rb")[^\n]*", written):
                fields = found[0].split()
                if int(fields[_INODE]):
                    yield int(fields[_UID])
