"""HetLoRA's clients that lower their own rank: what they cut, what they pay for it, and what the server makes of it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import strategies
from apiary.config import loading
from apiary.config.schema import RunConfig
from apiary.core import lora
from apiary.core.errors import UserError
from apiary.core.lora import Factors
from apiary.core.messages import Payload
from apiary.core.tensors import StateDict, add, digest
from apiary.tracking.event_log import read_events
from simulation.run import simulate
from strategies import hetlora
from strategies.aggregator import of_rank
from strategies.local import Client, Hooks, LocalAlgorithm, Opened, Penalty

ALPHA = 16.0
PRUNE = ["strategy.name=hetlora", "strategy.options.prune=0.5"]
MODULES = {"m.q": (9, 7), "m.v": (5, 8)}


def setting(*more: str) -> RunConfig:
    return loading.load(None, ["adapter.rank=8", f"adapter.alpha={ALPHA}", *PRUNE, *more])


def factors(rank: int, seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return lora.join(
        {
            m: Factors(torch.randn(o, rank, generator=rng), torch.randn(rank, i, generator=rng))
            for m, (o, i) in MODULES.items()
        }
    )


def tail_of(adapter: StateDict, rank: int) -> float:
    """The paper's norms, in numpy: of the columns of B and the rows of A that a client would cut."""
    split = {m: (f.b.double().numpy(), f.a.double().numpy()) for m, f in lora.split(adapter).items()}
    return sum(float(np.linalg.norm(b[:, rank:]) * np.linalg.norm(a[rank:])) for b, a in split.values())


def product(adapter: StateDict, rank: int, scale: float) -> dict[str, NDArray[np.float64]]:
    """s B A of the leading slices."""
    return {
        m: scale * f.b.double().numpy()[:, :rank] @ f.a.double().numpy()[:rank] for m, f in lora.split(adapter).items()
    }


def local_of(run: RunConfig) -> LocalAlgorithm:
    return strategies.from_config(run).local


def penalties(run: RunConfig, rank: int) -> tuple[Penalty, ...]:
    """What a client of this rank adds to its loss."""
    received = factors(rank, 2)
    shapes = {name: tensor.shape for name, tensor in received.items()}
    opened = local_of(run).open({}, Payload(received, {}), Client(rank, shapes, dict))
    assert opened == Opened(received, Hooks(penalties=opened.hooks.penalties))
    return opened.hooks.penalties


@pytest.mark.parametrize(
    ("rank", "gamma", "left"), [(16, 0.99, 15), (16, 0.5, 8), (5, 0.5, 2), (2, 0.99, 1), (1, 0.5, 1)]
)
def test_the_tail_begins_at_the_floor_of_gamma_r(rank: int, gamma: float, left: int) -> None:
    assert hetlora.kept_rank(rank, gamma) == left


@pytest.mark.parametrize("kind", ["rslora", "lora"])
def test_a_smaller_tail_is_cut_and_the_rest_keeps_its_product(kind: str) -> None:
    """What the server then holds for the client, the leading slices at their own scale, plus the change sent."""

    def scale(rank: int) -> float:
        return ALPHA / (math.sqrt(rank) if kind == "rslora" else rank)

    run, server = setting(f"adapter.scaling={kind}"), factors(16, 0)
    start = of_rank(server, 8, scale)
    shrunk = {m: Factors(-0.3 * f.b, torch.zeros_like(f.a)) for m, f in lora.split(start).items()}
    moved = add(lora.join(shrunk), {name: 0.01 * tensor for name, tensor in factors(8, 1).items()})
    assert tail_of(add(start, moved), 4) < tail_of(start, 4)
    sent, kept = local_of(run).finish(start, moved)
    assert not kept
    assert digest(sent) == digest(hetlora.pruned(start, moved, 0.5, scale))
    assert {f.rank for f in lora.split(sent).values()} == {4}
    got = product(add(of_rank(server, 4, scale), sent), 4, scale(4))
    for module, expected in product(add(start, moved), 4, scale(8)).items():
        np.testing.assert_allclose(got[module], expected, rtol=1e-5, atol=1e-6)


def test_a_larger_tail_stays() -> None:
    """Also where all else has become smaller."""
    start = factors(8, 0)
    moved = {}
    for module, f in lora.split(start).items():
        b = -0.5 * f.b
        b[:, 4:] = 0.1 * f.b[:, 4:]
        moved[module] = Factors(b, torch.zeros_like(f.a))
    delta = lora.join(moved)
    assert tail_of(add(start, delta), 4) > tail_of(start, 4)
    assert local_of(setting()).finish(start, delta)[0] is delta


def test_nobody_prunes_unless_told_to() -> None:
    plain = loading.load(None, ["strategy.name=hetlora"])
    start = factors(8, 0)
    delta = {name: -0.5 * tensor for name, tensor in start.items()}
    assert local_of(plain).finish(start, delta)[0] is delta
    assert local_of(setting()).finish(start, delta)[0] is not delta
    assert penalties(plain, 8) == ()
    assert penalties(setting(), 8) == ()  # pruning without a penalty
    assert penalties(setting("strategy.options.penalty=0.1"), 1) == ()  # nothing to cut


def test_the_penalty_is_the_papers() -> None:
    """Its value by numpy, its slope by differences: nothing but the tail feels it, and at B = 0 it is finite."""
    (penalty,) = penalties(setting("strategy.options.penalty=0.25"), 8)
    adapter = {name: tensor.double().requires_grad_() for name, tensor in factors(8, 0).items()}
    value = penalty(adapter)
    assert float(value.detach()) == pytest.approx(
        0.25 * tail_of({n: t.detach() for n, t in adapter.items()}, 4), rel=1e-6
    )
    value.backward()
    for module, f in lora.split(adapter).items():
        assert f.b.grad is not None and f.a.grad is not None
        assert not f.b.grad[:, :4].any() and not f.a.grad[:4].any(), module
        norms = float((f.a[4:].norm() / f.b[:, 4:].norm()).detach())
        torch.testing.assert_close(f.b.grad[:, 4:], 0.25 * norms * f.b[:, 4:].detach())
    fresh = {n: (torch.zeros_like(t) if lora.is_b(n) else t).requires_grad_() for n, t in factors(8, 0).items()}
    penalty(fresh).backward()
    assert all(bool(t.grad.isfinite().all()) for t in fresh.values() if t.grad is not None)


@pytest.mark.slow
def test_in_a_whole_run_ranks_fall_and_never_rise(small_run: list[str], tmp_path: Path) -> None:
    settings = [*small_run, *PRUNE, "strategy.options.penalty=3.0", "adapter.rank=8", "adapter.ranks=[2, 8, 8]"]
    settings += ["rounds=5", "evaluate.baselines=[]", "evaluate.generate=false"]
    metrics = simulate(loading.load(None, settings), tmp_path / "run")
    events = read_events(tmp_path / "run")
    assert not [event for event in events if event["event"] == "refused"]
    clients = [event for event in events if event["event"] == "client"]
    ranks = {name: [e["rank"] for e in clients if e["client"] == name] for name in {e["client"] for e in clients}}
    assert len(clients) == 15
    for name, had in ranks.items():
        assert had == sorted(had, reverse=True), name
        assert set(had) <= {1, 2, 4, 8}
    assert any(had[-1] < had[0] for had in ranks.values())
    sizes = {(e["client"], e["rank"]): e["bytes_up"] for e in clients}
    for (name, rank), size in sizes.items():
        assert all(size > other for (n, r), other in sizes.items() if n == name and r < rank)
    assert metrics["rounds"][-1]["loss"] < metrics["rounds"][0]["loss"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["privacy.unit=record", "privacy.epsilon=3"], "tells of its rows"),
        (["wire.up=int4"], "what a codec keeps for the next message"),
        (["wire.down=int8"], "what a codec keeps for the next message"),
        (["simulate.attackers=0.2"], "attackers keep their rank"),
        (["strategy.options.prune=0", "strategy.options.penalty=0.1"], "set prune"),
        (["strategy.options.prune=1.5"], "strategy.options.prune"),
    ],
)
def test_what_does_not_go_with_it(more: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        strategies.from_config(setting(*more))
