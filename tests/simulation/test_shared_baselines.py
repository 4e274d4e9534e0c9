"""Baselines that runs have alike: shared only where training anew gives the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import instruction_rows, overrides_for
from safetensors.torch import load_file

from apiary.config import loading
from apiary.config.schema import RunConfig
from apiary.core.tensors import StateDict, add
from apiary.data import injection, tokenization
from apiary.models import adapters
from apiary.tracking.event_log import read_events
from client import handlers
from client.training import trainer
from client.training.trainer import Cursor, VisitPlan
from simulation import baselines, shared_baselines
from simulation.baselines import Part, Work
from simulation.run import simulate

# A value that is not the default, nor that of the small run, for every key; None where another value cannot be trained
# here: the key's values are told apart by the test of digests alone.
OTHER: dict[str, Any] = {
    "seed": 7,
    "rounds": 5,
    "model.name": "builtin:tiny",
    "model.revision": None,
    "model.device": None,
    "model.dtype": "bfloat16",
    "model.quantization": None,
    "adapter.kind": None,
    "adapter.rank": 3,
    "adapter.alpha": 8.0,
    "adapter.scaling": "lora",
    "adapter.dropout": 0.25,
    "adapter.targets": ["q_proj"],
    "adapter.train": "b",
    "adapter.share": "a",
    "adapter.init": "orthonormal",
    "adapter.ranks": [2, 4],
    "adapter.start": None,
    "adapter.start_digest": None,
    "data.source": "other.jsonl",
    "data.split": "validation",
    "data.query": None,
    "data.test": "other.jsonl",
    "data.test_fraction": 0.4,
    "data.columns": {"instruction": "instruction", "output": "skill"},
    "data.clients": 2,
    "data.partition": {"name": "dirichlet", "alpha": 0.5, "by": "skill"},
    "data.max_rows": 60,
    "prompt.template": "alpaca",
    "prompt.system": "Be short.",
    "prompt.max_tokens": 24,
    "prompt.on_long": "drop",
    "prompt.boundary": "structured",
    "prompt.injected": 0.25,
    "train.objective": None,
    "train.steps": 4,
    "train.epochs": 0.5,
    "train.batch_tokens": 128,
    "train.accumulate": 2,
    "train.optimizer": "sgd",
    "train.lr": 1e-3,
    "train.lr_b": 4.0,
    "train.schedule": "constant",
    "train.warmup": 0.5,
    "train.weight_decay": 0.1,
    "train.clip_norm": 0.01,
    "train.penalties": [{"name": "fedprox", "mu": 0.5}],
    "train.threads": 2,
    "curate.steps": ["duplicates"],
    "curate.every": 2,
    "continual.by": "other",
    "continual.stages": [["first"], ["last"]],
    "privacy.unit": None,
    "privacy.epsilon": 4.0,
    "privacy.delta": 1e-6,
    "privacy.clip": 0.5,
    "privacy.batch_rows": 8,
    "privacy.noise_multiplier": 1.0,
    "privacy.accountant": "rdp",
    "strategy.name": "auto",
    "strategy.options": {},
    "strategy.root": None,
    "strategy.server_optimizer": {"name": "nesterov", "lr": 0.7},
    "strategy.weighting": "uniform",
    "strategy.norm_guard": 0.0,
    "strategy.weight_cap": 0.0,
    "strategy.fraction": 0.7,
    "strategy.min_clients": 1,
    "strategy.quorum": 0.9,
    "strategy.deadline_s": 9.0,
    "strategy.join_timeout_s": 9.0,
    "wire.up": "int8",
    "wire.down": "int8",
    "evaluate.every": 0,
    "evaluate.limit": 0.0,
    "evaluate.max_examples": 5,
    "evaluate.clients": False,
    "evaluate.generate": False,
    "evaluate.max_new_tokens": 3,
    "evaluate.baselines": ["base"],
    "evaluate.patience": 2,
    "evaluate.samples": 1,
    "evaluate.set_apart": True,
    "simulate.engine": "ray",
    "simulate.cpus_per_client": 2,
    "simulate.gpus_per_client": 0.5,
    "simulate.attackers": 0.3,
    "simulate.attack": "scaled",
    "simulate.away": 0.3,
    "simulate.failing": 0.3,
    "simulate.relays": 2,
    "log.trackers": ["tensorboard"],
    "log.project": "other",
}


def test_every_key_is_asked_about() -> None:
    ours = {name for name, _, _ in loading.describe()}
    assert {name for name in OTHER if name.partition(".")[0] != "continual"} <= ours
    missing = {name for name in ours - OTHER.keys() if not name.startswith(("continual.", "personal."))}
    assert missing == set()


def direct(config: RunConfig, work: Work, total: int) -> StateDict:
    """The baseline by the trainer alone, from the whole configuration: no narrowing, no sharing."""
    lm = adapters.load(config.model, config.adapter.of_rank(work.rank))
    template = tokenization.make_template(config.prompt, lm.tokenizer)
    train = config.train.model_copy(update={"accumulate": config.train.accumulate * work.width})
    adapter, cursor, first = adapters.fresh_adapter(lm, config.seed), Cursor(), 0
    for number, part in enumerate(work.parts):
        if number and part.rows != work.parts[number - 1].rows:
            cursor = Cursor(cursor.epoch + 1)
        corpus = injection.encode_training(part.rows, template, lm.tokenizer, config.prompt)
        visit = VisitPlan(config.seed, work.client, part.steps, total, first, cursor, factors=part.factors)
        done = trainer.fit(lm, adapter, corpus, train, visit)
        adapter, cursor, first = add(adapter, done.delta), done.cursor, first + part.steps
    return adapter


def digest(config: RunConfig, work: Work, total: int) -> str:
    lm = adapters.load(config.model, config.adapter.of_rank(work.rank))
    return baselines.key(lm, config, tokenization.make_template(config.prompt, lm.tokenizer), work, total)


def planned(config: RunConfig, folder: Path) -> tuple[Work, int]:
    """What the run would train as the baseline of its first client if every visit made `train.steps` steps."""
    client = handlers.federation(config.to_json()).clients[0]
    steps, factors = config.train.steps or 1, config.adapter.trained(1)
    work = Work("local", client.name, config.adapter.rank, (Part(client.train, factors, 2 * steps),), 1, folder)
    return work, round(2 * steps * config.rounds / 2)


@pytest.mark.slow
def test_sharing_is_only_where_training_anew_gives_the_same_bits(
    tmp_path: Path, tiny_model: Path, rows_file: Path
) -> None:
    """Each key is changed by itself; where the digest stays, so must the adapter of a direct fit."""
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in instruction_rows(90, seed=5)))
    start = overrides_for(tiny_model, rows_file)
    plain = loading.load(None, start)
    reference = direct(plain, *planned(plain, tmp_path))
    same_digest = digest(plain, *planned(plain, tmp_path))
    shared, told_apart = set(), set()
    for key, value in OTHER.items():
        if value is None:
            continue
        more = [f"{key}={loading.toml_text.shown(str(tmp_path / value) if value == 'other.jsonl' else value)}"]
        more += ["data.partition=iid"] if key == "data.clients" else []
        try:
            config = loading.load(None, [*start, *more])
            work, total = planned(config, tmp_path)
        except loading.UserError:
            continue  # not alone: refused with the others of this run
        if digest(config, work, total) != same_digest:
            told_apart.add(key)
            continue
        shared.add(key)
        trained = direct(config, work, total)
        assert trained.keys() == reference.keys() and all(torch.equal(trained[n], reference[n]) for n in trained), key
    # What a sweep varies most: with the server's side alone the baselines are shared, with the clients' they are not.
    assert {
        "strategy.server_optimizer",
        "strategy.weighting",
        "train.penalties",
        "wire.up",
        "evaluate.patience",
    } <= shared
    assert {"seed", "rounds", "train.lr", "train.steps", "adapter.rank", "adapter.alpha", "data.source"} <= told_apart
    assert {"adapter.dropout", "prompt.template", "model.dtype", "train.threads", "adapter.train"} <= told_apart


def test_the_digest_is_of_rows_steps_factors_and_schedule(tmp_path: Path, small_run: list[str]) -> None:
    config = loading.load(None, small_run)
    work, total = planned(config, tmp_path)
    (part,) = work.parts
    others = [
        work._replace(client="client-01"),
        work._replace(width=2),
        work._replace(parts=(part._replace(rows=part.rows[:-1]),)),
        work._replace(parts=(part._replace(rows=[*part.rows[1:], part.rows[0]]),)),
        work._replace(parts=(part._replace(steps=part.steps + 1),)),
        work._replace(parts=(part._replace(factors="b"),)),
        work._replace(parts=(part._replace(steps=1), part._replace(steps=part.steps - 1))),
    ]
    found = [digest(config, work, total), digest(config, work, total + 1), *(digest(config, w, total) for w in others)]
    assert len(set(found)) == len(found)
    assert digest(config, work._replace(folder=tmp_path / "elsewhere", method="any"), total) == found[0]


def test_a_narrowed_configuration_trains_the_same_bits(tmp_path: Path, small_run: list[str]) -> None:
    more = ["train.penalties=[{name='fedprox', mu=0.5}]", "strategy.server_optimizer=nesterov", "adapter.dropout=0.2"]
    config = loading.load(None, [*small_run, *more])
    work, total = planned(config, tmp_path / "made")
    lm = adapters.load(config.model, config.adapter)
    made = baselines._train(lm, config, tokenization.make_template(config.prompt, lm.tokenizer), work, total)
    expected = direct(config, work, total)
    assert all(torch.equal(made.adapter[name], tensor) for name, tensor in expected.items())


def test_a_baseline_is_trained_once_and_copied(tmp_path: Path) -> None:
    trained: list[str] = []

    def train(folder: Path) -> None:
        trained.append(folder.name)
        folder.mkdir()
        (folder / "weights").write_text(folder.name)

    first = shared_baselines.fetch(tmp_path / "all", "k", tmp_path / "a", lambda: train(tmp_path / "a"))
    again = shared_baselines.fetch(tmp_path / "all", "k", tmp_path / "b", lambda: train(tmp_path / "b"))
    other = shared_baselines.fetch(tmp_path / "all", "l", tmp_path / "c", lambda: train(tmp_path / "c"))
    assert (first, again, other) == (False, True, False)
    assert trained == ["a", "c"]
    assert (tmp_path / "b" / "weights").read_text() == "a"
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"k", "l"}
    (tmp_path / "all" / ".m.123.tmp").mkdir()  # of one that was killed on the way
    assert shared_baselines.count(tmp_path / "all") == 2
    shared_baselines.sweep(tmp_path / "all")
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"k", "l"}


def test_what_fails_while_it_trains_is_not_shared(tmp_path: Path) -> None:
    def fail() -> None:
        raise FloatingPointError

    with pytest.raises(FloatingPointError):
        shared_baselines.fetch(tmp_path, "k", tmp_path / "a", fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_runs_that_differ_in_the_server_alone_share_and_others_do_not(tmp_path: Path, small_run: list[str]) -> None:
    """Whole runs: what is shared is what the run would have trained by itself."""
    quiet = [*small_run, "evaluate.generate=false", "rounds=2"]
    changed = {"first": [], "nesterov": ["strategy.server_optimizer=nesterov"], "rate": ["train.lr=1e-3"]}
    for name, more in changed.items():
        simulate(loading.load(None, [*quiet, *more]), tmp_path / name, shared=tmp_path / "shared")
    simulate(loading.load(None, [*quiet, *changed["nesterov"]]), tmp_path / "alone")
    assert len(list((tmp_path / "shared").iterdir())) == 2 * 5  # three clients and two that are pooled, for two rates
    for place in ("local/client-00", "local/client-02", "central", "central_serial"):
        files = [tmp_path / run / "baselines" / place for run in ("nesterov", "alone")]
        shared, trained = (load_file(folder / "adapter_model.safetensors") for folder in files)
        assert all(torch.equal(shared[name], tensor) for name, tensor in trained.items())
        accounts = [json.loads((folder / "fit.json").read_text()) for folder in files]
        assert [a.pop("seconds") >= 0 for a in accounts] == [True, True]
        assert accounts[0] == accounts[1]
    table = [json.loads((tmp_path / run / "metrics.json").read_text())["table"] for run in ("nesterov", "alone")]
    assert table[0] == table[1]
    assert len([e for e in read_events(tmp_path / "nesterov") if e["event"] == "baseline"]) == 5
