"""Wire codecs: the change of an adapter as the bytes of one message, both halves side by side.

What is encoded is always a change, never weights: a change is small beside the weights, and so is what its coding
loses. A codec is a value made by a builder of `CODECS`. What the sender's rounding and its feedback are is its own
business; the receiver needs only the codec's label.

A message, all numbers little-endian: magic (4 bytes), version (1), length of the label (1), label, layout (8), which
tensors are not all zero (a bit each, in the order of the names, lowest first), a part for each of these, CRC-32 of all
that (4). The layout is a digest of names and shapes: both sides know them from the model, so they need not travel. A
factor that is not trained, whose change is zero, so costs one bit.

The receiver reconstructs in float32 from whole numbers times a power of two (`topk`) or a scale of 8 bits (`int8`,
`int4`). Such products are exact, so every host reconstructs the same bits, and so does the sender, which needs them for
its feedback. (A host that flushes subnormal numbers to zero, below 1.2e-38, differs in those.)

Error feedback (Seide et al. 2014; Karimireddy et al. 2019): with e what earlier messages left out, h = Q(d + e) is sent
and e' = d + e - h is kept, so that all that was sent and what is kept add up to all changes. It holds in one basis of
the factors only, so it does not go with methods that factor the adapter anew each round.

Under differential privacy all of it works on what is already clipped and noised. It is post-processing then, and costs
nothing; the feedback must never see a change without its noise.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from apiary.config.registry import Registry
from apiary.core.errors import CodecError
from apiary.core.tensors import StateDict, is_finite

Floats: TypeAlias = NDArray[np.float32]
Bytes: TypeAlias = NDArray[np.uint8]
Shapes: TypeAlias = Mapping[str, Sequence[int]]
Rounding: TypeAlias = Literal["nearest", "stochastic"]

SHARE, SHARE_DOWN = 0.01, 0.1  # of topk's entries: the default, and the least that has served on the way down
_MAGIC, _VERSION, _CHECKSUM = b"APIW", 1, struct.Struct("<I")
_LARGEST = np.finfo(np.float32).max


class Codec(NamedTuple):
    """How one tensor, as a flat float32 array, becomes its part of a message, and back.

    `unpack` gets the rest of the message from the part on and the number of entries; it returns the entries and how
    many bytes they took, raises `CodecError`, and allocates no more than in proportion to the entries.
    """

    label: str  # name and parameters, as in the header; what two codecs of one label pack, both unpack
    pack: Callable[[Floats, Generator], bytes]
    unpack: Callable[[Bytes, int], tuple[Floats, int]]
    most: Callable[[int], int]  # bytes of a part at most, by number of entries
    feedback: bool = False  # keep what a message leaves out, and add it to the next
    # Each entry by itself: the parts of several tensors, one after another, are that of one. Not beside feedback.
    entrywise: bool = False

    @property
    def whole(self) -> bool:
        """Whether nothing is left out, so that on the way down whole adapters travel, and clients keep no copy."""
        return self.label == "fp32"


CODECS: Registry[Codec] = Registry("wire.up/down", makes=Codec)


def shapes_of(state: StateDict) -> dict[str, torch.Size]:
    """The shapes by name, as `decode` wants them."""
    return {name: tensor.shape for name, tensor in state.items()}


def float32_bytes(delta: StateDict) -> int:
    """What a change weighs as float32; a tensor that rests travels for nothing."""
    return 4 * sum(tensor.numel() for tensor in delta.values() if not _is_zero(tensor.float()))


def encode(delta: StateDict, codec: Codec, feedback: StateDict, rng: Generator) -> tuple[bytes, dict[str, Tensor]]:
    """The message of a change, and what is to be kept for the next one.

    Args:
        delta: the change; of any float dtype, sent as float32.
        codec: how.
        feedback: what `encode` returned the last time; empty at first. That of tensors which `delta` lacks, or whose
            change is zero, stays as it is: a factor that rests must not move.
        rng: for stochastic rounding; used tensor by tensor in the order of their names.

    Returns:
        The message, and the new feedback, which is empty for a codec without.

    Raises:
        ValueError: a tensor holds NaN or infinity, or the feedback has another shape than it.
    """
    kept = dict(feedback) if codec.feedback else {}
    moving: dict[str, Tensor] = {}
    names = sorted(delta)
    for name in names:
        wanted = delta[name].detach().float()
        # With feedback a change of negative zeros rests too; a codec that is exact sends their sign.
        if not wanted.any() if codec.feedback else _is_zero(wanted):
            continue
        if name in kept:
            if kept[name].shape != wanted.shape:
                raise ValueError(f"{name!r} is {tuple(wanted.shape)}, its feedback {tuple(kept[name].shape)}")
            wanted = wanted + kept[name]
        moving[name] = wanted
    parts = [codec.pack(_flat(moving, group), rng) for group in _groups(list(moving), codec)]
    if codec.feedback:
        for (name, wanted), part in zip(moving.items(), parts, strict=True):
            seen, _ = codec.unpack(np.frombuffer(part, np.uint8), wanted.numel())
            kept[name] = wanted - torch.from_numpy(seen).view(wanted.shape)
    present = np.packbits(np.array([name in moving for name in names], bool), bitorder="little")
    parts = [_header(codec, shapes_of(delta)), present.tobytes(), *parts]
    checksum = functools.reduce(lambda crc, part: zlib.crc32(part, crc), parts, 0)
    return b"".join([*parts, _CHECKSUM.pack(checksum)]), kept


def _groups(names: list[str], codec: Codec) -> list[list[str]]:
    """The tensors that share a part: calling numpy for each of a hundred small ones takes longer than its work."""
    return ([names] if names else []) if codec.entrywise else [[name] for name in names]


def _flat(tensors: StateDict, names: Sequence[str]) -> Floats:
    flat: Floats = torch.cat([tensors[name].reshape(-1) for name in names]).numpy()
    if not np.isfinite(flat).all():
        name = next(name for name in names if not is_finite({name: tensors[name]}))
        raise ValueError(f"the change of {name!r} holds NaN or infinity, or numbers too large: it cannot be sent")
    return flat


def _is_zero(tensor: Tensor) -> bool:
    """Whether all bits are zero; a negative zero is to arrive as one."""
    return not tensor.reshape(-1).numpy().view(np.int32).any()


def decode(message: bytes, codec: Codec, shapes: Shapes) -> dict[str, Tensor]:
    """The change that a message holds, float32, in the order of `shapes`.

    Args:
        message: what `encode` made; trusted in nothing.
        codec: of the same label as the sender's.
        shapes: of the receiver's own adapter; the message can make it allocate no more than these take.

    Raises:
        CodecError: whatever is wrong with the message.
    """
    header = _header(codec, shapes)
    _check(message, codec, shapes, header)
    body = np.frombuffer(message, np.uint8)[len(header) : -_CHECKSUM.size]
    present, at = _read_present(body, len(shapes))
    names = sorted(shapes)
    tensors = {name: torch.zeros(tuple(shapes[name])) for name, here in zip(names, present, strict=True) if not here}
    for group in _groups([name for name, here in zip(names, present, strict=True) if here], codec):
        sizes = {name: math.prod(shapes[name]) for name in group}
        values, used = _unpack(body[at:], codec, sizes)
        at += used
        for name, flat in zip(group, torch.from_numpy(values).split(list(sizes.values())), strict=True):
            tensors[name] = flat.view(tuple(shapes[name]))
    if at != len(body):
        raise CodecError(f"it goes on for {len(body) - at} bytes after its last tensor")
    return {name: tensors[name] for name in shapes}


def _unpack(body: Bytes, codec: Codec, sizes: Mapping[str, int]) -> tuple[Floats, int]:
    """What a part holds, and its bytes; a fault is raised by the name of its tensor, also where several share it."""
    try:
        return codec.unpack(body, sum(sizes.values()))
    except CodecError as error:
        if len(sizes) == 1:
            raise type(error)(f"{next(iter(sizes))}: {error}") from None
        for name, size in sizes.items():
            body = body[_unpack(body, codec, {name: size})[1] :]
        raise


def _read_present(body: Bytes, tensors: int) -> tuple[list[bool], int]:
    """Which tensors have a part, and the bytes that say so."""
    size = (tensors + 7) // 8
    bits = np.unpackbits(take(body, 0, size, "u1"), bitorder="little")
    if bits[tensors:].any():
        raise CodecError("it names more tensors than the adapter has")
    return bits[:tensors].astype(bool).tolist(), size


def _check(message: bytes, codec: Codec, shapes: Shapes, header: bytes) -> None:
    """What can be said of a message without reading its body; the first fault is the most telling one."""
    if len(message) <= len(_MAGIC) + _CHECKSUM.size or not message.startswith(_MAGIC):
        raise CodecError("it is no encoded adapter, or cut off")
    if message[len(_MAGIC)] != _VERSION:
        raise CodecError(f"it is encoded in version {message[len(_MAGIC)]}; this one reads version {_VERSION}")
    (checksum,) = _CHECKSUM.unpack(message[-_CHECKSUM.size :])
    if zlib.crc32(memoryview(message)[: -_CHECKSUM.size]) != checksum:
        raise CodecError("its checksum differs: it was damaged or cut off on its way")
    if not message.startswith(_prefix(codec)):
        raise CodecError(f"it is encoded otherwise than {codec.label}, which this run uses here")
    if not message.startswith(header):
        raise CodecError("its tensors have other names or shapes than the adapter's")
    frame = len(header) + (len(shapes) + 7) // 8 + _CHECKSUM.size
    most = frame + sum(codec.most(math.prod(shape)) for shape in shapes.values())
    if len(message) > most:
        raise CodecError(f"it has {len(message)} bytes; an adapter of these shapes takes at most {most}")


def _prefix(codec: Codec) -> bytes:
    label = codec.label.encode()
    return _MAGIC + bytes([_VERSION, len(label)]) + label


def _header(codec: Codec, shapes: Shapes) -> bytes:
    layout = json.dumps([[name, *shapes[name]] for name in sorted(shapes)]).encode()
    return _prefix(codec) + hashlib.blake2b(layout, digest_size=8).digest()


def take(body: Bytes, at: int, count: int, dtype: str) -> NDArray[Any]:
    """The `count` numbers of `dtype` at byte `at`."""
    end = at + count * np.dtype(dtype).itemsize
    if end > len(body):
        raise CodecError("it ends too early")
    return body[at:end].view(dtype)


# -- floating point -----------------------------------------------------------------------------


def of_bf16(bits: NDArray[np.uint16]) -> Floats:
    """The float32 values of bfloat16 bits, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


# -- blockwise whole numbers --------------------------------------------------------------------


# -- the largest entries ------------------------------------------------------------------------
