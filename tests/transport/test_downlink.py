"""The way down: all who are asked hold the same copy, which follows the server's adapter, whatever they missed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from apiary.core.errors import CodecError
from apiary.core.tensors import digest, generator, norm, subtract
from apiary.transport import downlink
from apiary.transport.codec import Codec, shapes_of
from apiary.transport.codecs import CODECS
from apiary.transport.downlink import Copy, Downlink

CHOICES: list[tuple[str, Mapping[str, Any]]] = [*((name, {}) for name in CODECS), ("int4", {"rounding": "stochastic"})]
SHAPES = {"m.lora_A.weight": (8, 200), "m.lora_B.weight": (300, 8)}


def _adapter(number: int) -> dict[str, Tensor]:
    """The server's adapter after a round: a walk with steps a hundredth of its size."""
    state = {name: torch.randn(shape, generator=generator(0, name)) for name, shape in SHAPES.items()}
    for step in range(number):
        state = {n: t + 0.01 * torch.randn(t.shape, generator=generator(step, n)) for n, t in state.items()}
    return state


def _at(number: int, codec: Codec) -> Downlink:
    state = downlink.begin(_adapter(0))
    for step in range(1, number + 1):
        state = downlink.advance(state, _adapter(step), codec, generator(0, step))
    return state


def _bytes(parcel: downlink.Parcel) -> int:
    return len(parcel.whole) + sum(len(change.message) for change in parcel.changes)


@pytest.fixture(params=CHOICES, ids=lambda choice: f"{choice[0]}-{'-'.join(map(str, choice[1].values()))}")
def codec(request: pytest.FixtureRequest) -> Codec:
    name, options = request.param
    return CODECS.build(name, options, feedback=False)


def test_every_client_holds_what_the_server_thinks_whatever_it_missed(codec: Codec) -> None:
    """One is asked in every round, one in every third, one from round 5 on, one in rounds 0 and 11 alone."""
    asked = {"a": range(12), "b": range(0, 12, 3), "late": range(5, 12), "rare": (0, 11)}
    held: dict[str, Copy | None] = dict.fromkeys(asked)
    state = downlink.begin(_adapter(0))
    for number in range(12):
        if number:
            state = downlink.advance(state, _adapter(number), codec, generator(0, number))
        for client in (client for client, rounds in asked.items() if number in rounds):
            before = held[client]
            sent = downlink.parcel(state, before.version if before else "")
            after = downlink.receive(sent, before, codec, SHAPES)
            held[client] = after
            assert digest(after.adapter, 64) == digest(state.copy.adapter, 64)
            assert shapes_of(after.adapter) == SHAPES


def test_the_copy_follows_the_adapter_and_falls_no_further_behind(codec: Codec) -> None:
    """It is off by what one message leaves out, not by the sum over the rounds."""
    state, off = downlink.begin(_adapter(0)), []
    for number in range(1, 31):
        state = downlink.advance(state, _adapter(number), codec, generator(0, number))
        off.append(norm(subtract(_adapter(number), state.copy.adapter)))
    step = norm(subtract(_adapter(30), _adapter(29)))
    if codec.label == "fp32":
        assert off == [0.0] * 30
    elif codec.label.startswith("topk"):
        assert off[-1] < 0.99 * norm(subtract(_adapter(30), _adapter(0)))
    else:
        assert max(off) < 0.25 * step
        assert off[-1] <= 1.5 * off[0]


def test_float32_keeps_every_copy_bit_for_bit_where_a_factor_rests_too() -> None:
    """The message is then shorter than the adapter, and a sum of differences would round."""
    state = downlink.begin(_adapter(0))
    for number in range(1, 4):
        halves = {n: t if i else _adapter(0)[n] for i, (n, t) in enumerate(_adapter(10 * number).items())}
        state = downlink.advance(state, halves, CODECS.build("fp32"), generator(0, number))
        assert digest(state.copy.adapter) == digest(halves)


def test_topk_catches_up_when_the_adapter_rests() -> None:
    codec, state = CODECS.build("topk", {"share": 0.25}), downlink.begin(_adapter(0))
    for number in range(5):
        state = downlink.advance(state, _adapter(1), codec, generator(number))
    torch.testing.assert_close(state.copy.adapter, _adapter(1), rtol=0, atol=1e-5)


def test_fewer_bytes_and_whole_only_where_changes_would_take_more() -> None:
    codec = CODECS.build("int4")
    state = _at(12, codec)
    whole = downlink.parcel(state, "")
    assert whole.changes == () and _bytes(whole) > 4 * 4000
    versions = [change.since for change in state.changes]
    sizes = [_bytes(downlink.parcel(state, version)) for version in versions]
    assert sizes[-1] * 7.4 < _bytes(whole)
    assert len(sizes) == 7  # eight changes of 4 bits weigh more than 32
    assert sizes == sorted(sizes, reverse=True) and sizes[0] < _bytes(whole)
    assert _bytes(downlink.parcel(state, _at(2, codec).copy.version)) == _bytes(whole)


def test_who_holds_the_newest_copy_is_sent_nothing(codec: Codec) -> None:
    state = _at(3, codec)
    sent = downlink.parcel(state, state.copy.version)
    assert _bytes(sent) == 0
    assert downlink.receive(sent, state.copy, codec, SHAPES) == state.copy


def test_an_adapter_that_rests_costs_nothing() -> None:
    codec = CODECS.build("int8", {"rounding": "nearest"})
    state = downlink.begin(_adapter(0))
    assert downlink.advance(state, _adapter(0), codec, generator(0)) == state


def test_a_parcel_may_come_twice() -> None:
    """A client that was killed after it had written its copy, but before it answered, is asked again."""
    codec = CODECS.build("int4")
    old, new = _at(2, codec), _at(5, codec)
    sent = downlink.parcel(new, old.copy.version)
    once = downlink.receive(sent, old.copy, codec, SHAPES)
    again = downlink.receive(sent, once, codec, SHAPES)
    between = downlink.receive(sent, _at(4, codec).copy, codec, SHAPES)
    assert once.version == again.version == between.version == new.copy.version


@pytest.mark.parametrize("kill", [1, 4, 9])
def test_a_server_that_was_killed_goes_on_as_if_nothing_had_been(codec: Codec, kill: int, tmp_path: Path) -> None:
    through = _at(12, codec)
    save_file(downlink.to_tensors(_at(kill, codec)), tmp_path / "downlink.safetensors")
    state = downlink.from_tensors(load_file(tmp_path / "downlink.safetensors"))
    for number in range(kill + 1, 13):
        state = downlink.advance(state, _adapter(number), codec, generator(0, number))
    assert state.copy.version == through.copy.version == digest(through.copy.adapter)
    assert state.changes == through.changes


def test_an_adapter_that_comes_back_to_what_it_was_needs_no_detour() -> None:
    """Its old copy is the newest once more, and a later change builds on it as it is now, not as it was then."""
    codec = CODECS.build("int8", {"rounding": "nearest"})
    first, there = {"x": torch.zeros(4096)}, {"x": torch.full((4096,), 127.0)}  # which int8 holds exactly
    state = downlink.begin(first)
    for adapter in (there, first, there):
        state = downlink.advance(state, adapter, codec, generator(0))
    sent = downlink.parcel(state, downlink.begin(first).copy.version)
    assert len(sent.changes) == 1


def test_a_copy_of_a_run_that_went_another_way_is_replaced() -> None:
    """The server fell back to round 3, and other clients answered: there are two copies of round 5."""
    codec = CODECS.build("int4")
    abandoned = _at(5, codec).copy
    state = _at(3, codec)
    for number in (4, 5, 6):
        other = {name: t + 0.02 for name, t in _adapter(number).items()}
        state = downlink.advance(state, other, codec, generator(0, number))
    sent = downlink.parcel(state, abandoned.version)
    assert sent.whole
    assert downlink.receive(sent, abandoned, codec, SHAPES).version == state.copy.version


def test_a_parcel_for_another_copy_is_refused() -> None:
    codec = CODECS.build("int4")
    state = _at(4, codec)
    sent = downlink.parcel(state, _at(3, codec).copy.version)
    with pytest.raises(CodecError, match="not held here"):
        downlink.receive(sent, None, codec, SHAPES)
    with pytest.raises(CodecError, match="another adapter than is held"):
        downlink.receive(sent, Copy("0" * 16, _adapter(0)), codec, SHAPES)
    spoiled = {name: t.clone() for name, t in _at(3, codec).copy.adapter.items()}
    spoiled["m.lora_A.weight"][0, 0] += 1e-6  # on the client's disk
    with pytest.raises(CodecError, match="does not lead to the adapter"):
        downlink.receive(sent, Copy(_at(3, codec).copy.version, spoiled), codec, SHAPES)


def test_a_damaged_parcel_is_refused() -> None:
    codec = CODECS.build("int4")
    state, old = _at(4, codec), _at(2, codec).copy
    sent = downlink.parcel(state, old.version)
    cut = sent.changes[1]._replace(message=sent.changes[1].message[:-1])
    with pytest.raises(CodecError):
        downlink.receive(sent._replace(changes=(sent.changes[0], cut)), old, codec, SHAPES)
    with pytest.raises(CodecError, match="does not lead to the adapter"):
        downlink.receive(downlink.parcel(state, "")._replace(version="0" * 16), None, codec, SHAPES)


def test_the_codecs_own_feedback_is_not_added_a_second_time() -> None:
    for name, options in (("int4", {"feedback": True}), ("topk", {})):
        with_it = CODECS.build(name, options)
        assert with_it.feedback
        states = [_at(5, codec) for codec in (with_it, with_it._replace(feedback=False))]
        assert states[0].changes == states[1].changes
