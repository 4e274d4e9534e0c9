"""The whole private visit as it runs in a federation, judged from outside: by what is released and what is charged.

Real messages go to a ClientApp; what comes back, and the ledger on the site's disk, is all that is looked at. Who looks
knows every row and the adapter that was sent. A visit of T steps of gradient descent with a small rate releases

    -lr / batch_rows * ( sum over rows of c_i clip(g_i)  +  N(0, T (z C)^2) ),      c_i ~ Binomial(T, q)

so least squares on the clipped gradients, each worked out by plain autograd, gives the counts c_i, and what is left
over is the noise. Three things are tested against the charge, each with a false alarm probability of 6e-7 (5
deviations):

- the variance of what is left over, d - n numbers a visit: T (z C lr / batch_rows)^2, a chi-squared test;
- the sum of all c_i, over 9 visits of 2 steps with about 33 rows: Binomial, of mean n q T;
- counts and noise of two federations that differ in their secret keys alone, request names included: uncorrelated.

Half the noise has a quarter of the variance, more than 50 deviations off. Twice the rate moves the sum by more than 12
of its deviations, and is missed with a probability below 1e-9. A stream without the key in it has correlation 1.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import small_models
import torch
from conftest import overrides_for
from flwr.app import ArrayRecord, Message

from apiary.config import loading
from apiary.config.schema import RunConfig
from apiary.core.messages import Visit
from apiary.core.tensors import StateDict
from apiary.data import tokenization
from apiary.data.batches import collate
from apiary.models import adapters
from apiary.models.loss import row_losses
from apiary.privacy import noise
from apiary.privacy.ledger import Ledger, save_ledger
from apiary.privacy.mechanism import VisitMechanism
from apiary.privacy.noise import SecretNoise
from apiary.transport import codec, flower_records
from apiary.transport.from_config import configured_codec
from client import app as client_app
from client import handlers, private_visit
from client.training import dp_sgd
from simulation import engines
from simulation.in_process_grid import LocalGrid

pytestmark = pytest.mark.slow
ROUNDS, STEPS, EXPECTED, CLIP, NOISE = 3, 2, 8, 0.1, 0.01
LR = 5e-3  # so small that the first step hardly moves the gradients of the second
FAR = 5.0  # deviations; 6e-7 of a normal distribution lies beyond


class Released(NamedTuple):
    """A visit, as it looks from outside."""

    counts: np.ndarray  # (n,) how often each row was drawn, estimated
    errors: np.ndarray  # (n, n) covariance of the estimates that the charged noise makes
    left: np.ndarray  # (d,) the noise beside the gradients, over the deviation that was charged
    rates: np.ndarray  # (n,) as charged
    steps: int  # as charged


def configuration(model: Path, rows: Path) -> RunConfig:
    train = [f"train.steps={STEPS}", "train.optimizer=sgd", f"train.lr={LR}", "train.warmup=0"]
    private = ["privacy.unit=record", f"privacy.batch_rows={EXPECTED}", f"privacy.clip={CLIP}", "privacy.epsilon=1e9"]
    more = [*train, "train.schedule=constant", *private, f"privacy.noise_multiplier={NOISE}"]
    return loading.load(None, [*overrides_for(model, rows), *more])


class Federation:
    """Clients with secret keys of their own, asked as a server asks them."""

    def __init__(self, config: RunConfig, folder: Path, keys: str) -> None:
        handlers.forget()
        self._config, self._clients = config, folder / "clients"
        app = client_app.make_app(engines.site_facts(config.to_json(), folder))
        self._grid = LocalGrid(app, config.data.clients)
        self._lm = adapters.load(config.model, config.adapter)
        self._adapter = small_models.random_state(adapters.get_adapter(self._lm))
        self._sites = handlers.federation(config.to_json()).clients
        for name, *_ in self._sites:
            (self._clients / name).mkdir(parents=True)
            save_ledger(self._clients / name / "ledger.json", Ledger())
            (self._clients / name / noise.KEY_FILE).write_bytes(hashlib.sha256(f"{keys} {name}".encode()).digest())

    def visits(self) -> list[Released]:
        """All clients in all rounds."""
        gradients = [self._gradients(train) for _, train, *_ in self._sites]
        return [self._seen(*self._ask(at, number), gradients[at]) for number in range(1, ROUNDS + 1) for at in range(3)]

    def _ask(self, at: int, number: int) -> tuple[StateDict, dict[str, Any]]:
        """The change that a client released, and what its ledger was charged with."""
        content = flower_records.request(number, flower_records.to_arrays(self._adapter), ArrayRecord())
        (reply,) = self._grid.send_and_receive([Message(content, 1000 + at, "train", group_id=str(number))])
        visit = flower_records.read_train_reply(reply.content)
        assert isinstance(visit, Visit)
        entry = json.loads((self._clients / self._sites[at][0] / "ledger.json").read_text())["entries"][-1]
        assert visit.spent is not None and visit.spent.noise_multiplier == entry["noise_multiplier"]
        assert entry["round"] == number and visit.spent.sample_rate == max(entry["rates"].values())
        assert visit.spent.steps == number * entry["steps"]
        up = configured_codec(self._config, "up")
        return codec.decode(flower_records.read_message(reply.content), up, codec.shapes_of(self._adapter)), entry

    def _gradients(self, train: Any) -> np.ndarray:
        """(d, n) each row's clipped gradient at the adapter that is sent."""
        worker = handlers.worker(self._config.to_json())
        adapters.set_adapter(self._lm, self._adapter)
        corpus = tokenization.encode_all(train, worker.template, worker.tokenizer, self._config.prompt)
        assert len(corpus) == len(train)
        columns = []
        for row in range(len(corpus)):
            batch = collate(corpus, np.array([row]), 0)
            loss = row_losses(self._lm.model, batch).sum() / batch.targets.sum()
            found = torch.autograd.grad(loss, list(self._lm.adapter.values()))
            columns.append(flat(dict(zip(self._lm.adapter, found, strict=True))))
        made = np.stack(columns, 1)
        return made * np.minimum(1.0, CLIP / np.linalg.norm(made, axis=0))

    def _seen(self, delta: StateDict, entry: dict[str, Any], gradients: np.ndarray) -> Released:
        (rate,) = entry["rates"].values()
        total = flat({name: delta[name] for name in self._lm.adapter}) * -EXPECTED / LR
        std = math.sqrt(entry["steps"]) * entry["noise_multiplier"] * CLIP
        inverse = np.linalg.inv(gradients.T @ gradients)
        counts = inverse @ (gradients.T @ total)
        left = (total - gradients @ counts) / std
        return Released(counts, std**2 * inverse, left, np.full(len(counts), rate), entry["steps"])


def flat(state: StateDict) -> np.ndarray:
    return torch.cat([t.detach().double().flatten() for t in state.values()]).numpy()


def findings(one: list[Released], other: list[Released]) -> set[str]:
    """In what the released updates of two federations, of different keys alone, contradict what was charged."""
    both = [*one, *other]
    freedom = sum(len(visit.left) - len(visit.counts) for visit in both)
    variance = (sum(float(visit.left @ visit.left) for visit in both) / freedom - 1) / math.sqrt(2 / freedom)
    drawn, expected, spread = 0.0, 0.0, 0.0
    for visit in one:  # one federation of nine visits has the power that is stated
        drawn += float(visit.counts.sum())
        expected += visit.steps * float(visit.rates.sum())
        spread += visit.steps * float((visit.rates * (1 - visit.rates)).sum()) + float(visit.errors.sum())
    found = {"noise": abs(variance) > FAR, "rate": abs(drawn - expected) > FAR * math.sqrt(spread)}
    away = [np.concatenate([v.counts - v.steps * v.rates for v in run]) for run in (one, other)]
    rest = [np.concatenate([v.left for v in run]) for run in (one, other)]
    for name, (a, b) in (("secret rows", away), ("secret noise", rest)):
        a, b = a - a.mean(), b - b.mean()  # a wrong rate is a finding of its own
        correlation = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
        found[name] = abs(correlation) > FAR / math.sqrt(len(a))
    return {name for name, wrong in found.items() if wrong}


@pytest.fixture
def audited(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], set[str]]:
    """What an audit of two federations finds; their requests have the same names, so that only the keys differ."""
    named = noise.request_digest
    monkeypatch.setattr(private_visit, "request_digest", lambda _, *parts: named(bytes(32), *parts))
    config = configuration(tiny_model, rows_file)

    def audit(seed: int) -> set[str]:
        runs = [Federation(config, tmp_path / f"{seed}{name}" / "run", f"{seed}{name}").visits() for name in "ab"]
        return findings(*runs)

    return audit


@pytest.mark.parametrize("seed", range(3))
def test_what_is_released_is_what_was_charged(seed: int, audited: Callable[[int], set[str]]) -> None:
    assert audited(seed) == set()


def half_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    own = dp_sgd.privatised
    monkeypatch.setattr(dp_sgd, "privatised", lambda g, stream, std, rows: own(g, stream, std / 2, rows))


def twice_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    own = SecretNoise.chosen
    monkeypatch.setattr(SecretNoise, "chosen", lambda stream, rates: own(stream, np.minimum(1, 2 * rates)))


def twice_the_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    own = dp_sgd.clipped_sum
    monkeypatch.setattr(dp_sgd, "clipped_sum", lambda *given: own(*given[:-1], 2 * given[-1]))


def half_the_denominator(monkeypatch: pytest.MonkeyPatch) -> None:
    own = dp_sgd.privatised
    monkeypatch.setattr(dp_sgd, "privatised", lambda g, stream, std, rows: own(g, stream, std, rows // 2))


def one_step_more(monkeypatch: pytest.MonkeyPatch) -> None:
    own = dp_sgd.fit_private

    def longer(*given: Any) -> Any:
        *before, plan = given
        runs: VisitMechanism = plan.mechanism
        more = runs._replace(sampler=runs.sampler._replace(steps=runs.sampler.steps + 1))
        return own(*before, plan._replace(mechanism=more))

    monkeypatch.setattr(private_visit, "fit_private", longer)


def public(purpose: str) -> Callable[[pytest.MonkeyPatch], None]:
    """The stream of that purpose follows from the request alone."""

    def change(monkeypatch: pytest.MonkeyPatch) -> None:
        def stream(key: bytes, wanted: str, request: str) -> SecretNoise:
            return SecretNoise(bytes(32) if wanted == purpose else key, wanted, request)

        monkeypatch.setattr(private_visit, "SecretNoise", stream)

    return change


@pytest.mark.parametrize(
    ("change", "found"),
    [
        pytest.param(half_the_noise, {"noise"}, id="half the noise"),
        pytest.param(twice_the_rate, {"rate"}, id="twice the rate"),
        pytest.param(twice_the_clip, {"rate"}, id="twice the clip"),
        pytest.param(half_the_denominator, {"noise", "rate"}, id="half the denominator"),
        pytest.param(one_step_more, {"noise"}, id="one step more"),
        pytest.param(public("rows"), {"secret rows"}, id="public sampling stream"),
        pytest.param(public("noise"), {"secret noise"}, id="public noise stream"),
    ],
)
def test_a_visit_that_runs_otherwise_than_it_is_charged_is_found(
    change: Callable[[pytest.MonkeyPatch], None],
    found: set[str],
    audited: Callable[[int], set[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step more is half as many rows again: the rate is then found or missed by chance, so it isn't asked for."""
    change(monkeypatch)
    seen = audited(0)
    assert (seen - {"rate"} if change is one_step_more else seen) == found
