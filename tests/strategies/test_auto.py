"""The choice between averaging A and B apart and averaging products."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from apiary.config import loading
from apiary.core.errors import UserError
from apiary.core.lora import scaling, split
from apiary.core.messages import ClientInfo, Update
from apiary.core.tensors import digest
from strategies import AGGREGATORS, Aggregator, Gradient, ServerState, from_config
from strategies.aggregator import of_rank

SCALING = scaling(16.0, "rslora")
RANK = 4
SIZES = {"m.0.q": (20, 30), "m.1.q": (12, 30)}  # d_out, d_in


def _normal(seed: int, rank: int = RANK, scale: float = 1.0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    made = {}
    for module, (d_out, d_in) in SIZES.items():
        made[f"{module}.lora_A.weight"] = scale * torch.randn(rank, d_in, generator=rng)
        made[f"{module}.lora_B.weight"] = scale * torch.randn(d_out, rank, generator=rng)
    return made


def _state() -> ServerState:
    return ServerState(2, _normal(999), {}, {})


def _cohort(drift: float, ranks: Sequence[int] = (RANK,) * 5) -> list[Update]:
    return [Update(f"c{i}", _normal(i, r, drift), float(3 + 5 * i), r) for i, r in enumerate(ranks)]


def _method(name: str, **options: object) -> Aggregator:
    return AGGREGATORS.build(name, options, scaling=SCALING, seed=7, weighting="tokens")


def _fold(method: Aggregator, state: ServerState, updates: Sequence[Update]) -> Gradient:
    acc = method.reduce.start(state)
    for update in updates:
        acc = method.reduce.add(acc, update)
    return method.reduce.finish(state, acc, torch.Generator().manual_seed(0))


def _missed(state: ServerState, updates: Sequence[Update]) -> float:
    """The gauge by its definition, dense, for clients of one rank."""
    parts = np.array([u.weight for u in updates]) / sum(u.weight for u in updates)
    error = change = 0.0
    for module, held in split(state.adapter).items():
        ends = [split({n: state.adapter[n] + d for n, d in u.delta.items()})[module] for u in updates]
        b, a = (sum(p * e[i].double().numpy() for p, e in zip(parts, ends, strict=True)) for i in (0, 1))
        mean = sum(p * e.b.double().numpy() @ e.a.double().numpy() for p, e in zip(parts, ends, strict=True))
        error += np.sum((mean - b @ a) ** 2)
        change += np.sum((mean - held.b.double().numpy() @ held.a.double().numpy()) ** 2)
    return float(np.sqrt(error / change))


@pytest.mark.parametrize("drift", [0.05, 0.1, 0.13, 0.2, 0.5, 1.0])
def test_it_is_fedavg_below_the_threshold_and_flexlora_above_to_the_bit(drift: float) -> None:
    state, updates = _state(), _cohort(drift)
    chosen = "fedavg" if _missed(state, updates) < 0.1 else "flexlora"
    method, other = _method("auto"), _method(chosen)
    gradient = _fold(method, state, updates)
    assert gradient.method == chosen
    made, expected = method.step(state, gradient), other.step(state, _fold(other, state, updates))
    assert made.round == 3
    assert digest(made.adapter) == digest(expected.adapter)


def test_both_sides_of_the_threshold_were_tried() -> None:
    assert _missed(_state(), _cohort(0.13)) < 0.1 < _missed(_state(), _cohort(0.2))


def test_the_threshold_is_the_users() -> None:
    state, updates = _state(), _cohort(0.5)
    missed = _missed(state, updates)
    for threshold, chosen in ((missed * 1.001, "fedavg"), (missed * 0.999, "flexlora"), (0.0, "flexlora")):
        assert _fold(_method("auto", threshold=threshold), state, updates).method == chosen
    assert _fold(_method("auto", threshold=0), state, _cohort(0.0)).method == "flexlora"


def test_each_round_decides_for_itself() -> None:
    method, state = _method("auto"), _state()
    told = []
    for drift in (0.05, 1.0, 0.02):
        gradient = _fold(method, state, _cohort(drift))
        told.append(gradient.method)
        state = method.step(state, gradient)
    assert told == ["fedavg", "flexlora", "fedavg"]


def test_a_round_of_several_ranks_is_that_of_flexlora() -> None:
    """However near the clients are: slices of factors aim at another mean."""
    state, updates = _state(), _cohort(0.001, (1, 2, 4, 4))
    method, other = _method("auto"), _method("flexlora")
    gradient = _fold(method, state, updates)
    assert gradient.method == "flexlora"
    made, expected = (m.step(state, _fold(m, state, updates)) for m in (method, other))
    assert digest(made.adapter) == digest(expected.adapter)
    payload = method.payload(made, ClientInfo("c0", 2, 0))
    assert digest(payload.adapter) == digest(of_rank(made.adapter, 2, SCALING))


def test_the_order_of_answers_decides_nothing_even_where_it_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strategies.averaging_error._operations", lambda state, clients: math.inf)
    state, updates = _state(), _cohort(0.5)
    method = _method("auto")
    one, two = (_fold(method, state, u) for u in (updates, updates[::-1]))
    assert (one.method, digest(one.adapter)) == (two.method, digest(two.adapter))


def _run(*overrides: str) -> Aggregator:
    base = ["adapter.rank=4", "adapter.alpha=16", "strategy.name=auto"]
    return from_config(loading.load(None, [*base, *overrides]))


@pytest.mark.parametrize(("drift", "chosen"), [(0.05, "fedavg"), (1.0, "flexlora")])
def test_a_step_size_of_the_server_scales_the_change_of_either_method(drift: float, chosen: str) -> None:
    """Of factors both, of a product one: half a step of `fedavg` moves A and B by half."""
    state, updates = _state(), _cohort(drift)
    optimizer = ('strategy.server_optimizer={ name = "plain", lr = 0.5 }',)
    made = [_run(*o, f"strategy.name={n}") for n in ("auto", chosen) for o in (optimizer,)]
    one, two = (m.step(state, _fold(m, state, updates)) for m in made)
    assert digest(one.adapter) == digest(two.adapter)
    assert digest(one.adapter) != digest(_run().step(state, _fold(_run(), state, updates)).adapter)


def test_server_optimisers_with_a_memory_are_refused() -> None:
    for name in ("momentum", "nesterov", "adam", "yogi", "adagrad"):
        with pytest.raises(UserError, match="answers with changes of the products"):
            _run(f"strategy.server_optimizer={name}")


def test_frozen_factors_are_refused_with_the_reason() -> None:
    for train in ("b", "alternate"):
        with pytest.raises(UserError, match="moves the factor that clients hold fixed"):
            _run(f"adapter.train={train}")
    assert _run("adapter.ranks=[2, 4]").ranks == "mixed"
