"""Robust aggregation against textbook rules on dense points, and against attackers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from reference import robust as ref
from torch import Tensor

import strategies
from apiary.config import loading
from apiary.core import lora
from apiary.core.errors import UserError
from apiary.core.lora import Factors, is_b
from apiary.core.messages import ClientInfo, Update
from apiary.core.tensors import StateDict, digest
from strategies import AGGREGATORS, Aggregator, Gradient, ServerState
from strategies import gram_rules as rules
from strategies.aggregator import ROOT, of_rank
from strategies.coordinatewise import _picked_by_krum
from strategies.gram_rules import fewest, krum_scores

Floats = NDArray[np.float64]
SCALING = lora.scaling(16.0, "rslora")
MODULES = {"m.q": (9, 7), "m.v": (5, 8)}
RANK = 3
PRODUCTS = ("norm_clip", "krum", "multi_krum", "geometric_median", "fltrust")
ENTRIES = ("median", "trimmed_mean", "bulyan")


def _random(rng: np.random.Generator, scale: float = 1.0, rank: int = RANK) -> dict[str, Tensor]:
    factors = {
        module: Factors(
            torch.from_numpy((scale * rng.standard_normal((d_out, rank))).astype(np.float32)),
            torch.from_numpy((scale * rng.standard_normal((rank, d_in))).astype(np.float32)),
        )
        for module, (d_out, d_in) in MODULES.items()
    }
    return lora.join(factors)


def _state(seed: int = 100, fresh: bool = False) -> ServerState:
    made = _random(np.random.default_rng(seed), 0.6)
    return ServerState(2, {n: torch.zeros_like(t) if fresh and is_b(n) else t for n, t in made.items()}, {}, {})


def _plus(a: StateDict, b: StateDict, share: float = 1.0) -> dict[str, Tensor]:
    return {name: tensor + share * b[name] for name, tensor in a.items()}


def _times(a: StateDict, share: float) -> dict[str, Tensor]:
    return {name: share * tensor for name, tensor in a.items()}


def _honest(n: int, seed: int = 0, spread: float = 0.03) -> list[Update]:
    """Clients that agree on a direction, each with a deviation of its own."""
    rng = np.random.default_rng(seed)
    common = _random(rng, 0.05)
    return [Update(f"honest-{i:02d}", _plus(common, _random(rng, spread)), 1.0, RANK) for i in range(n)]


def _root(seed: int = 0) -> Update:
    """The server's own update: it points where `_honest` clients of this seed do."""
    common, own = _honest(1, seed, 0.0)[0].delta, _random(np.random.default_rng(2000 + seed), 0.03)
    return Update(ROOT, _plus(common, own), 1.0, RANK)


def _build(name: str, **options: Any) -> Aggregator:
    return AGGREGATORS.build(name, options, scaling=SCALING, seed=0)


def _reduce(method: Aggregator, state: ServerState, updates: Sequence[Update], root: Update | None = None) -> Gradient:
    acc = method.reduce.start(state)
    for update in [root or _root(), *updates] if method.root else updates:
        acc = method.reduce.add(acc, update)
    return method.reduce.finish(state, acc, torch.Generator().manual_seed(0))


def _dense(factors: Mapping[str, Factors], scale: float) -> Floats:
    return scale * np.concatenate([(f.b.double().numpy() @ f.a.double().numpy()).ravel() for f in factors.values()])


def _point(state: ServerState, update: Update) -> Floats:
    """s_k (B_k A_k - B_0 A_0) of all modules, dense."""
    start = lora.split(of_rank(state.adapter, update.rank, SCALING))
    delta = lora.split(update.delta)
    after = {m: Factors(f.b.double() + delta[m].b, f.a.double() + delta[m].a) for m, f in start.items()}
    return _dense(after, SCALING(update.rank)) - _dense(start, SCALING(update.rank))


def _points(state: ServerState, updates: Sequence[Update]) -> Floats:
    return np.stack([_point(state, update) for update in updates])


def _flat(state: StateDict) -> Floats:
    return np.concatenate([state[name].double().numpy().ravel() for name in sorted(state)])


def _result(method: Aggregator, state: ServerState, gradient: Gradient) -> Floats:
    """What the gradient changes, dense: of the products, or for methods on factors of the model after a step."""
    if method.space == "products":
        return _dense(lora.split(gradient.adapter), SCALING(RANK))
    after = lora.split(method.step(state, gradient).adapter)
    return _dense(after, SCALING(RANK)) - _dense(lora.split(state.adapter), SCALING(RANK))


# -- against the textbook -----------------------------------------------------------------------


def _textbook(name: str, points: Floats, f: int) -> Floats:
    """A rule of points, the last of which is the server's own."""
    clients = points[:-1]
    return {
        "norm_clip": lambda: ref.clip(clients).mean(0),
        "krum": lambda: ref.multi_krum(clients, f, 1),
        "multi_krum": lambda: ref.multi_krum(clients, f, len(clients) - f),
        "geometric_median": lambda: ref.geometric_median(clients),
        "fltrust": lambda: ref.fltrust(clients, points[-1]),
        "median": lambda: ref.median(clients),
        "trimmed_mean": lambda: ref.trimmed_mean(clients, f),
        "bulyan": lambda: ref.bulyan(clients, f),
    }[name]()


def _cohort(n: int, seed: int) -> list[Update]:
    """Clients of very different lengths, so that clipping and cutting do something."""
    rng = np.random.default_rng(seed)
    return [Update(f"c{i:02d}", _random(rng, 0.05 * 4.0 ** rng.uniform(-1, 1)), 1.0 + i, RANK) for i in range(n)]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("name", "before"),
    [
        (name, before)
        for name in (*PRODUCTS, *ENTRIES)
        for before in ((), ("clip",), ("nearest",), ("clip", "nearest"))
        if name != "norm_clip" or "clip" not in before  # it is the rule
    ],
)
def test_a_rule_is_that_of_its_paper(name: str, before: tuple[str, ...], seed: int) -> None:
    f, state = 2, _state()
    updates = _cohort(11, seed)
    method = _build(name, byzantine=f, **dict.fromkeys(before, True))
    gradient = _reduce(method, state, updates)
    order = [*updates, _root()]
    if method.space == "products":
        points = _points(state, order)
        found = _result(method, state, gradient)
    else:
        points, found = np.stack([_flat(update.delta) for update in order]), _flat(gradient.adapter)
    clients = points[:-1]
    clients = ref.clip(clients) if "clip" in before else clients
    clients = ref.mix_nearest(clients, f) if "nearest" in before else clients
    expected = _textbook(name, np.concatenate([clients, points[-1:]]), f)
    np.testing.assert_allclose(found, expected, atol=2e-5 * float(np.abs(points).max()))


@pytest.mark.parametrize("name", PRODUCTS)
def test_clients_of_lower_ranks_count_with_what_they_changed(name: str) -> None:
    state, rng = _state(), np.random.default_rng(4)
    updates = [Update(f"c{i}", _random(rng, 0.1, rank), 1.0, rank) for i, rank in enumerate((1, 2, 3, 3, 2, 1, 2))]
    method = _build(name, byzantine=2)
    points = _points(state, [*updates, _root()])
    expected = _textbook(name, points, 2)
    found = _result(method, state, _reduce(method, state, updates))
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(np.abs(points).max()))
    received = method.payload(state, ClientInfo("c0", 2, 0)).adapter
    assert {name: digest({"": t}) for name, t in received.items()} == {
        name: digest({"": t}) for name, t in of_rank(state.adapter, 2, SCALING).items()
    }


def test_the_geometric_median_of_points_on_a_line_is_the_middle_one() -> None:
    state = ServerState(0, {"x.lora_A.weight": torch.ones(1, 1), "x.lora_B.weight": torch.zeros(1, 1)}, {}, {})
    sent = {"a": 0.0, "b": 1.0, "c": 1e4}
    zero = torch.zeros(1, 1)
    updates = [
        Update(name, {"x.lora_A.weight": zero, "x.lora_B.weight": torch.full((1, 1), b)}, 1.0, 1)
        for name, b in sent.items()
    ]
    gradient = _reduce(_build("geometric_median"), state, updates)
    assert gradient.adapter["x.lora_B.weight"].item() == pytest.approx(1.0, abs=1e-5)
    assert gradient.shares["b"] > 0.999


def test_the_geometric_median_is_followed_to_its_end() -> None:
    """Weiszfeld's iteration is slow where two camps are nearly as large: ten steps are not enough."""
    rng = np.random.default_rng(5)
    points = np.concatenate([rng.normal(0, 1, (5, 6)), rng.normal(0, 1, (4, 6)) + 8.0])
    weights = rules.geometric_median(torch.from_numpy(points @ points.T), 0).weights.numpy()
    median = weights @ points
    pull = (points - median) / np.linalg.norm(points - median, axis=1, keepdims=True)
    assert np.linalg.norm(pull.sum(0)) < 1e-5  # of a sum of distances, the slope where it is least


def test_where_most_agree_to_the_bit_the_others_have_no_part_in_the_geometric_median() -> None:
    """Nor parts so small that float32 makes no number of them."""
    state = ServerState(0, {"x.lora_A.weight": torch.ones(1, 7), "x.lora_B.weight": torch.zeros(1, 1)}, {}, {})
    rng = np.random.default_rng(0)
    updates = [
        Update(f"c{i}", {n: torch.zeros_like(t) if i < 6 else _like(rng, t) for n, t in state.adapter.items()}, 1.0, 1)
        for i in range(9)
    ]
    method = _build("geometric_median")
    after = method.step(state, _reduce(method, state, updates))
    assert digest(after.adapter) == digest(state.adapter)


def _like(rng: np.random.Generator, tensor: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(tuple(tensor.shape))).float()


def test_norm_clip_takes_a_limit_on_the_change_of_the_weights() -> None:
    state, updates = _state(), _cohort(5, 3)
    method = _build("norm_clip", limit=0.7)
    expected = ref.clip(_points(state, updates), 0.7).mean(0)
    np.testing.assert_allclose(_result(method, state, _reduce(method, state, updates)), expected, atol=1e-6)


def test_multi_krum_keeps_as_many_as_it_is_told_but_no_more_than_are_honest() -> None:
    state, updates = _state(), _cohort(9, 5)
    points = _points(state, updates)
    for select, kept in ((2, 2), (9, 7)):
        method = _build("multi_krum", byzantine=2, select=select)
        found = _result(method, state, _reduce(method, state, updates))
        np.testing.assert_allclose(found, ref.multi_krum(points, 2, kept), atol=1e-5)


def test_two_that_are_each_others_nearest_tie_whatever_rounding_says() -> None:
    """Else Bulyan's last picks, which go by the one nearest, would depend on the machine."""
    points = torch.from_numpy(np.random.default_rng(0).standard_normal((5, 4)))
    points[1] = points[0] + 0.1
    gram = points @ points.T
    for noise in (1e-15, -1e-15):
        gram[0, 1] += noise
        scores = krum_scores(gram, 2)
        assert float(scores[0]) == float(scores[1]) == pytest.approx(0.04)


@pytest.mark.parametrize("seed", range(5))
def test_of_mixed_changes_with_equal_scores_no_rounding_chooses(seed: int) -> None:
    """Another processor's sums differ in their last bits, and a run must not turn out otherwise for that."""
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((11, 40))
    mixed = torch.tensor(ref.mix_nearest(points, 2))
    gram = mixed @ mixed.T
    chosen = [_picked_by_krum(gram, 2)[0], krum_scores(gram, 2).argsort(stable=True).tolist()]
    for _ in range(20):
        other = gram * (1 + 1e-15 * torch.tensor(rng.standard_normal(gram.shape)))
        assert [_picked_by_krum(other, 2)[0], krum_scores(other, 2).argsort(stable=True).tolist()] == chosen


def test_what_is_no_number_is_nobodys_nearest() -> None:
    """Such answers are refused before; a rule that meets one all the same must not take it for a copy of the others."""
    points = torch.from_numpy(np.random.default_rng(0).standard_normal((7, 4)))
    gram = points @ points.T
    gram[0], gram[:, 0] = torch.nan, torch.nan
    scores = krum_scores(gram, 2)
    assert scores[0].isnan()
    torch.testing.assert_close(scores[1:], krum_scores(gram[1:, 1:], 1))  # the same three nearest, of the six others


def test_fltrust_without_anybody_to_trust_leaves_the_model() -> None:
    state, method = _state(), _build("fltrust")
    gradient = _reduce(method, state, [Update("a", _times(_root().delta, -1e-3), 1.0, RANK)])
    assert digest(method.step(state, gradient).adapter) == digest(state.adapter)
    assert gradient.notes["a"].startswith("cosine -1.00")


@pytest.mark.parametrize("moved", ["b", "a"])
def test_fltrust_without_anybody_to_trust_leaves_both_factors_whatever_the_step(moved: str) -> None:
    """Also with a server step size, and where one factor rests."""
    config = ["strategy.name=fltrust", "strategy.root=rows.jsonl", "adapter.train=alternate", f"adapter.rank={RANK}"]
    method = strategies.from_config(loading.load(None, [*config, 'strategy.server_optimizer={name="plain", lr=0.5}']))
    state = _state()._replace(round=0 if moved == "b" else 1)
    own = {n: t if is_b(n) == (moved == "b") else 0 * t for n, t in _root().delta.items()}
    gradient = _reduce(method, state, [Update("a", _times(own, -1e-3), 1.0, RANK)], _root()._replace(delta=own))
    assert digest(method.step(state, gradient).adapter) == digest(state.adapter)


def test_fltrust_asks_for_the_servers_own_update() -> None:
    method, state = _build("fltrust"), _state()
    assert method.root and not any(_build(n, byzantine=1).root for n in ("krum", "median", "norm_clip"))
    acc = method.reduce.add(method.reduce.start(state), _honest(1)[0])
    with pytest.raises(ValueError, match="one update of the server's own, this round has 0"):
        method.reduce.finish(state, acc, torch.Generator())


# -- against attackers --------------------------------------------------------------------------

Attack = Callable[[ServerState, Sequence[Update], np.random.Generator], StateDict]


def _mean(updates: Sequence[Update]) -> dict[str, Tensor]:
    return {name: torch.stack([u.delta[name] for u in updates]).mean(0) for name in updates[0].delta}


def _std(updates: Sequence[Update]) -> dict[str, Tensor]:
    return {name: torch.stack([u.delta[name] for u in updates]).std(0) for name in updates[0].delta}


def _matched_noise(state: ServerState, honest: Sequence[Update], rng: np.random.Generator) -> StateDict:
    noise = _random(rng)
    return _times(noise, float(np.linalg.norm(_flat(_mean(honest))) / np.linalg.norm(_flat(noise))))


def _gauge(state: ServerState, honest: Sequence[Update], factor: float, share: float) -> StateDict:
    """The change to B times `factor` and A over `factor`, after `share` of the honest mean."""
    adapter = _plus(state.adapter, _mean(honest), share)
    return {n: t * (factor if is_b(n) else 1 / factor) - state.adapter[n] for n, t in adapter.items()}


CRUDE: Mapping[str, Attack] = {
    "sign flip x 5": lambda state, honest, rng: _times(_mean(honest), -5.0),
    "sign flip x 10": lambda state, honest, rng: _times(_mean(honest), -10.0),
    "scaled x 10": lambda state, honest, rng: _times(_mean(honest), 10.0),
    "huge": lambda state, honest, rng: _times(_random(rng), 1e30),
    "gauge, flipped x 3": lambda state, honest, rng: _gauge(state, honest, 1e3, -3.0),
}
SUBTLE: Mapping[str, Attack] = {
    "sign flip": lambda state, honest, rng: _times(_mean(honest), -1.0),
    "noise": _matched_noise,
    "alie": lambda state, honest, rng: _plus(_mean(honest), _std(honest), -1.0),
    "inner product": lambda state, honest, rng: _times(_mean(honest), -0.5),
}
SETTINGS = {
    name: [{"byzantine": 2}, {"byzantine": 2, "clip": True}, {"byzantine": 2, "nearest": True}]
    for name in ("krum", "multi_krum", "geometric_median", "fltrust", "median", "trimmed_mean", "bulyan")
}
ROBUST = [(name, options) for name, many in SETTINGS.items() for options in many]


def _poisoned(attack: Attack, state: ServerState, honest: Sequence[Update], f: int, seed: int) -> list[Update]:
    rng = np.random.default_rng(1000 + seed)
    bad = [Update(f"attacker-{i}", attack(state, honest, rng), 1.0, RANK) for i in range(f)]
    return [*bad, *honest]


def _error(name: str, options: Mapping[str, Any], state: ServerState, cohort: list[Update], seed: int = 0) -> float:
    """How far the result is from the honest mean, in units of the honest clients' own typical distance from it."""
    points = _points(state, [u for u in cohort if u.client.startswith("honest")])
    mean = points.mean(0)
    spread = float(np.sqrt(((points - mean) ** 2).sum(1).mean()))
    method = _build(name, **options)
    found = _result(method, state, _reduce(method, state, cohort, _root(seed)))
    return float(np.linalg.norm(found - mean)) / spread


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("attack", [*CRUDE, *SUBTLE])
def test_two_attackers_do_not_move_a_robust_result_from_the_honest_mean(attack: str, fresh: bool) -> None:
    """With the fewest clients that a rule needs, its result stays as near as one honest client or so."""
    for seed, (name, options) in itertools.product(range(2), ROBUST):
        state, n = _state(100 + seed, fresh), max(7, fewest(name, 2))
        cohort = _poisoned({**CRUDE, **SUBTLE}[attack], state, _honest(n - 2, seed), 2, seed)
        error = _error(name, options, state, cohort, seed)
        assert error < (1.5 if name == "krum" else 1.0), (name, options, seed)


@pytest.mark.parametrize("attack", CRUDE)
def test_a_mean_is_moved_by_them(attack: str) -> None:
    state = _state()
    assert _error("fedavg", {}, state, _poisoned(CRUDE[attack], state, _honest(5), 2, 0)) > 2


@pytest.mark.parametrize("attack", ["sign flip", "noise", "inner product"])
def test_multi_krum_keeps_the_honest_mean_itself_where_attackers_stand_apart(attack: str) -> None:
    state = _state()
    cohort = _poisoned(SUBTLE[attack], state, _honest(5), 2, 0)
    assert _error("multi_krum", {"byzantine": 2}, state, cohort) < 1e-5 < 0.5 < _error("fedavg", {}, state, cohort)


def test_without_attackers_little_is_lost() -> None:
    for seed, (name, options) in itertools.product(range(3), ROBUST):
        error = _error(name, options, _state(100 + seed), _honest(max(7, fewest(name, 2)), seed), seed)
        assert error < (1.0 if name == "krum" else 0.6), (name, options, seed)


def test_norm_clip_takes_the_same_from_an_attacker_however_long_its_update() -> None:
    state, honest, method = _state(fresh=True), _honest(5), _build("norm_clip")
    found = []
    for factor in (-4.0, -4e4, -4e20):
        longer = {n: t * (factor if is_b(n) else 0.0) for n, t in _mean(honest).items()}
        gradient = _reduce(method, state, [Update(f"attacker-{i}", longer, 1.0, RANK) for i in range(2)] + honest)
        found.append(_result(method, state, gradient))
    np.testing.assert_allclose(found[1:], [found[0]] * 2, atol=1e-6)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_gauge_changes_nothing(name: str) -> None:
    """A client that sends B G and G^-1 A counts as if it had sent B and A, but for what float32 keeps of them."""
    state, updates, rng = _state(), _cohort(7, 1), np.random.default_rng(3)
    moved = []
    for update in updates:
        turn = torch.from_numpy(np.eye(RANK) + 0.3 * rng.standard_normal((RANK, RANK)))
        after = lora.split(_plus(state.adapter, update.delta))
        turned = {
            m: Factors((f.b.double() @ turn).float(), (turn.inverse() @ f.a.double()).float()) for m, f in after.items()
        }
        moved.append(update._replace(delta=_plus(lora.join(turned), state.adapter, -1.0)))
    method = _build(name, byzantine=2)
    plain, gauged = (_reduce(method, state, cohort) for cohort in (updates, moved))
    np.testing.assert_allclose(_result(method, state, gauged), _result(method, state, plain), atol=1e-5)
    assert gauged.shares == pytest.approx(plain.shares, abs=1e-5)


@pytest.mark.parametrize("name", [*PRODUCTS, *ENTRIES])
def test_b_times_a_million_and_a_over_it_is_no_attack(name: str) -> None:
    """What such a client sends is an honest product, rounded to a few per cent by float32."""
    state, honest = _state(fresh=True), _honest(9)
    cohort = [Update(f"attacker-{i}", _gauge(state, honest, 1e6, 1.0), 1.0, RANK) for i in range(2)] + honest
    assert _error("fedavg", {}, state, cohort) > 1e4
    assert _error(name, {"byzantine": 2}, state, cohort) < 1.0


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_client_whose_parts_cancel_to_nothing_is_not_cut_for_it(name: str) -> None:
    """Beside what the others changed, what float32 may lose of its parts is small, however small their sum is."""
    state, honest = _state(), _honest(6)
    twins = {m: Factors(f.b, torch.cat([f.a[:1], f.a[:1], f.a[2:]])) for m, f in lora.split(state.adapter).items()}
    state = state._replace(adapter=lora.join(twins))
    quiet = {n: torch.zeros_like(t) for n, t in state.adapter.items()}
    for factor, tensor in quiet.items():
        if is_b(factor):
            tensor[:, 0], tensor[:, 1] = 0.05, -0.05
    gradient = _reduce(_build(name, byzantine=1), state, [*honest, Update("quiet", quiet, 1.0, RANK)])
    assert gradient.notes.get("quiet") != "huge factors that cancel each other"


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("fresh", [True, False])
def test_a_gauge_that_float32_can_hold_is_judged_as_the_product_that_it_is(name: str, fresh: bool) -> None:
    """Also in later rounds: B times 1,000 and A over it, from an adapter whose B is not zero."""
    state, honest = _state(fresh=fresh), _honest(9)
    hidden = Update("c", _gauge(state, honest, 1e3, 1.0), 1.0, RANK)
    plain = Update("c", _gauge(state, honest, 1.0, 1.0), 1.0, RANK)
    method = _build(name, byzantine=2)
    one, other = (_reduce(method, state, [*honest, update]) for update in (hidden, plain))
    assert one.shares == pytest.approx(other.shares, abs=2e-3)


@pytest.mark.parametrize("name", PRODUCTS)
def test_factors_that_cancel_are_cut_before_they_round(name: str) -> None:
    """Of two columns 1e12 times as large as their difference float32 would leave noise, whatever the exact product."""
    state, honest = _state(), _honest(6)
    hidden = dict(honest[0].delta)
    for module, f in lora.split(state.adapter).items():
        rows, columns = f.a.clone(), torch.full_like(f.b, 1e12)
        rows[1] = rows[0]
        columns[:, 1], columns[:, 2] = -1e12, 0.0
        hidden |= lora.join({module: Factors(columns, rows - f.a)})
    method = _build(name, byzantine=2)
    gradient = _reduce(method, state, [*honest, Update("hidden", hidden, 1.0, RANK)])
    assert gradient.shares["hidden"] == 0.0
    assert gradient.notes["hidden"] == "huge factors that cancel each other"
    without = _reduce(_build(name, byzantine=1), state, honest)
    assert [digest(g.adapter) for g in (gradient,)] == [digest(without.adapter)]


def test_a_change_that_overflows_in_the_servers_units_is_cut() -> None:
    state, honest = _state(), _honest(6)
    rng = np.random.default_rng(0)
    huge = {n: torch.full_like(t, 3e38) if is_b(n) else t for n, t in _random(rng, 0.1, 1).items()}
    gradient = _reduce(_build("multi_krum", byzantine=2), state, [*honest, Update("huge", huge, 1.0, 1)])
    assert gradient.shares["huge"] == 0.0 and "huge" in gradient.notes
    assert all(bool(t.isfinite().all()) for t in gradient.adapter.values())


@pytest.mark.parametrize(
    ("name", "options"), [*ROBUST, ("norm_clip", {}), ("norm_clip", {"byzantine": 2, "nearest": True})]
)
def test_huge_updates_leave_the_next_adapter_finite(name: str, options: Mapping[str, Any]) -> None:
    state, honest, method = _state(), _honest(9), _build(name, **options)
    for size in (1e15, 1e30, 1e38):
        bad = [
            Update(f"attacker-{i}", {n: torch.full_like(t, size) for n, t in _mean(honest).items()}, 1.0, RANK)
            for i in range(2)
        ]
        after = method.step(state, _reduce(method, state, [*bad, *honest]))
        assert max(float(t.abs().max()) for t in after.adapter.values()) < 10


# -- what is kept, and what is told -------------------------------------------------------------


@pytest.mark.parametrize("name", [*PRODUCTS, *ENTRIES])
def test_the_order_of_answers_does_not_show_in_a_single_bit(name: str) -> None:
    state, cohort = _state(), _cohort(11, 8)
    method = _build(name, byzantine=2, nearest=True)
    first = _reduce(method, state, cohort)
    for seed in range(5):
        shuffled = [cohort[i] for i in np.random.default_rng(seed).permutation(11)]
        again = _reduce(method, state, shuffled)
        assert digest(again.adapter) == digest(first.adapter)
        assert (again.shares, again.notes) == (first.shares, first.notes)


@pytest.mark.parametrize("moved", ["b", "a"])
@pytest.mark.parametrize("name", [*PRODUCTS, *ENTRIES])
def test_where_one_factor_moves_the_other_stays_bit_by_bit(name: str, moved: str) -> None:
    state = _state()
    frozen = [
        update._replace(delta={n: t if is_b(n) == (moved == "b") else 0 * t for n, t in update.delta.items()})
        for update in [*_cohort(11, 2), _root()]
    ]
    method = _build(name, byzantine=2)
    gradient = _reduce(method, state, frozen[:-1], frozen[-1])
    after = method.step(state, gradient)
    for tensor, before in state.adapter.items():
        assert torch.equal(after.adapter[tensor], before) == (is_b(tensor) != (moved == "b"))
    if method.space == "products":
        for tensor in (n for n in state.adapter if is_b(n) == (moved == "b")):
            mean = sum(gradient.shares[u.client] * u.delta[tensor].double() for u in frozen[:-1])
            torch.testing.assert_close(
                after.adapter[tensor].double(), state.adapter[tensor] + mean, rtol=1e-5, atol=1e-6
            )
        points = _points(state, frozen)
        expected = _textbook(name, points, 2)
        found = _dense(lora.split(after.adapter), SCALING(RANK)) - _dense(lora.split(state.adapter), SCALING(RANK))
        np.testing.assert_allclose(found, expected, atol=2e-5 * float(np.abs(points).max()))


@pytest.mark.parametrize("before", [(), ("nearest",)])
@pytest.mark.parametrize("name", PRODUCTS)
def test_the_result_is_the_changes_times_their_shares(name: str, before: tuple[str, ...]) -> None:
    state, cohort = _state(), _cohort(9, 6)
    method = _build(name, byzantine=2, **dict.fromkeys(before, True))
    gradient = _reduce(method, state, cohort)
    expected = sum(gradient.shares[update.client] * _point(state, update) for update in cohort)
    np.testing.assert_allclose(_result(method, state, gradient), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"), [*ROBUST, ("norm_clip", {}), ("norm_clip", {"byzantine": 2, "nearest": True})]
)
def test_attackers_are_named_with_the_reason_and_honest_clients_are_not(name: str, options: Mapping[str, Any]) -> None:
    state, honest = _state(), _honest(9)
    cohort = _poisoned(CRUDE["sign flip x 10"], state, honest, 2, 0)
    gradient = _reduce(_build(name, **options), state, cohort)
    assert set(gradient.shares) == {update.client for update in cohort}
    named = {client for client in gradient.notes if client.startswith("attacker")}
    assert len(named) == 2 and all(gradient.shares[client] < 0.5 / 11 for client in named)
    if name not in ("krum", "bulyan"):  # these leave honest ones out too
        assert set(gradient.notes) == named
    assert all(0 < len(note) < 100 and "\n" not in note for note in gradient.notes.values())


def test_reasons_are_in_numbers() -> None:
    state, honest = _state(fresh=True), _honest(5, spread=0.0)
    far = Update("far", {n: t * (41.0 if is_b(n) else 1.0) for n, t in honest[0].delta.items()}, 1.0, RANK)
    cohort = [*honest, far]
    assert _reduce(_build("norm_clip"), state, cohort).notes == {"far": "norm 41 times the median"}
    against = _reduce(_build("fltrust"), state, [*honest, far._replace(delta=_times(honest[0].delta, -1e-4))])
    assert against.notes["far"].startswith("cosine -") and against.shares["far"] == 0
    rng = np.random.default_rng(0)
    apart = [update._replace(delta=_plus(update.delta, _random(rng, 0.03))) for update in _honest(6, spread=0.0)]
    note = _reduce(_build("multi_krum", byzantine=1), state, [*apart, far]).notes["far"]
    assert note.endswith("times as far from its nearest as those that are kept") and float(note.split()[0]) > 5


def test_coarse_values_share_their_say_among_those_that_agree() -> None:
    """As a codec of few bits makes them: then most values tie, and A may not move at all."""
    state, rng = _state(), np.random.default_rng(0)
    cohort = []
    for i in range(7):
        coarse = {
            n: torch.from_numpy(rng.integers(-1, 2, tuple(t.shape))).float() * is_b(n) for n, t in state.adapter.items()
        }
        cohort.append(Update(f"c{i}", coarse, 1.0, RANK))
    for name in ("median", "trimmed_mean"):
        method = _build(name, byzantine=2)
        gradient = _reduce(method, state, cohort)
        assert not gradient.notes and sum(gradient.shares.values()) == pytest.approx(1.0)
        bad = cohort[0]._replace(delta={n: torch.full_like(t, 5.0) * is_b(n) for n, t in state.adapter.items()})
        assert set(_reduce(method, state, [bad, *cohort[1:]]).notes) == {"c0"}


# -- how many it takes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("krum", 7),
        ("multi_krum", 7),
        ("bulyan", 11),
        ("median", 5),
        ("trimmed_mean", 5),
        ("geometric_median", 5),
        ("norm_clip", 5),
    ],
)
def test_a_round_with_too_few_answers_is_an_error_and_never_skipped(name: str, needed: int) -> None:
    method, state = _build(name, byzantine=2), _state()
    assert fewest(name, 2) == needed
    _reduce(method, state, _honest(needed))
    with pytest.raises(
        ValueError,
        match=f"{name} against 2 hostile clients needs {needed} good answers, this round has {needed - 1}; raise",
    ):
        _reduce(method, state, _honest(needed - 1))


def test_methods_that_promise_nothing_need_one_answer() -> None:
    assert [fewest(name, 5) for name in ("fedavg", "fltrust")] == [1, 1]
    assert fewest("median", None) == 1
    assert len(_reduce(_build("median"), _state(), _honest(1)).shares) == 1


def test_a_client_that_is_cut_beforehand_is_one_of_the_hostile() -> None:
    """And once it is known, the rest need one less."""
    state, bad = _state(), []
    for i in range(3):
        huge = {
            n: torch.full_like(t, 3e38) if is_b(n) else t for n, t in _random(np.random.default_rng(i), 0.1, 1).items()
        }
        bad.append(Update(f"bad-{i}", huge, 1.0, 1))
    method = _build("multi_krum", byzantine=2)
    gradient = _reduce(method, state, [*_honest(5), *bad[:2]])
    points = _points(state, _honest(5))
    np.testing.assert_allclose(_result(method, state, gradient), points.mean(0), atol=1e-6)
    with pytest.raises(ValueError, match="needs 3 good answers, this round has 2"):
        _reduce(_build("krum", byzantine=1), state, [*_honest(2), *bad])


@pytest.mark.parametrize("name", ["krum", "multi_krum", "trimmed_mean", "bulyan"])
def test_the_number_of_hostile_clients_has_to_be_said(name: str) -> None:
    with pytest.raises(UserError, match="needs the option 'byzantine'"):
        _build(name)
    with pytest.raises(UserError, match=r"strategy\.options\.byzantine = -1: must be a whole number, at least 0"):
        _build(name, byzantine=-1)


@pytest.mark.parametrize("options", [{}, {"byzantine": 0}])
@pytest.mark.parametrize("name", ["norm_clip", "geometric_median", "fltrust", "median"])
def test_mixing_has_to_know_how_many_are_not_near(name: str, options: Mapping[str, Any]) -> None:
    with pytest.raises(UserError, match=r"strategy\.options\.byzantine = 0: with nearest = true"):
        _build(name, nearest=True, **options)


@pytest.mark.parametrize("name", ["trimmed_mean", "median", "multi_krum", "geometric_median", "norm_clip"])
def test_whoever_sent_what_cannot_be_taken_is_one_hostile_client_less(name: str) -> None:
    """Four attackers of ten that send NaN are refused before the fold; the six left are told to withstand none."""
    state, honest = _state(), _honest(6)
    method = _build(name, byzantine=3)
    acc = method.reduce.start(state)
    for update in honest:
        acc = method.reduce.add(acc, update)
    with pytest.raises(ValueError, match="needs"):
        method.reduce.finish(state, acc, torch.Generator())
    for _ in range(4):
        acc = method.reduce.refused(acc)
    made = method.reduce.finish(state, acc, torch.Generator())
    expected = _reduce(_build(name, byzantine=0), state, honest)
    assert digest(made.adapter) == digest(expected.adapter)
