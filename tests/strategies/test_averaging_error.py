"""The gauge of the error against dense matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from reference import gauge as dense
from torch import Tensor

from apiary.core.lora import is_b, scaling, split
from apiary.core.messages import Update
from strategies import ServerState
from strategies.aggregator import of_rank
from strategies.averaging_error import Fold, Gauge, _gauge, estimated, exact, exact_if_few

SCALING = scaling(16.0, "rslora")
RANK = 4
SIZES = {"m.0.q": (20, 30), "m.0.k": (12, 30), "m.1.q": (20, 30)}  # d_out, d_in


def _normal(seed: int, sizes: Mapping[str, tuple[int, int]], rank: int, scale: float = 1.0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    made = {}
    for module, (d_out, d_in) in sizes.items():
        made[f"{module}.lora_A.weight"] = scale * torch.randn(rank, d_in, generator=rng)
        made[f"{module}.lora_B.weight"] = scale * torch.randn(d_out, rank, generator=rng)
    return made


def _state(sizes: Mapping[str, tuple[int, int]] = SIZES, rank: int = RANK) -> ServerState:
    return ServerState(2, _normal(999, sizes, rank), {}, {})


def _cohort(
    drift: float, ranks: Sequence[int] = (RANK,) * 5, sizes: Mapping[str, tuple[int, int]] = SIZES
) -> list[Update]:
    return [Update(f"c{i}", _normal(i, sizes, r, drift), float(3 + 5 * i), r) for i, r in enumerate(ranks)]


def _fold(fold: Fold, state: ServerState, updates: Sequence[Update], seed: int = 0) -> Gauge:
    acc = fold.start(state, torch.Generator().manual_seed(seed))
    for update in updates:
        acc = fold.add(acc, update)
    return fold.finish(state, acc)


def _dense(state: ServerState, updates: Sequence[Update]) -> tuple[float, float, float]:
    rank = next(iter(split(state.adapter).values())).rank
    total = sum(update.weight for update in updates)
    clients = []
    for update in updates:
        began = of_rank({n: t.double() for n, t in state.adapter.items()}, update.rank, SCALING)
        ended = {n: began[n].numpy() + d.double().numpy() for n, d in update.delta.items()}
        factors = {m: (ended[f"{m}.lora_B.weight"], ended[f"{m}.lora_A.weight"]) for m in split(state.adapter)}
        clients.append(dense.Client(factors, SCALING(update.rank), update.weight / total))
    start = {m: (f.b.double().numpy(), f.a.double().numpy()) for m, f in split(state.adapter).items()}
    return dense.gauge(start, SCALING(rank), clients, rank)


@pytest.mark.parametrize("drift", [1e-4, 0.003, 0.1, 1.0])
@pytest.mark.parametrize("ranks", [(4, 4, 4, 4, 4), (1, 2, 4, 3)])
def test_exact_is_the_dense_gauge(drift: float, ranks: Sequence[int]) -> None:
    state, updates = _state(), _cohort(drift, ranks)
    made, (relative, flexlora, change) = _fold(exact(SCALING), state, updates), _dense(state, updates)
    assert made.relative == pytest.approx(relative, rel=1e-6)
    assert made.flexlora == pytest.approx(flexlora, rel=1e-6)
    assert made.change == pytest.approx(change, rel=1e-6)
    assert made.stderr == 0
    assert made.gains == {"flora": made.relative, "fedex": made.relative, "flexlora": made.relative - made.flexlora}


@pytest.mark.parametrize("fold", [exact(SCALING), estimated(SCALING)], ids=["exact", "estimated"])
def test_a_new_adapter_has_no_product_to_start_from(fold: Fold) -> None:
    state = _state()
    state = state._replace(adapter={n: torch.zeros_like(t) if is_b(n) else t for n, t in state.adapter.items()})
    updates = _cohort(0.1)
    relative, flexlora, _ = _dense(state, updates)
    made = _fold(fold, state, updates)
    assert abs(made.relative - relative) <= 1e-6 + 5 * made.stderr
    if not made.stderr:
        assert made.flexlora == pytest.approx(flexlora, rel=1e-5)


@pytest.mark.parametrize("ranks", [(4, 4, 4, 4, 4), (1, 2, 4, 3)])
def test_the_squares_are_estimated_without_bias_and_within_the_stated_error(ranks: Sequence[int]) -> None:
    state, updates = _state(), _cohort(0.3, ranks)
    relative, flexlora, change = _dense(state, updates)
    made = [_fold(estimated(SCALING, probes=16), state, updates, seed) for seed in range(300)]
    # The mean of 300 unbiased estimates, to five of its standard errors.
    for values, truth in (
        ([g.change**2 for g in made], change**2),
        ([(g.relative * g.change) ** 2 for g in made], (relative * change) ** 2),
    ):
        assert abs(np.mean(values) - truth) < 5 * np.std(values) / math.sqrt(300)
    off = np.array([(g.relative - relative) / g.stderr for g in made])
    assert 0.8 < off.std() < 1.35  # Student's t of 15 degrees has 1.07
    assert np.mean(np.abs(off) < 3) > 0.97
    # Never below what the best factors leave, beyond the estimate's error.
    assert np.mean([g.flexlora for g in made]) > flexlora
    assert all(g.flexlora <= g.relative for g in made)


def test_the_bound_of_flexlora_is_what_lies_outside_the_span_of_the_mean_of_b() -> None:
    """With an error wholly inside that span the best factors of the rank leave nothing."""
    state = _state()
    flat = []
    for update in _cohort(0.3):
        began = split(state.adapter)
        delta = dict(update.delta)
        for module, factors in began.items():
            name = f"{module}.lora_B.weight"
            delta[name] = factors.b @ delta[name][:RANK]  # stays in the span of B
        flat.append(update._replace(delta=delta))
    made = _fold(estimated(SCALING), state, flat)
    assert made.relative > 0.05
    assert made.flexlora < 1e-5
    assert _fold(exact(SCALING), state, flat).flexlora < 1e-5


def test_more_modules_and_more_probes_make_the_estimate_better() -> None:
    sizes = {f"m.{i}.q": (20, 30) for i in range(24)}
    state, updates = _state(sizes), _cohort(0.3, sizes=sizes)
    one = {n: t for n, t in state.adapter.items() if n.startswith("m.0.")}
    alone = [u._replace(delta={n: t for n, t in u.delta.items() if n in one}) for u in updates]
    many = np.mean([_fold(estimated(SCALING), state, updates, s).stderr for s in range(20)])
    few = np.mean([_fold(estimated(SCALING), state._replace(adapter=one), alone, s).stderr for s in range(20)])
    wide = np.mean([_fold(estimated(SCALING, probes=32), state, updates, s).stderr for s in range(20)])
    assert few / many == pytest.approx(math.sqrt(24), rel=0.35)
    assert many / wide == pytest.approx(2, rel=0.35)


@pytest.mark.parametrize("fold", [exact(SCALING), estimated(SCALING)], ids=["exact", "estimated"])
def test_what_lies_in_the_span_of_the_mean_b_takes_no_rank(fold: Fold) -> None:
    """All clients end in one space of the adapter's rank, which is not the one that they began in."""
    state, updates = _state({"m": (20, 30)}), _cohort(1.0, sizes={"m": (20, 30)})
    name, rng = "m.lora_B.weight", torch.Generator().manual_seed(5)
    space = torch.randn(20, RANK, generator=rng)
    moved = [
        u._replace(delta={**u.delta, name: space @ torch.randn(RANK, RANK, generator=rng) - state.adapter[name]})
        for u in updates
    ]
    made = _fold(fold, state, moved)
    assert made.relative > 0.3
    assert made.flexlora < 1e-4


def _same(tensors: Sequence[Update], names: str) -> list[Update]:
    """The updates with the factors of that kind (A or B) all like the first one's."""
    first = tensors[0].delta
    return [u._replace(delta={n: first[n] if names in n else t for n, t in u.delta.items()}) for u in tensors]


@pytest.mark.parametrize("fold", [exact(SCALING), estimated(SCALING)], ids=["exact", "estimated"])
def test_where_averaging_apart_is_exact_the_error_is_zero(fold: Fold) -> None:
    state, updates = _state(), _cohort(0.3)
    for cohort in (updates[:1], _same(updates, "lora_"), _same(updates, "lora_A"), _same(updates, "lora_B")):
        made = _fold(fold, state, cohort)
        assert made.relative < 1e-6
        assert made.flexlora <= made.relative
        assert made.change > 1
    frozen = [u._replace(delta={n: t * is_b(n) for n, t in u.delta.items()}) for u in updates]
    assert _fold(fold, state, frozen).relative < 1e-6


@pytest.mark.parametrize("fold", [exact(SCALING), estimated(SCALING)], ids=["exact", "estimated"])
def test_a_round_that_changes_nothing_has_no_error(fold: Fold) -> None:
    still = [u._replace(delta={n: torch.zeros_like(t) for n, t in u.delta.items()}) for u in _cohort(1.0)]
    assert _fold(fold, _state(), still) == Gauge(0.0, 0.0, 0.0, 0.0)


def test_an_error_without_a_change_is_infinite() -> None:
    """Two clients go opposite ways in B from zero, and the same way from an A of zero: the products cancel."""
    names = ("m.lora_A.weight", "m.lora_B.weight")
    state = ServerState(0, {names[0]: torch.zeros(1, 1), names[1]: torch.zeros(1, 1)}, {}, {})
    moves = [(1.0, 1.0), (3.0, -1.0), (1.0, 2.0)]  # b a = 1, -3, 2: they sum to zero; the means do not
    cohort = [
        Update(f"c{i}", {names[0]: torch.tensor([[a]]), names[1]: torch.tensor([[b]])}, 1.0, 1)
        for i, (a, b) in enumerate(moves)
    ]
    assert _fold(estimated(SCALING), state, cohort).relative == math.inf


@pytest.mark.parametrize(("drift", "expected"), [(0.02, 0.013), (0.1, 0.066), (0.3, 0.19), (1.0, 0.54)])
def test_the_error_is_of_second_order_in_the_drift(drift: float, expected: float) -> None:
    """d = 512, r = 8, 8 clients, normal factors; the closed form is that of the expected squared norms."""
    sizes = {"m": (512, 512)}
    state = _state(sizes, 8)
    cohort = [u._replace(weight=1.0) for u in _cohort(drift, (8,) * 8, sizes)]
    made = _fold(exact(SCALING), state, cohort)
    assert made.relative == pytest.approx(expected, rel=0.04)
    # E||error||^2 : E||change||^2 = 7/64 drift^4 : 2/8 drift^2 + 1/8 drift^4, in units of r d^2.
    assert made.relative == pytest.approx(math.sqrt(7 / 64 * drift**2 / (1 / 4 + drift**2 / 8)), rel=0.03)
    guess = _fold(estimated(SCALING, probes=16), state, cohort)
    assert abs(guess.relative - made.relative) < 4 * guess.stderr < 0.25 * made.relative


def test_weights_count_as_told() -> None:
    state, updates = _state(), _cohort(0.3)
    for build in (exact, estimated):
        even = [u._replace(weight=7.0) for u in updates]
        assert _fold(build(SCALING, "uniform"), state, updates) == _fold(build(SCALING), state, even)
        halved = [u._replace(weight=u.weight / 2) for u in updates]
        assert _fold(build(SCALING), state, updates).relative == pytest.approx(
            _fold(build(SCALING), state, halved).relative, rel=1e-9
        )
        with pytest.raises(ValueError, match="weights of the round sum to 0"):
            _fold(build(SCALING), state, [u._replace(weight=0.0) for u in updates])


@pytest.mark.parametrize("fold", [exact(SCALING), estimated(SCALING)], ids=["exact", "estimated"])
def test_the_order_of_answers_does_not_matter(fold: Fold) -> None:
    state, updates = _state(), _cohort(0.3)
    one, two = _fold(fold, state, updates), _fold(fold, state, updates[::-1])
    assert one == pytest.approx(two, rel=1e-12)


def test_an_estimate_holds_no_more_for_more_clients() -> None:
    fold, state = estimated(SCALING), _state()

    def held(n: int) -> int:
        acc = fold.start(state, torch.Generator().manual_seed(0))
        for update in _cohort(0.1, (RANK,) * n):
            acc = fold.add(acc, update)
        return sum(t.numel() * t.element_size() for sums in acc.sums for t in sums[1:])

    assert 0 < held(1) == held(12)


def _sizes_of(acc: Any) -> int:
    return 0 if acc.updates is None else len(acc.updates)


def test_it_is_exact_while_few_have_answered_and_then_the_estimate_of_all() -> None:
    """The bound on operations lies between four and five clients here; no more than four are ever held."""
    state, updates = _state(), _cohort(0.3, (RANK,) * 8)
    modules = [(f.b.shape[0] + f.a.shape[1]) for f in split(state.adapter).values()]
    most = sum(2 * (6 * RANK) ** 2 * d + 30 * (6 * RANK) ** 3 for d in modules)
    fold = exact_if_few(SCALING, most=most)
    for n in (1, 4):
        assert _fold(fold, state, updates[:n]) == _fold(exact(SCALING), state, updates[:n])
    for n in (5, 8):
        assert _fold(fold, state, updates[:n], seed=3) == _fold(estimated(SCALING), state, updates[:n], seed=3)
    acc, held = fold.start(state, torch.Generator()), []
    for update in updates:
        acc = fold.add(acc, update)
        held.append(_sizes_of(acc))
    assert held == [1, 2, 3, 4, 0, 0, 0, 0]


@pytest.mark.parametrize("fold", [exact(SCALING), estimated(SCALING)], ids=["exact", "estimated"])
def test_the_largest_numbers_that_can_be_sent_leave_a_finite_gauge(fold: Fold) -> None:
    state, updates = _state(), _cohort(0.1)
    huge = {n: 1e38 * t.sign() for n, t in updates[0].delta.items()}
    made = _fold(fold, state, [updates[0]._replace(delta=huge), *updates[1:]])
    assert math.isfinite(made.relative) and math.isfinite(made.flexlora) and made.change > 1e70


@pytest.mark.parametrize("fold", [exact(SCALING), estimated(SCALING)], ids=["exact", "estimated"])
def test_the_gauge_tells_how_bad_a_client_is_that_hides_a_large_b_behind_a_small_a(fold: Fold) -> None:
    """Its product is as any other, so that the true mean hardly moves; the mean of the factors does."""
    state, updates = _state(), _cohort(0.1)
    hidden = {
        n: (1e3 if is_b(n) else 1e-3) * (state.adapter[n] + t) - state.adapter[n] for n, t in updates[0].delta.items()
    }
    attacked = [updates[0]._replace(delta=hidden), *updates[1:]]
    made, (relative, _, change) = _fold(fold, state, attacked), _dense(state, attacked)
    assert relative > 10
    assert abs(made.relative - relative) <= 1e-6 * relative + 5 * made.stderr
    assert change == pytest.approx(_dense(state, updates)[2], rel=1e-3)


def test_a_trace_of_rounding_below_zero_is_no_error() -> None:
    """As it comes out on some processors: a run must not end by it."""
    trace, change = torch.tensor([-9e-47]).double(), torch.tensor([5.0]).double()
    assert _gauge(trace, change, trace)[:2] == (0.0, 0.0)
