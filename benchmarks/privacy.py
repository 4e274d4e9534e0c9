"""What record-level privacy costs: held-out loss and exact match by epsilon, and the time of a step.

The recipe configs/private.toml, in one process and without a server: every round each client trains from the same
adapter, and the changes are averaged. "no noise" draws and clips rows as the private runs do, so what is lost from
"not private" to it is the price of clipping and of the sampler, and the rest that of noise. Both, and every epsilon,
make the same number of steps on the same number of rows. Private runs train at the recipe's rate, which was picked by
trials on seed 0; those without noise at the default rate, which suits them better.

python benchmarks/privacy.py [--seeds 3] [--epsilons 16,8,3] [-s KEY=VALUE]...
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from apiary.config import loading
from apiary.config.schema import RunConfig, TrainConfig
from apiary.core.tensors import StateDict, add
from apiary.data import tokenization
from apiary.data.batches import Corpus
from apiary.data.federation import federate
from apiary.evaluation import comparison
from apiary.models import adapters
from apiary.privacy import sampling
from apiary.privacy.accounting import Mechanism, epsilon
from apiary.privacy.mechanism import BlankedRow, VisitMechanism
from apiary.privacy.noise import SecretNoise
from apiary.privacy.sampling import Draw
from apiary.tracking.environment import machine
from client.training import dp_sgd, trainer
from client.training.trainer import FitResult

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "privacy.json"
_KEY = bytes(32)  # a measurement is to be repeated; nothing here is secret


class Setting(NamedTuple):
    """A seed's model, data and held-out examples."""

    config: RunConfig
    lm: adapters.LanguageModel
    corpora: dict[str, Corpus]
    held_out: comparison.HeldOut


Visit = Callable[[str, Corpus, StateDict, int], FitResult]  # client, rows, received adapter, round from 0


def open_setting(config: RunConfig) -> Setting:
    lm = adapters.load(config.model, config.adapter)
    template = tokenization.make_template(config.prompt, lm.tokenizer)
    federation = federate(config.data, config.seed)
    corpora = {
        c.name: tokenization.encode_all(c.train, template, lm.tokenizer, config.prompt) for c in federation.clients
    }
    return Setting(config, lm, corpora, comparison.prepare(federation.test, template, lm, config))


def private_visit(setting: Setting, rounds: Mapping[str, Mechanism]) -> Visit:
    """Visits that cost each client what `rounds` says."""
    config = setting.config

    def visit(client: str, corpus: Corpus, adapter: StateDict, number: int) -> FitResult:
        each = rounds[client]
        noise, sampling = (SecretNoise(_KEY, p, f"{config.seed} {client} {number}") for p in ("noise", "rows"))
        return dp_sgd.fit_private(
            setting.lm,
            adapter,
            corpus,
            config,
            dp_sgd.PrivateVisit(
                VisitMechanism(
                    Draw(each.steps, each.sample_rate, 0.0, 0),
                    BlankedRow(config.privacy.clip),
                    each.noise_multiplier,
                    config.privacy.batch_rows,
                ),
                len(corpus),
                noise,
                sampling,
                first_step=number * each.steps,
                total_steps=config.rounds * each.steps,
            ),
        )

    return visit


def plain_visit(setting: Setting, steps: int) -> Visit:
    """Ordinary visits whose steps see about as many rows as the private ones expect."""
    config = setting.config
    cursors: dict[str, trainer.Cursor] = {}

    def visit(client: str, corpus: Corpus, adapter: StateDict, number: int) -> FitResult:
        tokens = config.privacy.batch_rows * float(corpus.lengths.mean())
        train = config.train.model_copy(update={"batch_tokens": int(tokens), "accumulate": 1, "clip_norm": 1.0})
        plan = trainer.VisitPlan(
            seed=config.seed,
            client=client,
            steps=steps,
            total_steps=config.rounds * steps,
            first_step=number * steps,
            cursor=cursors.get(client, trainer.Cursor()),
        )
        result = trainer.fit(setting.lm, adapter, corpus, train, plan)
        cursors[client] = result.cursor
        return result

    return visit


def federated(setting: Setting, visit: Visit) -> tuple[StateDict, float]:
    """The adapter after all rounds of plain averaging, and the median seconds of an optimizer step."""
    adapter: StateDict = adapters.fresh_adapter(setting.lm, setting.config.seed)
    seconds = []
    for number in range(setting.config.rounds):
        deltas = []
        for client, corpus in setting.corpora.items():
            began = time.perf_counter()
            result = visit(client, corpus, adapter, number)
            seconds.append((time.perf_counter() - began) / result.report.steps)
            deltas.append(result.delta)
        for delta in deltas:
            adapter = add(adapter, delta, 1 / len(deltas))
    return adapter, statistics.median(seconds)


def row(setting: Setting, name: str, visit: Visit, **more: float) -> dict[str, Any]:
    adapter, seconds = federated(setting, visit)
    measured = comparison.measure(setting.lm, adapter, setting.held_out, setting.config)
    found = {
        "seed": setting.config.seed,
        "method": name,
        "loss": round(measured.loss, 4),
        "accuracy": None if measured.accuracy is None else round(measured.accuracy, 4),
        "seconds_per_step": round(seconds, 4),
        **more,
    }
    print(json.dumps(found), flush=True)
    return found


def compare(config: RunConfig, epsilons: list[float]) -> list[dict[str, Any]]:
    """All rows of one seed: untuned, not private, no noise, and each epsilon."""
    setting = open_setting(config)
    untuned = adapters.fresh_adapter(setting.lm, config.seed)  # not None: the model still holds the last seed's
    base = comparison.measure(setting.lm, untuned, setting.held_out, config)
    rows: list[dict[str, Any]] = [
        {"seed": config.seed, "method": "base", "loss": round(base.loss, 4), "accuracy": base.accuracy}
    ]
    sizes = {client: len(corpus) for client, corpus in setting.corpora.items()}
    quiet = {client: _round(config, size, noise_multiplier=1.0) for client, size in sizes.items()}
    train = config.train.model_copy(update={"lr": TrainConfig().lr})
    gentle = setting._replace(config=config.model_copy(update={"train": train}))
    rows.append(row(gentle, "not private", plain_visit(gentle, next(iter(quiet.values())).steps)))
    silent = {client: each._replace(noise_multiplier=0.0) for client, each in quiet.items()}
    rows.append(row(gentle, "no noise", private_visit(gentle, silent)))
    for budget in epsilons:
        made = {client: _round(config, size, epsilon=budget) for client, size in sizes.items()}
        whole = [each._replace(steps=each.steps * config.rounds) for each in made.values()]
        claims = {
            "epsilon": round(max(epsilon([run], config.privacy.delta) for run in whole), 4),
            "epsilon_rdp": round(max(epsilon([run], config.privacy.delta, "rdp") for run in whole), 4),
            "noise_multiplier": round(max(run.noise_multiplier for run in whole), 4),
        }
        rows.append(row(setting, f"epsilon {budget:g}", private_visit(setting, made), **claims))
    return rows


def _round(config: RunConfig, rows: int, **privacy: Any) -> Mechanism:
    """What each round costs the rows of a client with so many, with some keys of `privacy` changed."""
    changed = config.model_copy(update={"privacy": config.privacy.model_copy(update=privacy)})
    drawn = sampling.draw(changed, [rows], 1)
    assert drawn is not None
    return Mechanism(sampling.noise_multiplier(changed, [rows]), drawn.new, drawn.steps)


def main() -> None:
    """Run the seeds one after the other and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "private.toml")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epsilons", default="16,8,3")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("-s", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    budgets = [float(text) for text in args.epsilons.split(",") if text]
    rows = []
    for seed in range(args.seeds):
        config = loading.load(args.config, [*args.overrides, f"seed={seed}"])
        rows += compare(config, budgets)
    args.out.parent.mkdir(exist_ok=True)
    settings = {"rounds": config.rounds, "clients": config.data.clients, "privacy": config.privacy.model_dump()}
    args.out.write_text(
        json.dumps({"machine": machine(gpu=False), "settings": settings, "runs": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
