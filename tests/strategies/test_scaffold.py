"""SCAFFOLD against the paper's algorithm, against one client with everything, and through whole runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from killing import killed_before_checkpoint
from reference import scaffold as reference
from safetensors.torch import load_file

import strategies
from apiary.config import loading
from apiary.config.schedule import learning_rate
from apiary.config.schema import AdapterConfig, ModelConfig, TrainConfig
from apiary.core.errors import StateLost, UserError
from apiary.core.messages import ClientInfo, Payload, Update
from apiary.core.tensors import StateDict, zeros_like
from apiary.models import adapters
from apiary.tracking.event_log import read_events
from client import round_files
from client.site import Site
from client.training import trainer
from client.training.trainer import Cursor, VisitPlan
from client.worker import Worker
from server import checkpoint
from strategies import ServerState, scaffold
from strategies.local import Client, Hooks, Opened
from strategies.server_optimizers import SERVER_OPTIMIZERS, with_optimizer

SCAFFOLD = ["strategy.name=scaffold", "train.optimizer=sgd", "train.lr=0.1", "train.warmup=0"]
Floats = reference.Floats

# f_i(x) = h_i / 2 (x - m_i)^2, entry by entry: the joint optimum is sum h_i m_i / sum h_i.
CURVED = [np.array([1.0, 4.0, 0.5]), np.array([3.0, 0.5, 2.0]), np.array([0.5, 1.0, 1.0])]
CENTRES = [np.array([1.0, -2.0, 3.0]), np.array([-1.0, 2.0, 0.0]), np.array([4.0, 1.0, -2.0])]


def gradient(i: int, x: Floats) -> Floats:
    return CURVED[i] * (x - CENTRES[i])


GRADIENTS = [functools.partial(gradient, i) for i in range(3)]


def correction_of(state: StateDict, payload: Payload) -> StateDict:
    """The c - c_k that a visit adds to each step's gradient."""
    opened = scaffold.LOCAL.open(state, payload, Client(1, {}, dict))
    assert opened == Opened(payload.adapter, Hooks(correction=opened.hooks.correction))
    return opened.hooks.correction


class Ours:
    """Our server and our clients' memory around a bare gradient descent, without a language model."""

    def __init__(self, folder: Path, clients: int, global_rate: float = 1.0, alike: bool = False) -> None:
        method = strategies.AGGREGATORS.build("scaffold", alike=alike)
        optimizer = SERVER_OPTIMIZERS.build("plain", {"lr": global_rate})
        self.method, self.folder, self.clients = with_optimizer(method, optimizer), folder, clients
        self.state = ServerState(0, {"x": torch.zeros(3)}, {}, {})
        self.last = [0] * clients

    def payload(self, i: int) -> Payload:
        made = self.method.payload(self.state, ClientInfo(f"c{i}", 1, self.last[i], self.clients))
        return made._replace(last_round=self.last[i])

    def visit(self, i: int, number: int, rates: Sequence[float]) -> Update:
        payload = self.payload(i)
        correction = correction_of(self.kept(i), payload)
        y = payload.adapter["x"].double()
        for rate in rates:
            y = y - rate * (torch.from_numpy(gradient(i, y.numpy())) + correction["x"])
        delta = {"x": (y - payload.adapter["x"]).float()}
        kept = scaffold.LOCAL.settle(self.kept(i), payload, delta, sum(rates))
        round_files.save(self.folder / f"c{i}", scaffold.LOCAL.keeps, number, kept, back={payload.last_round})
        return Update(f"c{i}", delta, 1.0 + i, 1, payload.extra, sum(rates))

    def round(self, cohort: Sequence[int], rates: Sequence[float], lost: Sequence[int] = ()) -> None:
        number = self.state.round + 1
        acc = self.method.reduce.start(self.state)
        for i in cohort:
            update = self.visit(i, number, rates)
            if i not in lost:
                acc = self.method.reduce.add(acc, update)
                self.last[i] = number
        self.state = self.method.step(self.state, self.method.reduce.finish(self.state, acc, torch.Generator()))

    def kept(self, i: int) -> dict[str, torch.Tensor]:
        """What the worker loads for a visit: the state of the last round that counted."""
        return round_files.load(self.folder / f"c{i}", scaffold.LOCAL.keeps, self.last[i])

    def own(self, i: int) -> Floats:
        """c_i, as the server knows it."""
        found = round_files.load(self.folder / f"c{i}", "control", self.last[i])
        return found["x"].double().numpy() if found else np.zeros(3)

    @property
    def x(self) -> Floats:
        return self.state.adapter["x"].double().numpy()


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("global_rate", [1.0, 0.5])
def test_it_is_the_papers_algorithm_with_clients_that_skip_rounds(
    tmp_path: Path, global_rate: float, alike: bool
) -> None:
    cohorts = [(0, 1), (1, 2), (0, 2), (2,), (0, 1, 2), (1,), (0, 2), (0, 1)]
    expected = reference.scaffold(GRADIENTS, np.zeros(3), cohorts, 5, 0.1, global_rate)
    ours = Ours(tmp_path, 3, global_rate, alike)
    for cohort, (x, c, own) in zip(cohorts, expected, strict=True):
        ours.round(cohort, [0.1] * 5)
        np.testing.assert_allclose(ours.x, x, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(ours.payload(0).extra["x"], c, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose([ours.own(i) for i in range(3)], own, rtol=1e-4, atol=1e-5)


def test_it_reaches_the_joint_optimum_where_averaging_is_biased(tmp_path: Path) -> None:
    both = GRADIENTS[:2]
    optimum = sum(h * m for h, m in zip(CURVED[:2], CENTRES[:2], strict=True)) / sum(CURVED[:2])
    ours = Ours(tmp_path, 2)
    for _ in range(80):
        ours.round((0, 1), [0.1] * 10)
    np.testing.assert_allclose(ours.x, optimum, atol=1e-4)
    biased = reference.fedavg(both, np.zeros(3), 80, 10, 0.1)
    assert np.abs(biased - optimum).max() > 0.3


def test_a_schedule_of_learning_rates_gives_the_mean_gradient_by_rate(tmp_path: Path) -> None:
    """c_k' = sum lr_t g_t / sum lr_t, which for one rate is option II."""
    ours, rates = Ours(tmp_path, 3), [0.2, 0.1, 0.05]
    ours.round((0, 1, 2), [0.1] * 4)
    correction = correction_of(ours.kept(1), ours.payload(1))["x"].double().numpy()
    y, seen = ours.x, []
    for rate in rates:
        seen.append(gradient(1, y))
        y = y - rate * (seen[-1] + correction)
    ours.round((1,), rates)
    np.testing.assert_allclose(ours.own(1), np.average(seen, axis=0, weights=rates), rtol=1e-5)


def test_clients_that_walk_differently_far_count_with_their_own_slopes(tmp_path: Path) -> None:
    """The mean control variate is that of what the clients keep, whoever made more steps, or longer ones."""
    ours = Ours(tmp_path, 3)
    for rates in ([0.1] * 4, [0.2, 0.1], [0.05]):
        number, acc = ours.state.round + 1, ours.method.reduce.start(ours.state)
        for i in range(3):
            acc = ours.method.reduce.add(acc, ours.visit(i, number, [rate * (i + 1) for rate in rates[: 2 + i]]))
            ours.last[i] = number
        ours.state = ours.method.step(ours.state, ours.method.reduce.finish(ours.state, acc, torch.Generator()))
        mean = np.mean([ours.own(i) for i in range(3)], axis=0)
        np.testing.assert_allclose(ours.payload(0).extra["x"], mean, rtol=1e-4, atol=1e-6)
    assert np.abs(mean).max() > 0.1
    uneven = Ours(tmp_path / "uneven", 2, alike=True)
    acc = uneven.method.reduce.add(uneven.method.reduce.start(uneven.state), uneven.visit(0, 1, [0.1]))
    with pytest.raises(ValueError, match="should walk alike"):
        uneven.method.reduce.add(acc, uneven.visit(1, 1, [0.2]))


def test_the_mean_stays_the_mean_when_an_answer_is_lost_and_a_client_joins(tmp_path: Path) -> None:
    ours = Ours(tmp_path, 2)
    ours.round((0, 1), [0.1] * 4)
    ours.round((0, 1), [0.1] * 4, lost=(1,))
    for _ in range(4):
        ours.round((0, 1), [0.1] * 4, lost=(0,))  # more often than files are kept
    ours.clients, ours.last = 3, [*ours.last, 0]
    ours.round((0, 1, 2), [0.1] * 4)
    mean = np.mean([ours.own(i) for i in range(3)], axis=0)
    np.testing.assert_allclose(ours.payload(2).extra["x"], mean, rtol=1e-4, atol=1e-6)


# -- in the trainer -----------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_the_correction_is_added_to_the_clipped_gradient_in_each_step(tiny_model: Path, clip: float) -> None:
    """Seen from outside: y of three steps by hand, and c_k' the mean of the gradients that were clipped."""
    adapter = AdapterConfig.model_validate({"rank": 4, "alpha": 6})
    lm = adapters.load(ModelConfig(name=str(tiny_model), dtype="float32", device="cpu"), adapter)
    start = small_models.random_state(adapters.get_adapter(lm))
    rng = torch.Generator().manual_seed(1)
    mean = {name: 0.05 * torch.randn(t.shape, generator=rng) for name, t in start.items()}
    settings = {"batch_tokens": 96, "lr": 0.3, "warmup": 0.0, "steps": 1, "optimizer": "sgd", "clip_norm": clip}
    train = TrainConfig.model_validate(settings)
    corpus = small_models.make_corpus(40)

    def fit(
        state: dict[str, torch.Tensor], cursor: Cursor, steps: int, config: TrainConfig = train, hooks: Hooks = Hooks()
    ) -> trainer.FitResult:
        plan = VisitPlan(5, "a", steps=steps, total_steps=3, cursor=cursor, hooks=hooks)
        return trainer.fit(lm, state, corpus, config, plan)

    rates = [learning_rate(step, 3, train) for step in range(3)]
    y, cursor, seen = dict(start), Cursor(), zeros_like(start)
    for rate in rates:
        plain = fit(y, cursor, 1, config=train.model_copy(update={"schedule": "constant"}))
        gradients = {name: -d / train.lr for name, d in plain.delta.items()}
        if clip:
            assert math.sqrt(sum(float(g.square().sum()) for g in gradients.values())) == pytest.approx(clip, rel=1e-2)
        y = {name: y[name] - rate * (gradients[name] + mean[name]) for name in y}
        seen = {name: seen[name] + rate * gradients[name] / sum(rates) for name in y}
        cursor = plain.cursor
    done = fit(start, Cursor(), 3, hooks=Hooks(correction=mean))
    for name in start:
        torch.testing.assert_close(start[name] + done.delta[name], y[name], rtol=1e-4, atol=1e-5)
    own = scaffold.LOCAL.settle({}, Payload(start, {}, extra=mean), done.delta, sum(rates))
    for name in start:
        torch.testing.assert_close(own[name], seen[name], rtol=1e-3, atol=1e-4)


# -- whole runs ---------------------------------------------------------------------------------


def run(folder: Path, overrides: Sequence[str], **keys: Any) -> dict[str, Any]:
    from simulation.run import simulate

    plain = ["evaluate.generate=false", "evaluate.baselines=[]"]
    return simulate(loading.load(None, [*overrides, *plain]), folder, **keys)


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_with_one_step_it_is_averaging(small_run: list[str], tmp_path: Path) -> None:
    """The corrections of one step cancel out: both are a step along the mean gradient."""
    one = [*small_run, *SCAFFOLD, "train.steps=1"]
    run(tmp_path / "scaffold", one)
    run(tmp_path / "fedavg", [*one, "strategy.name=fedavg", "strategy.weighting=uniform"])
    ours, theirs = adapter_of(tmp_path / "scaffold"), adapter_of(tmp_path / "fedavg")
    start = adapters.fresh_adapter(adapters.load(loading.load(None, small_run).model, AdapterConfig(rank=4)), 0)
    moved = max(float((theirs[name] - start[name]).abs().max()) for name in ours)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-4 * moved)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [["train.steps=3"], ["train.steps=3", "wire.up=int4", "wire.down=int8"], ["train.epochs=1"]]
)
def test_a_run_with_skipped_rounds_keeps_the_mean_and_counts_the_bytes(
    small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    """Both sides work a client's control variate out for themselves, also of changes that were coded coarsely."""
    settings = [*small_run, *SCAFFOLD, "rounds=5", *more, "strategy.fraction=0.5"]
    sums: list[dict[str, torch.Tensor]] = [{}]
    received: list[tuple[int, dict[str, torch.Tensor]]] = []
    save, send = checkpoint.save, Worker.send

    def saving(folder: Path, state: ServerState, *args: Any, **keys: Any) -> Path:
        sums.append(dict(state.memory))
        return save(folder, state, *args, **keys)

    def sending(self: Worker, site: Site, number: int, payload: Payload, answer: Any) -> bytes:
        received.append((number, dict(payload.extra)))
        return send(self, site, number, payload, answer)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", saving)
        patch.setattr(Worker, "send", sending)
        metrics = run(tmp_path / "run", settings)
    assert len(received) == 10
    for number, mean in received:  # of all three clients, though two are asked in a round
        for name, tensor in mean.items():
            before = sums[number - 1].get(f"control.{name}", torch.zeros_like(tensor))
            torch.testing.assert_close(tensor, before / 3)
    state, progress = checkpoint.load(tmp_path / "run" / "checkpoints") or (None, {})
    assert state is not None and len(set(progress["last_round"].values())) > 1
    folders = tmp_path / "run" / "clients"
    own = [round_files.load(folders / name, "control", number) for name, number in progress["last_round"].items()]
    for name in state.adapter:
        total = torch.stack([held[name] for held in own]).sum(0)
        torch.testing.assert_close(state.memory[f"control.{name}"], total, rtol=1e-3, atol=1e-5)
    assert max(float(tensor.abs().max()) for tensor in state.memory.values()) > 0
    run(tmp_path / "plain", [*settings, "strategy.name=fedavg"])
    ours, theirs = ([e for e in read_events(tmp_path / f) if e["event"] == "round"] for f in ("run", "plain"))
    extra = 4 * sum(t.numel() for t in state.adapter.values())
    for a, b in zip(ours, theirs, strict=True) if more == ["train.steps=3"] else ():
        assert a["bytes_up"] == b["bytes_up"]  # nothing of the control variates travels up
        assert 1 <= (a["bytes_down"] - b["bytes_down"]) / (a["asked"] * extra) < 1.3  # with names
    assert metrics["rounds"][-1]["loss"] < metrics["rounds"][0]["loss"]


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(small_run: list[str], tmp_path: Path) -> None:
    settings = [*small_run, *SCAFFOLD, "rounds=4", "train.steps=3"]
    run(tmp_path / "whole", settings)
    with killed_before_checkpoint(3):
        run(tmp_path / "cut", settings)
    run(tmp_path / "cut", settings, resume=True)
    whole, cut = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize(
    ("settings", "why", "way_out"),
    [
        (["train.optimizer=adamw"], "AdamW rescales entry by entry", '"sgd"'),
        (["adapter.train=alternate"], "gradient of zero for the factor that rests", '"both"'),
        (['train.penalties=[{ name = "fedprox", mu = 0.1 }]'], "'fedprox' for a part", "one of the two"),
        (["privacy.unit=record"], "without noise", "use fedavg"),
        (["adapter.share=a"], "what all clients share", "leave it out"),
    ],
)
def test_what_does_not_go_with_it_is_refused(settings: list[str], why: str, way_out: str) -> None:
    with pytest.raises(UserError) as told:
        loading.load(None, [*SCAFFOLD, *settings])
    (line,) = told.value.problems
    assert why in line and way_out in line


def test_it_takes_one_rank() -> None:
    with pytest.raises(UserError, match="takes the rank 16 alone"):
        strategies.from_config(loading.load(None, [*SCAFFOLD, "adapter.ranks=[4, 16]"]))


def test_a_client_that_lost_its_control_variate_says_so_and_is_not_counted_twice() -> None:
    payload = Payload({"x": torch.zeros(3)}, {}, {"x": torch.zeros(3)}, 2)
    for half in (correction_of, lambda state, sent: scaffold.LOCAL.settle(state, sent, {"x": torch.zeros(3)}, 0.1)):
        with pytest.raises(StateLost, match="of round 2 is gone"):
            half({}, payload)
    assert correction_of({}, payload._replace(last_round=0))["x"].tolist() == [0.0] * 3
    assert correction_of({}, payload._replace(extra={})) == {}
