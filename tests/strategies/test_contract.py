"""What every registered aggregation method must do; a new one is picked up by its name."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from apiary.core.lora import is_b, scaling, split
from apiary.core.messages import ClientInfo, Update
from apiary.core.tensors import digest
from strategies import AGGREGATORS, Aggregator, Gradient, ServerState
from strategies.aggregator import ROOT

# Options for the methods that cannot be built without any.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    name: {"byzantine": 1} for name in ("krum", "multi_krum", "trimmed_mean", "bulyan")
}

SHAPES = {
    "model.layers.0.q_proj.lora_A.weight": (4, 6),
    "model.layers.0.q_proj.lora_B.weight": (8, 4),
    "model.layers.1.q_proj.lora_A.weight": (4, 6),
    "model.layers.1.q_proj.lora_B.weight": (8, 4),
}


def _tensors(seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}


def _digest(gradient: Gradient) -> str:
    return digest(gradient.adapter) + digest(gradient.base_delta)


def _zeros() -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name, shape in SHAPES.items()}


# What clients of fedkseed send is no change of factors: test_seed_scalars.py and test_zeroth_order.py.
@pytest.fixture(params=[name for name in AGGREGATORS if name != "fedkseed"])
def method(request: pytest.FixtureRequest) -> Aggregator:
    return AGGREGATORS.build(request.param, OPTIONS.get(request.param), scaling=scaling(16.0, "rslora"), seed=11)


@pytest.fixture
def state() -> ServerState:
    return ServerState(3, _tensors(99), {}, {})


@pytest.fixture
def fresh() -> ServerState:
    """As before the first round: B is zero."""
    return ServerState(0, {n: torch.zeros_like(t) if is_b(n) else t for n, t in _tensors(99).items()}, {}, {})


def _products(state: ServerState, scale: float) -> dict[str, Tensor]:
    """The change of each weight that a state stands for, dense."""
    made = {module: scale * (f.b @ f.a) for module, f in split(state.adapter).items()}
    for module, f in split(state.base_delta).items():
        made[module] = made[module] + f.b @ f.a
    return made


def _fold(method: Aggregator, state: ServerState, updates: Sequence[Update], seed: int = 0) -> Gradient:
    acc = method.reduce.start(state)
    extra = method.payload(state, ClientInfo("c", 4, 0, len(updates))).extra
    for update in _answers(method, updates):
        acc = method.reduce.add(acc, update._replace(extra=extra, lr_sum=0.1) if extra else update)
    return method.reduce.finish(state, acc, torch.Generator().manual_seed(seed))


def _answers(method: Aggregator, updates: Sequence[Update]) -> list[Update]:
    """All that a round folds in: with the server's own update for a method that asks for it."""
    own = min(updates, key=lambda update: update.client)._replace(client=ROOT)
    return [own, *updates] if method.root else [*updates]


def _cohort(n: int = 7) -> list[Update]:
    """Two of each weight, so that no order but that of the names is the same in each arrangement."""
    return [Update(f"client-{i}", _tensors(i), float(10 + 7 * (i // 2)), 4) for i in range(n)]


def _tensor_bytes(value: object) -> int:
    """Bytes of all tensors in a nest of tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(_tensor_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_tensor_bytes, value))
    return 0


def test_names_are_registered() -> None:
    assert "fedavg" in list(AGGREGATORS)


def test_identical_clients_move_the_model_as_one_of_them_did(method: Aggregator, fresh: ServerState) -> None:
    """From a new adapter what they made has the adapter's rank, so that every method can hold it."""
    updates = [Update(f"c{i}", _tensors(7), float(1 + i), 4) for i in range(7)]
    after = method.step(fresh, _fold(method, fresh, updates))
    scale = scaling(16.0, "rslora")(4)
    for module, moved in _products(after, scale).items():
        start, delta = split(fresh.adapter)[module], split(_tensors(7))[module]
        expected = scale * ((start.b + delta.b) @ (start.a + delta.a))
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-4)


def test_the_order_of_answers_does_not_matter(method: Aggregator, state: ServerState) -> None:
    cohort = _cohort()
    expected = _digest(_fold(method, state, cohort))
    assert _digest(_fold(method, state, cohort[::-1])) == expected
    assert _digest(_fold(method, state, cohort[2:] + cohort[:2])) == expected


def test_the_unit_of_the_weights_does_not_matter(method: Aggregator, state: ServerState) -> None:
    halved = [update._replace(weight=update.weight / 2) for update in _cohort()]
    one, two = (method.step(state, _fold(method, state, cohort)) for cohort in (_cohort(), halved))
    for module, product in _products(one, 1.0).items():
        torch.testing.assert_close(product, _products(two, 1.0)[module], rtol=1e-5, atol=1e-5)


def test_the_gradient_is_named_like_the_adapter(method: Aggregator, state: ServerState) -> None:
    gradient = _fold(method, state, _cohort())
    assert set(gradient.adapter) == set(SHAPES)
    tensors = [*gradient.adapter.values(), *gradient.base_delta.values()]
    assert {(t.dtype, t.device.type) for t in tensors} == {(torch.float32, "cpu")}
    if method.space == "factors":
        assert {name: tuple(tensor.shape) for name, tensor in gradient.adapter.items()} == SHAPES


def test_state_and_updates_are_never_changed(method: Aggregator, state: ServerState) -> None:
    cohort = _cohort()
    held = [state.adapter, state.base_delta, state.memory, *(update.delta for update in cohort)]
    before = [digest(tensors) for tensors in held]
    after = method.step(state, _fold(method, state, cohort))
    method.payload(after, ClientInfo("client-0", 4, 0))
    assert [digest(tensors) for tensors in held] == before
    assert state.round == 3


def test_two_folds_do_not_meet(method: Aggregator, state: ServerState) -> None:
    one, two = method.reduce.start(state), method.reduce.start(state)
    ours, others = _answers(method, _cohort()), _answers(method, _cohort(3))
    for a, b in zip(ours, reversed(others), strict=False):
        one, two = method.reduce.add(one, a), method.reduce.add(two, b)
    for update in ours[len(others) :]:
        one = method.reduce.add(one, update)
    rng = torch.Generator().manual_seed(0)
    assert _digest(method.reduce.finish(state, one, rng)) == _digest(_fold(method, state, _cohort()))


def test_the_same_generator_gives_the_same_round(method: Aggregator, state: ServerState) -> None:
    one, two = (method.step(state, _fold(method, state, _cohort(), seed=5)) for _ in range(2))
    assert [digest(part) for part in one[1:]] == [digest(part) for part in two[1:]]


def test_no_change_keeps_the_model(method: Aggregator, state: ServerState) -> None:
    """Methods that factor anew may change the factors, never the product."""
    updates = [Update(f"c{i}", _zeros(), float(1 + i), 4) for i in range(7)]
    scale = scaling(16.0, "rslora")(4)
    after = _products(method.step(state, _fold(method, state, updates)), scale)
    for module, before in _products(state, scale).items():
        torch.testing.assert_close(after[module], before, rtol=1e-4, atol=1e-4)


def test_no_direction_dies_that_nobody_has_used_yet(method: Aggregator, fresh: ServerState) -> None:
    """Where a row of A and its column of B are both zero, neither ever gets a gradient again."""
    one = {n: torch.zeros_like(t) for n, t in _tensors(7).items()}
    for name, tensor in one.items():
        if is_b(name):
            tensor[:, 0] = _tensors(7)[name][:, 0]
    after = method.step(fresh, _fold(method, fresh, [Update(f"c{i}", one, 1.0, 4) for i in range(7)]))
    for module in split(after.adapter).values():
        assert float(module.a.norm(dim=1).min()) > 0.2


def test_a_step_ends_one_round_and_keeps_the_shapes(method: Aggregator, state: ServerState) -> None:
    after = method.step(state, _fold(method, state, _cohort()))
    assert after.round == state.round + 1
    assert {name: tuple(tensor.shape) for name, tensor in after.adapter.items()} == SHAPES
    for part in after[1:]:
        assert {(tensor.dtype, tensor.device.type) for tensor in part.values()} <= {(torch.float32, "cpu")}


def test_a_client_receives_an_adapter_that_fits_its_model(method: Aggregator, state: ServerState) -> None:
    payload = method.payload(state, ClientInfo("client-0", 4, 0))
    assert {name: tuple(tensor.shape) for name, tensor in payload.adapter.items()} == SHAPES


def test_a_sum_takes_no_more_memory_for_more_clients(method: Aggregator, state: ServerState) -> None:
    if method.needs == "each":
        pytest.skip("this method has to see each update")
    acc = method.reduce.add(method.reduce.start(state), _cohort(1)[0])
    after_one = _tensor_bytes(acc)
    for update in _cohort(20):
        acc = method.reduce.add(acc, update)
    assert 0 < _tensor_bytes(acc) == after_one


def test_a_sum_can_be_made_of_parts_and_what_must_see_each_update_cannot(method: Aggregator) -> None:
    assert (method.reduce.merge is None) == (method.needs == "each")


@pytest.mark.parametrize("sizes", [(20,), (0, 20), (1, 19), (7, 0, 6, 7), (1,) * 20])
def test_parts_of_a_sum_give_the_model_that_the_whole_gives(
    method: Aggregator, state: ServerState, sizes: Sequence[int]
) -> None:
    """To the bit, however the clients are dealt out to relays, and in whichever order these are put together."""
    merge = method.reduce.merge
    if merge is None:
        pytest.skip("this method has to see each update")
    extra = method.payload(state, ClientInfo("c", 4, 0, 25)).extra  # five did not answer
    updates = [u._replace(extra=extra, lr_sum=0.1) if extra else u for u in _cohort(20)]

    def step(acc: Any) -> ServerState:
        return method.step(state, method.reduce.finish(state, acc, torch.Generator().manual_seed(0)))

    whole = step(functools.reduce(method.reduce.add, updates, method.reduce.start(state)))
    left = iter(updates)
    parts = [
        functools.reduce(method.reduce.add, itertools.islice(left, size), method.reduce.start(state)) for size in sizes
    ]
    for order in (parts, parts[::-1]):
        made = step(functools.reduce(merge, copy.deepcopy(order)))
        assert [digest(part) for part in made[1:]] == [digest(part) for part in whole[1:]]
