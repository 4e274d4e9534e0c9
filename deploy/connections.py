"""Who may hold a connection to the front door, for how long, and whom it makes way for.

Nobody is turned away because others are slow: where places are used up, one that has not proved a key makes way, the
longest held of the address that holds most. An honest site proves its key within a few round trips.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import resource
import ssl
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

Note = Callable[[str], None]  # receives a few words about what was ended


class Limits(NamedTuple):
    """Connections at a time, and seconds."""

    strangers: int = 1024  # that have not proved a key
    each: int = 256  # of these from one address, which may be the way out of several sites
    site: int = 32  # that one site has proved its key on
    head_s: float = 10.0  # for the TLS handshake, and again for the head of a call
    stall_s: float = 30.0  # without reading of what it asked for
    idle_s: int = 30  # between calls; longer than Flower's own 5 s at the other end, which must be first to hang up


class Held(Protocol):
    """What takes a place."""

    def drop(self) -> None:
        """End it at once."""


class Places:
    """The places that connections take: a bounded number of strangers', and each site's own.

    Args:
        limits: how many.
        note: is told of each connection that made way.
    """

    def __init__(self, limits: Limits, note: Note) -> None:
        self._limits, self._note = limits, note
        self._pools: dict[tuple[str, str], dict[Held, None]] = {}  # the longest held first
        self._where: dict[Held, str] = {}  # the address of each connection
        self._pool: dict[Held, tuple[str, str]] = {}
        self._homes: dict[str, str] = {}  # the address where a site last proved its key

    def __len__(self) -> int:
        return len(self._pool)

    def enter(self, held: Held, address: str) -> None:
        """Give a stranger a place."""
        address = network(address)
        self._where[held] = address
        self._take(held, ("address", address), self._limits.each)
        homes = set(self._homes.values())
        if address not in homes:
            crowds = [inside for (kind, name), inside in self._pools.items() if kind == "address" and name not in homes]
            if sum(map(len, crowds)) > self._limits.strangers:
                largest: dict[Held, None] = max(crowds, key=len)
                self._evict(next(iter(largest)))

    def prove(self, held: Held, site: str) -> None:
        """Move a connection to the places of a site; nothing for one that has none (any more)."""
        address = self._where.get(held)
        if address is None or self._pool[held] == ("site", site):
            return
        self.leave(held)
        self._homes[site] = self._where[held] = address
        self._take(held, ("site", site), self._limits.site)

    def leave(self, held: Held) -> None:
        """Free its place; nothing for one that has none."""
        self._where.pop(held, None)
        if (pool := self._pool.pop(held, None)) is not None:
            del self._pools[pool][held]
            if not self._pools[pool]:
                del self._pools[pool]

    def _take(self, held: Held, pool: tuple[str, str], most: int) -> None:
        inside = self._pools.setdefault(pool, {})
        inside[held], self._pool[held] = None, pool
        if len(inside) > most:
            self._evict(next(iter(inside)))

    def _evict(self, held: Held) -> None:
        kind, _ = self._pool[held]
        self.leave(held)
        self._note("too many connections" + (" of a site" if kind == "site" else ""))
        held.drop()


def network(address: str) -> str:
    """What counts as one address: of IPv6 the first half, for a machine has all of the second."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


class _Connection(H11Protocol):
    """uvicorn's protocol, but that every wait for the caller has an end. The calls find it in their state.

    h11 bounds the head of a call; httptools does not.

    Args:
        places: where it takes one.
        limits: how long it waits.
        note: is told when it waited in vain.
        given: as uvicorn gives it.
    """

    def __init__(self, places: Places, limits: Limits, note: Note, **given: Any) -> None:
        super().__init__(**given)
        self.app = functools.partial(_with_connection, self.app, self)
        self.timeout_keep_alive = limits.idle_s
        self._places, self._limits, self._note = places, limits, note
        self._head: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._raw: asyncio.BaseTransport | None = None  # below TLS
        self._early: list[bytes] = []  # came with the end of the handshake
        self._open = False
        self.lost = False

    def arrive(self, raw: asyncio.BaseTransport) -> None:
        """Take a place."""
        self._raw = raw
        peer = raw.get_extra_info("peername")
        self._places.enter(self, str(peer[0]) if peer else "")

    def prove(self, site: str) -> None:
        """A call on this connection was signed by a site."""
        self._places.prove(self, site)

    def drop(self) -> None:
        """End the connection at once."""
        transport = self.transport if self._open else self._raw
        if isinstance(transport, asyncio.Transport):
            transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if self._raw is None:
            self.arrive(transport)
        super().connection_made(transport)
        self._open = True
        early, self._early = self._early, []
        for data in early:
            super().data_received(data)
        self._watch()

    def data_received(self, data: bytes) -> None:
        if not self._open:
            self._early.append(data)
            return
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._places.leave(self)
        for timer in (self._head, self._stall):
            if timer is not None:
                timer.cancel()
        if self._open:
            super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self._stall or self.loop.call_later(self._limits.stall_s, self._give_up, "too slow a reader")

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _watch(self) -> None:
        """Time the head of a call, from its first byte or from the beginning of the connection until it is whole."""
        busy = self.cycle is not None and not self.cycle.response_complete
        if busy or self.transport.is_closing():
            if self._head is not None:
                self._head.cancel()
                self._head = None
        elif self._head is None:
            self._head = self.loop.call_later(self._limits.head_s, self._give_up, "too slow a head")

    def _give_up(self, reason: str) -> None:
        self._note(reason)
        self.drop()


async def _with_connection(app: Any, connection: _Connection, scope: Any, receive: Any, send: Any) -> None:
    scope["state"]["connection"] = connection
    await app(scope, receive, send)


class _Gate(asyncio.Protocol):
    """Gives a connection a place before its TLS handshake, and the handshake a deadline.

    uvicorn and asyncio count no connection before its handshake is over, and wait a minute for that.
    """

    def __init__(self, inner: _Connection, places: Places, limits: Limits, note: Note, tls: ssl.SSLContext) -> None:
        self._inner, self._places, self._limits, self._note, self._tls = inner, places, limits, note, tls
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        line = cast(asyncio.Transport, transport)  # a TCP connection's
        line.pause_reading()
        self._inner.arrive(line)
        self._task = asyncio.get_running_loop().create_task(self._handshake(line))

    def connection_lost(self, exc: Exception | None) -> None:  # before the handshake began
        self._places.leave(self._inner)
        if self._task is not None:
            self._task.cancel()

    async def _handshake(self, transport: asyncio.Transport) -> None:
        loop, inner = asyncio.get_running_loop(), self._inner
        try:
            made = await loop.start_tls(
                transport,
                inner,
                self._tls,
                server_side=True,
                ssl_handshake_timeout=self._limits.head_s,
                ssl_shutdown_timeout=5.0,
            )
        except OSError as error:  # of which time-outs and TLS's own errors are
            if "taking longer" in str(error):
                self._note("too slow a handshake")
            made = None
        if made is None or inner.lost or transport.is_closing():
            self._places.leave(inner)
            transport.abort()
        else:
            inner.connection_made(made)


def protocol(places: Places, limits: Limits, note: Note, tls: ssl.SSLContext | None = None) -> Any:
    """What makes uvicorn's side of a connection, as its option `http` takes it.

    Args:
        places: are taken by the connections.
        limits: on their waits.
        note: is told a few words about each connection that is ended.
        tls: ends TLS; None = plain HTTP. uvicorn itself gets no certificate.
    """

    def make(**given: Any) -> asyncio.Protocol:
        inner = _Connection(places, limits, note, **given)
        return inner if tls is None else _Gate(inner, places, limits, note, tls)

    return make


def allow_many_files() -> None:
    """Let this process have as many files open as it may have at all; each connection is one."""
    with contextlib.suppress(ValueError, OSError):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else 65_536, hard))
