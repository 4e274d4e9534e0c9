"""FedKSeed in whole runs: what travels, what it stands for, and that it learns without a gradient."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from apiary.config import loading
from apiary.config.schedule import learning_rate
from apiary.core.errors import RunFailed, UserError, WireError
from apiary.core.messages import ClientInfo, Payload, Update, Visit
from apiary.core.tensors import digest
from apiary.data.examples import read
from apiary.models import adapters
from client.site import Site
from client.training import zeroth_order
from client.worker import Worker, open_received
from server import checkpoint
from server.validation import check_delta, check_visit
from simulation.run import check_names, simulate
from strategies import AGGREGATORS, ServerState, seed_scalars
from strategies.from_config import local_from_config

SEEDED = ["strategy.name=fedkseed", "train.lr=1e-3", "train.schedule=constant", "train.warmup=0", "train.steps=20"]
QUIET = ["evaluate.baselines=[]", "evaluate.generate=false", "evaluate.clients=false"]


def events_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if e["event"] == kind]


@pytest.mark.slow
def test_a_run_learns_while_scalars_alone_travel(tmp_path: Path, small_run: list[str]) -> None:
    run = loading.load(None, [*small_run, *SEEDED, *QUIET, "rounds=4", "adapter.rank=2"])
    simulate(run, tmp_path / "run")
    losses = [event["loss"] for event in events_of(tmp_path / "run", "evaluate")]
    assert losses[-1] < losses[0] - 0.1
    for event in events_of(tmp_path / "run", "round"):
        assert (event["bytes_up"] + event["bytes_down"]) / event["asked"] < 18_000
    assert events_of(tmp_path / "run", "round")[0]["bytes_up"] / 3 < 300  # at most 20 scalars and their places

    # What the server exports is the start and the scalars of its last checkpoint, to the bit.
    found = checkpoint.load(tmp_path / "run" / "checkpoints")
    assert found is not None
    seeds = seed_scalars.candidates(run.seed)
    scalars = seed_scalars.of_tensor(found[0].memory[seed_scalars.NAME], seeds)
    assert 20 < len(scalars) <= 4 * 3 * 20
    start = adapters.fresh_adapter(adapters.load(run.model, run.adapter), run.seed)
    assert digest(seed_scalars.rebuild(start, scalars)) == digest(found[0].adapter)
    exported = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert len(exported) == len(start)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path, small_run: list[str]) -> None:
    run = loading.load(None, [*small_run, *SEEDED, *QUIET, "train.steps=3"])
    simulate(run, tmp_path / "whole")

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "round" and event["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, RunFailed)):
        simulate(run, tmp_path / "cut", observers=[stop])
    simulate(run, tmp_path / "cut", resume=True)
    ends = [checkpoint.load(tmp_path / name / "checkpoints") for name in ("whole", "cut")]
    assert ends[0] and ends[1]
    assert digest(ends[0][0].adapter) == digest(ends[1][0].adapter)


def test_what_a_client_rebuilds_is_the_servers_adapter(small_run: list[str]) -> None:
    run = loading.load(None, [*small_run, *SEEDED])
    lm = adapters.load(run.model, run.adapter)
    seeds = seed_scalars.candidates(run.seed)
    scalars = {seed: seed_scalars.on_grid(1e-3 * (i + 1)) for i, seed in enumerate(seeds[:5])}
    sent = Payload({seed_scalars.NAME: seed_scalars.to_tensor(scalars, seeds)}, {})
    opened = open_received(lm, run, local_from_config(run), {}, sent)
    assert digest(opened.adapter) == digest(seed_scalars.rebuild(adapters.fresh_adapter(lm, run.seed), scalars))


def test_the_server_averages_scalars_in_any_order_and_rebuilds_from_the_start() -> None:
    method = AGGREGATORS.build("fedkseed", {"candidates": 6}, seed=3)
    seeds, start = seed_scalars.candidates(3, 6), {"x": torch.linspace(-1, 1, 50)}
    told = [[0.5, 0, 0, -1.0, 0, 0], [0, 0.25, 0, 1.0, 0, 0], [0, 0, 0, 0, 0, 2.0]]
    updates = [
        Update(f"c{i}", {seed_scalars.NAME: torch.tensor(row)}, w, 4)
        for i, (row, w) in enumerate(zip(told, (1.0, 2.0, 1.0), strict=True))
    ]

    def after(order: list[int], rounds: int = 2) -> ServerState:
        state = ServerState(0, start, {}, {})
        for _ in range(rounds):
            acc = method.reduce.start(state)
            for i in order:
                acc = method.reduce.add(acc, updates[i])
            state = method.step(state, method.reduce.finish(state, acc, torch.Generator()))
        return state

    # Twice (1/4, 2/4, 1/4) of the three.
    expected = dict(zip(seeds, [0.25, 0.25, 0.0, 0.5, 0.0, 1.0], strict=True))
    state = after([0, 1, 2])
    assert digest(state.adapter) == digest(seed_scalars.rebuild(start, expected)) == digest(after([2, 0, 1]).adapter)
    acc = method.reduce.start(state)
    for update in updates:
        acc = method.reduce.add(acc, update)
        assert sum(part.numel() for part in acc[:2]) == 2 * 6  # a sum, and what it rounds away
    assert method.payload(state, ClientInfo("c0", 4, 2)).adapter[seed_scalars.NAME].tolist() == list(expected.values())
    assert (
        method.payload(ServerState(0, start, {}, {}), ClientInfo("c0", 4, 0)).adapter[seed_scalars.NAME].tolist()
        == [0.0] * 6
    )


@pytest.mark.parametrize("wrong", [1e-13, 1e5])
def test_scalars_that_cannot_be_cost_their_client(wrong: float) -> None:
    held = {seed_scalars.NAME: torch.zeros(4)}
    with pytest.raises(WireError, match="its scalars cannot be taken"):
        check_delta({seed_scalars.NAME: torch.tensor([0.0, wrong, 0.0, 0.0])}, held)
    check_delta({seed_scalars.NAME: torch.tensor([0.0, 2.0**-20, 0.0, 0.0])}, held)
    full = {seed_scalars.NAME: torch.tensor([1500.0, 0.0, 0.0, 0.0])}
    with pytest.raises(WireError, match="too much"):  # else the sum would be too large for the run one day
        check_delta({seed_scalars.NAME: torch.tensor([0.0, 600.0, 0.0, 0.0])}, full)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("privacy.unit=record", "no gradients"),
        ('train.penalties=[{ name = "fedprox", mu = 0.1 }]', "train.penalties"),
        ("wire.up=int8", "wire.up"),
        ("adapter.train=b", "adapter.train"),
        ("simulate.attackers=0.2", "attacks change factors"),
        ("adapter.ranks=[2, 4]", "adapter.ranks"),
        ('strategy.server_optimizer="adam"', "scalars of seeds"),
    ],
)
def test_what_does_not_go_with_it_is_refused(override: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        check_names(loading.load(None, [*SEEDED, "adapter.rank=4", override]))


def test_an_answer_is_a_visit_with_scalars_of_the_steps_made(tmp_path: Path, small_run: list[str]) -> None:
    """Asked again, a client says the same."""
    run = loading.load(None, [*small_run, *SEEDED, "train.steps=5"])
    rows = read(run.data.source).examples
    site = Site("a", rows[:30], rows[30:40], tmp_path / "run", tmp_path / "ledger.json", 4)
    worker = Worker(run)
    sent = Payload({seed_scalars.NAME: torch.zeros(seed_scalars.CANDIDATES)}, {})
    first, again = (worker.train(site, 1, sent) for _ in range(2))
    assert isinstance(first, Visit)
    assert isinstance(again, Visit)
    told = first.update.delta[seed_scalars.NAME]
    assert 1 <= int((told != 0).sum()) <= 5
    assert digest(first.update.delta) == digest(again.update.delta)
    assert first.report.steps == 5
    assert first.report.loss > 0


def _visits(tmp_path: Path, small_run: list[str], *more: str, clients: tuple[str, ...] = ("a",)) -> list[Visit]:
    run = loading.load(None, [*small_run, *SEEDED, "train.steps=5", *more])
    rows = read(run.data.source).examples
    worker, made = Worker(run), []
    for name in clients:
        site = Site(name, rows[:30], rows[30:40], tmp_path / name / "run", tmp_path / name / "ledger.json", 4)
        for number in (1, 2, 3):
            visit = worker.train(site, number, Payload({seed_scalars.NAME: torch.zeros(seed_scalars.CANDIDATES)}, {}))
            assert isinstance(visit, Visit)
            made.append(visit)
    return made


def test_the_step_size_falls_over_the_visits_of_a_run(tmp_path: Path, small_run: list[str]) -> None:
    """Each visit's own steps, told to its folder, stand at their place in the whole run's schedule."""
    _visits(tmp_path, small_run, "train.schedule=cosine")
    told = [json.loads(line) for line in (tmp_path / "a" / "run" / "steps.jsonl").read_text().splitlines()]
    train = loading.load(None, [*SEEDED, "train.schedule=cosine"]).train
    assert [step["lr"] for step in told] == pytest.approx([learning_rate(i, 15, train) for i in range(15)])
    assert told[0]["lr"] > 2 * told[-1]["lr"]


def test_clients_draw_directions_of_their_own(tmp_path: Path, small_run: list[str]) -> None:
    one, other = (
        {int(i) for i in visit.update.delta[seed_scalars.NAME].nonzero()}
        for visit in _visits(tmp_path, small_run, clients=("a", "b"))[::3]
    )
    assert one != other


def test_steps_that_are_far_too_long_are_told_as_such(tmp_path: Path, small_run: list[str]) -> None:
    with pytest.raises(FloatingPointError, match="lower the lr"):
        _visits(tmp_path, small_run, "train.lr=1e6")


def test_a_step_without_a_number_costs_the_step_and_not_the_visit(
    tmp_path: Path, small_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, looks = zeroth_order._Measure.__call__, iter(range(1000))

    def odd(self: Any, *given: Any) -> float:
        loss = plain(self, *given)
        if next(looks) == 2:  # ahead, in the second step
            self.seen[-1] = loss = float("nan")
        return loss

    monkeypatch.setattr(zeroth_order._Measure, "__call__", odd)
    visit = _visits(tmp_path, small_run)[0]
    assert 1 <= int((visit.update.delta[seed_scalars.NAME] != 0).sum()) <= 4
    assert visit.report.loss == pytest.approx(visit.report.loss) and visit.report.loss > 0
    run = loading.load(None, [*small_run, *SEEDED, "train.steps=5"])
    check_visit(visit, run, 30, Payload({seed_scalars.NAME: torch.zeros(seed_scalars.CANDIDATES)}, {}), 1)
