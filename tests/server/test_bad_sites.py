"""One bad site among four, through whole rounds with real Flower messages: what it sends must not count."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from kept_events import Log

import strategies
from apiary.config import loading
from apiary.core.errors import RunFailed, UserError
from apiary.core.messages import Fingerprint, FitReport, Hello, Payload, Score, Update, Visit
from apiary.core.tensors import StateDict
from apiary.transport import codec as codecs
from apiary.transport import flower_records, from_config
from server import checkpoint, explosion, screen
from server.app import save
from server.evaluation import Evaluation
from server.replies import Refusal, Terms
from server.rounds import Hooks, Progress, Rounds
from simulation.in_process_grid import LocalGrid
from strategies import ServerState, guard
from strategies.aggregator import AGGREGATORS
from strategies.guard import Reference

PRINT = Fingerprint("base", "tokenizer", "template", "adapter")
A, B = "m.lora_A.weight", "m.lora_B.weight"
START: StateDict = {A: torch.linspace(-0.5, 0.5, 24).reshape(2, 12), B: torch.zeros(8, 2)}
METHODS = ["fedavg", "rank_slices", "median"]
BAD = 3  # the site that is bad
Spoil = Callable[[Visit], Visit]


def honest(site: int, number: int, size: float) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(100 * number + site)
    return {name: size * (2 * torch.rand(t.shape, generator=rng) - 1) for name, t in START.items()}


def app(
    spoil: Spoil = lambda visit: visit,
    *,
    size: float = 0.005,
    tokens: Callable[[int], int] = lambda site: 100,
    rows: Callable[[int], int] = lambda site: 100,
    steps: Callable[[int], int] = lambda site: 3,
    error: str = "",
    nats: Callable[[int, int], float] = lambda site, number: 2.0,
) -> ClientApp:
    made = ClientApp()

    def site_of(context: Context) -> int:
        return int(context.node_config["partition-id"])

    @made.query("hello")
    def hello(message: Message, context: Context) -> Message:
        site = site_of(context)
        said = Hello(f"c{site}", PRINT, 2, rows(site), rows(site) * 10)
        return Message(flower_records.hello_reply(said), reply_to=message)

    @made.train()
    def train(message: Message, context: Context) -> Message:
        site, (number, _) = site_of(context), flower_records.read_request(message.content)
        if error and site == BAD:
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, error), reply_to=message)
        update = Update(f"c{site}", honest(site, number, size), float(tokens(site)), 2)
        visit = Visit(update, FitReport(tokens(site), 20, steps(site), 2.0, 0.1))
        return Message(flower_records.train_reply(spoil(visit) if site == BAD else visit), reply_to=message)

    @made.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        site, (number, _) = site_of(context), flower_records.read_request(message.content)
        return Message(flower_records.score_reply(f"c{site}", Score(nats(site, number) * 10, 10, 5)), reply_to=message)

    return made


def run(
    bad: ClientApp, *overrides: str, sites: int = 4, progress: Progress = Progress(), **hooks: Any
) -> tuple[StateDict, Log, Rounds]:
    config = loading.load(
        None,
        ["rounds=2", "adapter.rank=2", "train.schedule=constant", "strategy.server_optimizer=none", *overrides],
    )
    log = Log()
    state = ServerState(0, START, {}, {})
    made = Rounds(config, strategies.from_config(config), PRINT, state, Hooks(log, **hooks), progress)
    return made.run(LocalGrid(bad, sites), sites).adapter, log, made


def filled(value: float) -> Spoil:
    return lambda visit: visit._replace(
        update=visit.update._replace(delta={n: torch.full_like(t, value) for n, t in visit.update.delta.items()})
    )


def reported(**fields: Any) -> Spoil:
    return lambda visit: visit._replace(
        report=visit.report._replace(**fields),
        update=visit.update._replace(weight=float(fields.get("tokens", visit.update.weight))),
    )


# -- changes that are far too long -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.2, -1e3, 9e11])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_change_that_training_cannot_make_is_as_if_the_site_were_not_there(
    method: str, value: float, optimizer: str
) -> None:
    more = [f"strategy.name={method}", f"train.optimizer={optimizer}", "rounds=1", "train.clip_norm=1.0"]
    size = 0.005 if optimizer == "adamw" else 0.0005
    ours, log, _ = run(app(filled(value), size=size), *more)
    alone, _, _ = run(app(size=size), *more, sites=BAD)
    assert all(torch.equal(ours[name], alone[name]) for name in START)
    (refused,) = log.of("refused")
    assert refused["client"] == f"c{BAD}" and refused["round"] == 1
    assert ("moved by" if optimizer == "adamw" else "long") in refused["reason"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.1, 1e3])
def test_where_the_optimizer_has_no_bound_the_medians_have(method: str, value: float) -> None:
    """By gradient descent without clipping; the honest are at most 0.005 in each entry."""
    more = [f"strategy.name={method}", "train.optimizer=sgd", "train.clip_norm=0", "rounds=1"]
    ours, log, _ = run(app(filled(value)), *more)
    alone, _, _ = run(app(), *more, sites=BAD)
    assert all(torch.equal(ours[name], alone[name]) for name in START)
    (refused,) = log.of("refused")
    lengths = [*sorted(honest(site, 1, 0.005)[B].double().norm().item() for site in range(BAD)), value * 4]
    bound = 5 * (lengths[1] + lengths[2]) / 2
    assert refused["reason"].startswith("its change of the factors") and "strategy.norm_guard = 5" in refused["reason"]
    if "factors B" in refused["reason"]:
        assert f"{value * 4:.3g} long" in refused["reason"] and f"allow {bound:.3g}" in refused["reason"]


def test_by_the_past_alone_a_long_change_is_refused_and_an_honest_one_taken() -> None:
    free = ["train.optimizer=sgd", "train.clip_norm=0", "rounds=1", "strategy.quorum=0.3"]
    _, _, before = run(app(), *free)

    _, log, _ = run(_second(filled(0.1)), *free, sites=2, progress=before.progress._replace(last_round={}))
    assert [event["client"] for event in log.of("refused")] == ["c1"]
    assert [event["client"] for event in log.of("client")] == ["c0"]


@pytest.mark.parametrize(("optimizer", "why"), [("adamw", "moved by 0.2; "), ("sgd", "long; the run's steps lead to ")])
def test_of_two_sites_and_no_past_what_the_optimizer_can_do_is_the_limit(optimizer: str, why: str) -> None:
    bounded = ["rounds=1", "strategy.quorum=0.3", f"train.optimizer={optimizer}", "train.clip_norm=10.0"]
    _, log, _ = run(_second(filled(0.2)), *bounded, sites=2)
    (refused,) = log.of("refused")
    assert refused["client"] == "c1" and why in refused["reason"]
    assert [event["client"] for event in log.of("client")] == ["c0"]


def _second(spoil: Spoil) -> ClientApp:
    """As `app`, with the second site as the bad one."""
    made = ClientApp()
    plain, bad = app(), app()

    def site_of(context: Context) -> int:
        return int(context.node_config["partition-id"])

    @made.query("hello")
    def hello(message: Message, context: Context) -> Message:
        return plain(message, context)

    @made.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return bad(message, context)

    @made.train()
    def train(message: Message, context: Context) -> Message:
        site, (number, _) = site_of(context), flower_records.read_request(message.content)
        visit = Visit(Update(f"c{site}", honest(site, number, 0.005), 100.0, 2), FitReport(100, 20, 3, 2.0, 0.1))
        return Message(flower_records.train_reply(spoil(visit) if site == 1 else visit), reply_to=message)

    return made


def test_with_epochs_a_longer_change_is_scaled_down_to_the_limit() -> None:
    more = ["train.epochs=1.0", "train.optimizer=sgd", "train.clip_norm=0", "rounds=1"]
    ours, log, _ = run(app(filled(0.1)), *more)
    sizes = [[guard.lengths(honest(site, 1, 0.005))[part] for site in range(BAD)] + [0.1] for part in ("a", "b")]
    medians = [sum(sorted(values)[1:3]) / 2 for values in sizes]
    factor = min(5 * median / 0.1 for median in medians)
    (told,) = [event for event in log.of("client") if event["client"] == f"c{BAD}"]
    assert told["shortened"] == pytest.approx(factor) and not log.of("refused")
    changes = [honest(site, 1, 0.005)[A] for site in range(BAD)] + [torch.full_like(START[A], 0.1 * factor)]
    torch.testing.assert_close(ours[A], START[A] + torch.stack(changes).mean(0))


def _settled(changes: list[StateDict], *more: str) -> list[screen.Settled]:
    """A first round's changes, of equal weight, once they are settled."""
    config = loading.load(None, ["adapter.rank=2", *more])
    up = from_config.configured_codec(config, "up")
    screened = screen.Screen(Terms(config, strategies.from_config(config), up, 1, lambda client: Payload({}, {})))
    for site, delta in enumerate(changes):
        screened.take(f"c{site}", Visit(Update(f"c{site}", delta, 100.0, 2), FitReport(100, 20, 3, 2.0, 0.1)), 1)
    return list(screened.release())


@pytest.mark.parametrize(("method", "refused"), [("scaffold", True), ("fedalt", True), ("fedavg", False)])
def test_where_sites_keep_account_of_their_changes_none_is_scaled_down(method: str, refused: bool) -> None:
    """A site's sum of control variates, say, would go by another change than the server's."""
    changes = [honest(site, 1, 0.05 if site == BAD else 0.005) for site in range(4)]
    *others, last = _settled(changes, f"strategy.name={method}", "train.epochs=1.0", "train.optimizer=sgd")
    assert all(one.shortened is None and isinstance(one.reply, Visit) for one in others)
    assert isinstance(last.reply, Refusal) == refused == (last.shortened is None)


def test_a_part_in_which_the_others_move_nothing_has_a_limit_too() -> None:
    """With B = 0 nobody's first step moves A, whose median says nothing then."""
    still = [{**honest(site, 1, 0.005), A: torch.zeros_like(START[A])} for site in range(3)]
    for size, taken in ((0.004, True), (0.1, False)):
        *others, last = _settled([*still, {**still[0], A: torch.full_like(START[A], size)}])
        assert isinstance(last.reply, Visit) == taken and all(isinstance(one.reply, Visit) for one in others)
    assert "factors A is 0.49 long" in str(last.reply.reason)  # sqrt(24) * 0.1


@pytest.mark.parametrize("relays", [0, 2])
@pytest.mark.parametrize("method", METHODS)
def test_where_nobody_is_bad_the_guards_change_no_bit(method: str, relays: int) -> None:
    more = [f"strategy.name={method}", *([f"simulate.relays={relays}"] if relays and method != "median" else [])]
    on, log, _ = run(app(tokens=lambda site: 100 + 30 * site), *more)
    off, _, _ = run(app(tokens=lambda site: 100 + 30 * site), *more, "strategy.norm_guard=0", "strategy.weight_cap=0")
    assert all(torch.equal(on[name], off[name]) for name in START)
    assert not log.of("refused") and not any("capped" in event for event in log.of("client"))


# -- what AdamW can reach ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("steps", [1, 2, 7, 60, 300])
def test_adamw_stays_within_reach_whatever_the_gradients(steps: int, decay: float) -> None:
    """Gradients made to go far: constant, growing, shrinking, a jump, and noise; torch's own optimizer."""
    config = loading.load(
        None, [f"train.steps={steps}", "train.lr=0.01", f"train.weight_decay={decay}", "train.schedule=constant"]
    )
    start = torch.full((5,), 3.0)
    ours = guard.reach(config, 2, steps, {A: start}, strategies.from_config(config).local)
    weight = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([weight], lr=0.01, weight_decay=decay)
    rng = torch.Generator().manual_seed(1)
    for step in range(steps):
        noise = float(torch.randn((), generator=rng))
        jump = 1e6 if step >= steps - 12 else 1e-3
        weight.grad = torch.tensor([1.0, 1.05**step, 0.8**step, jump, noise])
        optimizer.step()
    moved = (weight.detach() - start).abs()
    assert float(moved.max()) <= ours.entries["a"]
    assert ours.passed({A: weight.detach() - start}) == ""
    # It is no idle limit: what goes steadily in one direction comes near it while steps are few.
    if steps <= 7 and not decay:
        assert float(moved.max()) >= ours.entries["a"] / 1.4


def test_a_method_that_trains_in_its_own_way_has_no_reach() -> None:
    config = loading.load(None, ["strategy.name=scaffold", "train.optimizer=sgd"])
    assert guard.reach(config, 1, 3, START, strategies.from_config(config).local) == guard.Reach()


# -- claims ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fedavg", "rank_slices", "flexlora"])
@pytest.mark.parametrize("relays", [0, 2])
def test_a_claim_of_a_million_million_rows_counts_three_times_the_median(method: str, relays: int) -> None:
    if relays and method == "flexlora":
        pytest.skip("it must see each update")
    more = [f"strategy.name={method}", "train.epochs=1.0", "rounds=1", f"simulate.relays={relays}"]
    claims = app(
        tokens=lambda site: 10**14 if site == BAD else 100,
        rows=lambda site: 10**12 if site == BAD else 100,
        steps=lambda site: 10**12 if site == BAD else 3,
    )
    ours, log, _ = run(claims, *more)
    fair, _, _ = run(app(tokens=lambda site: 300 if site == BAD else 100), *more, "strategy.weight_cap=0")
    assert all(torch.equal(ours[name], fair[name]) for name in START)
    (told,) = [event for event in log.of("client") if event["client"] == f"c{BAD}"]
    assert told["capped"] == 300.0 and told["tokens"] == 10**14


def test_in_later_rounds_the_weights_of_the_past_count_too() -> None:
    """A site that begins to claim more is capped by the round's median, or the past's where that is larger."""
    _, log, _ = run(
        app(tokens=lambda site: 900 if site == BAD else 100), "rounds=1", progress=Progress(weights=(200.0,))
    )
    assert [event.get("capped") for event in sorted(log.of("client"), key=lambda e: e["client"])] == [None] * 3 + [600]


def _claim(bad: int, much: int, usual: int = 100) -> ClientApp:
    """One site claims that it has, and has trained on, a million million rows."""
    return app(
        tokens=lambda site: much if site == bad else usual,
        rows=lambda site: 10**12 if site == bad else 100,
        steps=lambda site: 10**12 if site == bad and much > 10**6 else 3,
    )


@pytest.mark.parametrize("method", ["fedavg", "rank_slices", "flexlora"])
@pytest.mark.parametrize(("length", "claimed"), [("epochs=1.0", 10**14), ("steps=3", 3000)])
def test_of_two_sites_none_weighs_more_than_three_times_the_other(method: str, length: str, claimed: int) -> None:
    more = [f"strategy.name={method}", f"train.{length}", "rounds=1", "strategy.quorum=1.0"]
    ours, log, _ = run(_claim(1, claimed), *more, sites=2)
    fair, _, _ = run(app(tokens=lambda site: 300 if site == 1 else 100), *more, "strategy.weight_cap=0", sites=2)
    assert all(torch.equal(ours[name], fair[name]) for name in START)
    assert {event["client"]: event.get("capped") for event in log.of("client")} == {"c0": None, "c1": 300.0}


def test_a_tiny_claim_of_one_of_two_sites_takes_the_other_no_more_than_a_quarter() -> None:
    more = ["train.epochs=1.0", "rounds=1"]
    ours, _, _ = run(app(tokens=lambda site: 1 if site == 1 else 100), *more, sites=2)
    fair, _, _ = run(app(tokens=lambda site: 10 if site == 1 else 30), *more, sites=2)
    assert all(torch.equal(ours[name], fair[name]) for name in START)


@pytest.mark.parametrize(("epochs", "most"), [("1.0", 3000.0), ("2.0", 6000.0)])
def test_in_a_small_cohort_the_counts_of_all_handshakes_are_what_is_usual(epochs: str, most: float) -> None:
    """Of five sites two are asked; each has told 1,000 tokens. One trains on 10 of these, for a stage say."""
    more = [f"train.epochs={epochs}", "rounds=1", "strategy.fraction=0.4", "strategy.min_clients=2"]
    _, log, rounds = run(app(), *more, sites=5)
    first, second = (int(name[1:]) for name in rounds._cohort)
    _, log, _ = run(_claim(first, 10**14, usual=10), *more, sites=5)
    told = {event["client"]: event.get("capped") for event in log.of("client")}
    assert told == {f"c{first}": most, f"c{second}": None}


def test_where_two_sites_answer_the_past_is_what_is_usual() -> None:
    usual = Progress(weights=(50.0,))
    _, log, _ = run(_claim(1, 3000), "rounds=1", sites=2, progress=usual)
    assert {event["client"]: event.get("capped") for event in log.of("client")} == {"c0": None, "c1": 150.0}


@pytest.mark.parametrize("held", [0, 1000, 256 * 2**20])
def test_a_first_round_of_forty_is_held_against_its_own_medians(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With changes that wait in memory, on the disk, or here and there: each of them has 160 bytes."""
    monkeypatch.setattr(screen, "_HELD", held)
    free = ["train.optimizer=sgd", "train.clip_norm=0", "train.epochs=1.0", "rounds=1"]
    claims = {0: 5000, 1: 200, BAD: 100}
    sent = app(filled(1e3), tokens=lambda site: claims.get(site, 100), rows=lambda site: 100)
    ours, log, _ = run(sent, *free, sites=40)
    alone = app(tokens=lambda site: {0: 300, 1: 200}.get(site, 100))
    without = _only(alone, [site for site in range(40) if site != BAD])
    fair, _, _ = run(without, *free, "strategy.norm_guard=0", "strategy.weight_cap=0", sites=40)
    assert all(torch.equal(ours[name], fair[name]) for name in START)
    assert [event["client"] for event in log.of("refused")] == [f"c{BAD}"]
    assert [(event["client"], event["capped"]) for event in log.of("client") if "capped" in event] == [("c0", 300.0)]


def _only(sites: ClientApp, answering: list[int]) -> ClientApp:
    """The same sites, of which some do not answer to a round."""
    made = ClientApp()

    @made.query("hello")
    def hello(message: Message, context: Context) -> Message:
        return sites(message, context)

    @made.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return sites(message, context)

    @made.train()
    def train(message: Message, context: Context) -> Message:
        if int(context.node_config["partition-id"]) in answering:
            return sites(message, context)
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "not today"), reply_to=message)

    return made


def test_what_waits_takes_no_more_memory_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty changes of 160 bytes each, of which no more than six fit; bits and the order of tensors stay."""
    monkeypatch.setattr(screen, "_HELD", 1000)
    waiting = screen._Queue()
    for site in reversed(range(40)):
        delta = dict(reversed(honest(site, 1, 1.0).items()))
        waiting.put(f"c{site:02}", Visit(Update(f"c{site:02}", delta, 1.0, 2), FitReport(1, 1, 1, 2.0, 0.1)), 160)
    held = sum(t.nbytes for one in waiting._waiting for t in one.visit.update.delta.values())
    assert 160 * 5 < held <= 1000
    drained = list(waiting.drain())
    assert [client for client, _, _ in drained] == [f"c{site:02}" for site in range(40)]
    for site, (_, visit, size) in enumerate(drained):
        want = honest(site, 1, 1.0)
        assert list(visit.update.delta) == [B, A] and size == 160
        assert all(torch.equal(visit.update.delta[name], want[name]) for name in want)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"loss": -1e300}, "its loss is -1e+300, which must be from 0 to 1e+06"),
        ({"loss": 1e300}, "its loss is 1e+300"),
        ({"loss": math.inf}, "its loss is inf"),
        ({"seconds": -1.0}, "its visit took -1 s"),
        ({"seconds": 1e300}, "its visit took 1e+300 s"),
        ({"examples": -5}, "it reports -5 examples"),
        ({"examples": 10**15}, "it reports 1e+15 examples"),
        ({"tokens": 10**12}, "it reports 1e+12 tokens"),
    ],
)
def test_a_number_that_cannot_be_costs_its_site(method: str, fields: dict[str, Any], why: str) -> None:
    _, log, _ = run(app(reported(**fields)), f"strategy.name={method}", "rounds=1")
    (refused,) = log.of("refused")
    assert refused["client"] == f"c{BAD}" and why in refused["reason"]
    assert len(log.of("client")) == BAD


@pytest.mark.parametrize("method", METHODS)
def test_an_error_text_of_300_kb_is_a_line(method: str) -> None:
    text = "\x1b[2Jgone\r\n" + "x" * 300_000
    _, log, _ = run(app(error=text), f"strategy.name={method}", "rounds=1")
    (refused,) = log.of("refused")
    assert len(refused["reason"]) <= 300 and "gone" in refused["reason"]
    assert refused["reason"].isprintable()


def test_a_name_of_300_kb_is_a_line() -> None:
    def renamed(visit: Visit) -> Visit:
        return visit._replace(update=visit.update._replace(client="n" * 300_000))

    _, log, _ = run(app(renamed), "rounds=1")
    (refused,) = log.of("refused")
    assert len(refused["reason"]) <= 300


@pytest.mark.parametrize("key", ["norm_guard", "weight_cap"])
def test_a_limit_below_the_median_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=f"strategy.{key} = 0.5: set 1 or more, or 0"):
        loading.load(None, [f"strategy.{key}=0.5"])


# -- a loss that explodes ----------------------------------------------------------------------------------------------


def test_an_exploding_loss_ends_the_run_before_the_round_is_kept_and_names_who(tmp_path: Path) -> None:
    """Without the guard, one site in four sends changes twenty times as long; the loss follows what is done to A."""
    unguarded = ["rounds=6", "strategy.norm_guard=0", "evaluate.clients=false"]
    config = loading.load(None, unguarded)

    def late(visit: Visit) -> Visit:
        return filled(1e3)(visit) if visit.update.delta[A][0, 0] == honest(BAD, 3, 0.005)[A][0, 0] else visit

    def evaluate(model: StateDict) -> Evaluation:
        far = float((model[A] - START[A]).abs().max())
        return Evaluation(Score(20.0 + min(far * 1e3, 1e4) * (far > 1), 10, 5), None)

    hooks = {
        "evaluate": evaluate,
        "on_round": lambda state, progress: save(tmp_path, config, state, progress),
        "forget": lambda number, progress: checkpoint.forget(tmp_path / "checkpoints", number),
    }
    with pytest.raises(RunFailed) as stopped:
        run(app(late), *unguarded, **hooks)
    line = str(stopped.value)
    assert line.startswith("round 3: the loss is ") and "from 2 before training" in line
    assert "c3 moved the model most, with 100% of all changes" in line and "the adapter of round 2 is kept" in line
    assert "train.lr" not in line
    kept = checkpoint.load(tmp_path / "checkpoints")
    assert kept is not None and kept[0].round == 2 == kept[1]["sound_round"] and kept[1]["first_loss"] == 2.0


@pytest.mark.parametrize("more", [["strategy.weighting=uniform"], ["strategy.name=median"]])
def test_where_weights_do_not_count_none_is_capped(more: list[str]) -> None:
    _, log, _ = run(app(tokens=lambda site: 900 if site == BAD else 100), "rounds=1", *more)
    assert len(log.of("client")) == 4 and not any("capped" in event for event in log.of("client"))


@pytest.mark.parametrize("more", [["strategy.weighting=uniform"], ["strategy.name=median"]])
def test_where_weights_do_not_count_a_small_one_hides_nobody(more: list[str]) -> None:
    config = loading.load(None, more)
    watch = explosion.Watch(config)
    for site in range(4):
        change = honest(site, 1, 1.0 if site == BAD else 0.005)
        watch.add(Visit(Update(f"c{site}", change, 1.0 if site == BAD else 1e6, 2), FitReport(1, 1, 1, 2.0, 0.1)))
    line = watch.hold(1, Evaluation(Score(1e6, 1, 1), None), None, Progress(first_loss=2.0))
    assert f"c{BAD} moved the model most, with 9" in line


def test_a_loss_that_explodes_in_the_first_round_ends_the_run_in_the_same_line(tmp_path: Path) -> None:
    seen = [2.0, 99.0]
    hooks = {
        "evaluate": lambda model: Evaluation(Score(seen.pop(0) * 10, 10, 5), None),
        "forget": lambda number, progress: checkpoint.forget(tmp_path / "checkpoints", number),
    }
    with pytest.raises(RunFailed, match=r"round 1: the loss is 99, from 2 .*no round is kept"):
        run(app(), "evaluate.clients=false", **hooks)


def test_with_evaluations_far_apart_the_last_sound_round_is_what_is_left(tmp_path: Path) -> None:
    more = ["rounds=9", "evaluate.every=4", "strategy.norm_guard=0", "evaluate.clients=false"]
    config = loading.load(None, more)
    seen: list[float] = [2.0, 1.9, math.nan]
    hooks = {
        "evaluate": lambda model: Evaluation(Score(seen.pop(0) * 10, 10, 5), None),
        "on_round": lambda state, progress: save(tmp_path, config, state, progress),
        "forget": lambda number, progress: checkpoint.forget(tmp_path / "checkpoints", number),
    }
    with pytest.raises(RunFailed, match=r"round 8: the loss is nan, .* hardly more than others.* round 4 is kept"):
        run(app(), *more, **hooks)
    kept = checkpoint.load(tmp_path / "checkpoints")
    assert kept is not None and kept[0].round == 4


@pytest.mark.parametrize(
    ("nats", "ends"),
    [
        (lambda site, number: 2.0 if number == 0 or site < BAD else 1e5, False),  # one lies
        (lambda site, number: 2.0 if number == 0 or site < 1 else 9.0, True),  # most say so
        (lambda site, number: 2.0 if number == 0 or site < 1 else math.nan, True),
        (lambda site, number: 2.0 if number == 0 or site < BAD else math.nan, False),
        (lambda site, number: 2.0 if number == 0 else 3.9, False),  # 1.5 times 2, plus 1, is 4
        (lambda site, number: 2.0 if number == 0 else 4.1, True),
    ],
)
def test_without_rows_of_the_servers_own_the_median_site_decides(nats: Callable[[int, int], float], ends: bool) -> None:
    if not ends:
        run(app(nats=nats), "evaluate.clients=true")
        return
    with pytest.raises(RunFailed, match=r"round 1: the loss is .*no round is kept"):
        run(app(nats=nats), "evaluate.clients=true")
    run(app(nats=nats), "evaluate.clients=true", "evaluate.limit=0")


def test_of_two_sites_one_liar_ends_no_run() -> None:
    """Neither by a loss of zero before training, by which later ones are judged, nor by a huge one or none later."""
    before = {"liar": [0.0, 10.0, 1.0], "honest": [20.0, 10.0, 1.0]}
    assert explosion.measured(None, before, 0, before=True) == explosion.measured(None, before, 1, before=True) == 2.0
    after = {"liar": [1e4, 10.0, 1.0], "honest": [19.0, 10.0, 1.0]}
    assert explosion.measured(None, after, 0) == explosion.measured(None, {"honest": after["honest"]}, 1) == 1.9


# -- what is usual -----------------------------------------------------------------------------------------------------


def test_the_reference_keeps_five_rounds_in_proportion_to_the_learning_rate() -> None:
    usual = Reference()
    for number in range(1, 8):
        seen = guard.medians([({"a": number * 0.1}, 10.0 * number)] * 3)
        usual = usual.after(seen, rate=0.5)
    assert usual.lengths["a"] == pytest.approx([0.6, 0.8, 1.0, 1.2, 1.4]) and usual.weight == 50.0
    assert usual.length("a", 0.25) == pytest.approx(0.25) and usual.length("b", 0.25) == 0.0
    assert usual.after(guard.medians([({"a": 9.0}, 1.0)] * 2), 0.5) == usual


def test_every_method_says_which_clients_train_plainly() -> None:
    """A new method with training of its own must not be held to what AdamW reaches."""
    decay = loading.load(None, ["train.weight_decay=0.1"])
    given = {"scaling": lambda rank: 1.0, "seed": 0, "weighting": "tokens"}
    for name in ("scaffold", "fedkseed"):
        local = AGGREGATORS.build(name, {}, **given).local
        assert guard.reach(loading.load(None, []), 1, 3, START, local) == guard.Reach()
    shared = strategies.from_config(loading.load(None, ["adapter.share=a"])).local
    plain = strategies.from_config(loading.load(None, [])).local
    for local in (AGGREGATORS.build("fedalt", {}, **given).local, shared):
        ours = guard.reach(loading.load(None, []), 2, 3, START, local)
        assert ours.entries and ours == guard.reach(loading.load(None, []), 2, 3, START, plain)
        assert guard.reach(decay, 2, 3, START, local) == guard.Reach()  # it goes by an adapter that stays at the client


@pytest.mark.parametrize(("codec", "optimizer"), [("topk", "adamw"), ("int4", "adamw"), ("topk", "sgd")])
def test_what_feedback_brings_is_within_what_all_rounds_can_have_moved(codec: str, optimizer: str) -> None:
    """Changes at the edge of what steps can do, encoded round after round at a falling rate, and not a bit more."""
    keys = ["rounds=8", f"train.optimizer={optimizer}", "train.clip_norm=1.0", "wire.up.name=" + codec]
    config = loading.load(None, [*keys, *(["wire.up.share=0.2"] if codec == "topk" else [])])
    local, up = strategies.from_config(config).local, from_config.configured_codec(config, "up")
    assert up.feedback
    rng, left, alone = torch.Generator().manual_seed(3), dict[str, torch.Tensor](), 0
    for number in range(1, 9):
        once = guard.reach(config, number, 3, START, local)
        change = {}
        for name, tensor in START.items():
            sign = torch.sign(torch.randn(tensor.shape, generator=rng) + 2)
            change[name] = sign * (once.entries[guard.part_of(name)] if once.entries else once.norm / 7) / 1.25
        message, left = codecs.encode(change, up, left, rng)
        sent = codecs.decode(message, up, codecs.shapes_of(START))
        most = guard.reach(config, number, 3, START, local, feedback=True)
        assert most.passed(sent) == "" and most.passed({n: 1e3 * torch.ones_like(t) for n, t in START.items()})
        alone += bool(once.passed(sent))
    assert alone > 0  # what one round can do is too little


@pytest.mark.parametrize("codec", ["int4", "topk"])
def test_of_two_sites_one_with_feedback_is_held_to_what_the_rounds_can_do(codec: str) -> None:
    """A message is what it is, coded or not; the one here is not."""
    _, log, _ = run(_second(filled(9e11)), "rounds=1", "strategy.quorum=0.3", f"wire.up.name={codec}", sites=2)
    (refused,) = log.of("refused")
    assert refused["client"] == "c1" and "moved by 9e+11" in refused["reason"]
