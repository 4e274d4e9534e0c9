"""The way down in few bytes: clients hold a copy of the server's adapter, and are sent what it lacks.

The server knows what all clients hold, x_hat, and sends Q(x - x_hat) of its adapter x. What one message leaves out is
part of the next difference, which is error feedback without a state of its own (so the codec's own is not used here).

A copy goes by the digest of its bits. A client that holds another copy than the newest, for it was not asked for some
rounds, gets the changes since; one that is new, or was away for so long that these would take more bytes, gets the
newest copy whole, in float32: x_hat and not x, so that all hold the same. A copy of a run that was killed and went
another way has a digest that no change builds on, and so is replaced too.

The server's side moves on once after each step, before the checkpoint: `advance`, then whoever is asked, to train or to
evaluate, gets a `parcel`. With a codec that saves nothing, such as fp32, every copy is the adapter itself, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from apiary.core.errors import CodecError
from apiary.core.tensors import StateDict, add, digest, subtract
from apiary.transport import codec as codecs
from apiary.transport.codec import Codec, Shapes
from apiary.transport.codecs import floats

_WHOLE = floats.fp32()


class Copy(NamedTuple):
    """What a client holds."""

    version: str  # digest of the adapter
    adapter: StateDict


class Change(NamedTuple):
    """The message that turns one copy into the next."""

    since: str
    version: str
    message: bytes


class Downlink(NamedTuple):
    """The server's side: the newest copy, and the changes that led to it, oldest first."""

    copy: Copy
    changes: tuple[Change, ...] = ()  # together smaller than the copy


class Parcel(NamedTuple):
    """What a client is sent: the newest copy whole, or the changes that lead to it; neither where it holds it."""

    version: str
    whole: bytes = b""
    changes: tuple[Change, ...] = ()


def begin(adapter: StateDict) -> Downlink:
    """The server's side of a new run: the copy is the adapter itself, which nobody holds yet."""
    return Downlink(_copy(adapter))


def advance(state: Downlink, adapter: StateDict, codec: Codec, rng: Generator) -> Downlink:
    """The server's side once the adapter has changed.

    Args:
        state: as it was.
        adapter: the server's, of the same names and shapes.
        codec: how changes travel.
        rng: for stochastic rounding.

    Raises:
        ValueError: the adapter holds NaN or infinity.
    """
    if codec.whole:
        return begin(adapter)
    size = sum(4 * tensor.numel() for tensor in adapter.values())
    shapes = codecs.shapes_of(adapter)
    held = state.copy.adapter
    message, _ = codecs.encode(subtract(adapter, held), codec._replace(feedback=False), {}, rng)
    if len(message) >= size:
        return begin(adapter)
    copy = _copy(add(held, codecs.decode(message, codec, shapes)))
    if copy.version == state.copy.version:
        return state
    changes = (*state.changes, Change(state.copy.version, copy.version, message))
    while sum(len(change.message) for change in changes) >= size:
        changes = changes[1:]
    return Downlink(copy, changes)


def knows(state: Downlink, version: str) -> bool:
    """Whether changes alone lead from the copy of a version to the newest one."""
    return version == state.copy.version or _start(state.changes, version) is not None


def parcel(state: Downlink, holds: str) -> Parcel:
    """What a client is sent that holds the copy of version `holds`; "" where it holds none."""
    version = state.copy.version
    if holds == version:
        return Parcel(version)
    if (place := _start(state.changes, holds)) is not None:
        return Parcel(version, changes=state.changes[place:])
    whole, _ = codecs.encode(state.copy.adapter, _WHOLE, {}, torch.Generator())
    return Parcel(version, whole)


def receive(sent: Parcel, held: Copy | None, codec: Codec, shapes: Shapes) -> Copy:
    """The client's copy once it has unpacked a parcel.

    Args:
        sent: the parcel. Changes before the held copy do not matter, so that one sent twice may be unpacked twice.
        held: what the client held so far.
        codec: as the server's.
        shapes: of the client's own adapter.

    Raises:
        CodecError: the parcel is damaged, or does not lead from the held copy to its version; the client then drops
            its copy and asks for a whole one, by saying that it holds none.
    """
    if sent.whole:
        copy = _copy(codecs.decode(sent.whole, _WHOLE, shapes))
    elif held is None:
        raise CodecError("it builds on an adapter that is not held here")
    else:
        copy = _copy(_changed(sent, held, codec, shapes))
    if copy.version != sent.version:
        raise CodecError("it does not lead to the adapter that the server holds")
    return copy


def _changed(sent: Parcel, held: Copy, codec: Codec, shapes: Shapes) -> StateDict:
    if held.version == sent.version:
        return held.adapter
    if (place := _start(sent.changes, held.version)) is None:
        raise CodecError("it builds on another adapter than is held here")
    adapter = held.adapter
    for change in sent.changes[place:]:
        adapter = add(adapter, codecs.decode(change.message, codec, shapes))
    return adapter


def _start(changes: Sequence[Change], version: str) -> int | None:
    """Where to begin with a copy of `version`; the last such place, for an adapter may come back to what it was."""
    return next((place for place in reversed(range(len(changes))) if changes[place].since == version), None)


def _copy(adapter: StateDict) -> Copy:
    return Copy(digest(adapter), adapter)


# -- for the checkpoint -------------------------------------------------------------------------


def to_tensors(state: Downlink) -> dict[str, Tensor]:
    """The server's side as named tensors, which a checkpoint can hold."""
    tensors = {f"copy/{name}": tensor for name, tensor in state.copy.adapter.items()}
    for place, (since, version, message) in enumerate(state.changes):
        tensors[f"change/{place:06d}/{since}/{version}"] = torch.from_numpy(np.frombuffer(message, np.uint8).copy())
    return tensors


def from_tensors(tensors: Mapping[str, Tensor]) -> Downlink:
    """What `to_tensors` wrote."""
    adapter = {name.removeprefix("copy/"): t for name, t in tensors.items() if name.startswith("copy/")}
    changes = []
    for name in sorted(name for name in tensors if name.startswith("change/")):
        _, _, since, version = name.split("/")
        changes.append(Change(since, version, tensors[name].numpy().tobytes()))
    return Downlink(_copy(adapter), tuple(changes))
