"""What the client's half of every registered method must do; a new one is picked up by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from apiary.core.lora import Factors, gate_name, is_b, join, scaling, split, ungated
from apiary.core.messages import ClientInfo, Payload
from apiary.core.tensors import StateDict, digest
from apiary.transport.codecs import CODECS
from strategies import AGGREGATORS, Aggregator, ServerState
from strategies.fedsa import with_own_b
from strategies.local import NOTHING, PLAIN, Client, Hooks, LocalAlgorithm, Opened

RANK = 8
SCALE = scaling(16.0, "rslora")
MODULES = {"layers.0.q_proj": (8, 6), "layers.1.v_proj": (5, 7)}
LR_SUM = 0.25


def factors(seed: int, rank: int = RANK) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return join(
        {
            m: Factors(torch.randn(o, rank, generator=rng), torch.randn(rank, i, generator=rng))
            for m, (o, i) in MODULES.items()
        }
    )


GATES = {gate_name(m): torch.full((1, i), 0.5) for m, (_, i) in MODULES.items()}


def shapes_of(case: Case) -> dict[str, torch.Size]:
    """Of what a visit trains: the whole adapter, and gates where the method has them."""
    gates = {name: tensor.shape for name, tensor in GATES.items()} if case.local.mixes else {}
    return {**case.client.shapes, **gates}


START = {name: torch.zeros_like(t) if is_b(name) else t for name, t in factors(7).items()}


def build(name: str, **options: Any) -> Aggregator:
    options |= {"byzantine": 1} if name in ("krum", "multi_krum", "trimmed_mean", "bulyan") else {}
    return AGGREGATORS.build(name, options, scaling=SCALE, seed=11, weighting="tokens", alike=True)


# Every registered method as it comes, and those whose options or wrapper give clients another half.
METHODS: Mapping[str, Callable[[], Aggregator]] = {
    **{name: (lambda name=name: build(name)) for name in AGGREGATORS},
    "hetlora, pruning": lambda: build("hetlora", prune=0.5, penalty=0.1),
    "fedsa": lambda: with_own_b(build("fedavg")),
}
WITH_STATE = {"scaffold": "control", "fedsa": "personal", "ditto": "own", "fedalt": "individual"}
NOT_PLAIN = {"scaffold", "fedsa", "fedkseed", "hetlora, pruning", "ditto", "clustered", "fedalt"}


class Case(NamedTuple):
    """A method, and what its server sends to a client of rank `rank` after some rounds."""

    name: str
    method: Aggregator
    payload: Payload
    client: Client
    state: StateDict  # that the client kept of an earlier round
    delta: dict[str, Tensor]  # what a visit made of it

    @property
    def local(self) -> LocalAlgorithm:
        return self.method.local

    def opened(self) -> Opened:
        return self.local.open(self.state, self.payload, self.client)

    def own(self) -> Opened | None:
        return self.local.own(self.state, self.payload, self.client) if self.local.own else None


def case_of(name: str, rank: int = RANK, state: StateDict | None = None) -> Case:
    method = METHODS[name]()
    server = {n: t for n, t in factors(1).items() if method.local.shares(n)}
    memory = {f"control.{n}": t for n, t in factors(2).items()} if name == "scaffold" else {}
    payload = method.payload(ServerState(3, server, {}, memory), ClientInfo("c", rank, 2, 4))
    kept = {n: t for n, t in factors(3).items() if name != "fedsa" or is_b(n)} if name in WITH_STATE else {}
    shapes = {n: t.shape for n, t in factors(0, rank).items()}
    client = Client(rank, shapes, fresh=lambda: {n: t.clone() for n, t in START.items()})
    # A change that shrinks every tail, so that a client that may prune does.
    delta = {n: -0.5 * t if method.local.shares(n) else factors(5)[n] for n, t in payload.adapter.items()}
    whole = {n: delta.get(n, 0.1 * t) for n, t in factors(4, rank).items()}
    whole |= GATES if method.local.mixes else {}
    made = delta if method.scalars else whole
    return Case(name, method, payload._replace(last_round=2), client, kept if state is None else state, made)


@pytest.fixture(params=list(METHODS))
def case(request: pytest.FixtureRequest) -> Case:
    return case_of(request.param)


def bits(*states: StateDict) -> list[str]:
    return [digest(state) for state in states]


def copied(state: StateDict) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def hooks_said(hooks: Hooks) -> list[Any]:
    """What hooks do, as far as it can be seen from outside without a model."""
    live = factors(9)
    steps = [(lambda adapter: float(sum(t.square().sum() for t in adapter.values())), 1e-4)] * 5
    made = hooks.descend(iter(steps), START, torch.Generator().manual_seed(4)) if hooks.descend else None
    return [
        [float(penalty(live)) for penalty in hooks.penalties],
        digest(hooks.correction),
        [digest(project(live)) for project in hooks.projections],
        made and (digest(made.delta), made.skipped),
    ]


def test_a_visit_begins_with_a_whole_adapter_of_the_clients_rank(case: Case) -> None:
    adapter = case.opened().adapter
    assert {name: tensor.shape for name, tensor in adapter.items()} == shapes_of(case)
    assert all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in adapter.values())
    assert {f.rank for f in split(ungated(adapter)[0]).values()} == {RANK}
    if not (case.method.scalars or case.local.mixes):  # what was sent is in it as it was sent
        assert all(torch.equal(adapter[name], tensor) for name, tensor in case.payload.adapter.items())


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name]().ranks == "mixed"])
def test_a_client_of_a_lower_rank_opens_one_of_its_own(name: str) -> None:
    case = case_of(name, rank=4)
    assert case.local.rank(case.payload.adapter, RANK) <= RANK
    assert case.local.rank(case.payload.adapter, 4) == 4
    assert {n: t.shape for n, t in case.opened().adapter.items()} == dict(case.client.shapes)


def test_a_client_without_a_state_takes_part_all_the_same(case: Case) -> None:
    """In its first round, where the server counts on nothing of it."""
    first = case.payload._replace(last_round=0)
    opened = case.local.open({}, first, case.client)
    assert {name: tensor.shape for name, tensor in opened.adapter.items()} == shapes_of(case)
    if case.local.settle:
        assert case.local.settle({}, first, case.delta, LR_SUM)


def test_what_is_sent_has_only_what_travels(case: Case) -> None:
    sent, _ = case.local.finish(case.opened().adapter, case.delta)
    assert sent and all(map(case.local.shares, sent))
    assert list(map(case.local.shares, case.payload.adapter)) == [True] * len(case.payload.adapter)
    assert sent.keys() == case.payload.adapter.keys()
    if case.method.scalars:
        assert bits(sent) == bits(case.delta)
        return
    rank = case.local.rank({**case.delta, **sent}, RANK)
    assert rank == (RANK // 2 if case.method.prunes else RANK)
    assert all(tensor.shape[is_b(name)] == rank for name, tensor in sent.items())


def test_a_state_is_kept_only_where_it_has_a_name(case: Case) -> None:
    assert case.local.keeps == WITH_STATE.get(case.name, "")
    sent, kept = case.local.finish(case.opened().adapter, case.delta)
    settled = case.local.settle(case.state, case.payload, sent, LR_SUM) if case.local.settle else NOTHING
    own = case.own()
    assert bool(kept or settled or own) == bool(case.local.keeps)
    assert not (own and (kept or settled)) and not kept.keys() & settled.keys()  # there is one file a round
    if case.local.settle:
        assert case.local.keeps and case.payload.extra  # else the worker does not settle
    # What was kept is what the next visit opens with.
    again = case.local.open({**kept, **settled}, case.payload, case.client)
    assert {name: tensor.shape for name, tensor in again.adapter.items()} == shapes_of(case)


def test_a_state_makes_a_difference_to_the_next_visit() -> None:
    for name in WITH_STATE:
        case = case_of(name)
        other = case._replace(state={n: t + 1 for n, t in case.state.items()})
        one, two = (each.own() or each.opened() for each in (case, other))
        assert (digest(one.adapter), digest(one.hooks.correction)) != (
            digest(two.adapter),
            digest(two.hooks.correction),
        ), name


def test_inputs_are_never_changed(case: Case) -> None:
    given = (case.state, case.payload.adapter, case.payload.base_delta, case.payload.extra, case.delta, START)
    before = bits(*given)
    opened = case.opened()
    start = copied(opened.adapter)
    hooks_said(opened.hooks)
    case.local.finish(opened.adapter, case.delta)
    if case.local.settle:
        case.local.settle(case.state, case.payload, case.delta, LR_SUM)
    assert bits(*given) == before
    assert bits(opened.adapter) == bits(start)


def test_the_same_inputs_give_the_same_bits(case: Case) -> None:
    """Whatever the method was asked in between, and in a process that builds it anew."""
    opened = case.opened()
    first = (bits(opened.adapter), hooks_said(opened.hooks), bits(*case.local.finish(opened.adapter, case.delta)))
    elsewhere = {n: t + 1 for n, t in case.delta.items()}
    case.local.finish(copied(opened.adapter), elsewhere)
    for other in (case, case_of(case.name)):
        again = other.opened()
        said = (bits(again.adapter), hooks_said(again.hooks), bits(*other.local.finish(again.adapter, other.delta)))
        assert said == first
    if case.local.settle:
        one, two = (case.local.settle(case.state, case.payload, case.delta, LR_SUM) for _ in range(2))
        assert bits(one) == bits(two)


def test_methods_without_a_half_of_their_own_train_from_what_was_sent_and_send_the_change(case: Case) -> None:
    assert (case.local is PLAIN) == (case.name not in NOT_PLAIN)
    if case.local is not PLAIN:
        return
    opened = case.opened()
    assert opened == Opened(case.payload.adapter, Hooks()) and opened.adapter is case.payload.adapter
    sent, kept = case.local.finish(opened.adapter, case.delta)
    assert sent is case.delta and not kept
    assert case.local.rank(case.payload.adapter, 5) == 5


def test_what_a_half_says_of_itself_is_so(case: Case) -> None:
    hooks = case.opened().hooks
    assert (hooks.descend is not None) == case.local.gradient_free == bool(case.method.scalars)
    assert case.local.codec in CODECS and (case.local.codec != "fp32") == case.local.gradient_free
    assert bool(hooks.correction) == case.method.extra == case.local.by_rates
    assert bool(case.payload.extra) == (case.method.extra or case.local.mixes)
    assert set(hooks.correction) <= set(case.client.shapes)
    half = case.local.halves(case.client.shapes)
    assert half == (not all(map(case.local.shares, case.client.shapes)))
    assert bool(case.local.personal) == bool(half or case.local.own or case.method.group or case.local.mixes)
    assert (case.opened().base_delta is not None) == case.local.mixes
    assert not case.local.personal.endswith(".")  # a sentence goes on with it
    assert (case.local.own is None) == (case.local.own_share == 0.0) and 0.0 <= case.local.own_share < 1.0
    assert not hooks.penalties or case.method.prunes
    if hooks.descend:
        steps = [(lambda adapter: 1.0, 0.1), (lambda adapter: float("nan"), 0.1)]
        made = hooks.descend(iter(steps), START, torch.Generator().manual_seed(0))
        assert made.delta.keys() == case.payload.adapter.keys() and made.skipped == 1


def test_who_is_only_measured_is_sent_nothing_extra_and_opens_the_same_adapter(case: Case) -> None:
    if case.local.mixes:
        pytest.skip("its clients take themselves out of what they are sent, and get the number for it with it")
    measured = case.local.open(case.state, case.payload._replace(extra=NOTHING), case.client)
    assert bits(measured.adapter) == bits(case.opened().adapter)
    assert not measured.hooks.correction


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name]().local.own])
def test_an_own_adapter_is_whole_and_begins_where_the_client_left_it(name: str) -> None:
    """At first at the one that it is sent; whoever is only measured opens the same."""
    case = case_of(name)
    assert case.local.own is not None
    opened = case.own()
    assert opened is not None and bits(opened.adapter) == bits(case.state)
    first = case.local.own({}, case.payload._replace(last_round=0), case.client)
    assert bits(first.adapter) == bits(case.payload.adapter)
    measured = case.local.own(case.state, case.payload._replace(extra=NOTHING), case.client)
    assert bits(measured.adapter) == bits(opened.adapter)
    for one in (opened, first):
        assert {n: t.shape for n, t in one.adapter.items()} == dict(case.client.shapes)
        assert not one.hooks.descend  # the trainer makes its steps


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name]().local.own])
def test_what_is_sent_does_not_depend_on_the_own_adapter(name: str) -> None:
    case = case_of(name)
    other = case._replace(state={n: t + 1 for n, t in case.state.items()})
    one, two = case.opened(), other.opened()
    assert bits(one.adapter) == bits(two.adapter) and hooks_said(one.hooks) == hooks_said(two.hooks)
    own, again = case.own(), case.own()
    assert own and again and hooks_said(own.hooks) == hooks_said(again.hooks)
    before = bits(case.state, case.payload.adapter)
    hooks_said(own.hooks)
    assert bits(case.state, case.payload.adapter) == before
    sent, kept = case.local.finish(one.adapter, case.delta)
    assert not kept and case.local.settle is None and sent.keys() == case.payload.adapter.keys()
