"""A TCP relay that can be cut: what stands between a site and the door in a soak."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable

_RESET = struct.pack("ii", 1, 0)  # of SO_LINGER: closing sends RST


class Relay:
    """Passes bytes between a port of its own and another of this machine, in a thread of its own.

    Args:
        port: where it listens.
        onward: where it leads.
    """

    def __init__(self, port: int, onward: int) -> None:
        self.port, self._onward = port, onward
        self._writers: set[asyncio.StreamWriter] = set()
        self._closed, self._resets, self._bytes = False, 0, 0
        self._flows, self._over = asyncio.Event(), asyncio.Event()
        self._flows.set()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        ready.wait()

    def close(self) -> None:
        """Reset all connections and refuse new ones."""
        self._do(self._close)

    def hush(self) -> None:
        """Pass nothing on, and reset nothing."""
        self._do(self._flows.clear)

    def reset(self, times: int, after: int) -> None:
        """Reset so many connections, each once it has passed `after` further bytes from the site."""
        self._do(lambda: self._will_reset(times, after))

    @property
    def resets(self) -> int:
        """How many resets are still to come."""
        return self._resets

    def mend(self) -> None:
        """Pass everything on."""
        self._do(self._mend)

    def end(self) -> None:
        """Close for good."""
        self._do(self._over.set)
        self._thread.join()

    def _do(self, act: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(act)

    def _run(self, ready: threading.Event) -> None:
        asyncio.run(self._listen(ready))

    async def _listen(self, ready: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        ready.set()
        await self._over.wait()
        server.close()
        self._close()
        await asyncio.sleep(0)  # connections close in the loop's next turn

    def _close(self) -> None:
        self._closed = True
        for writer in tuple(self._writers):
            _abort(writer)

    def _will_reset(self, times: int, after: int) -> None:
        self._resets, self._bytes = times, after

    def _mend(self) -> None:
        self._closed, self._resets = False, 0
        self._flows.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._closed:
            _abort(writer)
            return
        try:
            ahead, behind = await asyncio.open_connection("127.0.0.1", self._onward)
        except OSError:  # the door is not there
            _abort(writer)
            return
        both = {writer, behind}
        self._writers |= both
        with contextlib.suppress(OSError):
            await asyncio.gather(self._pump(reader, behind, both, True), self._pump(ahead, writer, both, False))
        for each in both:
            each.close()
        self._writers -= both

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, both: set[asyncio.StreamWriter], up: bool
    ) -> None:
        while data := await reader.read(4096):
            await self._flows.wait()
            if up and self._resets:
                self._bytes -= len(data)
                if self._bytes < 0:
                    self._resets -= 1
                    self._bytes = 4096
                    for each in both:
                        _abort(each)
                    return
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()


def _abort(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, AttributeError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
