"""Every combination that concerns the server's arithmetic is either refused with a reason, or makes sound rounds."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import strategies
from apiary.config import defaults, loading
from apiary.config.schema import RunConfig
from apiary.core import lora
from apiary.core.errors import UserError
from apiary.core.messages import ClientInfo, Update
from strategies import AGGREGATORS, Aggregator, Gradient, ServerState, seed_scalars
from strategies.aggregator import ROOT
from strategies.server_optimizers import SERVER_OPTIMIZERS

OPTIONS = {
    **{name: ["strategy.options.byzantine=1"] for name in ("krum", "multi_krum", "trimmed_mean", "bulyan")},
    "fltrust": ["strategy.root=rows.jsonl"],
    "scaffold": ["train.optimizer=sgd"],
    "fedkseed": ["strategy.options.candidates=8"],
}
MODULES = {"m.q": (9, 7), "m.v": (5, 8)}
TRAINED = ("both", "b", "alternate")
CLIENTS = 7


def _start(rank: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return lora.join(
        {
            module: lora.Factors(torch.randn(d_out, rank, generator=rng), torch.randn(rank, d_in, generator=rng))
            for module, (d_out, d_in) in MODULES.items()
        }
    )


def _update(run: RunConfig, method: Aggregator, state: ServerState, number: int, i: int) -> Update:
    """What a client of the run might answer to what the method sends it."""
    ranks = run.adapter.ranks or (run.adapter.rank,)
    rank = int(ranks[i % len(ranks)])
    sent = method.payload(state, ClientInfo(f"c{i}", rank, number - 1, CLIENTS))
    rng = torch.Generator().manual_seed(100 * number + i)
    moving = run.adapter.trained(number)
    delta = {}
    for name, tensor in sent.adapter.items():
        if name == seed_scalars.NAME:
            delta[name] = torch.tensor([seed_scalars.on_grid(0.01 * i * k) for k in range(len(tensor))])
        elif moving == "both" or lora.is_b(name) == (moving == "b"):
            delta[name] = 0.01 * torch.randn(tensor.shape, generator=rng)
        else:
            delta[name] = torch.zeros_like(tensor)
    return Update(f"c{i}", delta, 10.0 + i, rank)


@pytest.mark.parametrize("ranks", ["[]", "[2, 4]"])
@pytest.mark.parametrize("name", list(AGGREGATORS))
def test_allowed_or_refused(name: str, ranks: str) -> None:
    allowed = 0
    for train, optimizer in itertools.product(TRAINED, SERVER_OPTIMIZERS):
        settings = [f"strategy.name={name}", f"adapter.train={train}", f'strategy.server_optimizer="{optimizer}"']
        settings += ["adapter.rank=4", f"adapter.ranks={ranks}", f"strategy.min_clients={CLIENTS}"]
        try:
            run = loading.load(None, [*settings, *OPTIONS.get(name, [])])
            method = strategies.from_config(run)
        except UserError:
            continue
        allowed += 1
        state = ServerState(0, _start(4), {}, {})
        for number in (1, 2, 3):
            before, acc = state, method.reduce.start(state)
            for i in range(CLIENTS):
                acc = method.reduce.add(acc, _update(run, method, state, number, i))
            if method.root:
                own = _update(run, method, state, number, 1)  # client 1 has the full rank
                acc = method.reduce.add(acc, own._replace(client=ROOT))
            state = method.step(state, method.reduce.finish(state, acc, torch.Generator().manual_seed(number)))
            assert state.round == number
            assert {n: t.shape for n, t in state.adapter.items()} == {n: t.shape for n, t in before.adapter.items()}
            assert all(bool(t.isfinite().all()) for part in (state.adapter, state.base_delta) for t in part.values())
            moving = run.adapter.trained(number)
            for tensor in state.adapter:
                if moving != "both" and lora.is_b(tensor) != (moving == "b") and not method.renews:
                    assert torch.equal(state.adapter[tensor], before.adapter[tensor]), (train, optimizer, tensor)
        assert any(not torch.equal(state.adapter[n], t) for n, t in _start(4).items())
    assert allowed or ranks != "[]"


def test_weights_of_the_clients_are_refused_where_a_method_has_its_own() -> None:
    for name in ("krum", "median", "scaffold", "hetlora"):
        settings = [f"strategy.name={name}", "strategy.weighting=uniform", *OPTIONS.get(name, [])]
        with pytest.raises(UserError, match=rf"strategy\.weighting = 'uniform': strategy\.name = '{name}' has its own"):
            strategies.from_config(loading.load(None, [*settings, f"strategy.min_clients={CLIENTS}"]))
    for name in ("fedavg", "flora", "flexlora"):
        strategies.from_config(loading.load(None, [f"strategy.name={name}", "strategy.weighting=uniform"]))


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ([], "nesterov"),
        (["strategy.weighting=uniform", "wire.up=int8", "simulate.attackers=0.2"], "nesterov"),
        (["strategy.name=fedex"], "none"),  # what it adds to the base fits a step of size 1
        (["strategy.name=flora"], "none"),  # another basis in every round
        (["strategy.name=median"], "none"),  # not the mean
        (["strategy.name=scaffold", "train.optimizer=sgd"], "none"),
        (["strategy.name=ditto"], "none"),
        (["adapter.share=a"], "none"),
        (["adapter.train=b"], "none"),
        (["privacy.unit=record"], "none"),
        (['continual.stages=[["sort"], ["count"]]'], "none"),
        (["strategy.server_optimizer=adam"], "adam"),
    ],
)
def test_what_the_server_optimizer_comes_to_stands_in_the_configuration(more: list[str], name: str) -> None:
    config = loading.load(None, more)
    found = defaults.resolved(config)
    assert found.strategy.server_optimizer.name == name
    assert defaults.resolved(found) == found
    assert found == config.model_copy(update={"strategy": found.strategy})  # nothing else was touched


def test_the_default_momentum_is_that_of_its_formula() -> None:
    """u = 0.5 u + D, x += 0.7 (D + 0.5 u), from the configuration as it comes to the server: two rounds of D = 1."""
    method, one = strategies.from_config(loading.load(None, [])), {"m.lora_A.weight": torch.ones(2, 3)}
    state = ServerState(0, {"m.lora_A.weight": torch.zeros(2, 3)}, {}, {})
    for expected in (0.7 * 1.5, 0.7 * 1.5 + 0.7 * (1 + 0.5 * 1.5)):
        state = method.step(state, Gradient(one))
        torch.testing.assert_close(state.adapter["m.lora_A.weight"], torch.full((2, 3), expected))
