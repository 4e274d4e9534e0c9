"""How often 95% intervals of a difference in loss are wrong, by method, by number of rows, and by number of seeds.

`train` makes the default federation several times with nothing changed but the order of each client's batches, one
client alone, and pooled training, and scores all of them and the untuned base on all 6,000 held-out rows of the
built-in corpus. `measure` takes these rows as the population: a pair of models, its differences shifted so that the
two models have the same loss on the whole population. Rows are drawn from it with replacement, and an interval that
leaves out zero is a false 'clear' difference: 5% of the draws should give one.

python benchmarks/intervals.py [--orders 6] [--draws 2000] [--losses FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apiary.config import loading
from apiary.core.tensors import StateDict, add
from apiary.data import tokenization
from apiary.data.batches import Corpus
from apiary.data.examples import Example
from apiary.data.federation import federate
from apiary.models import adapters
from apiary.models.inference import ModelProbe
from apiary.tracking.environment import machine
from client.training import trainer

RESULTS = Path(__file__).parent / "results" / "intervals.json"
Floats = NDArray[np.float64]


class Trainings:
    """The default federation's data and model, and what has been scored so far, which a file keeps."""

    def __init__(self, keep: Path) -> None:
        self.config = loading.load(None, [])
        self.keep = keep
        self.scored: dict[str, Floats] = dict(np.load(keep)) if keep.exists() else {}
        self.lm = adapters.load(self.config.model, self.config.adapter)
        self.start: StateDict = adapters.fresh_adapter(self.lm, self.config.seed)
        federation = federate(self.config.data, self.config.seed)
        self.held_out = self._encode(federation.test)
        self.corpora = {client.name: self._encode(client.train) for client in federation.clients}
        self.pooled = self._encode([example for client in federation.clients for example in client.train])
        self.steps = self.config.train.steps or 1

    def _encode(self, rows: Sequence[Example]) -> Corpus:
        template = tokenization.make_template(self.config.prompt, self.lm.tokenizer)
        return tokenization.encode_all(rows, template, self.lm.tokenizer, self.config.prompt)

    def score(self, name: str, train: Callable[[], StateDict]) -> None:
        """Train a model, unless it was, and keep its nats on each held-out row."""
        if name in self.scored:
            return
        adapters.set_adapter(self.lm, train())
        nats, tokens = ModelProbe(self.lm).losses(self.held_out)
        self.scored |= {name: nats, "tokens": tokens.astype(np.float64)}
        np.savez_compressed(self.keep, **self.scored)  # type: ignore[arg-type]
        print(f"{name}: {nats.sum() / tokens.sum():.4f}", flush=True)

    def federated(self, order: int) -> StateDict:
        """Averaging, as the run does it; `order` seeds the batches of each client and nothing else."""
        adapter = self.start
        total = self.config.rounds * self.steps
        cursors = dict.fromkeys(self.corpora, trainer.Cursor())
        for number in range(self.config.rounds):
            made = {}
            for name, corpus in self.corpora.items():
                plan = trainer.VisitPlan(
                    order, name, self.steps, total, first_step=number * self.steps, cursor=cursors[name]
                )
                made[name] = trainer.fit(self.lm, adapter, corpus, self.config.train, plan)
                cursors[name] = made[name].cursor
            whole = sum(result.report.tokens for result in made.values())
            for result in made.values():
                share = result.report.tokens / whole
                adapter = add(adapter, {name: share * tensor for name, tensor in result.delta.items()})
        return adapter

    def alone(self, name: str, corpus: Corpus, visits: int = 1) -> StateDict:
        """Training on one corpus, in as many steps as `visits` clients make in the run."""
        steps = self.config.rounds * self.steps * visits
        plan = trainer.VisitPlan(self.config.seed, name, steps, steps)
        return add(self.start, trainer.fit(self.lm, self.start, corpus, self.config.train, plan).delta)


def train(orders: int, keep: Path) -> dict[str, Floats]:
    """Nats of each held-out row by model, and `tokens`: its response tokens."""
    made = Trainings(keep)
    made.score("base", lambda: made.start)
    first = next(iter(made.corpora))
    for order in range(orders):
        made.score(f"federated {order}", lambda order=order: made.federated(order))  # type: ignore[misc]
        made.score("local", lambda: made.alone(first, made.corpora[first]))
        if order == 1:
            made.score("central", lambda: made.alone("central", made.pooled, len(made.corpora)))
    return made.scored


def measure(scored: dict[str, Floats], draws: int) -> dict[str, Any]:
    raise NotImplementedError


def main() -> None:
    """Train unless the losses are there, measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orders", type=int, default=6, help="trainings that differ in the order of batches alone")
    parser.add_argument("--draws", type=int, default=2000, help="samples of rows for each figure")
    parser.add_argument("--losses", type=Path, default=Path("losses.npz"), help="keeps what is trained")
    args = parser.parse_args()
    scored = train(args.orders, args.losses)
    found = {"machine": machine(), "settings": {"orders": args.orders, "draws": args.draws}}
    RESULTS.write_text(json.dumps({**found, **measure(scored, args.draws)}, indent=1) + "\n")
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
