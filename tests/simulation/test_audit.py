"""The audit of one client's updates, on the path that trains: what it finds, what it leaves alone, what it refuses."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
from command_line import apiary, assert_refused
from conftest import overrides_for
from fake_run import fake_deployment, fake_metrics, fake_run
from report_pages import page
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment

from apiary.config import loading
from apiary.core import counts
from apiary.core.counts import CountPolicy
from apiary.core.messages import Payload, Visit
from apiary.core.tensors import norm, subtract
from apiary.data import split, tokenization
from apiary.data.examples import Example
from apiary.data.federation import ClientData
from apiary.data.turns import Turn
from apiary.evaluation import intervals
from apiary.models import adapters
from apiary.privacy.audit import one_run
from client import private_visit, site_worker
from client.site import Facts, at_home
from client.worker import Worker
from simulation import audit, inversion, replay
from simulation.replay import Bench, Seen
from simulation.run import simulate

PRIVATE = ["privacy.unit=record", "privacy.batch_rows=10", "privacy.epsilon=8.0", "evaluate.baselines=[]"]


def bench(model: Path, rows: tuple[Example, ...], *more: str) -> Bench:
    base = [f"model.name={model}", "model.dtype=float32", "model.device=cpu", "prompt.max_tokens=96"]
    train = ["train.threads=1", "train.warmup=0.0", "train.schedule=constant", "train.batch_tokens=4096"]
    config = loading.load(None, [*base, *train, *more])
    lm = adapters.load(config.model, config.adapter)
    return Bench(config, lm, Worker(config), ClientData("c", rows, ()), config.adapter.rank)


def short_rows(count: int, rng: np.random.Generator) -> tuple[Example, ...]:
    letters = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
    texts = ["".join(rng.choice(letters, 3)) for _ in range(2 * count)]
    return tuple(
        Example((Turn("user", a), Turn("assistant", b)), {}) for a, b in zip(texts[::2], texts[1::2], strict=True)
    )


@pytest.fixture(scope="module")
def varied(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model whose rows have gradients of many directions, and a template that adds nothing they share."""
    folder = tmp_path_factory.mktemp("varied")
    (folder / "bare.txt").write_text("{instruction}{response}")
    return small_models.make_folder("llama", tiny_model, folder / "model"), folder / "bare.txt"


def hardest_drill(
    varied: tuple[Path, Path], folder: Path, seed: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> tuple[float, float]:
    """The lower bound and the claim where all rows are canaries and each is in the one step; with a share of the noise.

    The ledger is charged for the whole of the noise: only what the training loop is given differs.
    """
    rng, count = np.random.default_rng(seed), 400
    settings = ["adapter.rank=32", f"prompt.template={varied[1]}", "rounds=1", "train.steps=1", "train.optimizer=sgd"]
    private = ["privacy.unit=record", f"privacy.batch_rows={count}", "privacy.epsilon=2.0", "privacy.clip=0.05"]
    rows = short_rows(count, rng)
    made = bench(varied[0], rows, *settings, *private, "train.lr=1.0", f"seed={seed}")
    fit = private_visit.fit_private

    def with_less(*given: Any) -> Any:
        *before, visit = given
        noise = visit.mechanism.noise_multiplier * share
        return fit(*before, visit._replace(mechanism=visit.mechanism._replace(noise_multiplier=noise)))

    inside = rng.random(count) < 0.5
    copy = [row if stays else replay.blank(row, made.config) for row, stays in zip(rows, inside, strict=True)]
    # A server may send what it likes: with such an adapter both factors get gradients, and rows differ most.
    start = small_models.random_state(adapters.get_adapter(made.lm), 0.3)
    with monkeypatch.context() as patched:
        patched.setattr(private_visit, "fit_private", with_less)
        answer = made.worker.train(replay.site(made, copy, folder / "copy", seed), 1, Payload(start, {}))
    assert isinstance(answer, Visit) and answer.spent is not None
    seen = Seen(1, start, answer.update.delta, answer.spent)
    scores = audit._decoded(made, audit._corpus(made, rows), seen)
    return one_run.lower_bound(scores, inside, 1e-5).epsilon, answer.spent.epsilon


@pytest.mark.slow
def test_the_hardest_drill_shows_a_quarter_of_the_noise(
    varied: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For most of five seeds the bound is above the claim; for one, the right mechanism allows that in 5% at most.

    So the right mechanism passes with a probability of 0.002 at most. A quarter of the noise was above it for 23 of 24
    seeds, so it is missed about as rarely. The noise hangs on the names of folders too, and is another in each run.
    """
    drills = [hardest_drill(varied, tmp_path / str(seed), seed, 0.25, monkeypatch) for seed in range(1, 6)]
    assert all(1.9 < claim <= 2.0 for _, claim in drills)
    assert sum(bound > 2.0 for bound, _ in drills) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_right_noise_never_beats_its_claim(
    seed: int, varied: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound, claim = hardest_drill(varied, tmp_path, seed, 1.0, monkeypatch)
    assert bound < claim


def test_without_noise_every_canary_is_found(
    varied: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hardest_drill(varied, tmp_path, 0, 1e-6, monkeypatch)[0] > 3.5


def told_apart(shares: np.ndarray) -> bool:
    """Whether giving each of k batches its own update recovers more than any other way of giving them out, (k, k).

    Where updates tell nothing of their batches, all k! ways are alike, so their own is the only best one with a
    probability of 1 / k! at most: 2e-9 for 12. Whatever the law of the shares is, and ties are counted as the others'.
    """
    best = -math.inf
    for i in range(len(shares)):  # some batch has another's
        other = shares.copy()
        other[i, i] = -len(shares)
        best = max(best, float(other[linear_sum_assignment(other, maximize=True)].sum()))
    return bool(np.trace(shares) > best + 1e-9)


def test_own_updates_are_the_best_ones_by_chance_once_in_all_orders() -> None:
    rng = np.random.default_rng(0)
    noise = rng.random((2400, 3, 3))
    assert 320 < sum(map(told_apart, noise)) < 480  # 1 of 3! is 400; outside with a probability below 1e-4
    assert not told_apart(np.ones((3, 3)))
    assert told_apart(noise[0] + np.eye(3)) and not told_apart(noise[0] + np.roll(np.eye(3), 1, 0))


def test_tokens_are_read_from_a_gradient_and_not_from_a_private_one(varied: tuple[Path, Path], tmp_path: Path) -> None:
    """A private update gives away no more of its own batch than of the others; almost without noise it does."""
    rows = short_rows(60, np.random.default_rng(0))
    found = {}
    for case, unit, noise in (("open", "none", None), ("private", "record", 1.0), ("bare", "record", 1e-4)):
        keys = ["adapter.rank=8", f"prompt.template={varied[1]}", f"privacy.unit={unit}", "privacy.batch_rows=8"]
        made = bench(varied[0], rows, *keys)
        start = small_models.random_state(adapters.get_adapter(made.lm))
        found[case] = inversion.read_batches(made, start, noise, ((1, 16), (8, 12)), tmp_path / case, 0)
    for size in (1, 8):
        # The cases draw the same batches; a row that is drawn twice cannot be told from itself.
        kept = np.sort(np.unique(found["open"][size], axis=0, return_index=True)[1])
        found |= {case: each | {size: each[size][np.ix_(kept, kept)]} for case, each in found.items()}
        assert len(kept) >= 10  # so that a private update fails the test with a probability of 1 / 10! = 3e-7 at most
        assert told_apart(found["open"][size]) and told_apart(found["bare"][size])
        assert not told_apart(found["private"][size])
    assert found["open"][1].diagonal().mean() > 0.95
    own, every = found["open"][8].diagonal().mean(), found["open"][8].mean()
    assert own > every + 0.2


def test_recovery_is_held_against_what_other_batches_give_away(
    varied: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update that says nothing recovers the client's common words all the same: that is no leak."""
    common = [Example((Turn("user", f"alpha beta gamma {word}"), Turn("assistant", "x")), {}) for word in "abcdefgh"]
    made = bench(varied[0], common, "adapter.rank=8", f"prompt.template={varied[1]}", "privacy.unit=none")
    ids = tokenization.encode_all(common, made.worker.template, made.lm.tokenizer, made.config.prompt).ids
    often = np.bincount(ids, minlength=len(made.lm.tokenizer)).astype(float)
    monkeypatch.setattr(inversion.inversion, "presence", lambda inputs, gradients: often)
    start = small_models.random_state(adapters.get_adapter(made.lm))
    pairs = inversion.drill(made, start, None, ((2, 4),), tmp_path / "drill", 0)[2]
    assert len(pairs) == 4 and all(own == pytest.approx(reference) for own, reference in pairs)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_only_layers_whose_input_follows_from_a_token_alone_are_read(
    family: str, tiny_model: Path, tmp_path: Path
) -> None:
    """GPT-2 adds positions to its embeddings: there is no such layer."""
    model = small_models.make_folder(family, tiny_model, tmp_path / family)
    config = loading.load(None, [f"model.name={model}", "model.dtype=float32", "model.device=cpu"])
    known = inversion.token_inputs(adapters.load(config.model, config.adapter))
    if family == "gpt2":
        assert known is None
    else:
        assert known is not None
        assert {name.rpartition(".")[2] for name in known[0]} == {"q_proj", "k_proj", "v_proj"}
        assert all(".layers.0." in name for name in known[0])


def test_a_row_that_is_left_out_adds_nothing_and_is_still_counted(tiny_model: Path, tmp_path: Path) -> None:
    rows = short_rows(20, np.random.default_rng(0))
    made = bench(tiny_model, rows, "adapter.rank=2", "prompt.template=plain", *PRIVATE, "rounds=1")
    copy = [*rows[:5], *(replay.blank(row, made.config) for row in rows[5:])]
    (seen,) = replay.visits(made, copy, 1, tmp_path / "copy", 0)
    assert len(audit._corpus(made, copy)) == 5
    assert seen.spent is not None and seen.spent.sample_rate == 0.5  # 10 of 20, not of 5


def test_what_is_planted_or_left_out_has_no_tools_and_a_blank_row_trains_nothing(tiny_model: Path) -> None:
    rows = [row._replace(tools="[]") for row in short_rows(64, np.random.default_rng(0))]
    made = bench(tiny_model, rows, "adapter.rank=2", "prompt.template=plain", *PRIVATE, "rounds=1")
    plan = audit.plant(made, audit.Options(canaries=8))
    planted = [*plan.canaries, *(fill for _, _, fills in plan.secrets for fill in fills)]
    assert planted and not any(row.tools for row in planted)
    blank = replay.blank(rows[0], made.config)
    assert not blank.tools and not any(turn.trained for turn in blank.turns if turn.role == "assistant")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows_file: Path) -> Path:
    """A finished private run of one client."""
    folder = tmp_path_factory.mktemp("audited") / "run"
    keys = [
        *overrides_for(tiny_model, rows_file),
        *PRIVATE,
        "data.clients=1",
        "strategy.min_clients=1",
        "evaluate.max_examples=4",
    ]
    simulate(loading.load(None, keys), folder)
    return folder


def everything(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_a_replay_is_the_run_itself(tmp_path: Path, small_run: list[str]) -> None:
    """With one client and its own rows, the last visit ends where the run's adapter stands, to the bit of a float."""
    keys = [*small_run, "data.clients=1", "strategy.min_clients=1", "evaluate.baselines=[]"]
    simulate(loading.load(None, keys), tmp_path / "run")
    made = audit.open_bench(tmp_path / "run", audit.Options())
    *_, last = replay.visits(made, made.client.train, 3, tmp_path / "copy", 0)
    stands = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    stands = {name.replace(".default.", "."): tensor for name, tensor in stands.items()}
    assert norm(subtract(last.end, stands)) <= 1e-6 * norm(stands)
    assert norm(last.change) > 0


@pytest.mark.slow
def test_an_audit_charges_nothing_and_changes_nothing_but_its_own_file(run: Path) -> None:
    before = everything(run)
    done = apiary("privacy", "audit", run, "--canaries", "24", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    after = everything(run)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"audit.json", "report.html"} and set(before) <= set(after)
    found = json.loads(done.stdout)
    assert found == json.loads((run / "audit.json").read_text())
    assert found["lower_bound"]["epsilon"] <= found["claim"]["epsilon"] <= 8.0
    assert {row["attack"] for row in found["membership"]} == {"loss", "update"}
    for row in found["exposure"]:
        low, high = intervals.of_median(row["bits"]) or (None, None)
        assert row["median"] == {"value": np.median(row["bits"]), "low": low, "high": high}
    for row in found["membership"]:
        figures = row["true_positives"], row["false_positives"]
        assert row["others"] >= 100 or figures == (None, None)
    assert [row["rows"] for row in found["inversion"]] == [1, 2, 8]
    text = (run / "report.html").read_text()
    assert "What an update tells" in text and "Epsilon is at least" in text
    again = apiary("privacy", "audit", run, "--canaries", "24", "--rounds", "1")
    assert again.returncode == 0 and "Epsilon is at least" in again.stdout
    timeless = [
        {k: v for k, v in each.items() if k != "seconds"}
        for each in (found, json.loads((run / "audit.json").read_text()))
    ]
    assert timeless[0] == timeless[1]  # the same seed, the same audit


def test_what_cannot_be_audited_is_refused_in_one_line(tmp_path: Path, small_run: list[str]) -> None:
    assert_refused(apiary("privacy", "audit", tmp_path / "none"), "does not exist")
    assert_refused(apiary("privacy", "audit", tmp_path), "no config.toml")
    deployed = fake_run(tmp_path / "deployed", fake_deployment())
    assert_refused(apiary("privacy", "audit", deployed), "at a site", "--data ROWS")
    (deployed / "metrics.json").unlink()
    assert_refused(apiary("privacy", "audit", deployed), "has not finished")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text(loading.load(None, small_run).to_toml())
    (folder / "metrics.json").write_text(json.dumps(fake_metrics()))
    assert_refused(apiary("privacy", "audit", folder, "--client", "nobody"), "--client = 'nobody'", "client-00")
    assert_refused(apiary("privacy", "audit", folder, "--rounds", "9"), "--rounds = 9: the run has 3")
    (folder / "audit.json").write_text("{")
    assert_refused(apiary("report", folder), "audit.json", "not valid JSON")


@pytest.mark.slow
def test_a_site_audits_its_own_rows_with_a_deployed_runs_configuration(
    tmp_path: Path, small_run: list[str], rows_file: Path
) -> None:
    (tmp_path / "config.toml").write_text(loading.load(None, [*small_run, "data.source=elsewhere.jsonl"]).to_toml())
    done = apiary("privacy", "audit", tmp_path, "--data", rows_file, "--rounds", "1", "--canaries", "24")
    assert done.returncode == 0, done.stderr
    assert "nothing is claimed" in done.stdout and (tmp_path / "audit.json").exists()
    assert "no --state" in done.stderr


@pytest.mark.parametrize("policy", [counts.ROUNDED, counts.CountPolicy("declared", 80, 900)])
def test_the_audit_at_a_site_has_the_sites_own_split_rate_and_noise(
    policy: CountPolicy, tmp_path: Path, small_run: list[str], rows_file: Path
) -> None:
    """As the site's own worker answers the same run: the same rows held out, and the same mechanism on the others."""
    config = loading.load(None, [*small_run, *PRIVATE, "data.test_fraction=0.3", "data.source=elsewhere.jsonl"])
    (tmp_path / "config.toml").write_text(config.to_toml())
    held_out = split.Split(0.3, bytes(range(32)))  # drawn, it might leave as many rows as are planned with
    split.save(tmp_path / "state", held_out)
    facts = Facts("c", rows_file, tmp_path / "state", counts=policy)
    there = at_home(config, facts)
    own = site_worker._read_site(there, facts, "run")
    made = audit.open_bench(tmp_path, audit.Options(), audit.AtSite(str(rows_file), tmp_path / "state", policy))
    assert made.client.train == own.train and made.client.test == own.test
    public = audit.open_bench(tmp_path, audit.Options(), audit.AtSite(str(rows_file), None, policy))
    assert made.client.test != public.client.test
    (seen,) = replay.visits(made, made.client.train, 1, tmp_path / "copy", 0)
    answer = Worker(there).train(own, 1, Payload(seen.start, {}))
    assert isinstance(answer, Visit) and answer.spent is not None and seen.spent is not None
    assert seen.spent == answer.spent
    assert seen.spent.sample_rate == 10 / policy.planned([len(own.train)])[0] != 10 / len(own.train)


def test_the_audit_at_a_site_leaves_out_what_it_set_apart_for_its_own_model(
    tmp_path: Path, small_run: list[str], rows_file: Path
) -> None:
    own = ("personal.enabled=true", "personal.validation=0.3", "data.test_fraction=0.1", "seed=5")
    config = loading.load(None, [*small_run, *own, "data.source=elsewhere.jsonl"])
    (tmp_path / "config.toml").write_text(config.to_toml())
    facts = Facts("c", rows_file, tmp_path / "state")
    site = site_worker._read_site(at_home(config, facts), facts, "run")
    made = audit.open_bench(tmp_path, audit.Options(), audit.AtSite(str(rows_file), tmp_path / "state"))
    assert made.client.train == site.train and made.client.test == site.test
    assert 10 < len(made.client.validation) < 70


@pytest.mark.slow
def test_a_site_audits_a_private_run(tmp_path: Path, small_run: list[str], rows_file: Path) -> None:
    """Also by the drill on single rows, in which each row takes part whatever number the site declares."""
    (tmp_path / "config.toml").write_text(loading.load(None, [*small_run, *PRIVATE]).to_toml())
    split.save(tmp_path / "state", split.draw(0.1))
    site = ("--data", rows_file, "--state", tmp_path / "state", "--counts", "200:3000")
    done = apiary("privacy", "audit", tmp_path, *site, "--rounds", "1", "--canaries", "24", "--json")
    assert done.returncode == 0, done.stderr
    assert "no --state" not in done.stderr
    found = json.loads(done.stdout)
    assert found["claim"]["sample_rate"] == 10 / 200 and [row["rows"] for row in found["inversion"]] == [1, 2, 8]


def test_a_sites_options_are_refused_where_they_say_nothing(tmp_path: Path, small_run: list[str]) -> None:
    (tmp_path / "config.toml").write_text(loading.load(None, small_run).to_toml())
    assert_refused(apiary("privacy", "audit", tmp_path, "--counts", "exact"), "--counts is of a site", "--data")
    at = ("--data", tmp_path, "--state")
    assert_refused(apiary("privacy", "audit", tmp_path, *at, tmp_path), "holds no split.json")
    split.save(tmp_path / "state", split.draw(0.4))
    assert_refused(apiary("privacy", "audit", tmp_path, *at, tmp_path / "state"), "the site has pinned 0.4")


def test_every_report_says_what_an_update_could_tell_and_how_to_measure_it() -> None:
    for metrics in (fake_metrics(), fake_deployment()):
        text = page(metrics)
        assert "An update can tell which rows a client trained on" in text and "apiary privacy audit RUN" in text
    assert "What an update tells</h2>" not in text
