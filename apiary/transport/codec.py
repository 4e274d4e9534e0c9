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
import inspect
import json
import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Generator, Tensor

from apiary.config.registry import Registry
from apiary.config.schema import RunConfig, UserError
from apiary.core.tensors import StateDict

Floats: TypeAlias = NDArray[np.float32]
Bytes: TypeAlias = NDArray[np.uint8]
Shapes: TypeAlias = Mapping[str, Sequence[int]]
Rounding: TypeAlias = Literal["nearest", "stochastic"]

_SHARE, _SHARE_DOWN = 0.01, 0.1  # of topk's entries: the default, and the least that has served on the way down
_MAGIC, _VERSION, _CHECKSUM = b"APIW", 1, struct.Struct("<I")
_LARGEST = np.finfo(np.float32).max
_HALF_BITS, _HALF_MOST = 15, 32752.0  # top-k values are scaled to below 2^15; the largest float16 below that
_VARINT_BITS, _VARINT_MOST = 7, 5  # a gap takes at most so many bytes


class CodecError(ValueError):
    """A message is not what the receiver can use; the text names the fault, and of the message only numbers."""


class NotFinite(CodecError):
    """A message that arrived as it was sent, and holds NaN, infinity or a scale that leads there: no encoder's."""


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

    @property
    def whole(self) -> bool:
        """Whether nothing is left out, so that on the way down whole adapters travel, and clients keep no copy."""
        return self.label == "fp32"


CODECS: Registry[Codec] = Registry("wire.up/down", makes=Codec)


def of_run(config: RunConfig, way: Literal["up", "down"]) -> Codec:
    """The codec that a run names for one way.

    On the way down each message has in it what the last one left out (`apiary.transport.downlink`). There a codec
    needs no feedback of its own and rounds to the nearest unless told otherwise, for nothing is lost by it.

    Raises:
        UserError: unknown name or options, by their key.
    """
    method = config.wire.up if way == "up" else config.wire.down
    if way == "up" and config.strategy.name == "fedkseed" and method.name == "fp32":
        return sparse()  # a visit has scalars for few of the seeds
    options = method.options
    try:
        if way == "down" and "feedback" in options:
            raise UserError("wire.down: the way down has feedback by itself; leave the option 'feedback' out")
        if way == "down" and "rounding" in inspect.signature(CODECS.builder(method.name)).parameters:
            options = {"rounding": "nearest", **options}
        return CODECS.build(method.name, options)
    except UserError as error:
        raise UserError(*(line.replace(CODECS.key, f"wire.{way}") for line in error.problems)) from None


def remarks(config: RunConfig) -> list[str]:
    """What a run should know of the codecs that it has chosen, a line each."""
    share = config.wire.down.options.get("share", _SHARE)
    if config.wire.down.name != "topk" or not isinstance(share, int | float) or share >= _SHARE_DOWN:
        return []
    return [
        f"wire.down = 'topk' with share = {share:g}: clients train from copies that lag far behind the adapter; in our "
        f"runs 0.01 ended above the untuned loss, and {_SHARE_DOWN:g} held (docs/wire.md)"
    ]


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
    parts: list[bytes] = []
    kept = dict(feedback) if codec.feedback else {}
    names = sorted(delta)
    present = np.zeros(len(names), bool)
    for place, name in enumerate(names):
        wanted = delta[name].detach().float()
        # With feedback a change of negative zeros rests too; a codec that is exact sends their sign.
        if not wanted.any() if codec.feedback else _is_zero(wanted):
            continue
        if name in kept:
            if kept[name].shape != wanted.shape:
                raise ValueError(f"{name!r} is {tuple(wanted.shape)}, its feedback {tuple(kept[name].shape)}")
            wanted = wanted + kept[name]
        if not torch.isfinite(wanted).all():
            raise ValueError(f"the change of {name!r} holds NaN or infinity, or numbers too large: it cannot be sent")
        part = codec.pack(wanted.reshape(-1).numpy(), rng)
        parts.append(part)
        present[place] = True
        if codec.feedback:
            seen, _ = codec.unpack(np.frombuffer(part, np.uint8), wanted.numel())
            kept[name] = wanted - torch.from_numpy(seen).view(wanted.shape)
    parts = [_header(codec, shapes_of(delta)), np.packbits(present, bitorder="little").tobytes(), *parts]
    checksum = functools.reduce(lambda crc, part: zlib.crc32(part, crc), parts, 0)
    return b"".join([*parts, _CHECKSUM.pack(checksum)]), kept


def _is_zero(tensor: Tensor) -> bool:
    """Whether all bits are zero; a negative zero is to arrive as one."""
    return not tensor.reshape(-1).view(torch.int32).any()


def decode(message: bytes, codec: Codec, shapes: Shapes) -> dict[str, Tensor]:
    """The change that a message holds, float32, in the order of `shapes`.

    Args:
        message: what `encode` made; trusted in nothing.
        codec: of the same label as the sender's.
        shapes: of the receiver's own adapter; the message can make it allocate no more than these take.

    Raises:
        CodecError: whatever is wrong with the message.
    """
    _check(message, codec, shapes)
    body = np.frombuffer(message, np.uint8)[len(_header(codec, shapes)) : -_CHECKSUM.size]
    present, at = _read_present(body, len(shapes))
    found: dict[str, Tensor] = {}
    for name, here in zip(sorted(shapes), present, strict=True):
        if not here:
            found[name] = torch.zeros(tuple(shapes[name]))
            continue
        try:
            values, used = codec.unpack(body[at:], math.prod(shapes[name]))
        except CodecError as error:
            raise type(error)(f"{name}: {error}") from None
        found[name], at = torch.from_numpy(values).view(tuple(shapes[name])), at + used
    if at != len(body):
        raise CodecError(f"it goes on for {len(body) - at} bytes after its last tensor")
    return {name: found[name] for name in shapes}


def _read_present(body: Bytes, tensors: int) -> tuple[list[bool], int]:
    """Which tensors have a part, and the bytes that say so."""
    size = (tensors + 7) // 8
    bits = np.unpackbits(_take(body, 0, size, "u1"), bitorder="little")
    if bits[tensors:].any():
        raise CodecError("it names more tensors than the adapter has")
    return bits[:tensors].astype(bool).tolist(), size


def _check(message: bytes, codec: Codec, shapes: Shapes) -> None:
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
    if not message.startswith(_header(codec, shapes)):
        raise CodecError("its tensors have other names or shapes than the adapter's")
    frame = len(_header(codec, shapes)) + (len(shapes) + 7) // 8 + _CHECKSUM.size
    most = frame + sum(codec.most(math.prod(shape)) for shape in shapes.values())
    if len(message) > most:
        raise CodecError(f"it has {len(message)} bytes; an adapter of these shapes takes at most {most}")


def _prefix(codec: Codec) -> bytes:
    label = codec.label.encode()
    return _MAGIC + bytes([_VERSION, len(label)]) + label


def _header(codec: Codec, shapes: Shapes) -> bytes:
    layout = json.dumps([[name, *shapes[name]] for name in sorted(shapes)]).encode()
    return _prefix(codec) + hashlib.blake2b(layout, digest_size=8).digest()


def _take(body: Bytes, at: int, count: int, dtype: str) -> NDArray[Any]:
    """The `count` numbers of `dtype` at byte `at`."""
    end = at + count * np.dtype(dtype).itemsize
    if end > len(body):
        raise CodecError("it ends too early")
    return body[at:end].view(dtype)


# -- floating point -----------------------------------------------------------------------------


@CODECS.register("fp32")
def fp32() -> Codec:
    """The change as it is, 4 bytes an entry."""

    def unpack(body: Bytes, n: int) -> tuple[Floats, int]:
        values = _take(body, 0, n, "<f4").astype(np.float32)
        if not np.isfinite(values).all():
            raise NotFinite("it holds NaN or infinity")
        return values, 4 * n

    return Codec("fp32", lambda flat, rng: flat.astype("<f4").tobytes(), unpack, lambda n: 4 * n)


@CODECS.register("bf16")
def bf16() -> Codec:
    """The change rounded to the nearest bfloat16, 2 bytes an entry: each entry to 1 part in 512."""

    def pack(flat: Floats, rng: Generator) -> bytes:
        bits = flat.view(np.uint32)
        even = (bits >> 16) & 1
        rounded = ((bits + 0x7FFF + even) >> 16).astype("<u2")
        rounded -= (rounded & 0x7FFF) == 0x7F80  # above the largest bfloat16, where rounding leads to infinity
        return rounded.tobytes()

    def unpack(body: Bytes, n: int) -> tuple[Floats, int]:
        bits = _take(body, 0, n, "<u2")
        if ((bits & 0x7F80) == 0x7F80).any():
            raise NotFinite("it holds NaN or infinity")
        return _of_bf16(bits), 2 * n

    return Codec("bf16", pack, unpack, lambda n: 2 * n)


def _of_bf16(bits: NDArray[np.uint16]) -> Floats:
    return (bits.astype(np.uint32) << 16).view(np.float32)


# -- blockwise whole numbers --------------------------------------------------------------------


@CODECS.register("int8")
def int8(
    block: Annotated[int, Field(ge=2, le=65536, multiple_of=2)] = 128,
    rounding: Rounding = "stochastic",
    feedback: bool = False,
) -> Codec:
    """Whole numbers from -127 to 127 times a scale for each block (Dettmers et al. 2021), 1 byte an entry.

    In blocks of 128, and not 64 as for `int4`: the scales would take 3% of the message, and buy nothing that 8 bits
    need. Down it has the option block alone.

    Args:
        block: entries to a scale.
        rounding: see `int4`.
        feedback: see `int4`.
    """

    def unpack(body: Bytes, n: int) -> tuple[Floats, int]:
        scales, at = _read_scales(body, n, block, levels=127)
        codes = _take(body, at, n, "i1")
        values = np.zeros(len(scales) * block, np.float32)
        values[:n] = codes
        if (codes == -128).any():
            raise CodecError("it holds a number that int8 does not use")
        return _scaled(values, scales, n), at + n

    def pack(flat: Floats, rng: Generator) -> bytes:
        scales, codes = _quantise(flat, block, 127, rounding, rng)
        return scales.tobytes() + codes.tobytes()

    return Codec(f"int8/{block}", pack, unpack, lambda n: 2 * _blocks(n, block) + n, feedback)


@CODECS.register("int4")
def int4(
    block: Annotated[int, Field(ge=2, le=65536, multiple_of=2)] = 64,
    rounding: Rounding = "nearest",
    feedback: bool = True,
) -> Codec:
    """Whole numbers from -7 to 7 times a scale for each block, two to a byte.

    A block's scale is max|x| / 7 rounded *up* to a bfloat16. Up, so that no entry is cut, which would bias it; a
    bfloat16, so that it has the range of float32 and neither huge nor tiny blocks are lost. A block of zeros has the
    scale zero.

    Args:
        block: entries to a scale; the last block of a tensor may have fewer.
        rounding: "nearest" has half the squared error of "stochastic", but many clients err alike, so that their mean
            is no better; stochastic errors average out, E h = x.
        feedback: keep what a message leaves out, and add it to the next.
    """

    def pack(flat: Floats, rng: Generator) -> bytes:
        scales, codes = _quantise(flat, block, 7, rounding, rng)
        nibbles = np.append(codes, np.int8(0)) if len(codes) % 2 else codes
        nibbles = nibbles.view(np.uint8) & 15
        return scales.tobytes() + (nibbles[::2] | nibbles[1::2] << 4).tobytes()

    def unpack(body: Bytes, n: int) -> tuple[Floats, int]:
        scales, at = _read_scales(body, n, block, levels=7)
        packed = _take(body, at, (n + 1) // 2, "u1")
        low, high = (packed << 4).view(np.int8) >> 4, packed.view(np.int8) >> 4
        if (low == -8).any() or (high == -8).any() or (n % 2 and high[-1]):
            raise CodecError("it holds a number that int4 does not use")
        values = np.zeros(len(scales) * block, np.float32)
        values[0 : 2 * len(low) : 2], values[1 : 2 * len(high) : 2] = low, high
        return _scaled(values, scales, n), at + len(packed)

    return Codec(f"int4/{block}", pack, unpack, lambda n: 2 * _blocks(n, block) + (n + 1) // 2, feedback)


def _blocks(n: int, block: int) -> int:
    return -(-n // block)


def _most_scale(levels: int) -> int:
    """The bits of the largest bfloat16 that times `levels` is still finite."""
    return int((_LARGEST / np.float32(levels)).view(np.uint32)) >> 16


def _quantise(
    flat: Floats, block: int, levels: int, rounding: Rounding, rng: Generator
) -> tuple[NDArray[np.uint16], NDArray[np.int8]]:
    """The scale of each block, as the bits of a bfloat16, and the code of each entry."""
    n, blocks = len(flat), _blocks(len(flat), block)
    grid = np.pad(flat, (0, blocks * block - n)).reshape(blocks, block)
    top = np.maximum(grid.max(1), -grid.min(1))
    up = ((top / levels).view(np.uint32) + 0xFFFF) >> 16
    bits = np.minimum(up, _most_scale(levels)).astype("<u2")
    scales = _of_bf16(bits)
    # Division by the scale that the receiver will see, or what it makes of the codes would be biased.
    ratio = grid / np.where(scales > 0, scales, 1)[:, None]
    np.clip(ratio, -levels, levels, out=ratio)  # only beside the largest float32 there is anything to cut
    if rounding == "nearest":
        codes = np.rint(ratio, out=ratio)
    else:
        codes = np.floor(ratio)
        codes += torch.rand(grid.shape, generator=rng).numpy() < ratio - codes
    return bits, codes.astype(np.int8).reshape(-1)[:n]


def _read_scales(body: Bytes, n: int, block: int, levels: int) -> tuple[Floats, int]:
    """The scales that begin a part, and the bytes they take."""
    bits = _take(body, 0, _blocks(n, block), "<u2")
    if (bits > _most_scale(levels)).any():  # as are the bits of all negative numbers, NaN and infinity
        raise NotFinite("it holds a scale that is negative, too large or no number")
    return _of_bf16(bits), 2 * len(bits)


def _scaled(values: Floats, scales: Floats, n: int) -> Floats:
    grid = values.reshape(len(scales), -1) if len(scales) else values.reshape(0, 1)
    grid *= scales[:, None]
    return values[:n]


# -- the largest entries ------------------------------------------------------------------------


@CODECS.register("topk")
def topk(share: Annotated[float, Field(gt=0, le=1)] = _SHARE) -> Codec:
    """The largest entries of each tensor (Stich et al. 2018), always with error feedback; about 3.3 bytes each at 1%.

    A part holds an exponent for the tensor (2 bytes), the values over 2^exponent in float16, and the number of entries
    skipped before each, 7 bits to a byte. Of each tensor, not of all together: at first B changes much more than A.

    Args:
        share: of a tensor's entries, rounded to a whole number; at least one.
    """

    def kept(n: int) -> int:
        return min(n, max(1, round(share * n)))

    def pack(flat: Floats, rng: Generator) -> bytes:
        n, k = len(flat), kept(len(flat))
        if not k:
            return b""
        index = np.sort(np.argpartition(np.abs(flat), n - k)[n - k :])
        values = flat[index].astype(np.float64)
        exponent = int(np.frexp(np.abs(values).max())[1]) - _HALF_BITS
        halves = np.clip(np.ldexp(values, -exponent), -_HALF_MOST, _HALF_MOST).astype("<f2")
        gaps = np.diff(index, prepend=-1) - 1
        return struct.pack("<h", exponent) + halves.tobytes() + _varints(gaps).tobytes()

    def unpack(body: Bytes, n: int) -> tuple[Floats, int]:
        k = kept(n)
        values = np.zeros(n, np.float32)
        if not k:
            return values, 0
        exponent = int(_take(body, 0, 1, "<i2")[0])
        halves = _take(body, 2, k, "<f2").astype(np.float64)
        if not (np.abs(halves) <= _HALF_MOST).all() or not -200 < exponent <= 128 - _HALF_BITS:
            raise NotFinite("it holds NaN, infinity or numbers too large")
        at = 2 + 2 * k
        gaps, used = _read_varints(body[at : at + _VARINT_MOST * k], k)
        index = np.cumsum(gaps + 1) - 1
        if index[-1] >= n:
            raise CodecError("it names an entry beyond the end of the tensor")
        values[index] = np.ldexp(halves, exponent)
        return values, at + used

    return Codec(f"topk/{share!r}", pack, unpack, lambda n: (2 + (2 + _VARINT_MOST) * kept(n)) if n else 0, True)


@CODECS.register("sparse")
def sparse() -> Codec:
    """The entries that are not zero, as they are: for changes that are mostly zeros, such as FedKSeed's scalars.

    A part holds their number (4 bytes), their values in float32, and the number of entries skipped before each, 7 bits
    to a byte; where that would take more than all entries do, all of them and no numbers of skipped ones.
    """

    def pack(flat: Floats, rng: Generator) -> bytes:
        index = np.flatnonzero(flat.view(np.uint32))  # bits: -0.0 is no zero here
        gaps = _varints(np.diff(index, prepend=-1) - 1)
        if 4 * len(index) + len(gaps) >= 4 * len(flat):
            index, gaps = np.arange(len(flat)), gaps[:0]
        return struct.pack("<I", len(index)) + flat[index].astype("<f4").tobytes() + gaps.tobytes()

    def unpack(body: Bytes, n: int) -> tuple[Floats, int]:
        k = int(_take(body, 0, 1, "<u4")[0])
        if k > n:
            raise CodecError("it has more entries than the tensor")
        found = _take(body, 4, 4 * k, "u1").view("<f4").astype(np.float32)
        if not np.isfinite(found).all():
            raise NotFinite("it holds NaN or infinity")
        if k in (0, n):
            return (found if k else np.zeros(n, np.float32)), 4 + 4 * k
        gaps, used = _read_varints(body[4 + 4 * k : 4 + (4 + _VARINT_MOST) * k], k)
        index = np.cumsum(gaps + 1) - 1
        if index[-1] >= n:
            raise CodecError("it names an entry beyond the end of the tensor")
        values = np.zeros(n, np.float32)
        values[index] = found
        return values, 4 + 4 * k + used

    return Codec("sparse", pack, unpack, lambda n: 4 + 4 * n)


def _varints(numbers: NDArray[np.int64]) -> Bytes:
    """Non-negative numbers below 2^35, 7 bits to a byte, lowest first; the last byte of each is below 128."""
    places = range(_VARINT_MOST)
    width = 1 + np.searchsorted([1 << _VARINT_BITS * place for place in places[1:]], numbers, side="right")
    starts = np.cumsum(width) - width
    made = np.empty(int(width.sum()), np.uint8)
    for place in places:
        has = width > place
        more = (width[has] > place + 1) << _VARINT_BITS
        made[starts[has] + place] = numbers[has] >> _VARINT_BITS * place & 127 | more
    return made


def _read_varints(window: Bytes, count: int) -> tuple[NDArray[np.int64], int]:
    """The first `count` numbers, and the bytes they take."""
    stops = np.flatnonzero(window < 128)[:count]
    if len(stops) < count:
        raise CodecError("it ends too early")
    starts = np.append(0, stops[:-1] + 1)
    width = stops - starts + 1
    if width.max() > _VARINT_MOST:
        raise CodecError("it holds an index that is too large")
    used = int(stops[-1]) + 1
    place = np.arange(used) - np.repeat(starts, width)
    digits = (window[:used] & 127).astype(np.int64) << _VARINT_BITS * place
    return np.add.reduceat(digits, starts), used
