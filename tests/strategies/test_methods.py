"""Aggregation methods against their papers' equations in plain numpy."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.averaging import weighted_mean

from apiary.core.errors import UserError
from apiary.core.messages import Update
from apiary.core.tensors import StateDict, digest
from strategies import AGGREGATORS, Aggregator, Gradient, ServerState

SHAPES = {"x.lora_A.weight": (2, 5), "x.lora_B.weight": (3, 2)}


def _state(seed: int = 100) -> ServerState:
    return ServerState(0, _tensors(seed), {}, {})


def _tensors(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    return {
        name: torch.from_numpy((scale * rng.standard_normal(shape)).astype(np.float32))
        for name, shape in SHAPES.items()
    }


def _updates(weights: Sequence[float]) -> list[Update]:
    # Scales over six orders of magnitude: where the order of a float32 sum would show.
    return [Update(f"c{i}", _tensors(i, 10.0 ** (i % 7 - 3)), w, 2) for i, w in enumerate(weights)]


def _reduce(method: Aggregator, updates: Sequence[Update], state: ServerState) -> StateDict:
    acc = method.reduce.start(state)
    for update in updates:
        acc = method.reduce.add(acc, update)
    return method.reduce.finish(state, acc, torch.Generator().manual_seed(0)).adapter


_weights = st.lists(st.floats(1e-3, 1e9), min_size=1, max_size=12)


@given(_weights)
@settings(max_examples=80, deadline=None)
def test_fedavg_is_the_mean_weighted_by_trained_tokens(weights: list[float]) -> None:
    updates = _updates(weights)
    gradient = _reduce(AGGREGATORS.build("fedavg"), updates, _state())
    for name in SHAPES:
        expected = weighted_mean([u.delta[name].numpy() for u in updates], weights)
        np.testing.assert_allclose(gradient[name].numpy(), expected, rtol=1e-6, atol=1e-9)


@given(_weights)
@settings(max_examples=40, deadline=None)
def test_uniform_weighting_gives_every_client_the_same_say(weights: list[float]) -> None:
    updates = _updates(weights)
    gradient = _reduce(AGGREGATORS.build("fedavg", {"weighting": "uniform"}), updates, _state())
    for name in SHAPES:
        expected = np.mean([u.delta[name].double().numpy() for u in updates], axis=0)
        np.testing.assert_allclose(gradient[name].numpy(), expected, rtol=1e-6, atol=1e-9)


def test_fedavg_by_hand() -> None:
    state = ServerState(4, {"w": torch.tensor([1.0, 1.0])}, {}, {})
    updates = [
        Update("a", {"w": torch.tensor([4.0, 0.0])}, 1.0, 1),
        Update("b", {"w": torch.tensor([0.0, 4.0])}, 3.0, 1),
    ]
    method = AGGREGATORS.build("fedavg")
    after = method.step(state, Gradient(_reduce(method, updates, state)))
    assert after.adapter["w"].tolist() == [2.0, 4.0]  # 1 + 4 * 1/4 and 1 + 4 * 3/4
    assert after.round == 5


def test_the_order_of_answers_does_not_show_in_a_single_bit() -> None:
    method, state = AGGREGATORS.build("fedavg"), _state()
    updates = _updates([17.0, 512.0, 3.0, 90_001.0, 44.0])
    results = {digest(_reduce(method, order, state)) for order in itertools.permutations(updates)}
    assert len(results) == 1
    many = _updates([float(1 + (i * 7919) % 1000) for i in range(200)])
    rng = np.random.default_rng(0)
    shuffled = [[many[i] for i in rng.permutation(200)] for _ in range(10)]
    assert len({digest(_reduce(method, order, state)) for order in shuffled}) == 1


def test_a_million_entries_of_all_magnitudes_are_summed_alike_in_every_order() -> None:
    rng, n = np.random.default_rng(0), 1 << 20
    deltas = [(rng.standard_normal(n) * 10.0 ** rng.uniform(-12, 6, n)).astype(np.float32) for _ in range(10)]
    deltas += [1e9 * deltas[0], -1e9 * deltas[0]]  # cancel each other, and drown the others on the way
    weights = [float(w) for w in rng.integers(1, 200_000, 10)] + [77.0, 77.0]
    updates = [
        Update(f"c{i}", {"w": torch.from_numpy(d)}, w, 2) for i, (d, w) in enumerate(zip(deltas, weights, strict=True))
    ]
    method, state = AGGREGATORS.build("fedavg"), ServerState(0, {"w": torch.zeros(n)}, {}, {})
    results = [_reduce(method, [updates[i] for i in rng.permutation(12)], state)["w"].numpy() for _ in range(10)]
    results += [_in_parts(method, [updates[i] for i in rng.permutation(12)], state)["w"].numpy() for _ in range(4)]
    assert all(np.array_equal(results[0], result) for result in results[1:])
    for at in range(0, n, 997):
        exact = math.fsum(w * float(d[at]) for w, d in zip(weights, deltas, strict=True))
        assert results[0][at] == np.float32(exact / sum(weights))


def _in_parts(method: Aggregator, updates: Sequence[Update], state: ServerState) -> StateDict:
    """The gradient from sums of three updates each, as relays would make them."""
    parts = []
    for first in range(0, len(updates), 3):
        parts.append(functools.reduce(method.reduce.add, updates[first : first + 3], method.reduce.start(state)))
    assert method.reduce.merge is not None
    return method.reduce.finish(state, functools.reduce(method.reduce.merge, parts), torch.Generator()).adapter


@pytest.mark.parametrize("shape", [(1, 1), (3, 5461), (2, 8192), (5, 13_000)])  # around the pieces that are added
def test_tensors_of_any_size_and_layout_are_summed_whole(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    deltas = [rng.standard_normal(shape).astype(np.float32) for _ in range(3)]
    turned = [torch.from_numpy(np.asfortranarray(delta)) for delta in deltas]  # the same entries, by columns
    updates = [Update(f"c{i}", {"w": t}, w, 2) for i, (t, w) in enumerate(zip(turned, (3.0, 1.0, 7.0), strict=True))]
    mean = _reduce(AGGREGATORS.build("fedavg"), updates, ServerState(0, {"w": torch.zeros(shape)}, {}, {}))["w"]
    np.testing.assert_allclose(mean.numpy(), weighted_mean(deltas, [3.0, 1.0, 7.0]), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("weights", [[0.0], [0.0, 0.0], []])
def test_a_round_without_weight_is_an_error_and_not_a_nan(weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"weights of the round sum to 0\.0"):
        _reduce(AGGREGATORS.build("fedavg"), _updates(weights), _state())


def test_a_client_with_no_tokens_changes_nothing_under_token_weights() -> None:
    method, state = AGGREGATORS.build("fedavg"), _state()
    some = _updates([2.0, 5.0, 0.0])
    assert digest(_reduce(method, some, state)) == digest(_reduce(method, some[:2], state))


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="weighting = 'examples'"):
        AGGREGATORS.build("fedavg", {"weighting": "examples"})
    with pytest.raises(UserError, match="did you mean 'fedavg'"):
        AGGREGATORS.build("fedavgg")
