"""How the ClientApp asks the site's worker: one call over a socket of this machine.

A call and its answer are each a JSON header and a body of bytes. No Flower and no torch here: the process that asks is
to stay small.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

METHOD = "/apiary.Worker/Answer"
OPTIONS = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))  # protobuf's 2 GiB remain
_SIZE = 4  # bytes of the header's length
_READY_S = 120.0  # a worker that was restarted loads its libraries first
_waiting: set[Any] = set()  # gRPC's channels of the calls of this process that wait for their answer


class Envelope(NamedTuple):
    """A call or an answer."""

    header: Mapping[str, Any]
    body: bytes = b""

    def pack(self) -> bytes:
        """Its bytes: the header's length, the header as JSON, the body."""
        header = json.dumps(dict(self.header)).encode()
        return len(header).to_bytes(_SIZE, "big") + header + self.body


def unpack(data: bytes) -> Envelope:
    """The envelope that `Envelope.pack` wrote.

    Raises:
        ValueError: it is cut short, or its header is not a JSON object.
    """
    end = _SIZE + int.from_bytes(data[:_SIZE], "big")
    if len(data) < end:
        raise ValueError(f"an envelope of {len(data)} bytes, which should have {end} at least")
    header = json.loads(data[_SIZE:end])
    if not isinstance(header, dict):
        raise ValueError("an envelope without a header")
    return Envelope(header, data[end:])


class Unanswered(RuntimeError):
    """The worker gave no answer; the message is one line without anything private."""


def ask(address: str, envelope: Envelope, ready_s: float = _READY_S) -> Envelope:
    """The worker's answer; waits for it as long as the worker lives.

    Args:
        address: the worker's socket, as gRPC writes it (`unix:PATH`).
        envelope: the call.
        ready_s: seconds a worker may need to be there.

    Raises:
        Unanswered: the worker is not there, or ended while it worked.
    """
    import grpc

    with grpc.insecure_channel(address, options=OPTIONS) as channel:
        _waiting.add(channel)
        try:
            grpc.channel_ready_future(channel).result(timeout=ready_s)
            return unpack(channel.unary_unary(METHOD)(envelope.pack()))
        except grpc.FutureTimeoutError:
            raise Unanswered(f"its worker did not come up within {ready_s:g} s") from None
        except grpc.RpcError as error:
            code = error.code().name if isinstance(error, grpc.Call) else type(error).__name__
            raise Unanswered(f"its worker ended while it worked on the message ({code})") from None
        except ValueError:
            raise Unanswered("nobody waits for the answer any more") from None
        finally:
            _waiting.discard(channel)


def cancel() -> None:
    """Let go of every call that waits for its answer: each ends with `Unanswered`.

    The worker drops a call that it has not begun.
    """
    for channel in list(_waiting):
        channel.close()
