"""A tree in a simulation: relays add up the answers of their clients, and the server adds up the relays' sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import strategies
from apiary.config import loading
from apiary.core.errors import UserError
from apiary.core.tensors import digest
from apiary.tracking.event_log import read_events
from deploy import run_checks
from server import aggregation
from simulation.run import simulate

_LEAN = ["evaluate.baselines=['base']", "evaluate.generate=false", "data.clients=5", "rounds=2", "train.threads=1"]


def _run(folder: Path, overrides: list[str]) -> tuple[str, list[dict[str, Any]]]:
    simulate(loading.load(None, overrides), folder)
    rounds = [event for event in read_events(folder) if event["event"] == "round"]
    return digest(load_file(folder / "adapter" / "adapter_model.safetensors"), 64), rounds


@pytest.mark.parametrize(
    "method",
    [
        ["strategy.name=fedavg"],
        ["strategy.name=fedavg", "adapter.share=a"],
        ["strategy.name=scaffold", "train.optimizer=sgd", "train.lr=0.1"],
        ["strategy.name=rank_slices", "adapter.ranks=[2, 4]"],
        ["strategy.name=ditto"],
    ],
    ids=" ".join,
)
def test_a_tree_gives_the_same_model_to_the_bit(method: list[str], small_run: list[str], tmp_path: Path) -> None:
    runs_ = [_run(tmp_path / str(n), [*small_run, *_LEAN, *method, f"simulate.relays={n}"]) for n in (0, 2, 7)]
    assert len({adapter for adapter, _ in runs_}) == 1
    told = [[(event["clients"], event["bytes_up"], event["tokens"]) for event in rounds] for _, rounds in runs_]
    assert told[0][0][0] == 5 and told[1] == told[0] and told[2] == told[0]
    for _, rounds in runs_[1:]:
        for event, one in zip(rounds, runs_[0][1], strict=True):
            assert event.keys() == one.keys()
            gauges = [(event["gauge"][name], value) for name, value in one.get("gauge", {}).items()]
            assert all(ours == pytest.approx(theirs, abs=2e-5) for ours, theirs in gauges)


def test_each_relay_holds_the_sum_of_its_own_clients(
    small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is merged are sums of two and three clients, and not one sum of all beside empty ones."""
    seen: list[int] = []
    whole = aggregation.merged

    def merged(one: aggregation.Folded, other: aggregation.Folded, terms: aggregation.Terms) -> aggregation.Folded:
        seen.extend([len(one.reports), len(other.reports)])
        return whole(one, other, terms)

    monkeypatch.setattr(aggregation, "merged", merged)
    _run(tmp_path / "run", [*small_run, *_LEAN, "simulate.relays=2"])
    assert seen == [3, 2] * 2


def test_clients_that_fail_do_not_stop_a_tree(small_run: list[str], tmp_path: Path) -> None:
    more = ["simulate.failing=0.4", "strategy.quorum=0.2"]
    runs_ = [_run(tmp_path / str(n), [*small_run, *_LEAN, *more, f"simulate.relays={n}"]) for n in (0, 3)]
    assert runs_[0][0] == runs_[1][0] and runs_[1][1][0]["clients"] == 3


def test_what_must_see_each_update_and_what_is_no_simulation_is_refused(small_run: list[str]) -> None:
    config = loading.load(None, [*small_run, "strategy.name=median", "simulate.relays=2"])
    with pytest.raises(UserError, match=r"simulate\.relays = 2: .* 'median' must see each client's update; set 0"):
        strategies.from_config(config)
    with pytest.raises(UserError, match=r"simulate\.relays: sites send their answers to the server itself"):
        run_checks.check(loading.load(None, [*small_run, "simulate.relays=2", "data.test=builtin:skills"]))
