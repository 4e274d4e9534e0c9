"""The front door: the one port of the server that is open to others.

Flower's SuperLink carries on one port what the sites need (`/v1/fleet/`, where every call is signed by a site's key)
and what needs no password at all: starting runs, registering keys. It therefore listens on this machine alone, and
this proxy ends TLS at the open port and lets through only the former.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.auto import AutoHTTPProtocol

_FLEET = re.compile(r"/v1/fleet/[a-z-]{1,64}")
_MOST = 2**31  # bytes of a body: protobuf holds no more
_IDLE_S = 30.0  # without a byte of what a caller began to send
_CALLERS = 512  # connections at a time; a site holds one or two
_DIGITS = re.compile(r"[0-9]{1,18}")
# Of one connection, not of the message (RFC 9110, section 7.6.1); the name of the host behind is put in anew.
_HOP = {b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"host"}


class _TurnedAway(Exception):
    def __init__(self, reason: str, status: int) -> None:
        self.reason, self.status = reason, status


def make_door(
    upstream: str, trust: ssl.SSLContext | bool = True, *, most: int = _MOST, idle_s: float = _IDLE_S
) -> Starlette:
    """The proxy before `upstream`.

    Args:
        upstream: where the SuperLink listens, such as `https://127.0.0.1:8000`.
        trust: what its certificate is checked by.
        most: bytes of a body.
        idle_s: how long a caller may pause in a body.
    """
    # A call may take as long as the disk behind needs for a big adapter; who hangs is ended by the site's own timeout.
    # As many as there are callers: who is slow must not keep a place that others wait for.
    client = httpx.AsyncClient(
        verify=trust,
        timeout=httpx.Timeout(300.0, connect=10.0),
        limits=httpx.Limits(max_connections=None),
        trust_env=False,
    )

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    async def health(request: Request) -> Response:
        return await _forward(client, request, f"{upstream}/health", None)

    async def fleet(request: Request) -> Response:
        path = request.scope["path"]
        if not _FLEET.fullmatch(path):
            return PlainTextResponse("not here", 404)
        size = request.headers.get("content-length", "0")
        if not _DIGITS.fullmatch(size) or int(size) > most:
            return PlainTextResponse("too large", 413)
        return await _forward(client, request, upstream + path, _body(request, most, idle_s))

    routes = [Route("/health", health, methods=["GET"]), Route("/v1/fleet/{call}", fleet, methods=["POST"])]
    return Starlette(routes=routes, lifespan=lifespan)


async def _body(request: Request, most: int, idle_s: float) -> AsyncIterator[bytes]:
    """What the caller sends, counted: one that comes in chunks does not say its size before."""
    stream, size = request.stream(), 0
    while True:
        try:
            chunk = await asyncio.wait_for(anext(stream), idle_s)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise _TurnedAway("too slow", 408) from None
        size += len(chunk)
        if size > most:
            raise _TurnedAway("too large", 413)
        yield chunk


async def _forward(
    client: httpx.AsyncClient, request: Request, url: str, body: AsyncIterator[bytes] | None
) -> Response:
    """The answer from behind, passed on as it comes, without holding it whole."""
    headers = [(name, value) for name, value in request.headers.raw if name not in _HOP]
    try:
        answer = await client.send(
            client.build_request(request.method, url, headers=headers, content=body), stream=True
        )
    except _TurnedAway as error:
        return PlainTextResponse(error.reason, error.status, headers={"connection": "close"})
    except ClientDisconnect:
        return Response(status_code=400)  # nobody hears it
    except httpx.TransportError:  # it starts again: sites try again after this status
        return PlainTextResponse("the server behind is not there", 502)
    passed = StreamingResponse(answer.aiter_raw(), answer.status_code, background=BackgroundTask(answer.aclose))
    passed.raw_headers = [(name.lower(), value) for name, value in answer.headers.raw if name.lower() not in _HOP]
    return passed


def _impatient(protocol: Any) -> Any:
    """The protocol, but that it ends a connection on which nothing comes; uvicorn waits for a first byte for ever."""

    class Impatient(protocol):  # type: ignore[misc]
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self.timeout_keep_alive_task = self.loop.call_later(_IDLE_S, self.timeout_keep_alive_handler)

    return Impatient


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(prog="deploy.proxy", description="The front door of a federation's server.")
    parser.add_argument("--bind", required=True, help="address to listen on")
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--upstream", required=True, help="the SuperLink, such as https://127.0.0.1:8000")
    parser.add_argument("--certificate", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--ca", required=True)
    given = parser.parse_args()
    uvicorn.run(
        make_door(given.upstream, ssl.create_default_context(cafile=given.ca)),
        host=given.bind,
        port=given.port,
        ssl_certfile=given.certificate,
        ssl_keyfile=given.key,
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
        limit_concurrency=_CALLERS,
        http=_impatient(AutoHTTPProtocol),
    )


if __name__ == "__main__":
    main()
