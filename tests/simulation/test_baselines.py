"""What the federated model is held against: training like the clients' own, bit for bit, or a word that it is not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import instruction_rows, overrides_for
from report_pages import Page, page
from safetensors.torch import load_file
from small_models import same

from apiary.config import loading
from apiary.config.schema import RunConfig
from apiary.core.tensors import StateDict, add
from apiary.data import tokenization
from apiary.data.examples import Example
from apiary.evaluation import comparison
from apiary.export import tuned
from apiary.models import adapters
from apiary.report import headline, table_plain
from apiary.report.card_table import card_table
from apiary.report.data import parse_metrics
from apiary.tracking.event_log import RunLog, read_events
from client import handlers
from client.training import trainer, zeroth_order
from client.training.trainer import Cursor, FitResult, VisitPlan
from simulation import baselines, visits
from simulation.run import simulate
from simulation.visits import ClientVisits
from strategies import seed_scalars
from strategies.local import Descent

QUIET = ["evaluate.generate=false", "evaluate.every=0", "evaluate.clients=false"]


def run(folder: Path, overrides: list[str]) -> dict[str, Any]:
    return simulate(loading.load(None, overrides), folder)


def weights(place: Path) -> dict[str, torch.Tensor]:
    return load_file(place / "adapter_model.safetensors")


class Direct:
    """Fits by hand on the rows of a run's clients, with the trainer alone."""

    def __init__(self, folder: Path, rank: int | None = None) -> None:
        self.config: RunConfig = loading.load(folder / "config.toml")
        self.clients = handlers.federation(self.config.to_json()).clients
        self.lm = adapters.load(self.config.model, self.config.adapter.of_rank(rank or self.config.adapter.rank))
        self.start = adapters.fresh_adapter(self.lm, self.config.seed)

    def fit(self, rows: Sequence[Example], start: StateDict, wide: int = 1, **plan: Any) -> FitResult:
        template = tokenization.make_template(self.config.prompt, self.lm.tokenizer)
        corpus = tokenization.encode_all(rows, template, self.lm.tokenizer, self.config.prompt)
        train = self.config.train.model_copy(update={"accumulate": wide * self.config.train.accumulate})
        return trainer.fit(self.lm, start, corpus, train, VisitPlan(seed=self.config.seed, **plan))


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows_file: Path
) -> tuple[Path, dict[str, Any]]:
    """A run of three clients, three rounds and two steps, in which each goes through its rows more than once."""
    folder = tmp_path_factory.mktemp("baselines") / "run"
    return folder, run(folder, [*overrides_for(tiny_model, rows_file), *QUIET, "train.steps=3"])


# -- what they train ---------------------------------------------------------------------------------------------------


def test_each_baseline_is_a_direct_fit_on_the_clients_rows_bit_for_bit(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = finished
    direct = Direct(folder)
    table = {row["method"]: row for row in metrics["table"]}
    told = []
    for client, entry in zip(direct.clients, metrics["clients"], strict=True):
        one = direct.fit(client.train, direct.start, client=client.name, steps=9, total_steps=9)
        assert same(weights(folder / "baselines" / "local" / client.name), add(direct.start, one.delta))
        assert entry["alone"]["rows"] == len(client.train) > 30
        assert (entry["alone"]["steps"], entry["steps"]) == (9, 9)
        assert entry["alone"]["tokens"] == one.report.tokens and entry["alone"]["examples"] == one.report.examples
        told.append(one.report)
    pooled = [row for client in direct.clients for row in client.train]
    for method, steps, wide in (("central", 27, 1), ("central_serial", 9, 3)):
        made = direct.fit(pooled, direct.start, wide, client="central", steps=steps, total_steps=steps)
        assert same(weights(folder / "baselines" / method), add(direct.start, made.delta))
        row = table[method]
        assert (row["steps"], row["rows"], row["tokens"]) == (steps, len(pooled), made.report.tokens)
    assert table["local"]["tokens"] == round(sum(report.tokens for report in told) / 3)
    assert (table["local"]["steps"], table["local"]["rows"]) == (9, round(len(pooled) / 3))
    assert (table["federated"]["steps"], table["federated"]["rows"]) == (27, len(pooled))
    assert not any("not_alike" in row for row in metrics["table"])


def test_serial_steps_see_the_tokens_of_all_steps(finished: tuple[Path, dict[str, Any]]) -> None:
    _, metrics = finished
    table = {row["method"]: row for row in metrics["table"]}
    assert table["central_serial"]["tokens"] == table["central"]["tokens"] > 2.5 * table["local"]["tokens"]
    assert [row["method"] for row in metrics["table"]][-1] == "central_serial"
    assert {"central", "central_serial"} <= metrics["clients"][0]["own"].keys()


def test_the_figures_of_a_baseline_are_those_of_its_own_fit(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A baseline that makes fewer steps on fewer rows than it should tells so itself."""
    folder, _ = finished
    direct, fit = Direct(folder), trainer.fit

    def crippled(lm: Any, start: Any, corpus: Any, config: Any, plan: VisitPlan) -> FitResult:
        half = [direct.clients[0].train[i] for i in range(0, len(direct.clients[0].train), 2)]
        template = tokenization.make_template(direct.config.prompt, lm.tokenizer)
        few = tokenization.encode_all(half, template, lm.tokenizer, direct.config.prompt)
        return fit(lm, start, few, config, plan._replace(steps=plan.steps // 3))

    monkeypatch.setattr(trainer, "fit", crippled)
    config = direct.config.model_copy(
        update={"evaluate": direct.config.evaluate.model_copy(update={"baselines": ("local",)})}
    )
    template = tokenization.make_template(config.prompt, direct.lm.tokenizer)
    took_part = visits.of_run(direct.clients[:1], config, read_events(folder), folder)
    with closing(RunLog(tmp_path)) as log:
        made = baselines.train_all(config, direct.lm, template, took_part, 3, tmp_path, log)
    account = made.alone["client-00"].account
    assert (account.steps, account.rows) == (3, (len(direct.clients[0].train) + 1) // 2)


def test_a_finished_baseline_is_taken_from_disk_with_its_account(
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, metrics = finished
    direct = Direct(folder)
    template = tokenization.make_template(direct.config.prompt, direct.lm.tokenizer)
    took_part = visits.of_run(direct.clients, direct.config, read_events(folder), folder)
    trained: list[str] = []
    fit = trainer.fit

    def noted(lm: Any, start: Any, corpus: Any, config: Any, plan: VisitPlan) -> FitResult:
        trained.append(plan.client)
        return fit(lm, start, corpus, config, plan)

    monkeypatch.setattr(trainer, "fit", noted)
    (folder / "baselines" / "local" / "client-01" / "fit.json").unlink()  # as a kill between two files leaves it
    with closing(RunLog(folder)) as log:
        again = baselines.train_all(direct.config, direct.lm, template, took_part, 3, folder, log)
    assert trained == ["client-01"]
    for entry in metrics["clients"]:
        account = again.alone[entry["client"]].account._asdict()
        assert {**account, "seconds": 0} == {**entry["alone"], "seconds": 0}


def test_a_client_alone_trains_on_what_curation_left_of_its_rows(
    tmp_path: Path, tiny_model: Path, rows_file: Path
) -> None:
    """The rows are chosen anew in each round, by the shared model, and the baselines follow."""
    steps = 'curate.steps=["mask", { name = "ifd", threshold = 100.0, keep = 0.5, floor = 0, warmup = 1 }]'
    folder = tmp_path / "run"
    metrics = run(folder, [*overrides_for(tiny_model, rows_file), *QUIET, steps, "curate.every=1", "data.clients=2"])
    direct = Direct(folder)
    chosen: dict[str, list[list[int]]] = {}
    for client in direct.clients:
        files = sorted((folder / "clients" / client.name).glob("curated-*.json"))
        chosen[client.name] = [json.loads(path.read_text())["kept"] for path in files]
        assert [len(kept) for kept in chosen[client.name]] == [len(client.train), *[len(client.train) // 2] * 2]

    def chain(client: str, parts: list[list[Example]], steps: int) -> dict[str, torch.Tensor]:
        state, cursor = direct.start, Cursor()
        for number, rows in enumerate(parts):
            at = {"first_step": number * steps, "cursor": cursor}
            made = direct.fit(rows, state, client=client, steps=steps, total_steps=3 * steps, **at)
            state, cursor = add(state, made.delta), Cursor(made.cursor.epoch + 1)
        return dict(state)

    by_round = [[[c.train[i] for i in chosen[c.name][number]] for c in direct.clients] for number in range(3)]
    for index, client in enumerate(direct.clients):
        own = chain(client.name, [rows[index] for rows in by_round], 2)
        assert same(weights(folder / "baselines" / "local" / client.name), own)
    assert same(weights(folder / "baselines" / "central"), chain("central", [a + b for a, b in by_round], 4))
    rows = {row["method"]: row["rows"] for row in metrics["table"]}
    assert rows["central"] == len(by_round[0][0]) + len(by_round[0][1])
    assert rows["federated"] == len(by_round[2][0]) + len(by_round[2][1])  # as the clients last told


def test_a_client_alone_has_the_rank_that_it_had(tmp_path: Path, tiny_model: Path, rows_file: Path) -> None:
    folder, mixed = tmp_path / "run", ["strategy.name=rank_slices", "adapter.ranks=[2, 4, 3]", "rounds=2"]
    metrics = run(folder, [*overrides_for(tiny_model, rows_file), *QUIET, *mixed])
    scored = []
    for index, rank in enumerate((2, 4, 3)):
        direct = Direct(folder, rank)
        client = direct.clients[index]
        one = direct.fit(client.train, direct.start, client=client.name, steps=4, total_steps=4)
        place = folder / "baselines" / "local" / client.name
        assert json.loads((place / "adapter_config.json").read_text())["r"] == rank
        state = weights(place)
        assert same(state, add(direct.start, one.delta))
        template = tokenization.make_template(direct.config.prompt, direct.lm.tokenizer)
        test = handlers.federation(direct.config.to_json()).test
        held_out = comparison.prepare(test, template, direct.lm, direct.config)
        scored.append(comparison.measure(direct.lm, state, held_out, direct.config).loss)
        assert metrics["clients"][index]["mix_loss"]["local"] == pytest.approx(scored[-1], rel=1e-5)
    table = {row["method"]: row for row in metrics["table"]}
    assert table["local"]["loss"] == pytest.approx(sum(scored) / 3, rel=1e-5) and "not_alike" not in table["local"]
    why = {"rank": "used rank 4, where clients have ranks from 2 to 4"}
    assert table["central"]["not_alike"] == table["central_serial"]["not_alike"] == why
    rows, lines = tuned.score(tuned.open_tuned(folder), str(rows_file))
    assert rows["local"].loss > 0 and sum("not like with like: it used rank 4" in line for line in lines) == 2


def test_pooled_training_has_the_rank_that_all_clients_share(tmp_path: Path) -> None:
    """Also where it is below the server's."""
    config = loading.load(None, ["adapter.ranks=[4]"])
    clients = [ClientVisits(name, 4, {1: 2}, {0: ()}) for name in ("a", "b")]
    assert {work.rank for work in baselines.plan(config, clients, tmp_path)} == {4}
    assert baselines.unlike(config, clients) == {}


def test_factors_that_clients_train_in_turns_are_trained_in_turns(
    tmp_path: Path, tiny_model: Path, rows_file: Path
) -> None:
    folder = tmp_path / "run"
    run(folder, [*overrides_for(tiny_model, rows_file), *QUIET, "adapter.train=alternate", "data.clients=2"])
    direct = Direct(folder)
    pooled = [row for client in direct.clients for row in client.train]
    for place, client, rows, steps, wide in (
        ("local/client-01", "client-01", direct.clients[1].train, 2, 1),
        ("central", "central", pooled, 4, 1),
        ("central_serial", "central", pooled, 2, 2),
    ):
        state, cursor = direct.start, Cursor()
        for number, factors in enumerate(("b", "a", "b")):
            at = {"first_step": number * steps, "total_steps": 3 * steps, "cursor": cursor, "factors": factors}
            made = direct.fit(rows, state, wide, client=client, steps=steps, **at)
            state, cursor = add(state, made.delta), made.cursor
        assert same(weights(folder / "baselines" / place), state), place


def test_steps_without_a_gradient_stay_without_one(tmp_path: Path, tiny_model: Path, rows_file: Path) -> None:
    """A learning rate for them means something else to an optimizer with gradients."""
    folder = tmp_path / "run"
    few = ["strategy.name=fedkseed", "strategy.options.candidates=8", "train.lr=1e-3", "data.clients=2", "rounds=2"]
    metrics = run(folder, [*overrides_for(tiny_model, rows_file), *QUIET, *few])
    direct = Direct(folder)
    seeds = seed_scalars.candidates(direct.config.seed, 8)
    template = tokenization.make_template(direct.config.prompt, direct.lm.tokenizer)

    def descend(losses: Any, start: StateDict, rng: torch.Generator) -> Descent:
        made = seed_scalars.descend(losses, start, seeds, epsilon=seed_scalars.EPSILON, rng=rng)
        ends.append(made.x)
        return Descent({}, made.skipped)

    ends: list[dict[str, torch.Tensor]] = []
    for place, client, rows, steps in (
        ("local/client-00", "client-00", direct.clients[0].train, 4),
        ("central", "central", [row for c in direct.clients for row in c.train], 8),
    ):
        corpus = tokenization.encode_all(rows, template, direct.lm.tokenizer, direct.config.prompt)
        plan = VisitPlan(seed=direct.config.seed, client=client, steps=steps, total_steps=steps)
        zeroth_order.fit(direct.lm, direct.start, corpus, direct.config.train, plan, descend)
        assert same(weights(folder / "baselines" / place), ends[-1]), place
    assert not any("not_alike" in row for row in metrics["table"])


def test_a_run_that_stopped_early_stops_the_baselines_schedule_too(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 12 rounds 6 were made: the learning rate ends where the clients' did, half way down."""
    folder, _ = finished
    direct, plans, fit = Direct(folder), [], trainer.fit

    def noted(lm: Any, start: Any, corpus: Any, config: Any, plan: VisitPlan) -> FitResult:
        plans.append(plan)
        return fit(lm, start, corpus, config, plan)

    monkeypatch.setattr(trainer, "fit", noted)
    template = tokenization.make_template(direct.config.prompt, direct.lm.tokenizer)
    longer = direct.config.model_copy(update={"rounds": 12})
    took_part = [ClientVisits(c.name, 4, dict.fromkeys(range(1, 7), 1), {0: c.train}) for c in direct.clients]
    with closing(RunLog(tmp_path)) as log:
        baselines.train_all(longer, direct.lm, template, took_part, 6, tmp_path, log)
    steps = [(plan.steps, plan.total_steps) for plan in plans]
    assert steps == [(6, 12)] * 3 + [(18, 36), (6, 12)]


def test_serial_steps_are_those_of_the_longest_client_in_each_round(tmp_path: Path) -> None:
    config = loading.load(None, ["train.epochs=1.0"])
    clients = [ClientVisits("a", 16, {1: 2, 2: 2}, {0: ()}), ClientVisits("b", 16, {2: 8, 3: 4}, {0: ()})]
    work = {item.method: item for item in baselines.plan(config, clients, tmp_path)}
    assert [part.steps for part in work["central"].parts] == [16]
    assert [part.steps for part in work["central_serial"].parts] == [2 + 8 + 4]
    assert work["central_serial"].width == 1  # 16 steps' worth of tokens in 14
    alike = [ClientVisits(name, 16, {1: 3, 2: 3}, {0: ()}) for name in "abcd"]
    (serial,) = (item for item in baselines.plan(config, alike, tmp_path) if item.method == "central_serial")
    assert (serial.parts[0].steps, serial.width) == (6, 4)


def test_only_clients_that_took_part_are_in_the_pool(tmp_path: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    direct = Direct(folder)
    events = [e for e in read_events(folder) if e.get("client") != "client-01" or e["event"] != "client"]
    took_part = visits.of_run(direct.clients, direct.config, events, folder)
    assert [client.client for client in took_part] == ["client-00", "client-02"]
    (central,) = (w for w in baselines.plan(direct.config, took_part, tmp_path) if w.method == "central")
    assert central.parts[0].rows == direct.clients[0].train + direct.clients[2].train


# -- where none is alike -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "kind", "methods"),
    [
        (["privacy.unit=record"], "noise", {"local", "central", "central_serial"}),
        (['continual.stages=[["a"], ["b"]]'], "stages", {"local", "central", "central_serial"}),
        (["strategy.name=hetlora", "strategy.options.prune=0.5"], "rank", {"local", "central", "central_serial"}),
        ([], "", set()),
    ],
)
def test_what_is_not_alike_says_so(overrides: list[str], kind: str, methods: set[str]) -> None:
    clients = [ClientVisits(name, 16, {1: 2}, {0: ()}) for name in ("a", "b")]
    found = baselines.unlike(loading.load(None, overrides), clients)
    assert set(found) == methods and all(set(reasons) == {kind} for reasons in found.values())


def test_a_choice_that_is_lost_is_no_choice(tmp_path: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    """Runs of an earlier version kept the newest three alone."""
    folder, _ = finished
    direct = Direct(folder)
    config = loading.load(folder / "config.toml", ['curate.steps=["duplicates"]', "curate.every=1"])
    (one, *_) = visits.of_run(direct.clients, config, read_events(folder), folder)
    assert not one.known and one.choices == {0: direct.clients[0].train}
    reasons = baselines.unlike(config, [one])
    assert reasons["local"]["rows"].startswith("used rows that client-00 did not choose")


def test_of_an_unlike_baseline_no_share_of_the_gap_is_told(finished: tuple[Path, dict[str, Any]]) -> None:
    _, metrics = finished
    losses = {"base": 5.0, "local": 4.0, "federated": 1.0, "central": 0.25, "central_serial": 0.5}
    interval = {"difference": -3.0, "ci95": [-3.1, -2.9], "n": 240}
    table = [{"method": m, "loss": v, "accuracy": None, "n": 240} for m, v in losses.items()]
    alike = {"schema": 1, "table": table, "paired": {"local": interval}, "clients": metrics["clients"]}
    share = "That is 80% of what copying all data to one place would gain over training alone (86% of what it would"
    assert share in Page(page(alike)).text
    assert "pooling all data reaches 0.25, or 0.50 in as few steps as one client makes" in headline(
        parse_metrics(alike)
    )
    odd = [{**row, "not_alike": {"rank": "used rank 9"}} if row["method"] == "central" else row for row in table]
    unlike = {**alike, "table": odd}
    text = Page(page(unlike)).text
    assert "% of what" not in text and "no share of the gap" in text
    assert "not alike: used rank 9" in text and "pooling all data (not alike) reaches 0.25" in text
    said = "Not like with like: training on all data pooled (central) used rank 9."
    assert said in text and said in table_plain(unlike) and "central *" in table_plain(unlike)
    card = "\n".join(card_table(unlike))
    assert said in card and "| central (not alike) | 0.25" in card and "| local | 4.00" in card


# -- where nothing was federated ---------------------------------------------------------------------------------------


def test_a_single_client_has_joined_nobody(tmp_path: Path, tiny_model: Path) -> None:
    """Half of its rows are spoiled, and curation takes these out: what that gains is not the worth of joining."""
    rows = instruction_rows(80)
    spoiled = [{**row, "output": "x" * 40} if i % 2 else row for i, row in enumerate(rows)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in spoiled), encoding="utf-8")
    single = [
        "data.clients=1",
        "strategy.min_clients=1",
        'curate.steps=[{ name = "length", max = 20, unit = "characters" }]',
    ]
    folder = tmp_path / "run"
    metrics = run(folder, [*overrides_for(tiny_model, path), *QUIET, *single, "evaluate.max_examples=80"])
    direct = Direct(folder)
    good = [row for row in direct.clients[0].train if "xxx" not in row.turns[-1].text]
    alone = direct.fit(good, direct.start, client="client-00", steps=6, total_steps=6)
    assert same(weights(folder / "baselines" / "local" / "client-00"), add(direct.start, alone.delta))
    assert metrics["clients"][0]["alone"]["rows"] == len(good) < len(direct.clients[0].train)
    assert metrics["gain"] == {}  # nobody gained by joining
    report = (folder / "report.html").read_text()
    card = "\n".join(card_table(metrics))
    assert headline(parse_metrics(metrics)).startswith("Nothing was federated: one client trained by itself, from")
    for text in (report, table_plain(metrics), card):
        assert "A single client took part, so there was nobody to join" in text
        assert not any(words in text for words in ("by joining", "Joining forces", "better off", "of what copying"))


def test_two_clients_of_which_one_never_took_part_are_one(finished: tuple[Path, dict[str, Any]]) -> None:
    _, metrics = finished
    clients = [{**client, "steps": 9 if client["client"] == "client-00" else 0} for client in metrics["clients"]]
    assert headline(parse_metrics(metrics)).startswith("Joining forces")
    assert headline(parse_metrics({**metrics, "clients": clients})).startswith("Nothing was federated")
