"""The front door: the one port of the server that is open to others.

Flower's SuperLink carries on one port what the sites need (`/v1/fleet/`, where every call is signed by a site's key)
and what needs no password at all: starting runs, registering keys. It also reads a whole body before it looks at the
signature. So it listens on this machine alone, and this proxy ends TLS at the open port and lets through only calls of
sites, whose key it has checked before it reads a byte of the body.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from deploy import admission
from deploy.admission import CALL_BYTES, CALLS, OBJECT_BYTES, Admission, Caller, Refused, UnknownKey
from deploy.connections import Limits, Places, allow_many_files, protocol

_FLEET, _OBJECT, _ACTIVATE = "/v1/fleet/", "push-object", "activate-node"
_ANNOUNCE, _BEAT = "push-messages", "send-node-heartbeat"
# What Flower itself says to a key that it does not know. Its SuperNode tells its operator so, but of a 401 nothing.
_NOT_ACTIVATED = '{"code": 2004, "detail": "Failed to activate SuperNode."}'
_HEAD_BYTES = 16_384
_DIGITS = re.compile(r"[0-9]{1,18}")
# Of one connection, not of the message (RFC 9110, section 7.6.1); the name of the host behind is put in anew, and the
# date is the door's own.
_HOP = {b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"host"}
_NOT_BACK = {*_HOP, b"date", b"server"}
_KEPT_S = 2.0  # an idle connection to the SuperLink, whose uvicorn hangs up after 5 s
_HEALTH_S = 1.0  # that long an answer to /health serves everybody
_FAULTS = 10  # answers of 500 in a row that a site is asked to try again after
_SAY_S = 10.0  # between lines of the log about refusals


class Bounds(NamedTuple):
    """What a call may take."""

    object_bytes: int = OBJECT_BYTES  # of the body of push-object
    flight: int = 256 * 2**20  # bytes of objects that are on their way to the SuperLink, which holds them in memory
    site_flight: int = 4 * OBJECT_BYTES  # of one site; it sends two at a time
    # Calls of one site that the SuperLink works on at a time. A site moves two objects at a time and makes its other
    # calls one by one, signs of life apart; what it gave up waiting for counts until the SuperLink is done with it.
    site_calls: int = 6
    site_announcements: int = 2  # of answers, which take the SuperLink longest; besides
    site_beats: int = 2  # besides as well, so that nothing else keeps a site from being seen
    patience_s: float = 10.0  # that long a call waits for others to pass
    grace_s: float = 10.0  # that long a caller may be silent over a whole body, and besides
    least_rate: int = (
        24 * 1024
    )  # bytes a second: an object within Flower's 305 s, at the end of which a signature is stale


class Refusals:
    """Counts who was refused or sent away, and says so in a line now and then.

    Args:
        say: receives the line.
        every_s: seconds between lines.
    """

    def __init__(self, say: Callable[[str], None] = lambda line: None, every_s: float = _SAY_S) -> None:
        self._say, self._every_s = say, every_s
        self._counts: Counter[tuple[str, str]] = Counter()
        self._due: asyncio.TimerHandle | None = None

    def note(self, reason: str, site: str = "") -> None:
        """Count one; `reason` is one of a few, and holds nothing of the call."""
        self._counts[reason, site] += 1
        if self._due is None:  # the first line comes soon, with what comes at the same time
            self._due = asyncio.get_running_loop().call_later(min(1.0, self._every_s), self._tell)

    def _tell(self) -> None:
        self._due = None
        if self._counts:
            told = [
                f"{count} {reason}" + (f" (site {site})" if site else "")
                for (reason, site), count in sorted(self._counts.items())
            ]
            self._counts.clear()
            self._say("refused: " + ", ".join(told))
            self._due = asyncio.get_running_loop().call_later(self._every_s, self._tell)


class _Flight:
    """The bytes of objects that are on their way, in all and of each site."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds, self._freed = bounds, asyncio.Condition()
        self._sites: Counter[str] = Counter()

    @asynccontextmanager
    async def hold(self, site: str, size: int) -> AsyncIterator[None]:
        def fits() -> bool:
            within = self._sites[site] + size <= self._bounds.site_flight
            return within and self._sites.total() + size <= self._bounds.flight

        try:
            async with asyncio.timeout(self._bounds.patience_s), self._freed:
                await self._freed.wait_for(fits)
                self._sites[site] += size
        except TimeoutError:
            raise Refused("too many bytes on their way", 503, site=site) from None
        try:
            yield
        finally:
            async with self._freed:
                self._sites[site] -= size
                self._freed.notify_all()


class _Upstream:
    """The calls that the SuperLink works on, of each site by kind: no site gets more of it than its share.

    A call takes its place until its answer has ended, be it that the caller has hung up long before.
    """

    def __init__(self, bounds: Bounds) -> None:
        self._most = {_ANNOUNCE: bounds.site_announcements, _BEAT: bounds.site_beats, "": bounds.site_calls}
        self._held: Counter[tuple[str, str]] = Counter()

    @contextlib.contextmanager
    def hold(self, site: str, call: str) -> Iterator[None]:
        place = site, call if call in self._most else ""
        if self._held[place] >= self._most[place[1]]:
            raise Refused("too many calls at a time", 503, site=site)
        self._held[place] += 1
        try:
            yield
        finally:
            self._held[place] -= 1


class _Passed(StreamingResponse):
    """An answer from behind, passed on; `over` is called once that has ended, however it did."""

    def __init__(self, request: Request, answer: httpx.Response, over: Callable[[], None]) -> None:
        super().__init__(_rest(request, answer), answer.status_code)
        self.raw_headers = [(name.lower(), v) for name, v in answer.headers.raw if name.lower() not in _NOT_BACK]
        self._answer, self._over = answer, over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            try:
                await self._answer.aclose()
            finally:
                self._over()


class _Door:
    """What the door does with a call; see `make_door`."""

    def __init__(
        self, upstream: str, client: httpx.AsyncClient, checks: Admission, bounds: Bounds, refusals: Refusals
    ) -> None:
        self._upstream, self._client, self._checks = upstream, client, checks
        self._bounds, self._refusals, self._flight = bounds, refusals, _Flight(bounds)
        self._working = _Upstream(bounds)
        self._faults: Counter[tuple[str, str]] = Counter()
        self._healthy: tuple[float, Response] | None = None
        self._asking = asyncio.Lock()

    async def health(self, request: Request) -> Response:
        """Whether the SuperLink is there; asked once a second, however many want to know."""
        async with self._asking:
            if self._healthy is None or time.monotonic() - self._healthy[0] > _HEALTH_S:
                try:
                    answer = await self._client.get(f"{self._upstream}/health", timeout=10.0)
                    response = Response(answer.content, answer.status_code, media_type="application/json")
                except httpx.TransportError:
                    response = PlainTextResponse("the server behind is not there", 502)
                self._healthy = time.monotonic(), response
            return self._healthy[1]

    async def fleet(self, request: Request) -> Response:
        """A site's call."""
        call = request.scope["path"].removeprefix(_FLEET)
        try:
            if call not in CALLS:
                raise Refused("no such call", 404)
            caller = self._admit(call, request)
            most = self._bounds.object_bytes if call == _OBJECT else CALL_BYTES
            size = _size(request, most, caller.site)
            body = _body(request, self._bounds, size, caller.site)
            if call == _OBJECT:  # passed on as it comes; Flower compares the node in it with the key
                async with self._flight.hold(caller.site, size):
                    return await self._pass(request, call, caller, body)
            whole = b"".join([chunk async for chunk in body])
            admission.check(call, whole, caller)
            return await self._pass(request, call, caller, whole)
        except Refused as error:
            return self._refuse(error)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody hears it

    def _admit(self, call: str, request: Request) -> Caller:
        try:
            caller = self._checks.admit(request.headers.raw)
        except UnknownKey as error:
            if call == _ACTIVATE:
                raise Refused(error.reason, 412, _NOT_ACTIVATED) from None
            raise
        if (connection := getattr(request.state, "connection", None)) is not None:
            connection.prove(caller.site)
        return caller

    def _refuse(self, error: Refused) -> Response:
        self._refusals.note(error.reason, error.site)
        again = {"retry-after": "5"} if error.status == 503 else {}
        return PlainTextResponse(error.text, error.status, headers={"connection": "close", **again})

    async def not_here(self, request: Request, error: Exception) -> Response:
        """What is asked for beside the calls of sites."""
        return self._refuse(Refused("not here", getattr(error, "status_code", 404)))

    async def _pass(self, request: Request, call: str, caller: Caller, body: bytes | AsyncIterator[bytes]) -> Response:
        """The answer from behind, passed on as it comes, without holding it whole."""
        headers = [(name, value) for name, value in request.headers.raw if name not in _HOP]
        built = self._client.build_request("POST", self._upstream + _FLEET + call, headers=headers, content=body)
        with contextlib.ExitStack() as held:
            held.enter_context(self._working.hold(caller.site, call))
            try:
                answer = await self._client.send(built, stream=True)
            except httpx.TransportError:  # it starts again: sites try again after this status
                return PlainTextResponse("the server behind is not there", 502)
            if answer.status_code == 500:
                self._faults[caller.site, call] += 1
                # A database that is locked, mostly. A site ends its session after a 500, and tries again after a 503;
                # calls bear to be repeated. What fails on and on is passed on as it is.
                if self._faults[caller.site, call] <= _FAULTS:
                    await answer.aclose()
                    return self._refuse(Refused("fault of the server", 503, "the server failed", caller.site))
            else:
                self._faults.pop((caller.site, call), None)
            return _Passed(request, answer, held.pop_all().close)


async def _rest(request: Request, answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for chunk in answer.aiter_raw():
            yield chunk
    except httpx.TransportError:  # the head has gone out: hanging up is all that tells the caller
        if (connection := getattr(request.state, "connection", None)) is None:
            raise
        connection.drop()


def _size(request: Request, most: int, site: str) -> int:
    """The size of the body, which the caller must say before."""
    sizes = request.headers.getlist("content-length")
    if "transfer-encoding" in request.headers or not sizes:
        raise Refused("no length", 411, site=site)
    if len(sizes) != 1 or not _DIGITS.fullmatch(sizes[0]):
        raise Refused("no length", 400, site=site)
    if int(sizes[0]) > most:
        raise Refused("too large", 413, site=site)
    return int(sizes[0])


async def _body(request: Request, bounds: Bounds, size: int, site: str) -> AsyncIterator[bytes]:
    """What the caller sends, at the least rate or faster; the time that it is not read in does not count."""
    stream, came, waited = request.stream(), 0, 0.0
    while came < size:
        began = time.monotonic()
        try:
            async with asyncio.timeout(bounds.grace_s + came / bounds.least_rate - waited):
                chunk = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise Refused("too slow a body", 408, site=site) from None
        waited += time.monotonic() - began
        came += len(chunk)
        yield chunk


def make_door(
    upstream: str,
    checks: Admission,
    trust: ssl.SSLContext | bool = True,
    *,
    bounds: Bounds | None = None,
    refusals: Refusals | None = None,
) -> Starlette:
    """The proxy before `upstream`.

    Args:
        upstream: where the SuperLink listens, such as `https://127.0.0.1:8000`.
        checks: of who calls.
        trust: what the SuperLink's certificate is checked by.
        bounds: of what a call may take.
        refusals: counts what is not let through.
    """
    # A call may take as long as the disk behind needs for a big adapter; who hangs is ended by the site's own timeout.
    # As many as there are callers: who is slow must not keep a place that others wait for.
    client = httpx.AsyncClient(
        verify=trust,
        timeout=httpx.Timeout(300.0, connect=10.0),
        limits=httpx.Limits(max_connections=None, keepalive_expiry=_KEPT_S),
        trust_env=False,
    )
    door = _Door(upstream, client, checks, bounds or Bounds(), refusals or Refusals())

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    routes = [
        Route("/health", door.health, methods=["GET"]),
        Route(_FLEET + "{call}", door.fleet, methods=["POST"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={404: door.not_here, 405: door.not_here})


def config(app: Starlette, refusals: Refusals, limits: Limits, tls: ssl.SSLContext | None = None) -> uvicorn.Config:
    """How uvicorn serves a door; the address is yet to be set.

    Args:
        app: the door.
        refusals: counts the connections that are ended.
        limits: on these.
        tls: None = plain HTTP.
    """
    return uvicorn.Config(
        app,
        http=protocol(Places(limits, refusals.note), limits, refusals.note, tls),
        ws="none",
        loop="asyncio",
        h11_max_incomplete_event_size=_HEAD_BYTES,
        access_log=False,
        log_level="error",  # lower ones come as often as strangers like
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
    )


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(prog="deploy.proxy", description="The front door of a federation's server.")
    parser.add_argument("--bind", required=True, help="address to listen on")
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--upstream", required=True, help="the SuperLink, such as https://127.0.0.1:8000")
    parser.add_argument("--certificate", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--ca", required=True)
    parser.add_argument("--sites", required=True, type=Path, help="folder of the sites' public keys, NAME.pub each")
    parser.add_argument("--nodes", required=True, type=Path, help="file of the node that each site is registered as")
    parser.add_argument("--most", type=int, default=OBJECT_BYTES, help="bytes of an object that a site sends")
    given = parser.parse_args()
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.minimum_version = ssl.TLSVersion.TLSv1_2
    tls.load_cert_chain(given.certificate, given.key)
    refusals = Refusals(lambda line: print(f"{time.strftime('%H:%M:%S')} {line}", flush=True))
    door = make_door(
        given.upstream,
        Admission(admission.Registry(given.sites, given.nodes)),
        ssl.create_default_context(cafile=given.ca),
        bounds=Bounds(given.most, site_flight=4 * given.most, flight=max(Bounds().flight, 4 * given.most)),
        refusals=refusals,
    )
    served = config(door, refusals, Limits(), tls)
    served.host, served.port = given.bind, given.port
    allow_many_files()  # a connection is one, and two while a call is passed on
    uvicorn.Server(served).run()


if __name__ == "__main__":
    main()
