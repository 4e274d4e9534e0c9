"""How often 95% intervals of a difference in loss are wrong, by method and by number of rows and seeds.

First the federation of federation.toml is trained six times with nothing changed but the order of each client's
batches, then one client alone, and all data pooled; all of these and the untuned base are scored on the 6,000
held-out rows of the built-in corpus. These rows are the population: of a pair of models the differences are shifted so
that both have the same loss on all of it. Rows are drawn from it with replacement, and an interval that leaves out
zero is a false 'clear' difference, which should happen in 5% of the draws. One population more is made up, with a
longer tail.

python benchmarks/intervals.py [--draws 4000] [--losses FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from apiary.config import loading
from apiary.core.tensors import StateDict, add
from apiary.data import tokenization
from apiary.data.batches import Corpus
from apiary.data.examples import Example
from apiary.data.federation import federate
from apiary.evaluation import intervals
from apiary.evaluation.intervals import SeedRows
from apiary.models import adapters
from apiary.models.inference import ModelProbe
from apiary.tracking.environment import machine
from client.training import trainer

RESULTS = Path(__file__).parent / "results" / "intervals.json"
Floats = NDArray[np.float64]
ROWS = (10, 20, 40, 60, 120, 240)
METHODS = ("percentile", "BCa", "Student", "bootstrap-t", "farther of the two")
TAILS = (0.025, 0.975)
ORDERS, BOOTSTRAPS, SAMPLES = 6, 2000, 40


class Trainings:
    """The federation's data and model, and what has been scored so far, which a file keeps."""

    def __init__(self, keep: Path) -> None:
        self.config = loading.load(Path(__file__).with_name("federation.toml"), [])
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
        np.savez_compressed(self.keep, **self.scored)
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


def train(keep: Path) -> dict[str, Floats]:
    """Nats of each held-out row by model, and `tokens`: its response tokens."""
    made = Trainings(keep)
    made.score("base", lambda: made.start)
    first = next(iter(made.corpora))
    for order in range(ORDERS):
        made.score(f"federated {order}", lambda order=order: made.federated(order))
        made.score("local", lambda: made.alone(first, made.corpora[first]))
        if order == 1:
            made.score("central", lambda: made.alone("central", made.pooled, len(made.corpora)))
    return made.scored


def measure(scored: dict[str, Floats], draws: int) -> dict[str, Any]:
    """False 'clear' differences by method and rows, between two orders of batches, and of shares of hits."""
    tokens = scored["tokens"]
    runs = [scored[name] for name in sorted(scored) if name.startswith("federated ")]
    rng = np.random.default_rng(0)
    pairs = {
        "another order of batches": [runs[i] - runs[i + 1] for i in range(0, len(runs) - 1, 2)],
        "trained alone": [runs[0] - scored["local"]],
        "pooled": [runs[0] - scored["central"]],
        "untuned": [runs[0] - scored["base"]],
        "made up: lognormal": [tokens * np.exp(rng.normal(size=len(tokens)))],
    }
    found = []
    for name, differences in pairs.items():
        for n in ROWS:
            shares = [_wrong(values, tokens, n, draws, rng) for values in differences]
            found.append(
                {"pair": name, "rows": n, **{m: np.mean([s[m] for s in shares], axis=0).tolist() for m in METHODS}}
            )
    return {"population": len(tokens), "rows": found, "orders": orders(runs, tokens), "shares": shares_of_hits()}


def _wrong(values: Floats, tokens: Floats, n: int, draws: int, rng: np.random.Generator) -> dict[str, list[float]]:
    """By method the share of intervals that lie above zero, and below, and their median width; zero is the truth."""
    null = values - values.sum() / tokens.sum() * tokens
    drawn = rng.integers(0, len(tokens), (n, draws))
    counts = rng.multinomial(n, np.full(n, 1 / n), size=BOOTSTRAPS).astype(np.float64)  # one set for all draws
    return {
        method: [float((low > 0).mean()), float((high < 0).mean()), float(np.median(high - low))]
        for method, (low, high) in ends(null[drawn], tokens[drawn], counts).items()
    }


def ends(v: Floats, w: Floats, counts: Floats) -> dict[str, tuple[Floats, Floats]]:
    """By method the ends (k,) of the intervals of k samples (n, k), from the draws of rows `counts` (draws, n)."""
    n = len(v)
    total = counts @ w
    ratio, ratios = v.sum(0) / w.sum(0), (counts @ v) / total
    factor = n / (n - 1)
    error = np.sqrt(factor * ((v - ratio * w) ** 2).sum(0)) / w.sum(0)
    squares = counts @ v**2 - 2 * ratios * (counts @ (v * w)) + ratios**2 * (counts @ w**2)
    with np.errstate(divide="ignore", invalid="ignore"):
        pivots = np.nan_to_num((ratios - ratio) * total / np.sqrt(np.maximum(factor * squares, 0)))
    low, high = np.quantile(pivots, TAILS, axis=0)
    student = float(special.stdtrit(n - 1, TAILS[1]))
    return {
        "percentile": tuple(np.quantile(ratios, TAILS, axis=0)),
        "BCa": _bca(v, w, ratio, np.sort(ratios, axis=0)),
        "Student": (ratio - student * error, ratio + student * error),
        "bootstrap-t": (ratio - high * error, ratio - low * error),
        "farther of the two": (
            ratio - np.maximum(student, high) * error,
            ratio + np.maximum(student, -low) * error,
        ),
    }


def _bca(v: Floats, w: Floats, ratio: Floats, ratios: Floats) -> tuple[Floats, Floats]:
    """Bias-corrected and accelerated (Efron 1987): `ratios` (draws, k) are sorted."""
    below = ((ratios < ratio).mean(0) + (ratios <= ratio).mean(0)) / 2
    bias = special.ndtri(np.clip(below, 1 / len(ratios), 1 - 1 / len(ratios)))
    left_out = (v.sum(0) - v) / (w.sum(0) - w)
    u = left_out.mean(0) - left_out
    acceleration = (u**3).sum(0) / (6 * (u**2).sum(0) ** 1.5)
    found = []
    for tail in TAILS:
        z = bias + special.ndtri(tail)
        at = special.ndtr(bias + z / (1 - acceleration * z)) * (len(ratios) - 1)
        found.append(ratios[np.round(at).astype(int), np.arange(v.shape[1])])
    return found[0], found[1]


def orders(runs: list[Floats], tokens: Floats) -> dict[str, Any]:
    """How often trainings that differ in the order of batches alone come out as clearly different on 240 rows.

    Over rows: of two such trainings. Over seeds and rows: three against three others.
    """
    rng = np.random.default_rng(1)
    pairs = list(itertools.combinations(range(len(runs)), 2))
    threes = [(half, rest) for half in itertools.combinations(range(6), 3) if 0 in half for rest in [_rest(half)]]
    one = many = 0
    for _ in range(SAMPLES):
        rows = rng.choice(len(tokens), 240, replace=False)
        keys, w = [str(row) for row in rows], tokens[rows]
        for a, b in pairs:
            found = intervals.over_rows((runs[a] - runs[b])[rows], w, seed=0)
            one += found is not None and (found[0] > 0 or found[1] < 0)
        for half, rest in threes:
            seeds = [SeedRows(keys, (runs[a] - runs[b])[rows], w) for a, b in zip(half, rest, strict=True)]
            over = intervals.over_seeds_and_rows(seeds).ends
            many += over is not None and (over[0] > 0 or over[1] < 0)
    losses = [float(run.sum() / tokens.sum()) for run in runs]
    return {
        "losses": losses,
        "sd": float(np.std(losses, ddof=1)),
        "samples": SAMPLES,
        "two": [int(one), SAMPLES * len(pairs)],
        "three against three": [int(many), SAMPLES * len(threes)],
    }


def _rest(half: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(number for number in range(6) if number not in half)


def shares_of_hits() -> list[dict[str, float]]:
    """How often intervals of a share of exact matches leave out the true one, by its binomial distribution."""
    found = []
    for true, n in itertools.product((0.01, 0.1, 0.4), (10, 60, 240)):
        hits = np.arange(n + 1)
        chance = stats.binom.pmf(hits, n, true)
        low, high = (stats.binom.ppf(tail, n, hits / n) / n for tail in TAILS)
        score = np.array([intervals.of_share(np.repeat([1.0, 0.0], [k, n - k])) for k in hits])
        found.append(
            {
                "true": true,
                "rows": n,
                "percentile": float(chance[(low > true) | (high < true)].sum()),
                "score": float(chance[(score[:, 0] > true) | (score[:, 1] < true)].sum()),
            }
        )
    return found


def main() -> None:
    """Train unless the losses are there, measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4000, help="samples of rows for each figure")
    parser.add_argument("--losses", type=Path, default=Path("losses.npz"), help="keeps what is trained")
    args = parser.parse_args()
    scored = train(args.losses)
    found = {"machine": machine(), "settings": {"orders": ORDERS, "draws": args.draws}}
    RESULTS.write_text(json.dumps({**found, **measure(scored, args.draws)}, indent=1) + "\n")
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
