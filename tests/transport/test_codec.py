"""Wire codecs: what arrives, how far off it is, what it weighs, and what becomes of damaged or hostile messages."""

from __future__ import annotations

import math
import os
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from reference import codecs as reference
from safetensors.torch import load_file, save_file
from torch import Tensor

from apiary.core import errors
from apiary.core.errors import CodecError, UserError
from apiary.core.tensors import digest, generator, norm, subtract
from apiary.transport import codec as codecs
from apiary.transport.codec import Codec, decode, encode, shapes_of
from apiary.transport.codecs import CODECS

ROOT = Path(__file__).resolve().parents[2]
BLOCKWISE = {"int8": 127, "int4": 7}
# Every codec that is registered, and the choices within it.
CHOICES: list[tuple[str, Mapping[str, Any]]] = [
    *((name, {}) for name in CODECS),
    *((name, {"rounding": r, "feedback": f}) for name in BLOCKWISE for r in ("nearest", "stochastic") for f in (0, 1)),
    ("int4", {"block": 6}),
    ("topk", {"share": 0.3}),
]
_floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def _plain(name: str, **options: Any) -> Codec:
    """A codec of blocks or top-k as one message alone sees it."""
    return CODECS.build(name, options)._replace(feedback=False)


def _state(seed: int = 0, size: float = 1e-3) -> dict[str, Tensor]:
    """Tensors whose last blocks are short, one empty, one without dimensions."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {"m.b": (37, 5), "m.a": (3, 64), "n": (129,), "empty": (0, 4), "point": (), "one": (1,)}
    return {name: size * torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def _sent(delta: Mapping[str, Tensor], codec: Codec, seed: int = 0) -> dict[str, Tensor]:
    message, _ = encode(delta, codec, {}, generator(seed))
    return decode(message, codec, shapes_of(delta))


def _array(values: Any, codec: Codec, seed: int = 0) -> np.ndarray:
    """What arrives of one tensor."""
    return _sent({"x": torch.as_tensor(np.asarray(values, np.float32))}, codec, seed)["x"].numpy()


@pytest.fixture(params=CHOICES, ids=lambda choice: f"{choice[0]}-{'-'.join(map(str, choice[1].values()))}")
def codec(request: pytest.FixtureRequest) -> Codec:
    name, options = request.param
    return CODECS.build(name, options)


# -- what arrives -------------------------------------------------------------------------------


def test_names_shapes_and_order_arrive_and_nothing_is_changed_in_place(codec: Codec) -> None:
    delta = _state()
    before = digest(delta)
    message, kept = encode(delta, codec, {}, generator(0))
    second, _ = encode(delta, codec, kept, generator(1))
    for got in (decode(message, codec, shapes_of(delta)), decode(second, codec, shapes_of(delta))):
        assert list(got) == list(delta)
        assert {name: t.shape for name, t in got.items()} == shapes_of(delta)
        assert {t.dtype for t in got.values()} == {torch.float32}
        assert norm(subtract(got, delta)) < 2 * norm(delta)
    assert digest(delta) == before


def test_the_order_of_names_and_the_strides_of_tensors_do_not_matter(codec: Codec) -> None:
    delta = _state()
    strided = {name: torch.stack([t, t], -1)[..., 0] for name, t in reversed(delta.items())}
    assert encode(strided, codec, {}, generator(0))[0] == encode(delta, codec, {}, generator(0))[0]


def test_nothing_at_all_is_a_message_too(codec: Codec) -> None:
    assert decode(encode({}, codec, {}, generator(0))[0], codec, {}) == {}


@pytest.mark.parametrize("block", [8, 64])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", BLOCKWISE)
def test_blocks_are_the_reference(name: str, rounding: str, block: int) -> None:
    codec = _plain(name, rounding=rounding, block=block)
    delta = {n: t for n, t in _state().items() if t.numel()}
    message, _ = encode(delta, codec, {}, generator(3))
    got = decode(message, codec, shapes_of(delta))
    label, rest = reference.open_message(message, [True] * len(delta))
    assert label == f"{name}/{block}"
    rng = generator(3)
    for tensor_name in sorted(delta):
        values = delta[tensor_name].reshape(-1)
        u = torch.rand(math.ceil(len(values) / block) * block, generator=rng).tolist()
        expected = reference.quantised(values.tolist(), block, BLOCKWISE[name], u if rounding == "stochastic" else None)
        read, rest = reference.read_blocks(rest, len(values), block, 8 if name == "int8" else 4)
        assert got[tensor_name].reshape(-1).tolist() == read == expected
    assert rest == b""


def test_fp32_is_lossless() -> None:
    delta = {**_state(), "odd": torch.tensor([1e-45, -0.0, 3.4028234663852886e38, -1e-38])}
    assert digest(_sent(delta, CODECS.build("fp32"))) == digest(delta)


@given(hnp.arrays(np.float32, st.integers(0, 40), elements=_floats))
@example(np.array([1 + 2**-8, -1 - 3 * 2**-8, 3.4028235e38, -3.4e38], np.float32))  # ties, and beyond the largest
@settings(max_examples=200, deadline=None)
def test_bf16_rounds_as_torch_does_but_never_to_infinity(x: np.ndarray) -> None:
    most = torch.finfo(torch.bfloat16).max
    expected = torch.from_numpy(x).bfloat16().float().clamp(-most, most).numpy()
    np.testing.assert_array_equal(_array(x, CODECS.build("bf16")), expected)


@pytest.mark.parametrize("share", [0.004, 0.05, 0.5, 1.0])
def test_topk_sends_the_largest_entries_and_is_the_reference(share: float) -> None:
    """Gaps take one byte and more: 40,000 entries, of which few are sent."""
    x = torch.randn(40_000, generator=generator(5)).numpy()
    codec = _plain("topk", share=share)
    message, _ = encode({"x": torch.from_numpy(x)}, codec, {}, generator(0))
    got = decode(message, codec, {"x": x.shape})["x"].numpy()
    label, body = reference.open_message(message, [True])
    read, rest = reference.read_topk(body, x.size, round(share * x.size))
    assert label == f"topk/{share}" and rest == b"" and got.tolist() == read
    largest = np.argsort(-np.abs(x), kind="stable")[: round(share * x.size)]
    assert set(np.flatnonzero(got)) == set(largest)
    np.testing.assert_allclose(got[largest], x[largest], rtol=2**-11, atol=2**-38)


def test_topk_takes_its_share_of_each_tensor_and_at_least_one_entry() -> None:
    delta = {"large": 1e3 * torch.ones(200) + torch.arange(200), "small": 1e-9 * torch.arange(1, 51)}
    got = _sent(delta, _plain("topk", share=0.02))
    assert {name: int((t != 0).sum()) for name, t in got.items()} == {"large": 4, "small": 1}


@given(st.lists(st.integers(1, 40_000), min_size=1, max_size=6))
@example([1, 128, 129, 16_384, 16_385, 2_097_152, 2_097_153])
@settings(max_examples=60, deadline=None)
def test_topk_finds_entries_however_far_apart(gaps: list[int]) -> None:
    index = np.cumsum(gaps) - 1
    x = np.zeros(int(index[-1]) + 1, np.float32)
    x[index] = 1.0
    got = _array(x, _plain("topk", share=len(gaps) / x.size))
    np.testing.assert_array_equal(got, x)


# -- how far off --------------------------------------------------------------------------------


@given(hnp.arrays(np.float32, st.integers(1, 40), elements=_floats), st.sampled_from(["nearest", "stochastic"]))
@settings(max_examples=300, deadline=None)
def test_each_entry_is_within_a_step_of_its_block(x: np.ndarray, rounding: str) -> None:
    for name, levels in BLOCKWISE.items():
        got = _array(x, _plain(name, rounding=rounding, block=16)).astype(np.float64)
        for start in range(0, x.size, 16):
            block, seen = (v[start : start + 16].astype(np.float64) for v in (x, got))
            step = np.abs(block).max() / levels * (1 + 2**-7) + 2.0**-133
            assert np.abs(seen - block).max() <= step * (0.5 if rounding == "nearest" else 1) * (1 + 1e-6)
            assert (seen * block >= 0).all()


def test_each_tensor_of_topk_has_the_range_of_float32() -> None:
    for size in (1e-44, 1e-38, 1e-30, 1.0, 1e30, 3.4e38):
        x = np.float32(size) * np.array([1, -1, 0.5, 0.25], np.float32)
        np.testing.assert_allclose(_array(x, _plain("topk", share=1.0)), x, rtol=2**-10, atol=2.0**-149)


@pytest.mark.parametrize(
    ("name", "rounding", "expected"),
    [
        ("int8", "nearest", 3.6e-5),
        ("int8", "stochastic", 7.1e-5),
        ("int4", "nearest", 1.2e-2),
        ("int4", "stochastic", 2.3e-2),
    ],
)
def test_the_error_of_a_gaussian_change(name: str, rounding: str, expected: float) -> None:
    """A step a of a block of 64 errs by a^2 / 12 to the nearest, by twice that at random; E max^2 is 6.0."""
    x = torch.randn(64 * 4000, generator=generator(1)).numpy()
    got = _array(x, _plain(name, rounding=rounding, block=64))
    assert float(((got - x) ** 2).mean() / (x**2).mean()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("name", BLOCKWISE)
def test_stochastic_errors_average_out_for_every_entry(name: str) -> None:
    """The largest entry too: a scale rounded down would cut it in every message."""
    block = torch.randn(64, generator=generator(2)).numpy()
    n = 20_000
    got = _array(np.tile(block, n), _plain(name, rounding="stochastic", block=64)).reshape(n, 64).astype(np.float64)
    step = reference.scale(block.tolist(), BLOCKWISE[name])
    part = block / step - np.floor(block / step)
    z = (got.mean(0) - block) / (step * np.sqrt(part * (1 - part) / n) + 1e-6 * step)
    assert np.abs(z).max() < 4.5
    assert (z**2).sum() < 64 + 5 * math.sqrt(2 * 64)
    assert np.abs(_array(np.tile(block, n), _plain(name, rounding="nearest", block=64)) - np.tile(block, n)).max() > 0


def test_the_mean_of_many_clients_gains_from_stochastic_rounding_alone() -> None:
    x = torch.randn(64 * 200, generator=generator(3)).numpy()

    def error(rounding: str) -> float:
        codec = _plain("int4", rounding=rounding)
        mean = np.mean([_array(x, codec, seed) for seed in range(20)], axis=0)
        return float(((mean - x) ** 2).mean() / (x**2).mean())

    assert error("stochastic") == pytest.approx(1.2e-3, rel=0.1)
    assert error("nearest") == pytest.approx(1.2e-2, rel=0.1)


# -- feedback -----------------------------------------------------------------------------------

FEEDBACK = [
    ("int8", {"feedback": True}),
    ("int4", {}),
    ("int4", {"rounding": "stochastic"}),
    ("topk", {"share": 0.05}),
]


def _deltas(rounds: int) -> list[dict[str, Tensor]]:
    return [_state(seed) for seed in range(rounds)]


@pytest.mark.parametrize(("name", "options"), FEEDBACK)
def test_all_that_arrived_and_what_is_kept_add_up_to_all_changes(
    name: str, options: Mapping[str, Any], tmp_path: Path
) -> None:
    """Also across a restart, in which what is kept comes back from a file."""
    codec = CODECS.build(name, options)
    shapes, kept = shapes_of(_state()), {}
    arrived = {n: torch.zeros(s, dtype=torch.float64) for n, s in shapes.items()}
    changes = {n: torch.zeros(s, dtype=torch.float64) for n, s in shapes.items()}
    for number, delta in enumerate(_deltas(50)):
        if number == 25:
            save_file(kept, tmp_path / "feedback.safetensors")
            kept = load_file(tmp_path / "feedback.safetensors")
        message, kept = encode(delta, codec, kept, generator(0, number))
        got = decode(message, codec, shapes)
        arrived = {n: arrived[n] + got[n] for n in shapes}
        changes = {n: changes[n] + delta[n] for n in shapes}
    for n in kept.keys() | {n for n, change in changes.items() if change.any()}:
        torch.testing.assert_close(arrived[n] + kept[n], changes[n], rtol=0, atol=1e-8)  # 50 roundings of 1e-2 or less
    assert norm(kept) > 0


def test_feedback_gets_small_changes_across_in_the_end() -> None:
    """Half of a block is below half a step in every round: without feedback none of it ever arrives."""
    x = torch.cat([torch.ones(32), torch.full((32,), 0.05)])
    sums = {}
    for feedback in (True, False):
        codec, kept, total = CODECS.build("int4", {"feedback": feedback}), {}, torch.zeros(64)
        for number in range(50):
            message, kept = encode({"x": x}, codec, kept, generator(number))
            total += decode(message, codec, {"x": (64,)})["x"]
        sums[feedback] = total / 50
    torch.testing.assert_close(sums[True], x, rtol=0, atol=1 / 7 / 2 / 50 * 1.02)
    assert sums[False][32:].abs().max() == 0


@pytest.mark.parametrize(("name", "options"), FEEDBACK)
def test_what_is_kept_is_what_the_receiver_did_not_see(name: str, options: Mapping[str, Any]) -> None:
    codec, delta = CODECS.build(name, options), _state()
    message, kept = encode(delta, codec, {}, generator(0))
    left_out = subtract(delta, decode(message, codec, shapes_of(delta)))
    assert digest(kept) == digest({name: tensor for name, tensor in left_out.items() if tensor.numel()})


def test_a_codec_without_feedback_keeps_nothing() -> None:
    for name, options in [("fp32", {}), ("bf16", {}), ("int8", {}), ("int4", {"feedback": False})]:
        assert encode(_state(), CODECS.build(name, options), {}, generator(0))[1] == {}


def test_what_is_kept_of_a_tensor_waits_for_the_next_message_that_holds_it() -> None:
    """Methods that train A and B in turn send one of them at a time."""
    codec, delta = CODECS.build("int4"), _state()
    _, kept = encode(delta, codec, {}, generator(0))
    _, later = encode({"n": delta["n"]}, codec, kept, generator(1))
    assert digest({**later, "n": kept["n"]}) == digest(kept)
    assert not torch.equal(later["n"], kept["n"])


def test_feedback_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'n' is \(129,\), its feedback \(128,\)"):
        encode(_state(), CODECS.build("int4"), {"n": torch.zeros(128)}, generator(0))


def test_what_float32_would_weigh_counts_what_an_exact_codec_sends() -> None:
    delta = {"moved": torch.ones(3), "rests": torch.zeros(5), "turned": torch.full((7,), -0.0)}
    assert codecs.float32_bytes(delta) == 4 * (3 + 7)
    empty = len(encode({}, CODECS.build("sparse"), {}, generator(0))[0])
    assert len(encode(delta, CODECS.build("sparse"), {}, generator(0))[0]) > empty


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_what_is_kept_of_a_factor_that_rests_waits(zero: float) -> None:
    """A factor that is not trained in a round must not move, and what it still has to say is not lost.

    Whoever turns the sign of a change around, such as an attacker, makes negative zeros of one that rests.
    """
    codec, delta = CODECS.build("int4"), _state()
    _, kept = encode(delta, codec, {}, generator(0))
    resting = {**delta, "n": torch.full((129,), zero)}
    message, later = encode(resting, codec, kept, generator(1))
    assert not decode(message, codec, shapes_of(delta))["n"].any()
    assert torch.equal(later["n"], kept["n"]) and kept["n"].any()
    message, last = encode(delta, codec, later, generator(2))
    arrived = decode(message, codec, shapes_of(delta))["n"]
    torch.testing.assert_close(arrived + last["n"], delta["n"] + kept["n"], rtol=0, atol=1e-9)


# -- odd values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_by_the_name_of_their_tensor(codec: Codec, bad: float) -> None:
    delta = _state()
    delta["m.a"][2, 63] = bad
    with pytest.raises(ValueError, match=r"change of 'm\.a' holds NaN or infinity"):
        encode(delta, codec, {}, generator(0))


def test_a_change_that_overflows_with_its_feedback_is_refused() -> None:
    kept = {"x": torch.full((2,), 3e38)}
    with pytest.raises(ValueError, match="numbers too large"):
        encode(kept, CODECS.build("int4"), kept, generator(0))


def test_zeros_arrive_as_zeros(codec: Codec) -> None:
    zeros = {name: torch.zeros_like(t) for name, t in _state().items()}
    assert all(not t.any() for t in _sent(zeros, codec).values())
    mixed = {"x": torch.cat([torch.zeros(128), torch.ones(3), torch.zeros(128)])}
    got = _sent(mixed, codec)["x"]
    assert not got[:128].any() and not got[131:].any()


def test_a_tensor_that_is_zero_costs_a_bit(codec: Codec) -> None:
    """Nine tensors, of which the first, second and ninth are not zero."""
    delta = {f"t{place}": torch.full((40, 50), float(place in (0, 1, 8))) for place in range(9)}
    message, _ = encode(delta, codec, {}, generator(0))
    reference.open_message(message, [place in (0, 1, 8) for place in range(9)])
    alone = {name: delta[name] for name in ("t0", "t1", "t8")}
    assert len(message) == len(encode(alone, codec, {}, generator(0))[0]) + 1  # two bytes of such bits, not one
    got = decode(message, codec, shapes_of(delta))
    assert [bool(tensor.any()) for tensor in got.values()] == [place in (0, 1, 8) for place in range(9)]


def test_negative_zeros_arrive_as_such() -> None:
    """The copy that a client holds is compared by its bits."""
    delta = {"x": torch.full((3,), -0.0)}
    assert digest(_sent(delta, CODECS.build("fp32"))) == digest(delta)


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-8, 1e4, 1e30, 3.4028234e38])
def test_tiny_and_huge_tensors_are_neither_lost_nor_infinite(codec: Codec, size: float) -> None:
    x = size * torch.tensor([1.0, -1.0, 1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = _sent({"x": x, "y": torch.ones(2)}, codec)["x"]
    sent = got != 0
    assert int(sent.sum()) == (1 if codec.label.startswith("topk") else 3)
    torch.testing.assert_close(got[sent], x[sent], rtol=0.01, atol=2.0**-133)  # the smallest number of a bfloat16


def test_a_tiny_block_survives_beside_a_huge_one() -> None:
    x = np.concatenate([np.full(128, 1e30), np.full(128, 1e-30)]).astype(np.float32)
    for name in BLOCKWISE:
        np.testing.assert_allclose(_array(x, _plain(name, rounding="nearest")), x, rtol=0.01)


# -- damaged and hostile messages ---------------------------------------------------------------

SMALL = {"b": torch.tensor([[1.0, -2.0, 3.0]]), "a": torch.linspace(-1, 1, 5)}
SHAPES = shapes_of(SMALL)


def _small(codec: Codec) -> bytes:
    return encode(SMALL, codec, {}, generator(0))[0]


def _sealed(content: bytes) -> bytes:
    """A message with a checksum that fits, as somebody who knows the format would make it."""
    return content + struct.pack("<I", zlib.crc32(content))


def _body(codec: Codec, body: bytes) -> bytes:
    """A message of `SMALL`'s frame, in which both tensors are, around another body."""
    return _sealed(_small(codec)[: 6 + len(codec.label) + 8 + 1] + body)


def test_any_flipped_bit_is_seen(codec: Codec) -> None:
    message = _small(codec)
    for place in range(8 * len(message)):
        damaged = bytearray(message)
        damaged[place // 8] ^= 1 << place % 8
        with pytest.raises(CodecError):
            decode(bytes(damaged), codec, SHAPES)


def test_a_message_that_is_cut_off_or_goes_on_is_seen(codec: Codec) -> None:
    message = _small(codec)
    for end in range(len(message)):
        with pytest.raises(CodecError):
            decode(message[:end], codec, SHAPES)
        if end != len(message) - 4:
            with pytest.raises(CodecError):
                decode(_sealed(message[:end]), codec, SHAPES)
    for more in (b"\0", b"\0" * 1000):
        with pytest.raises(CodecError):
            decode(message + more, codec, SHAPES)
        with pytest.raises(CodecError, match=r"goes on for|at most"):
            decode(_sealed(message[:-4] + more), codec, SHAPES)


def test_the_fault_is_named() -> None:
    codec = CODECS.build("int8")
    message = _small(codec)
    with pytest.raises(CodecError, match="no encoded adapter"):
        decode(b"<html>not found</html>", codec, SHAPES)
    with pytest.raises(CodecError, match="in version 2; this one reads version 1"):
        decode(_sealed(message[:4] + b"\2" + message[5:-4]), codec, SHAPES)
    with pytest.raises(CodecError, match="checksum"):
        decode(message[:-1], codec, SHAPES)
    for other in ("int4", "fp32"):
        with pytest.raises(CodecError, match="otherwise than int8/128"):
            decode(_small(CODECS.build(other)), codec, SHAPES)
    with pytest.raises(CodecError, match="otherwise than int8/64"):
        decode(message, CODECS.build("int8", {"block": 64}), SHAPES)


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"a": (5,)},
        {**SHAPES, "c": (0,)},
        {"a": (5,), "c": (1, 3)},
        {"a": (5,), "b": (3, 1)},
        {"a": (5,), "b": (3,)},
        {"b": (5,), "a": (1, 3)},
    ],
)
def test_other_names_or_shapes_are_seen(codec: Codec, shapes: Mapping[str, tuple[int, ...]]) -> None:
    with pytest.raises(CodecError, match="other names or shapes"):
        decode(_small(codec), codec, shapes)


@pytest.mark.parametrize(
    ("name", "body", "fault"),
    [
        ("fp32", struct.pack("<8f", *[0.0] * 4, math.nan, *[0.0] * 3), "a: it holds NaN"),
        ("fp32", struct.pack("<8f", *[0.0] * 7, math.inf), "b: it holds NaN"),
        ("bf16", struct.pack("<8H", *[0] * 7, 0x7F80), "b: it holds NaN"),
        ("bf16", struct.pack("<8H", 0xFFFF, *[0] * 7), "a: it holds NaN"),
        ("int8", struct.pack("<H5bH3b", 0x3F80, *[1] * 5, 0x7F80, *[0] * 3), "b: it holds a scale"),
        ("int8", struct.pack("<H5bH3b", 0xBF80, *[1] * 5, 0, *[0] * 3), "a: it holds a scale"),
        ("int8", struct.pack("<H5bH3b", 0x7C82, *[1] * 5, 0, *[0] * 3), "a: it holds a scale"),  # times 127: infinite
        ("int8", struct.pack("<H5bH3b", 0x3F80, *[-128] * 5, 0, *[0] * 3), "a: it holds a number that int8"),
        ("int4", b"\x80\x3f\x11\x11\x18" + b"\0" * 4, "a: it holds a number that int4"),
        ("int4", b"\x80\x3f\x11\x11\x11" + b"\0" * 4, "a: it holds a number that int4"),  # a half byte too many
        ("topk", struct.pack("<heB", 114, 1.0, 0) + b"\0" * 5, "a: it holds NaN, infinity or numbers too large"),
        ("topk", struct.pack("<heB", 0, math.nan, 0) + b"\0" * 5, "a: it holds NaN, infinity or numbers too large"),
        ("topk", struct.pack("<heB", 0, 1.0, 5) + b"\0" * 5, "a: it names an entry beyond the end"),
        ("topk", struct.pack("<he", 0, 1.0) + b"\xff" * 10, "a: it ends too early"),
        ("topk", struct.pack("<he", 0, 1.0), "a: it ends too early"),
    ],
)
def test_a_number_that_no_encoder_writes_is_refused(name: str, body: bytes, fault: str) -> None:
    codec = CODECS.build(name)
    with pytest.raises(CodecError, match=fault):
        decode(_body(codec, body), codec, SHAPES)


def test_a_message_that_names_tensors_which_are_not_there_is_refused(codec: Codec) -> None:
    message, end = _small(codec), 6 + len(codec.label) + 8
    for bits, fault in ((0b111, "more tensors than"), (0b10000011, "more tensors than"), (0b01, "goes on for")):
        with pytest.raises(CodecError, match=fault):
            decode(_sealed(message[:end] + bytes([bits]) + message[end + 1 : -4]), codec, SHAPES)
    with pytest.raises(CodecError, match="ends too early"):
        decode(_sealed(message[:end]), codec, SHAPES)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_stranger_can_send_only_finite_numbers_or_a_fault(data: st.DataObject) -> None:
    name, options = data.draw(st.sampled_from(CHOICES))
    codec = CODECS.build(name, options)
    body = bytearray(_small(codec)[6 + len(codec.label) + 8 + 1 : -4])
    for place, byte in data.draw(st.lists(st.tuples(st.integers(0, len(body) - 1), st.integers(0, 255)), max_size=6)):
        body[place] = byte
    body = bytearray(data.draw(st.one_of(st.just(bytes(body)), st.binary(max_size=80))))
    try:
        got = decode(_body(codec, bytes(body)), codec, SHAPES)
    except CodecError:
        return
    assert shapes_of(got) == SHAPES
    assert all(torch.isfinite(t).all() for t in got.values())


def test_a_long_message_allocates_nothing(codec: Codec) -> None:
    long = [_body(codec, filler * 2_000_000) for filler in (b"\0", b"\xff", b"\x7f")]
    tracemalloc.start()
    try:
        for message in long:
            with pytest.raises(CodecError):
                decode(message, codec, SHAPES)
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


# -- bytes --------------------------------------------------------------------------------------


def _adapter(layers: int = 6, rank: int = 16) -> dict[str, Tensor]:
    """The change of all linear modules of a model of width 576 with 192 key columns and 1,536 inside."""
    sides = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
    sides |= {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}
    rng, made = generator(11), {}
    for layer in range(layers):
        for module, (d_out, d_in) in sides.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}_proj"
            made[f"{prefix}.lora_A.weight"] = 1e-3 * torch.randn(rank, d_in, generator=rng)
            made[f"{prefix}.lora_B.weight"] = 1e-4 * torch.randn(d_out, rank, generator=rng)
    return made


def test_what_a_message_weighs() -> None:
    delta = _adapter()
    entries = sum(t.numel() for t in delta.values())
    size = {name: len(encode(delta, CODECS.build(name), {}, generator(0))[0]) for name in CODECS}
    assert size["fp32"] - 4 * entries == 4 + 1 + 1 + len("fp32") + 8 + math.ceil(len(delta) / 8) + 4
    assert size["fp32"] / size["bf16"] == pytest.approx(2, rel=1e-4)
    assert size["fp32"] / size["int8"] >= 3.9
    assert size["fp32"] / size["int4"] >= 7.4
    assert 3.0 < size["topk"] / (entries / 100) < 3.6  # a float16, and 1 or 2 bytes for its place


def test_the_bytes_of_the_table_for_seven_billion_parameters() -> None:
    """Llama-2-7B at rank 16, 39,976,960 entries: 159.9 MB, and 21.2 in int4; topk 1.2 to 1.6."""
    n = 39_976_960
    assert CODECS.build("fp32").most(n) / 1e6 == pytest.approx(159.9, abs=0.05)
    assert CODECS.build("bf16").most(n) / 1e6 == pytest.approx(80.0, abs=0.05)
    assert CODECS.build("int8", {"block": 64}).most(n) / 1e6 == pytest.approx(41.2, abs=0.05)
    assert CODECS.build("int4").most(n) / 1e6 == pytest.approx(21.2, abs=0.05)


def test_no_part_is_longer_than_its_codec_says(codec: Codec) -> None:
    for n in (0, 1, 2, 7, 63, 64, 65, 1000):
        for x in (torch.zeros(n), torch.randn(n, generator=generator(n))):
            assert len(codec.pack(x.numpy(), generator(0))) <= codec.most(n)


# -- elsewhere ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_another_process_with_more_threads_sees_the_same_bits(tmp_path: Path) -> None:
    expected = []
    for number, (name, options) in enumerate(CHOICES):
        codec = CODECS.build(name, options)
        message, _ = encode(_adapter(1), codec, {}, generator(number))
        (tmp_path / str(number)).write_bytes(message)
        expected.append(digest(decode(message, codec, shapes_of(_adapter(1))), 64))
    code = (
        "import sys; from pathlib import Path; import torch; torch.set_num_threads(3)\n"
        "from apiary.transport.codecs import CODECS; from apiary.transport.codec import decode\n"
        "from apiary.core.tensors import digest\n"
        f"for number, (name, options) in enumerate({CHOICES!r}):\n"
        "    message = (Path(sys.argv[1]) / str(number)).read_bytes()\n"
        f"    print(digest(decode(message, CODECS.build(name, options), {_plain_shapes()!r}), 64))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "3", "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == expected


def _plain_shapes() -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in shapes_of(_adapter(1)).items()}


@pytest.mark.parametrize(("name", "options"), CHOICES)
def test_a_generator_decides_the_message_where_rounding_is_stochastic(name: str, options: Mapping[str, Any]) -> None:
    one, two, other = (encode(_state(), CODECS.build(name, options), {}, generator(seed))[0] for seed in (1, 1, 2))
    assert one == two
    stochastic = options.get("rounding", "stochastic" if name == "int8" else "nearest") == "stochastic"
    assert (one != other) == stochastic


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("int5", {}, ("'int5'", "bf16, fp32, int4, int8, sparse, topk")),
        ("int4", {"rounding": "up"}, ("rounding = 'up'", "allowed are 'nearest', 'stochastic'")),
        ("int4", {"block": 7}, ("block = 7", "multiple of 2")),
        ("topk", {"share": 0}, ("share = 0", "above 0 and at most 1")),
        ("topk", {"feedback": False}, ("'topk' has no option 'feedback'",)),
        ("fp32", {"feedback": True}, ("'fp32' has no option 'feedback'",)),
    ],
)
def test_a_slip_in_the_configuration_is_one_line(name: str, options: Mapping[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        CODECS.build(name, options)
    for part in ("wire.up/down", *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 1.0])
def test_sparse_loses_no_bit_and_is_never_much_larger_than_all_entries(share: float) -> None:
    rng = np.random.default_rng(3)
    flat = np.where(rng.random(5000) < share, rng.normal(size=5000) * 10.0 ** rng.uniform(-30, 30, 5000), 0)
    flat[7] = -0.0
    delta = {"a": torch.from_numpy(flat.astype(np.float32)), "b": torch.zeros(3, 0)}
    message, kept = codecs.encode(delta, CODECS.build("sparse"), {}, generator(0))
    assert digest(codecs.decode(message, CODECS.build("sparse"), codecs.shapes_of(delta))) == digest(delta)
    assert kept == {}
    assert len(message) <= 4 * min(5000, 2 + 2 * round(5000 * share)) + 100


def test_a_sparse_part_that_cannot_be_is_refused() -> None:
    unpack = CODECS.build("sparse").unpack
    for part, fault in [
        (struct.pack("<If", 9, 1.0), "more entries"),
        (struct.pack("<Iff", 2, 1.0, math.nan) + b"\0\0", "NaN"),
        (struct.pack("<Iff", 2, 1.0, 2.0) + b"\3\5", "beyond the end"),
        (struct.pack("<I", 2), "ends too early"),
    ]:
        with pytest.raises(errors.CodecError, match=fault):
            unpack(np.frombuffer(part, np.uint8), 8)
