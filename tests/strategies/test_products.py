"""Exact and heterogeneous aggregation against the papers' equations, dense and in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from reference import lowrank as paper
from reference.lowrank import Client, Floats
from scipy.linalg import orthogonal_procrustes
from torch import Tensor

from apiary.core.errors import UserError
from apiary.core.lora import Factors, Scaling, join, scaling, split
from apiary.core.messages import ClientInfo, Payload, Update
from apiary.core.tensors import digest
from strategies import AGGREGATORS, Aggregator, Gradient, ServerState

SIZES = {"x.q_proj": (12, 10), "y.down_proj": (9, 16)}
MIXED = ("flora", "flexlora", "hetlora", "rank_slices")
ONE = ("fedex", "lora_fair", "fedrot")
BOTH_SCALINGS = pytest.mark.parametrize("s", [scaling(16.0, "rslora"), scaling(16.0, "lora")], ids=["rslora", "lora"])
RSLORA = scaling(16.0, "rslora")


def _random(seed: int, rank: int, size: float = 1.0) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    return join(
        {
            module: Factors(*(torch.from_numpy(size * rng.standard_normal(n)).float() for n in ((d, rank), (rank, e))))
            for module, (d, e) in SIZES.items()
        }
    )


def _server(rank: int, seed: int = 100, number: int = 0) -> ServerState:
    return ServerState(number, _random(seed, rank, 0.5), {}, {})


def _new(rank: int) -> ServerState:
    """As a run begins: B is zero."""
    state = _server(rank)
    return state._replace(adapter={n: t if "lora_A" in n else torch.zeros_like(t) for n, t in state.adapter.items()})


def _updates(ranks: Sequence[int], size: float = 0.3, seed: int = 0) -> list[Update]:
    return [Update(f"c{i}", _random(seed + i, r, size), float(3 + 5 * i), r) for i, r in enumerate(ranks)]


def _still(ranks: Sequence[int]) -> list[Update]:
    return _updates(ranks, 0.0)


def _build(name: str, s: Scaling = RSLORA, **options: Any) -> Aggregator:
    return AGGREGATORS.build(name, options, scaling=s, seed=7)


def _fold(method: Aggregator, state: ServerState, updates: Sequence[Update]) -> Gradient:
    acc = method.reduce.start(state)
    for update in updates:
        acc = method.reduce.add(acc, update)
    return method.reduce.finish(state, acc, torch.Generator().manual_seed(0))


def _round(method: Aggregator, state: ServerState, updates: Sequence[Update]) -> ServerState:
    return method.step(state, _fold(method, state, updates))


def _dense(factors: Factors) -> tuple[Floats, Floats]:
    return factors.b.double().numpy(), factors.a.double().numpy()


def _product(factors: Factors) -> Floats:
    b, a = _dense(factors)
    return b @ a


def _model(state: ServerState, s: Scaling) -> dict[str, Floats]:
    """What the state adds to each weight, dense."""
    made = {module: s(f.rank) * _product(f) for module, f in split(state.adapter).items()}
    for module, f in split(state.base_delta).items():
        made[module] = made[module] + _product(f)
    return made


def _clients(state: ServerState, updates: Sequence[Update], s: Scaling) -> dict[str, list[Client]]:
    """What each client holds after its training, by module."""
    total = sum(update.weight for update in updates)
    made: dict[str, list[Client]] = {}
    for module, held in split(state.adapter).items():
        made[module] = []
        for update in updates:
            start = paper.received(*_dense(held), update.rank, s(held.rank), s(update.rank))
            b, a = (x + d for x, d in zip(start, _dense(split(update.delta)[module]), strict=True))
            made[module].append(Client(b, a, s(update.rank), update.weight / total))
    return made


def _close(got: Mapping[str, Floats], expected: Mapping[str, Floats], tolerance: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    for module, matrix in expected.items():
        np.testing.assert_allclose(got[module], matrix, atol=tolerance * max(1.0, np.linalg.norm(matrix)), rtol=0)


def _gauged(state: ServerState, update: Update, seed: int, s: Scaling) -> Update:
    """An update of a client that holds the same products in other factors, B G and G^-1 A."""
    rng = np.random.default_rng(seed)
    made = {}
    for module, held in split(state.adapter).items():
        start = paper.received(*_dense(held), update.rank, s(held.rank), s(update.rank))
        b, a = (x + d for x, d in zip(start, _dense(split(update.delta)[module]), strict=True))
        g = np.linalg.qr(rng.standard_normal((update.rank, update.rank)))[0] * rng.uniform(0.2, 5, update.rank)
        turned = (b @ g - start[0], np.linalg.solve(g, a) - start[1])
        made[module] = Factors(*(torch.from_numpy(t).float() for t in turned))
    return update._replace(delta=join(made))


# -- flora --------------------------------------------------------------------------------------


@BOTH_SCALINGS
def test_flora_puts_the_mean_of_the_products_into_the_base(s: Scaling) -> None:
    state, updates = _new(8), _updates([4, 8, 2, 8])
    after = _round(_build("flora", s), state, updates)
    clients = _clients(state, updates, s)
    _close(_model(after, s), {module: paper.mean_product(cs) for module, cs in clients.items()})
    assert all(not f.b.any() for f in split(after.adapter).values())
    assert {f.rank for f in split(after.base_delta).values()} == {9, 10}  # not the 22 of the stack: a full matrix's
    assert float(after.memory["dropped_energy"]) == 0


def test_flora_stacks_no_more_ranks_than_the_clients_have() -> None:
    after = _round(_build("flora"), _new(4), _updates([1, 3, 2]))
    assert {f.rank for f in split(after.base_delta).values()} == {6}


def test_flora_adds_up_over_rounds_and_whoever_comes_later_receives_all_of_it() -> None:
    method, state = _build("flora"), _new(4)
    expected = _model(state, RSLORA)
    for seed in range(4):
        updates = _updates([4, 2], seed=50 * seed)
        clients = _clients(state, updates, RSLORA)
        expected = {module: matrix + paper.mean_product(clients[module]) for module, matrix in expected.items()}
        state = _round(method, state, updates)
    late = method.payload(state, ClientInfo("late", 2, 0))
    _close(_model(ServerState(4, late.adapter, late.base_delta, {}), RSLORA), expected)


@BOTH_SCALINGS
def test_flora_keeps_what_the_adapter_held(s: Scaling) -> None:
    """Clients of lower ranks hold a part of it; the rest is not lost."""
    state, method = _server(8), _build("flora", s)
    _close(_model(_round(method, state, _still([2, 8, 4])), s), _model(state, s))
    updates = _updates([2, 8, 4])
    clients = _clients(state, updates, s)
    starts = _clients(state, _still([2, 8, 4]), s)
    moved = {
        m: _model(state, s)[m] + paper.mean_product(cs) - paper.mean_product(starts[m]) for m, cs in clients.items()
    }
    _close(_model(_round(method, state, updates), s), moved)


def test_flora_recompresses_a_base_that_grows_and_says_what_it_costs() -> None:
    state, updates = _new(4), _updates([4, 4, 4])
    after = _round(_build("flora", base_rank=5), state, updates)
    whole = {module: paper.mean_product(cs) for module, cs in _clients(state, updates, RSLORA).items()}
    _close(_model(after, RSLORA), {module: paper.best(matrix, 5) for module, matrix in whole.items()})
    assert {f.rank for f in split(after.base_delta).values()} == {5}
    energy = {module: float((matrix**2).sum()) for module, matrix in whole.items()}
    lost = sum(paper.tail(matrix, 5) * energy[module] for module, matrix in whole.items())
    assert float(after.memory["dropped_energy"]) == pytest.approx(lost / sum(energy.values()), rel=1e-4)
    again = _round(_build("flora", base_rank=5), after, _still([4]))
    assert float(again.memory["dropped_energy"]) == pytest.approx(0.0, abs=1e-12)


def test_flora_draws_a_new_a_in_each_round_and_the_same_one_everywhere() -> None:
    method, updates = _build("flora"), _updates([4, 4])
    one, same = (_round(method, _new(4), updates).adapter for _ in range(2))
    assert digest(one) == digest(same)
    later = _round(method, _new(4)._replace(round=1), updates).adapter
    other = AGGREGATORS.build("flora", {}, scaling=RSLORA, seed=8)
    drawn = [*split(one).values(), *split(later).values(), *split(_round(other, _new(4), updates).adapter).values()]
    assert len({float(f.a[0, 0]) for f in drawn}) == len(drawn)
    for f in drawn:
        bound = f.a.shape[1] ** -0.5
        assert bound / 2 < float(f.a.abs().max()) <= bound


# -- flexlora -----------------------------------------------------------------------------------


@BOTH_SCALINGS
@pytest.mark.parametrize("ranks", [[8, 8, 8], [2, 8, 4, 8, 5], [1]])
@pytest.mark.parametrize("fresh", [True, False])
def test_flexlora_is_the_best_approximation_of_the_dense_mean_of_changes(
    s: Scaling, ranks: Sequence[int], fresh: bool
) -> None:
    state, updates = _new(8) if fresh else _server(8), _updates(ranks)
    clients, starts = _clients(state, updates, s), _clients(state, _still(ranks), s)
    for form in ("delta", "absolute"):
        made = {}
        for module, matrix in _model(state, s).items():
            change = paper.mean_product(clients[module]) - paper.mean_product(starts[module])
            made[module] = paper.best(matrix + change if form == "delta" else paper.mean_product(clients[module]), 8)
        _close(_model(_round(_build("flexlora", s, form=form), state, updates), s), made)


def test_flexlora_with_a_stack_of_more_ranks_than_the_matrix_has() -> None:
    state, updates = _server(14), _updates([14, 13, 9, 14])  # 64 columns in matrices of 12 x 10 and 9 x 16
    clients = _clients(state, updates, RSLORA)
    starts = _clients(state, _still([14, 13, 9, 14]), RSLORA)
    made = {
        module: matrix + paper.mean_product(clients[module]) - paper.mean_product(starts[module])
        for module, matrix in _model(state, RSLORA).items()
    }
    _close(_model(_round(_build("flexlora"), state, updates), RSLORA), made)


def test_flexlora_with_singular_values_that_are_all_alike() -> None:
    """Which directions are kept is open then, but not how many and how much of them."""
    eye = Factors(torch.eye(8, 6), torch.eye(6))
    state = ServerState(0, join({"m": Factors(torch.zeros(8, 3), torch.ones(3, 6))}), {}, {})
    parts = [Factors(eye.b[:, i : i + 3], eye.a[i : i + 3] - 1.0) for i in (0, 3)]  # A begins with ones
    updates = [Update(f"c{i}", join({"m": f}), 1.0, 3) for i, f in enumerate(parts)]
    after = split(_round(_build("flexlora"), state, updates).adapter)["m"]
    np.testing.assert_allclose(np.linalg.svd(_product(after), compute_uv=False)[:4], [0.5, 0.5, 0.5, 0.0], atol=1e-6)
    assert np.linalg.norm(_product(after) - np.eye(8, 6) / 2) == pytest.approx(math.sqrt(3) / 2, abs=1e-6)


def test_ranks_collapse_in_the_absolute_form_and_never_in_the_delta_form() -> None:
    """Clients of ranks 2, 4, 8 and 16, and nobody trains for 20 rounds (Wu et al. 2026)."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((size, 16)))[0] for size in (48, 40))
    before = np.linspace(4.0, 0.5, 16)
    held = Factors(*(torch.from_numpy(t).float() for t in (u * np.sqrt(before), (v * np.sqrt(before)).T)))
    state = ServerState(0, join({"m": held}), {}, {})
    still = [
        Update(f"c{r}", join({"m": Factors(torch.zeros(48, r), torch.zeros(r, 40))}), 1.0, r) for r in (2, 4, 8, 16)
    ]
    spectra = {}
    for form in ("delta", "absolute"):
        after = state
        for _ in range(20):
            after = _round(_build("flexlora", form=form), after, still)
        spectra[form] = np.linalg.svd(_product(split(after.adapter)["m"]), compute_uv=False)[:16]
    np.testing.assert_allclose(spectra["delta"], before, rtol=1e-4)
    kept = np.repeat([1.0, 0.75, 0.5, 0.25], [2, 2, 4, 8]) ** 20  # of slice i, the part of the clients that hold it
    np.testing.assert_allclose(spectra["absolute"], before * kept, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["flora", "flexlora", "fedex"])
def test_exact_methods_do_not_see_how_clients_share_a_product_between_factors(name: str) -> None:
    state = _server(6)
    updates = _updates([6, 6, 6] if name == "fedex" else [6, 3, 4])
    gauged = [_gauged(state, update, i, RSLORA) for i, update in enumerate(updates)]
    method = _build(name)
    _close(_model(_round(method, state, gauged), RSLORA), _model(_round(method, state, updates), RSLORA), 3e-5)


def test_a_small_change_of_a_large_adapter_is_not_lost() -> None:
    state, updates = _server(6), _updates([6, 3], 1e-4)
    gradient = split(_fold(_build("flexlora"), state, updates).adapter)
    for module, clients in _clients(state, updates, RSLORA).items():
        start = paper.mean_product(_clients(state, _still([6, 3]), RSLORA)[module])
        expected = paper.mean_product(clients) - start
        error = np.linalg.norm(RSLORA(6) * _product(gradient[module]) - expected)
        assert error < 1e-3 * np.linalg.norm(expected)


def test_flexlora_stacks_the_sum_of_the_ranks_and_the_servers() -> None:
    state, updates = _server(8), _updates([2, 4, 8])
    frozen = [u._replace(delta={n: 0 * t if "lora_A" in n else t for n, t in u.delta.items()}) for u in updates]
    for cohort, ranks in ((updates, 2 + 4 + 8 + 8), (frozen, 2 + 4 + 8)):
        assert {f.rank for f in split(_fold(_build("flexlora"), state, cohort).adapter).values()} == {ranks}


# -- slices of factors --------------------------------------------------------------------------


@BOTH_SCALINGS
def test_hetlora_is_the_papers_average(s: Scaling) -> None:
    state, updates = _server(8), _updates([2, 8, 5])
    after = split(_round(_build("hetlora", s), state, updates).adapter)
    for module, clients in _clients(state, updates, s).items():
        for got, expected in zip(_dense(after[module]), paper.hetlora(clients, 8, s(8)), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-5)


def test_hetlora_weighs_by_the_product_whatever_the_factors_look_like() -> None:
    """A client that holds its product in other factors has no other weight: those of the others tell."""
    state, updates = _server(4), _updates([4, 2])
    quiet = _updates([4, 2])[1]
    loud = updates[0]._replace(delta=_random(5, 4, 3.0))
    after = split(_round(_build("hetlora"), state, [loud, quiet]).adapter)
    turned = [_gauged(state, loud, 3, RSLORA), quiet]
    again = split(_round(_build("hetlora"), state, turned).adapter)
    for module, held in split(state.adapter).items():
        loud_b = {
            k: held.b.numpy() + split(u.delta)[module].b.numpy() for k, u in (("as", loud), ("turned", turned[0]))
        }
        quiet_b = np.zeros_like(held.b.numpy())
        quiet_b[:, :2] = _clients(state, [loud, quiet], RSLORA)[module][1].b * (RSLORA(2) / RSLORA(4))
        # B = w loud + (1 - w) quiet, from which the weight w follows.
        weights = [
            float(((f[module].b.numpy() - quiet_b) * (x - quiet_b)).sum() / ((x - quiet_b) ** 2).sum())
            for f, x in ((after, loud_b["as"]), (again, loud_b["turned"]))
        ]
        assert weights[0] == pytest.approx(weights[1], abs=1e-5) and 0.5 < weights[0] < 1


def test_hetlora_before_anybody_has_a_product_counts_all_alike() -> None:
    state = _new(4)
    only_a = [
        u._replace(delta={n: t if "lora_A" in n else 0 * t for n, t in u.delta.items()}) for u in _updates([4, 4])
    ]
    after = split(_round(_build("hetlora"), state, only_a).adapter)
    for module, held in split(state.adapter).items():
        mean = held.a + (split(only_a[0].delta)[module].a + split(only_a[1].delta)[module].a) / 2
        torch.testing.assert_close(after[module].a, mean)


def test_padded_zeros_shrink_slices_as_the_paper_has_it_but_changes_do_not() -> None:
    state, still = _server(8), _still([2, 4, 8])
    after = split(_round(_build("hetlora"), state, still).adapter)
    for module, clients in _clients(state, still, RSLORA).items():
        norms = np.array([np.linalg.norm(c.s * c.b @ c.a) for c in clients])
        kept = np.repeat([1.0, norms[1:].sum() / norms.sum(), norms[2] / norms.sum()], [2, 2, 4])
        held = split(state.adapter)[module]
        np.testing.assert_allclose(after[module].a, kept[:, None] * held.a.numpy(), rtol=1e-5)
        np.testing.assert_allclose(after[module].b, kept * held.b.numpy(), rtol=1e-5)
    assert digest(_round(_build("hetlora", form="delta"), state, still).adapter) == digest(state.adapter)


def test_a_client_may_come_back_with_another_rank() -> None:
    """As after pruning: whatever the rank, the update is the change from that many slices."""
    state, method = _server(8), _build("hetlora")
    for rank in (8, 5, 3, 6):
        updates = _updates([8, rank], seed=rank)
        clients = _clients(state, updates, RSLORA)
        state = _round(method, state, updates)
        for module, f in split(state.adapter).items():
            for got, expected in zip(_dense(f), paper.hetlora(clients[module], 8, RSLORA(8)), strict=True):
                np.testing.assert_allclose(got, expected, atol=1e-5)


@BOTH_SCALINGS
def test_rank_slices_are_averaged_over_those_that_hold_them(s: Scaling) -> None:
    state, updates = _server(8), _updates([2, 6, 4])  # the last two slices: nobody
    after = split(_round(_build("rank_slices", s), state, updates).adapter)
    for module, clients in _clients(state, updates, s).items():
        expected = paper.rank_slices(*_dense(split(state.adapter)[module]), clients, s(8))
        for got, want in zip(_dense(after[module]), expected, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5)


def test_rank_slices_of_one_rank_are_federated_averaging_to_the_bit() -> None:
    state, updates = _server(5), _updates([5, 5, 5])
    for weighting in ("tokens", "uniform"):
        one, two = (_fold(_build(name, weighting=weighting), state, updates) for name in ("rank_slices", "fedavg"))
        assert digest(one.adapter) == digest(two.adapter)


# -- residuals ----------------------------------------------------------------------------------


@BOTH_SCALINGS
def test_fedex_is_the_mean_of_the_products_with_the_means_as_adapter(s: Scaling) -> None:
    state, updates = _server(4), _updates([4, 4, 4])
    after = _round(_build("fedex", s), state, updates)
    clients = _clients(state, updates, s)
    _close(_model(after, s), {module: paper.mean_product(cs) for module, cs in clients.items()})
    for module, f in split(after.adapter).items():
        for got, expected in zip(_dense(f), paper.means(clients[module]), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-5)
    assert digest(after.adapter) == digest(_round(_build("fedavg", s), state, updates).adapter)
    assert {f.rank for f in split(after.base_delta).values()} == {8}  # (K - 1) r


def test_fedex_adds_up_over_rounds() -> None:
    method, state = _build("fedex"), _server(3)
    expected = {module: np.zeros(size) for module, size in SIZES.items()}
    for seed in range(4):  # 12 ranks are more than the matrices have
        updates = _updates([3, 3], seed=50 * seed)
        for module, clients in _clients(state, updates, RSLORA).items():
            b, a = paper.means(clients)
            expected[module] += paper.mean_product(clients) - RSLORA(3) * b @ a
        state = _round(method, state, updates)
    _close({module: _product(f) for module, f in split(state.base_delta).items()}, expected)


def test_fedex_truncates_the_rounds_residual_to_its_best_ranks() -> None:
    state, updates = _server(4), _updates([4, 4, 4])
    after = _round(_build("fedex", rank=3), state, updates)
    for module, clients in _clients(state, updates, RSLORA).items():
        b, a = paper.means(clients)
        residual = paper.mean_product(clients) - RSLORA(4) * b @ a
        got = split(after.base_delta)[module]
        assert got.rank == 3
        np.testing.assert_allclose(_product(got), paper.best(residual, 3), atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"rank": 2}])
def test_there_is_no_residual_where_all_clients_have_one_a_or_one_client_answers(options: Mapping[str, int]) -> None:
    state, updates = _server(4), _updates([4, 4, 4])
    shared = [
        u._replace(delta={n: updates[0].delta[n] if "lora_A" in n else t for n, t in u.delta.items()}) for u in updates
    ]
    for cohort in (shared, updates[:1]):
        assert not _fold(_build("fedex", **options), state, cohort).base_delta
        fair, mean = (_round(_build(name), state, cohort).adapter for name in ("lora_fair", "fedavg"))
        for name, tensor in mean.items():
            torch.testing.assert_close(fair[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 0.01, 1.0, 100.0])
def test_lora_fair_is_the_minimum_of_its_objective(ridge: float) -> None:
    state, updates = _server(4), _updates([4, 4, 4], 0.8)
    after = split(_round(_build("lora_fair", ridge=ridge), state, updates).adapter)
    for module, clients in _clients(state, updates, RSLORA).items():
        for got, expected in zip(_dense(after[module]), paper.fair(clients, ridge), strict=True):
            np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("seed", range(10))
def test_lora_fair_is_never_further_from_the_mean_than_averaging_apart(seed: int) -> None:
    state, updates = _server(4, seed), _updates([4, 4, 4, 4], 1.0, seed=1000 * seed)
    errors: dict[float, list[float]] = {}
    clients = _clients(state, updates, RSLORA)
    for ridge in (0.0, 0.01, 1.0, 1e12):
        after = split(_round(_build("lora_fair", ridge=ridge), state, updates).adapter)
        errors[ridge] = [np.linalg.norm(RSLORA(4) * _product(after[m]) - paper.mean_product(clients[m])) for m in SIZES]
    mean = split(_round(_build("fedavg"), state, updates).adapter)
    apart = [np.linalg.norm(RSLORA(4) * _product(mean[m]) - paper.mean_product(clients[m])) for m in SIZES]
    for fitted, less, least, none, whole in zip(*errors.values(), apart, strict=True):
        assert fitted <= less * (1 + 1e-6) <= least * (1 + 2e-6) <= none * (1 + 3e-6) and fitted < 0.99 * whole
        assert none == pytest.approx(whole, rel=1e-6)


def test_lora_fair_with_rows_of_a_that_depend_on_each_other() -> None:
    state = _server(4)
    twins = {m: Factors(f.b, f.a[[0, 1, 0, 1]]) for m, f in split(state.adapter).items()}
    updates = _updates([4, 4])
    moved = {m: Factors(f.b, f.a[[0, 1, 0, 1]]) for m, f in split(updates[1].delta).items()}
    updates[1] = updates[1]._replace(delta=join(moved))
    updates[0] = updates[0]._replace(delta=join({m: Factors(-f.b, -f.a) for m, f in moved.items()}))
    state = state._replace(adapter=join(twins))
    clients = _clients(state, updates, RSLORA)
    after, mean = (split(_round(_build(n), state, updates).adapter) for n in ("lora_fair", "fedavg"))
    best = split(_round(_build("lora_fair", ridge=0.0), state, updates).adapter)
    for module, cs in clients.items():
        error, least, apart = (
            float(np.linalg.norm(RSLORA(4) * _product(x[module]) - paper.mean_product(cs))) for x in (after, best, mean)
        )
        assert least <= error * (1 + 1e-5) <= apart * (1 + 2e-5)


# -- rotations ----------------------------------------------------------------------------------


def _turned(state: ServerState, update: Update, turns: Mapping[str, Floats]) -> Update:
    """The update of a client that holds B Q and Q^T A."""
    made = {}
    for module, held in split(state.adapter).items():
        delta = split(update.delta)[module]
        (b, a), (db, da), q = _dense(held), _dense(delta), turns[module]
        made[module] = Factors(*(torch.from_numpy(t).float() for t in ((b + db) @ q - b, q.T @ (a + da) - a)))
    return update._replace(delta=join(made))


def _orthogonal(rank: int, seed: int, sign: int = 1) -> dict[str, Floats]:
    rng = np.random.default_rng(seed)
    made = {}
    for module in SIZES:
        q = np.linalg.qr(rng.standard_normal((rank, rank)))[0]
        q[:, 0] *= sign * np.linalg.det(q)
        made[module] = q
    return made


def _adapters_close(one: Mapping[str, Tensor], two: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    for name, tensor in two.items():
        torch.testing.assert_close(one[name], tensor, rtol=0, atol=tolerance)


@pytest.mark.parametrize("align", ["a", "b", "alternate"])
@pytest.mark.parametrize("sign", [1, -1])
def test_rotations_of_clients_are_undone(align: str, sign: int) -> None:
    """And so are reflections, where they are allowed."""
    state, updates = _server(4), _updates([4, 4, 4])
    method = _build("fedrot", align=align, reflections=sign < 0)
    turned = [_turned(state, update, _orthogonal(4, i, sign)) for i, update in enumerate(updates)]
    _adapters_close(_round(method, state, turned).adapter, _round(method, state, updates).adapter)
    still = [_turned(state, update, _orthogonal(4, i, sign)) for i, update in enumerate(_still([4, 4]))]
    _adapters_close(_round(method, state, still).adapter, state.adapter)


@pytest.mark.parametrize("align", ["a", "b"])
def test_fedrot_is_the_procrustes_alignment(align: str) -> None:
    state, update = _server(4), _turned(_server(4), _updates([4], 0.5)[0], _orthogonal(4, 3))
    after = split(_round(_build("fedrot", align=align, reflections=True), state, [update]).adapter)
    for module, [client] in _clients(state, [update], RSLORA).items():
        b, a = _dense(split(state.adapter)[module])
        q = orthogonal_procrustes(client.a.T, a.T)[0] if align == "a" else orthogonal_procrustes(client.b, b)[0]
        for got, expected in zip(_dense(after[module]), (client.b @ q, q.T @ client.a), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"align": "b"}, {"strength": 0.3}, {"reflections": True}])
def test_the_product_of_a_client_survives_the_turn(options: Mapping[str, Any]) -> None:
    state, [update] = _server(4), _updates([4], 0.9)
    method, plain = _build("fedrot", **options), _build("fedavg")
    for number, sign in itertools.product((0, 1), (1, -1)):
        at = state._replace(round=number)
        turned = _turned(at, update, _orthogonal(4, 5, sign))
        _close(_model(_round(method, at, [turned]), RSLORA), _model(_round(plain, at, [update]), RSLORA), 1e-6)


def test_without_reflections_the_best_rotation_is_taken() -> None:
    """By hand: rows of lengths 3, 2 and 1, of which the client has turned one round; the shortest gives way."""
    held = Factors(torch.zeros(3, 3), torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    state = ServerState(0, join({"m": held}), {}, {})
    mirrored = Factors(torch.zeros(3, 3), torch.diag(torch.tensor([0.0, -4.0, 0.0])))  # A is diag(3, -2, 1) now
    update = Update("c", join({"m": mirrored}), 1.0, 3)
    rotated, reflected = (
        split(_round(_build("fedrot", reflections=r), state, [update]).adapter)["m"].a for r in (False, True)
    )
    torch.testing.assert_close(reflected, held.a)
    torch.testing.assert_close(rotated, torch.diag(torch.tensor([3.0, 2.0, -1.0])))


def test_the_strength_leads_from_no_turn_to_the_whole_one() -> None:
    """By hand in the plane: half way to a turn by an angle is a turn by half of it."""
    angle = 0.8
    q = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    state = ServerState(0, join({"m": Factors(torch.zeros(2, 2), torch.eye(2))}), {}, {})
    update = Update("c", join({"m": Factors(torch.zeros(2, 2), torch.from_numpy(q - np.eye(2)).float())}), 1.0, 2)
    left = []
    for strength in (0.0, 0.5, 1.0):
        a = split(_round(_build("fedrot", strength=strength), state, [update]).adapter)["m"].a
        left.append(math.atan2(float(a[1, 0]), float(a[0, 0])))
    assert left == pytest.approx([angle, angle / 2, 0.0], abs=1e-6)
    cohort = _updates([4, 4])
    none, plain = (
        _round(_build(n, **o), _server(4), cohort) for n, o in (("fedrot", {"strength": 0.0}), ("fedavg", {}))
    )
    _adapters_close(none.adapter, plain.adapter, 1e-6)


def test_a_new_adapter_is_aligned_by_a_whatever_is_asked_for() -> None:
    state, updates = _new(4), _updates([4, 4])
    by_a, by_b = (_round(_build("fedrot", align=align), state, updates) for align in ("a", "b"))
    assert digest(by_a.adapter) == digest(by_b.adapter)


def test_alternating_begins_with_a() -> None:
    updates = _updates([4, 4], 1.5)
    for number, align in ((0, "a"), (1, "b"), (2, "a")):
        state = _server(4, number=number)
        one, two = (_round(_build("fedrot", align=which), state, updates) for which in ("alternate", align))
        assert digest(one.adapter) == digest(two.adapter)
    other = _round(_build("fedrot", align="b"), _server(4), updates)
    assert digest(other.adapter) != digest(_round(_build("fedrot"), _server(4), updates).adapter)


def test_directions_that_the_server_has_not_are_not_turned() -> None:
    """Nothing says how to turn them: left to the decomposition they would be turned by chance."""
    state = _server(6)
    lame = {m: Factors(f.b * torch.tensor([0, 0, 0, 0, 1.0, 1.0]), f.a) for m, f in split(state.adapter).items()}
    state = state._replace(adapter=join(lame))
    updates = _updates([6, 6], 1e-3)
    got, expected = (_round(_build(n, **o), state, updates) for n, o in (("fedrot", {"align": "b"}), ("fedavg", {})))
    _adapters_close(got.adapter, expected.adapter, 5e-3)


# -- all ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MIXED, *ONE])
def test_the_order_of_answers_of_many_ranks_does_not_show_in_a_single_bit(name: str) -> None:
    state, updates = _server(8), _updates([2, 8, 5, 8] if name in MIXED else [8] * 4)
    updates = [u._replace(delta=_random(i, u.rank, 10.0 ** (i - 2))) for i, u in enumerate(updates)]
    gradients = [_fold(_build(name), state, order) for order in itertools.permutations(updates)]
    assert len({digest(g.adapter) + digest(g.base_delta) for g in gradients}) == 1


@pytest.mark.parametrize("name", ["flora", "flexlora", "rank_slices", "fedex", "lora_fair", "fedrot"])
def test_weights_are_tokens_or_one_each(name: str) -> None:
    method, state, updates = _build(name), _server(4), _updates([4, 4])
    thrice = [updates[0]._replace(weight=3.0), updates[1]._replace(weight=1.0)]
    copies = [*(updates[0]._replace(client=f"copy {i}", weight=2.0) for i in range(3)), updates[1]._replace(weight=2.0)]
    _close(_model(_round(method, state, thrice), RSLORA), _model(_round(method, state, copies), RSLORA), 3e-5)
    uniform = _build(name, weighting="uniform")
    alike = [update._replace(weight=5.0) for update in thrice]
    _close(_model(_round(uniform, state, thrice), RSLORA), _model(_round(method, state, alike), RSLORA))


@pytest.mark.parametrize("name", ["flora", "flexlora", "rank_slices", "fedex", "lora_fair", "fedrot"])
def test_a_round_without_weight_is_an_error_and_not_a_nan(name: str) -> None:
    with pytest.raises(ValueError, match=r"weights of the round sum to 0\.0"):
        _fold(_build(name), _server(4), [update._replace(weight=0.0) for update in _updates([4, 4])])


@pytest.mark.parametrize("name", MIXED)
@BOTH_SCALINGS
def test_a_client_of_a_lower_rank_receives_the_leading_slices_at_its_own_scale(name: str, s: Scaling) -> None:
    method, state = _build(name, s), _server(8)._replace(base_delta=_random(4, 3))
    assert method.ranks == "mixed"
    small = method.payload(state, ClientInfo("small", 3, 0))
    for module, f in split(small.adapter).items():
        b, a = _dense(split(state.adapter)[module])
        np.testing.assert_allclose(s(3) * _product(f), s(8) * b[:, :3] @ a[:3], atol=1e-4)
    assert small.base_delta == state.base_delta
    assert method.payload(state, ClientInfo("large", 8, 0)) == Payload(state.adapter, state.base_delta)


@pytest.mark.parametrize("name", ONE)
def test_methods_of_one_rank_refuse_another(name: str) -> None:
    method, state = _build(name), _server(4)
    assert method.ranks == "one"
    for rank in (1, 3, 5):
        with pytest.raises(ValueError, match=rf"^{name}: 'c0' sent rank {rank}; it takes 4 alone$"):
            _fold(method, state, _updates([rank]))


@pytest.mark.parametrize("name", MIXED)
def test_methods_of_mixed_ranks_refuse_more_than_the_servers(name: str) -> None:
    method, state = _build(name), _server(4)
    with pytest.raises(ValueError, match=rf"^{name}: 'c0' sent rank 5; it takes at most 4, the same in all modules$"):
        _fold(method, state, _updates([5]))
    with pytest.raises(ValueError, match="sent rank 2, 3; it takes at most 4"):
        _fold(method, state, [_updates([3])[0]._replace(rank=2)])


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("lora_fair", {"ridge": -1.0}, r"ridge = -1\.0: must be a number, at least 0"),
        ("lora_fair", {"ridge": math.inf}, "ridge = inf: must be finite"),
        ("fedrot", {"strength": 1.5}, r"strength = 1\.5: must be a number, at least 0.* and at most 1"),
        ("fedrot", {"align": "c"}, "align = 'c': allowed are 'a', 'b', 'alternate'"),
        ("flexlora", {"form": "both"}, "form = 'both': allowed are 'delta', 'absolute'"),
        ("flora", {"base_rank": -1}, "base_rank = -1: must be a whole number, at least 0"),
    ],
)
def test_options_are_checked(name: str, options: Mapping[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        AGGREGATORS.build(name, options, scaling=RSLORA, seed=7)


def test_the_exact_methods_make_one_model() -> None:
    """By three ways; FlexLoRA as far as the adapter's rank can hold it."""
    state, updates = _new(8), _updates([8, 8], 0.2)
    flora, fedex, flexlora = (_model(_round(_build(n), state, updates), RSLORA) for n in ("flora", "fedex", "flexlora"))
    _close(flora, fedex)
    _close(flexlora, {module: paper.best(matrix, 8) for module, matrix in flora.items()}, 3e-5)
