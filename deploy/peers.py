"""Who is at the other end of a connection on this machine: by the kernel's own table of sockets (Linux)."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_LOOKS, _BETWEEN_S = 3, 0.01  # a table that changes while it is read may leave a row out
_ORDER = -1 if sys.byteorder == "little" else 1


class _End(NamedTuple):
    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int


class _Socket(NamedTuple):
    local: _End
    remote: _End
    uid: int
    inode: int  # 0 where no process holds it any more


def is_own(transport: asyncio.BaseTransport) -> bool:
    """Whether the other end of a connection is a process of this machine under our own user, or under root.

    Anything else is not: another user, another machine, or a caller that has gone already.
    """
    theirs, ours = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
    if not _is_internet(theirs) or not _is_internet(ours):
        return False
    wanted = _end(theirs), _end(ours)
    for look in range(_LOOKS):
        if look:
            time.sleep(_BETWEEN_S)
        for found in _sockets():
            if (found.local, found.remote) == wanted and found.inode:
                return found.uid in (0, os.geteuid())
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


def _end(name: tuple[Any, ...]) -> _End:
    return _End(_plain(ipaddress.ip_address(str(name[0]).partition("%")[0])), int(name[1]))


def _plain(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address, as IPv4 where it is one that an IPv6 socket speaks to."""
    return (isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped) or address


def _sockets() -> Iterator[_Socket]:
    for table in _TABLES:
        with contextlib.suppress(OSError):  # no IPv6 here
            for line in table.read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                yield _Socket(_read_end(fields[1]), _read_end(fields[2]), int(fields[7]), int(fields[9]))


def _read_end(text: str) -> _End:
    """An end as the kernel writes it: words of four bytes in the machine's own order, and a port, all hexadecimal."""
    address, _, port = text.partition(":")
    words = (bytes.fromhex(address[at : at + 8])[::_ORDER] for at in range(0, len(address), 8))
    return _End(_plain(ipaddress.ip_address(b"".join(words))), int(port, 16))
