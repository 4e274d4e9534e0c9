"""A site's own model after a deployed run: made at home, of the state that its visits left and what is handed out."""

from __future__ import annotations

import json
import shutil
import socket
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from command_line import apiary, assert_refused
from conftest import instruction_rows, overrides_for
from safetensors.torch import load_file, save_file
from small_models import same

from apiary.cli import own_model as told
from apiary.config import loading
from apiary.config.schema import RunConfig
from apiary.core.errors import UserError
from apiary.core.messages import Payload, Visit
from apiary.core.tensors import StateDict, add
from apiary.data import split, tokenization
from apiary.data.batches import Corpus
from apiary.data.examples import Example
from apiary.data.federation import decides
from apiary.evaluation import comparison
from apiary.export import export, tuned
from apiary.export.adapter_folder import save_adapter_folder
from apiary.models import adapter_files, adapters
from client import site_worker, state
from client.personal import at_site, own_model
from client.personal.at_site import Handed
from client.site import Facts, Site, at_home
from client.training import trainer
from client.worker import Worker
from deploy import kits

WEIGHTS = "adapter_model.safetensors"
ROWS = 340
RUN = "first-0123abcd"
OWN = ("personal.enabled=true", "personal.validation=0.3", "personal.budget=2", "personal.weights=[0.5]")


class Home(NamedTuple):
    """A site after a run of three rounds, in two of which it took part with four steps each."""

    kit: Path
    facts: Facts
    config: RunConfig  # as the server sent it
    run: Path  # the run directory, as it is handed out
    site: Site
    adapter: StateDict  # of the federation


def worked(folder: Path, model: Path, *more: str, visits: int = 2) -> Home:
    """A site's kit with a state folder as its worker leaves it, and the run directory of the server."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in instruction_rows(ROWS, seed=3)), encoding="utf-8")
    kits.init(folder / "fed", "localhost:18443", ["north"])
    kit = folder / "fed" / "north"
    given = [*overrides_for(model, rows), "train.steps=4", "data.test_fraction=0.25", "evaluate.max_examples=400"]
    config = loading.load(None, [*given, "model.name=org/base", "data.source=at-the-server", "seed=5", *more])
    facts = Facts("north", rows, kit / "state", str(model))
    if config.curate.steps:
        split.repin(facts.state, 0.25, new_key=False, agreed=config)
    home = at_home(config, facts)
    site = site_worker._read_site(home, facts, RUN)
    worker, lm = Worker(home), adapters.load(home.model, home.adapter)
    state.save_fingerprint(site.folder, worker.hello(site).fingerprint)
    adapter: StateDict = adapters.fresh_adapter(lm, config.seed)
    shared = {name: tensor for name, tensor in adapter.items() if worker.local.shares(name)}
    for number in range(1, visits + 1):
        told = {"clients": torch.tensor(3.0)} if worker.local.mixes else {}
        answer = worker.train(site, number, Payload(shared, {}, told))
        assert isinstance(answer, Visit)
        shared = add(shared, {name: 0.7 * change for name, change in answer.update.delta.items()})  # as with others
    adapter = {**adapter, **shared}
    run = folder / "first"
    save_adapter_folder(lm, adapter, run / "adapter", config.model_copy(update={"model": home.model}))
    (run / "config.toml").write_text(config.to_toml())
    (run / "run-id").write_text("0123abcd\n")
    return Home(kit, facts, config, run, site, adapter)


@pytest.fixture(scope="module")
def north(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Home:
    return worked(tmp_path_factory.mktemp("north"), tiny_model, *OWN)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def texts(rows: Sequence[Example]) -> set[str]:
    return {row.turns[0].text for row in rows}


class Finished(NamedTuple):
    out: Path
    said: str
    warned: str
    trained: list[Corpus]
    state_before: dict[str, bytes]


@pytest.fixture(scope="module")
def finished(north: Home) -> Finished:
    """The model that the command makes, with all that was trained on for it, and every way out closed."""
    trained, fit = list[Corpus](), trainer.fit

    def noted(lm: Any, start: Any, corpus: Corpus, config: Any, plan: Any) -> Any:
        trained.append(corpus)
        return fit(lm, start, corpus, config, plan)

    def shut(*_: Any) -> None:
        raise AssertionError("somebody was called")

    before = files_of(north.facts.state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "fit", noted)
        for call in ("connect", "connect_ex", "sendto", "bind"):
            patch.setattr(socket.socket, call, shut)
        done = apiary("deploy", "personal", north.kit, north.run, "--data", north.facts.data, "--model", *model(north))
    assert done.returncode == 0, done.stderr
    return Finished(north.kit / "personal" / "first", done.stdout, done.stderr, trained, before)


def model(home: Home) -> tuple[str]:
    return (str(home.facts.model),)


class Bench:
    """The site's base, for losses by hand."""

    def __init__(self, home: Home) -> None:
        self.config = at_home(home.config, home.facts)
        self.lm = adapters.load(self.config.model, self.config.adapter)
        self.template = tokenization.make_template(self.config.prompt, self.lm.tokenizer)

    def loss(self, adapter: StateDict, rows: Sequence[Example]) -> float:
        quiet = self.config.evaluate.model_copy(update={"generate": False})
        config = self.config.model_copy(update={"evaluate": quiet})
        held_out = comparison.prepare(rows, self.template, self.lm, config)
        return comparison.measure(self.lm, adapter, held_out, config).loss

    def texts(self, rows: Sequence[Example]) -> set[tuple[int, ...]]:
        return sequences(tokenization.encode_all(rows, self.template, self.lm.tokenizer, self.config.prompt))


def sequences(corpus: Corpus) -> set[tuple[int, ...]]:
    return {tuple(corpus.ids[a:b].tolist()) for a, b in zip(corpus.offsets, corpus.offsets[1:], strict=False)}


# -- what is made ----------------------------------------------------------------------------------------------------


def test_the_model_is_made_and_measured_on_the_rows_of_the_run(north: Home, finished: Finished) -> None:
    """It trains on what the visits trained on, chooses by what they left out, and is reported on what is held out."""
    bench, choice = Bench(north), json.loads((finished.out / "choice.json").read_text())
    plan = at_site.prepare(north.facts, Handed(north.run), north.kit / "elsewhere")
    rows = plan.task.rows
    assert list(rows.train) == list(north.site.train) and list(rows.reported) == list(north.site.test)
    apart = texts(rows.validation)
    assert len(apart) > 20 and apart.isdisjoint(texts(north.site.train) | texts(north.site.test))
    assert len(apart | texts(north.site.train) | texts(north.site.test)) == ROWS
    assert len(finished.trained) == 3  # alone, twice, and tuned
    for corpus in finished.trained:
        assert sequences(corpus) == bench.texts(north.site.train)
    assert choice["client"] == "north" and choice["federation_steps"] == 8
    assert (choice["rows"]["train"], choice["rows"]["validation"]) == (len(north.site.train), len(rows.validation))
    federated = choice["candidates"][0]
    assert federated["kind"] == "federated" and federated["steps"] == 8
    assert federated["loss"] == pytest.approx(bench.loss(north.adapter, rows.validation), rel=1e-6)
    assert [step for step, _ in choice["curves"]["alone"]] == list(range(2, 17, 2))  # twice the steps of the federation
    for name, place in (("personal", finished.out), ("local_best", finished.out / "alone")):
        state = adapter_files.read_adapter(bench.lm, place / WEIGHTS)
        assert choice["own"][name] == pytest.approx(bench.loss(state, north.site.test), rel=1e-5)
    assert choice["own"]["federated"] == pytest.approx(bench.loss(north.adapter, north.site.test), rel=1e-5)
    paired = choice["own_paired"]["local_best"]
    assert paired["n"] == len(north.site.test)
    assert paired["difference"] == pytest.approx(choice["own"]["personal"] - choice["own"]["local_best"], abs=1e-6)


def test_what_is_printed_says_what_was_kept_and_that_nothing_left(north: Home, finished: Finished) -> None:
    choice = json.loads((finished.out / "choice.json").read_text())
    for name, key in (
        ("Own model", "personal"),
        ("Federated", "federated"),
        ("Training alone, at its best", "local_best"),
    ):
        (line,) = [line for line in finished.said.splitlines() if line.startswith(f"{name} ")]
        low, high = choice["own_ci95"][key]
        assert f"{choice['own'][key]:.3f}  {low:.3f} to {high:.3f}" in line
    assert f"kept: {choice['kept']}" in finished.said and choice["why"] in finished.said
    assert "Nothing was sent to anybody, not even what was kept" in finished.said
    assert f"8 optimizer steps in {RUN}" in finished.warned and "at most 16 optimizer steps" in finished.warned


def test_the_folder_is_its_owners_and_what_other_commands_take(north: Home, finished: Finished, tmp_path: Path) -> None:
    assert stat.S_IMODE(finished.out.stat().st_mode) == 0o700
    assert {path.name for path in finished.out.iterdir()} >= {WEIGHTS, "apiary.toml", "choice.json", "README.md"}
    assert "the own model of one client" in (finished.out / "README.md").read_text()
    everything = b"".join(files_of(finished.out).values())
    assert str(north.facts.data).encode() not in everything and b"instruction" not in everything
    for place in (finished.out, finished.out / "alone"):
        opened = tuned.open_tuned(place)
        assert opened.config.model.name == north.facts.model
    to = export.export_run(finished.out, tmp_path / "out").folder
    assert "the own model of one client" in (to / "README.md").read_text()
    assert list(finished.out.parent.iterdir()) == [finished.out]  # no draft is left
    assert files_of(north.facts.state) == finished.state_before


def test_a_failure_on_the_way_leaves_nothing(north: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = at_site.prepare(north.facts, Handed(north.run), tmp_path / "own")

    def stopped(*_: Any) -> None:
        assert (plan.task.own / "choice.json").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(own_model, "on_own_rows", stopped)  # the model is there by then
    with pytest.raises(KeyboardInterrupt):
        at_site.make(plan)
    assert list(tmp_path.iterdir()) == []


# -- how many steps --------------------------------------------------------------------------------------------------


def test_steps_are_counted_once_and_only_of_rounds_that_were_finished(tmp_path: Path) -> None:
    lines = [(1, 0), (1, 1), (2, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (3, 0)]  # back to round 1 after a crash
    text = "".join(json.dumps({"round": number, "step": step, "loss": 1.0}) + "\n" for number, step in lines)
    (tmp_path / "steps.jsonl").write_text(text + '{"round": 2, "st')
    assert state.steps_of(tmp_path) == {}  # no memory says that a round was finished
    for number in (1, 2):
        state.save(tmp_path, state.Memory(number))
    assert state.steps_of(tmp_path) == {1: 2, 2: 3}
    assert state.steps_of(tmp_path / "nothing") == {}


def steps(home: Home, handed: Handed, out: Path) -> tuple[int, str]:
    plan = at_site.prepare(home.facts, handed, out)
    return plan.task.steps, plan.remarks[-1]


def test_a_site_counts_its_own_steps_and_else_those_that_the_run_plans(north: Home, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert steps(north, Handed(north.run), out) == (8, f"it made 8 optimizer steps in {RUN}, by its state folder")
    assert steps(north, Handed(north.run / "adapter"), out)[0] == 8  # the same run
    other = shutil.copytree(north.run, tmp_path / "other")
    (other / "run-id").write_text("ffffffff\n")
    planned, why = steps(north, Handed(other), out)
    assert planned == 12 and "took no part in this run" in why  # three rounds of four
    assert steps(north, Handed(north.run, run="none"), out)[0] == 12
    # Of what is delivered, where that is an earlier round than the last.
    (other / "run-id").write_text("0123abcd\n")
    (other / "metrics.json").write_text(json.dumps({"schema": 1, "delivered": {"round": 1}}))
    assert steps(north, Handed(other), out)[0] == 4
    assert not out.exists()


def test_an_adapter_folder_is_of_the_only_run_or_of_the_one_that_is_named(north: Home, tmp_path: Path) -> None:
    folder = shutil.copytree(north.run / "adapter", tmp_path / "handed")
    assert steps(north, Handed(folder), tmp_path / "out")[0] == 8
    kit = shutil.copytree(north.kit, tmp_path / "kit")
    home = north._replace(facts=north.facts._replace(state=kit / "state"))
    shutil.copytree(kit / "state" / "runs" / RUN, kit / "state" / "runs" / "second-89abcdef")
    with pytest.raises(UserError, match=r"name it \(--run NAME.*first-0123abcd, second-89abcdef"):
        at_site.prepare(home.facts, Handed(folder), tmp_path / "out")
    assert "in second-89abcdef" in steps(home, Handed(folder, run="second-89abcdef"), tmp_path / "out")[1]
    with pytest.raises(UserError, match=r"--run 'third': the state folder has no such run; there are first"):
        at_site.prepare(home.facts, Handed(folder, run="third"), tmp_path / "out")


def test_what_export_wrote_is_taken_also_at_a_lower_rank(north: Home, tmp_path: Path) -> None:
    run = rewritten(north, tmp_path / "run", f"model.name={north.facts.model}")
    whole = export.export_run(run, tmp_path / "whole").folder
    plan = at_site.prepare(north.facts, Handed(whole), tmp_path / "out")
    assert plan.task.steps == 8 and same(dict(plan.task.federated), dict(north.adapter))
    assert list(plan.task.rows.validation) and list(plan.task.rows.train) == list(north.site.train)
    cut = export.export_run(run, tmp_path / "cut", max_rank=2).folder
    smaller = at_site.prepare(north.facts, Handed(cut), tmp_path / "out")
    assert smaller.home.lm.rank == 2 and smaller.task.steps == 8


def test_a_template_that_the_run_left_to_the_tokenizer_is_the_one_that_it_came_to(
    tmp_path: Path, tiny_model: Path
) -> None:
    home = worked(tmp_path, tiny_model, *OWN, "prompt.template=auto", "prompt.max_tokens=256", visits=1)
    assert home.config.prompt.template == "auto"
    for handed in (home.run, shutil.copytree(home.run / "adapter", tmp_path / "handed")):
        plan = at_site.prepare(home.facts, Handed(handed), tmp_path / "out")
        assert plan.home.template.name == "alpaca" == plan.home.config.prompt.template
        assert plan.task.steps == 4


# -- other runs ------------------------------------------------------------------------------------------------------


def test_a_run_that_set_nothing_apart_chooses_by_half_of_the_held_out_rows(tmp_path: Path, tiny_model: Path) -> None:
    home = worked(tmp_path, tiny_model, visits=1)
    plan = at_site.prepare(home.facts, Handed(home.run), tmp_path / "out")
    rows = plan.task.rows
    assert list(rows.train) == list(home.site.train)
    assert list(rows.validation) == [row for row in home.site.test if decides(row)]
    assert list(rows.reported) == [row for row in home.site.test if not decides(row)]
    assert any("half of the held-out rows chooses" in line for line in plan.remarks)


def test_where_the_clients_decided_the_round_their_rows_are_not_reported(tmp_path: Path, tiny_model: Path) -> None:
    home = worked(tmp_path, tiny_model, *OWN, "evaluate.patience=2", "evaluate.clients=true", visits=1)
    rows = at_site.prepare(home.facts, Handed(home.run), tmp_path / "out").task.rows
    assert list(rows.reported) == [row for row in home.site.test if not decides(row)]


def test_with_a_b_of_its_own_the_federated_candidate_is_the_sites_own(tmp_path: Path, tiny_model: Path) -> None:
    """The shared A as it was handed out, with the B that the site's last visit left in its state folder."""
    home = worked(tmp_path, tiny_model, *OWN, "adapter.share=a")
    plan = at_site.prepare(home.facts, Handed(home.run), tmp_path / "out")
    last = load_file(home.site.folder / "adapter" / WEIGHTS)  # as after the site's last visit
    names = {name.replace("base_model.model.", "").replace(".weight", ""): name for name in last}
    assert len(plan.task.federated) == len(names)
    for name, tensor in plan.task.federated.items():
        stored = next(last[full] for full in last if full.endswith(name.removeprefix("base_model.model.")))
        if ".lora_B." in name:
            torch.testing.assert_close(tensor, stored)
            assert tensor.any()
        else:
            torch.testing.assert_close(tensor, home.adapter[name])
    assert any("its own factors, from its state folder" in line for line in plan.remarks)
    never = at_site.prepare(home.facts, Handed(home.run, run="none"), tmp_path / "out")
    assert not any(tensor.any() for name, tensor in never.task.federated.items() if ".lora_B." in name)
    assert any("no factors of its own" in line for line in never.remarks)


def test_the_model_that_the_method_made_for_a_site_is_its_federated_candidate(tmp_path: Path, tiny_model: Path) -> None:
    """Its worker kept it in the state folder; the shared one, which the consortium hands out, is another."""
    home = worked(tmp_path, tiny_model, *OWN, "strategy.name=ditto")
    plan = at_site.prepare(home.facts, Handed(home.run), tmp_path / "out")
    lm = adapters.load(at_home(home.config, home.facts).model, home.config.adapter)
    mine = adapter_files.read_adapter(lm, home.site.folder / "adapter" / WEIGHTS)
    for name, tensor in plan.task.federated.items():
        torch.testing.assert_close(tensor, mine[name])
    assert any(not torch.equal(mine[name], home.adapter[name]) for name in mine)
    assert any("made for it, from its state folder" in line for line in plan.remarks)
    assert plan.task.steps == 8  # two visits of four: what is sent and what is kept share them
    never = at_site.prepare(home.facts, Handed(home.run, run="none"), tmp_path / "out")
    assert all(torch.allclose(tensor, home.adapter[name]) for name, tensor in never.task.federated.items())
    assert any("the shared one stands in" in line for line in never.remarks)


def test_a_model_with_gates_is_its_candidate_in_the_fixed_form(tmp_path: Path, tiny_model: Path) -> None:
    """A client's factors and the others' side by side; what is trained at home begins there."""
    home = worked(tmp_path, tiny_model, *OWN, "strategy.name=fedalt")
    plan = at_site.prepare(home.facts, Handed(home.run), tmp_path / "out")
    lm = adapters.load(at_home(home.config, home.facts).model, home.config.adapter)
    mine = adapter_files.read_adapter(lm, home.site.folder / "adapter" / WEIGHTS)
    assert len(mine) == 2 * len(home.adapter) and plan.task.federated.keys() == mine.keys()
    assert all(torch.equal(tensor, mine[name]) for name, tensor in plan.task.federated.items())
    made = at_site.make(plan)
    assert made["kept"] in ("federated", "mixed", "tuned", "alone")


def test_steps_of_private_visits_are_counted_and_its_rows_are_those_of_the_run(
    tmp_path: Path, tiny_model: Path
) -> None:
    private = ("privacy.unit=record", "privacy.batch_rows=8", "privacy.epsilon=20", "evaluate.clients=false")
    home = worked(tmp_path, tiny_model, *OWN, *private, visits=1)
    plan = at_site.prepare(home.facts, Handed(home.run), tmp_path / "out")
    assert plan.task.steps == 4 and list(plan.task.rows.train) == list(home.site.train)
    assert at_site.prepare(home.facts, Handed(home.run, run="none"), tmp_path / "out").task.steps == 12


def test_it_trains_on_what_curation_last_left_in_the_run(tmp_path: Path, tiny_model: Path) -> None:
    home = worked(tmp_path, tiny_model, *OWN, "curate.steps=[{name='random', rows=30}]", visits=1)
    plan = at_site.prepare(home.facts, Handed(home.run), tmp_path / "out")
    kept = json.loads((home.site.folder / "curated-0001.json").read_text())["kept"]
    assert len(plan.task.rows.train) == 30 < len(home.site.train)
    numbers = [number if isinstance(number, int) else number[0] for number in kept]
    assert texts(plan.task.rows.train) == {home.site.train[number].turns[0].text for number in numbers}
    never = at_site.prepare(home.facts, Handed(home.run, run="none"), tmp_path / "out")
    assert len(never.task.rows.train) == len(home.site.train)
    assert any("no choice of curation" in line for line in never.remarks)


# -- what is refused -------------------------------------------------------------------------------------------------


def rewritten(home: Home, folder: Path, *changes: str) -> Path:
    """The run directory with other settings."""
    shutil.copytree(home.run, folder)
    config = loading.load(home.run / "config.toml", list(changes))
    (folder / "config.toml").write_text(config.to_toml())
    return folder


Spoil = Callable[[Home, Path], Handed]


def _settings(*changes: str) -> Spoil:
    return lambda home, folder: Handed(rewritten(home, folder / "run", *changes))


def _other_shapes(home: Home, folder: Path) -> Handed:
    run = rewritten(home, folder / "run")
    wider = {k: torch.cat([v, v], 1 if ".lora_A." in k else 0) for k, v in load_file(run / "adapter" / WEIGHTS).items()}
    save_file(wider, run / "adapter" / WEIGHTS)
    return Handed(run)


def _without_settings(home: Home, folder: Path) -> Handed:
    copied = shutil.copytree(home.run / "adapter", folder / "bare")
    (copied / "apiary.toml").unlink()
    return Handed(copied)


REFUSED: dict[str, tuple[Spoil, str]] = {
    "another template": (_settings("prompt.template=alpaca"), r"prompt\.template: the adapter was tuned with another"),
    "other lengths": (_settings("prompt.max_tokens=80"), r"prompt\.max_tokens: the adapter was tuned with another"),
    "a file": (_settings("prompt.template=/etc/hosts"), r"sites take the built-in ones alone"),
    "other rows": (_settings("personal.validation=0.2"), r"personal\.validation: the adapter was tuned with another"),
    "another fraction": (
        _settings("data.test_fraction=0.2"),
        r"data\.test_fraction = 0\.2: this site has pinned 0\.25",
    ),
    "no gradients": (
        _settings("personal.enabled=false", "strategy.name=fedkseed", "train.lr=1e-3"),
        r"trains without gradients",
    ),
    "stages": (
        _settings("personal.enabled=false", "continual.by=skill", 'continual.stages=[["first"], ["last"]]'),
        r"continual\.stages: a client's rows change",
    ),
    "code": (_settings('train.objective="os:system"'), r"names code by module:function, which this site does not load"),
    "a start": (_settings("adapter.start=somewhere", 'adapter.start_digest="00"'), r"adapter\.start: .*--start DIR"),
    "a start of nothing": (lambda home, _: Handed(home.run, start=home.run), r"--start: the run began from a new"),
    "another base": (_other_shapes, r"does not fit the base"),
    "no settings": (_without_settings, r"holds no apiary\.toml"),
    "no adapter": (lambda home, folder: Handed(home.kit), r"holds no adapter"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_trained(case: str, north: Home, tmp_path: Path) -> None:
    spoil, line = REFUSED[case]
    with pytest.raises(UserError, match=line) as refused:
        at_site.prepare(north.facts, spoil(north, tmp_path), tmp_path / "out")
    assert len(refused.value.problems) == 1 and "\n" not in refused.value.problems[0]
    assert not (tmp_path / "out").exists()


def test_a_base_other_than_in_the_run_is_refused_though_its_shapes_fit(north: Home, tmp_path: Path) -> None:
    kit = shutil.copytree(north.kit, tmp_path / "kit")
    facts = north.facts._replace(state=kit / "state")
    path = facts.state / "runs" / RUN / "fingerprint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base": "another"}))
    with pytest.raises(UserError, match=r"this site took part in 'first-0123abcd' with another base"):
        at_site.prepare(facts, Handed(north.run), tmp_path / "out")
    assert at_site.prepare(facts, Handed(north.run, run="none"), tmp_path / "out").task.steps == 12


def test_the_command_refuses_in_one_line(north: Home, tmp_path: Path) -> None:
    def call(*words: str | Path, data: Path = north.facts.data, adapter: Path = north.run) -> Any:
        return apiary("deploy", "personal", north.kit, adapter, "--data", data, *words)

    given, out = ("--model", str(north.facts.model)), ("--out", str(tmp_path / "out"))
    assert_refused(call(*out), "not built in", "--model DIR")
    assert_refused(call("--model", "org/base", *out), "no such folder", "nothing is fetched")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    assert_refused(call(*given, "--out", tmp_path / "full"), "not empty")
    assert_refused(call(*given, *out, "--state", tmp_path / "new"), "split.json", "has taken part in no run")
    assert_refused(call(*given, *out, "-s", "train.lr=1"), "only keys of personal")
    assert_refused(call(*given, *out, data=tmp_path / "no.jsonl"), "no such file or folder")
    empty = tmp_path / "rows.jsonl"
    empty.touch()
    assert_refused(call(*given, *out, data=empty), "is empty, it holds no rows")
    empty.write_text('{"instruction": "Say bee", "output": "bee"}\n')
    assert_refused(call(*given, *out, "-s", "personal.validation=0.9"), "it says which rows the run trained on")
    assert not (tmp_path / "out").exists() and not (tmp_path / "new").exists()


# -- what a site is told ---------------------------------------------------------------------------------------------


def made_up(kept: str, difference: float, ends: tuple[float, float] | None) -> dict[str, Any]:
    return {
        "client": "north",
        "kept": kept,
        "weight": 0.25 if kept == "mixed" else 0.0,
        "why": "it has the lowest loss of 5 candidates on 60 validation rows",
        **{"steps": 24, "federation_steps": 12, "alone_steps": 18},
        "own": {"local_best": 0.5, "federated": 0.7, "personal": 0.5 + difference},
        "own_ci95": {"local_best": [0.4, 0.6], "federated": [0.6, 0.8], "personal": None},
        "own_paired": {"local_best": {"difference": difference, "ci95": ends, "n": 80}},
    }


def test_a_site_is_advised_to_stay_alone_where_its_rows_say_so() -> None:
    gains = "\n".join(told.lines(made_up("mixed", -0.1, (-0.15, -0.05)), private=False))
    assert "it gains, +0.100 (95% interval +0.050 to +0.150)" in gains and "kept: mixed (0.25 alone)" in gains
    assert "do not say that staying alone is better" in gains and "the better advice" not in gains
    chose = "\n".join(told.lines(made_up("alone", 0.0, (-0.01, 0.01)), private=False))
    assert "Staying alone is the better advice for north: of all candidates" in chose
    loses = "\n".join(told.lines(made_up("tuned", 0.1, (0.05, 0.15)), private=True))
    assert "it loses" in loses and "Staying alone is the better advice for north: on the reported rows" in loses
    assert "What the run promises to rows" in loses and "What the run promises" not in gains
    table = [line.split() for line in gains.splitlines()[1:4]]
    assert [row[-1] for row in table] == ["18", "12", "24"] and table[1][1:4] == ["0.700", "0.600", "to"]
    nothing = {**made_up("federated", 0.0, None), "own": {}, "own_ci95": {}, "own_paired": {}}
    assert "so there are no figures" in told.lines(nothing, private=False)[0]
