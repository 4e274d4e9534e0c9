"""Private visits of a worker: what is charged, what is released again, and what the server can tell from an answer."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apiary.config import loading
from apiary.config.schema import RunConfig
from apiary.core.errors import UserError
from apiary.core.messages import Decline, Payload, Visit
from apiary.data.examples import Example, Turn
from apiary.models import adapters
from apiary.privacy import sampling
from apiary.privacy.accounting import epsilon
from apiary.privacy.mechanism import VisitMechanism
from apiary.privacy.noise import SecretNoise
from client import private_visit
from client.site import Site
from client.training import dp_sgd
from client.worker import Worker

STAGES = ['continual.stages=[["a"], ["b"], ["c"]]', "continual.buffer=0.5", "continual.policy=poisson", "rounds=6"]


def settings(model: Path, *more: str) -> RunConfig:
    base = [f"model.name={model}", "model.dtype=float32", "model.device=cpu", "adapter.rank=2", "prompt.template=plain"]
    train = ["prompt.max_tokens=64", "train.steps=2", "train.batch_tokens=256", "train.threads=1"]
    private = ["privacy.unit=record", "privacy.batch_rows=8", "privacy.noise_multiplier=1.0", "privacy.epsilon=50.0"]
    return loading.load(None, [*base, *train, *private, *more])


def rows(n: int, word: str = "honey", skill: str = "a") -> tuple[Example, ...]:
    return tuple(
        Example((Turn("user", f"{word} {i}?"), Turn("assistant", f"{word} {i}")), {"skill": skill}) for i in range(n)
    )


def site(folder: Path, train: tuple[Example, ...]) -> Site:
    return Site("s", train, (), folder / "run", folder / "ledger.json", 2)


def payload(worker: Worker, fill: float = 0.01) -> Payload:
    adapter = adapters.load(worker.config.model, worker.config.adapter).adapter
    return Payload({name: torch.full(p.shape, fill) for name, p in adapter.items()}, {})


def charges(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "ledger.json").read_text())["entries"]


def same(a: Visit | Decline, b: Visit | Decline) -> bool:
    assert isinstance(a, Visit) and isinstance(b, Visit)
    return all(torch.equal(t, b.update.delta[name]) for name, t in a.update.delta.items())


def test_the_same_request_is_the_same_release_and_costs_once(tiny_model: Path, tmp_path: Path) -> None:
    worker = Worker(settings(tiny_model))
    first = worker.train(site(tmp_path, rows(40)), 1, payload(worker))
    assert len(charges(tmp_path)) == 1
    # Another process, after a crash between the charge and the release.
    for kept in (tmp_path / "run").glob("release*"):
        kept.unlink()
    again = Worker(settings(tiny_model)).train(site(tmp_path, rows(40)), 1, payload(worker))
    assert same(first, again) and len(charges(tmp_path)) == 1


@pytest.mark.parametrize("what", ["adapter", "rows", "settings"])
def test_anything_else_in_the_same_round_is_new_noise_and_is_charged(
    what: str, tiny_model: Path, tmp_path: Path
) -> None:
    worker = Worker(settings(tiny_model))
    first = worker.train(site(tmp_path, rows(40)), 1, payload(worker))
    other = Worker(settings(tiny_model, *(["train.lr=1e-3"] if what == "settings" else [])))
    second = other.train(
        site(tmp_path, rows(40, "wax" if what == "rows" else "honey")),
        1,
        payload(worker, 0.02 if what == "adapter" else 0.01),
    )
    assert not same(first, second) and len(charges(tmp_path)) == 2


def test_two_clients_with_the_same_rows_draw_their_own_noise(tiny_model: Path, tmp_path: Path) -> None:
    worker = Worker(settings(tiny_model))
    a, b = (worker.train(site(tmp_path / name, rows(40)), 1, payload(worker)) for name in ("a", "b"))
    assert not same(a, b)


def test_a_client_declines_before_its_budget_breaks(tiny_model: Path, tmp_path: Path) -> None:
    worker = Worker(settings(tiny_model, "privacy.epsilon=4.0", "rounds=50"))
    answers = []
    for number in range(1, 30):
        answers.append(worker.train(site(tmp_path, rows(40)), number, payload(worker)))
        if isinstance(answers[-1], Decline):
            break
    assert answers[-1] == Decline("s", "budget") and len(answers) > 2
    spent = [answer.spent for answer in answers if isinstance(answer, Visit)]
    assert all(a.epsilon < b.epsilon <= 4.0 for a, b in pairwise(spent) if a and b)
    assert len(charges(tmp_path)) == len(spent)
    # The next visit would have been too much, and only just.
    history = [h._replace(steps=2) for h in sampling.histories(worker.config, [40], 1.0)[0]]
    assert epsilon(history[: len(spent)], 1e-5) <= 4.0 < epsilon(history[: len(spent) + 1], 1e-5)


def test_an_answer_tells_nothing_of_the_rows_but_how_many_they_are(tiny_model: Path, tmp_path: Path) -> None:
    """All that a server sees beside the noisy adapter is the same for any rows of that number."""
    worker = Worker(settings(tiny_model, 'curate.steps=[{name="length", max=5}]'))
    seen = []
    half = (*rows(20), *rows(20, "a much longer story about honey that goes on"))
    for number, data in enumerate([rows(40), half]):
        where = site(tmp_path / str(number), data)
        answer = worker.train(where, 1, payload(worker))
        assert isinstance(answer, Visit)
        report = answer.report._replace(seconds=0.0)
        assert math.isnan(report.loss) and answer.curated is None
        seen.append((worker.hello(where), report._replace(loss=0.0), answer.update.weight, answer.spent))
    assert seen[0] == seen[1]
    assert seen[0][0].tokens is None and seen[0][0].examples is None


def test_a_client_whose_every_row_curation_drops_answers_like_any_other(tiny_model: Path, tmp_path: Path) -> None:
    worker = Worker(settings(tiny_model, 'curate.steps=[{name="length", min=9}]'))
    answer = worker.train(site(tmp_path, rows(40)), 1, payload(worker))
    assert isinstance(answer, Visit) and answer.report.examples == 16
    assert all(float(t.abs().max()) > 0 for t in answer.update.delta.values())


def test_an_answer_that_left_and_was_dropped_is_not_made_again_under_its_own_noise(
    tiny_model: Path, tmp_path: Path
) -> None:
    worker = Worker(settings(tiny_model))
    first = worker.train(site(tmp_path, rows(40)), 1, payload(worker))
    for number in (2, 3, 4):  # of four answers three are kept
        worker.train(site(tmp_path, rows(40)), number, payload(worker))
    again = worker.train(site(tmp_path, rows(40)), 1, payload(worker))
    assert not same(first, again) and len(charges(tmp_path)) == 5
    # That one is kept, however old its round: asked once more, it is the same and free.
    assert same(again, worker.train(site(tmp_path, rows(40)), 1, payload(worker))) and len(charges(tmp_path)) == 5


def test_a_private_client_tells_no_loss_whoever_asks(tiny_model: Path, tmp_path: Path) -> None:
    """The server's own switch is not what a client relies on."""
    held_out = Site("s", rows(40), rows(20, "wax"), tmp_path / "run", tmp_path / "ledger.json", 2)
    worker = Worker(settings(tiny_model))
    assert worker.evaluate(held_out, payload(worker)) == (0.0, 0, 0)
    plain = Worker(settings(tiny_model, "privacy.unit=none"))
    assert plain.evaluate(held_out, payload(plain)).examples == 20


def test_replayed_rows_give_a_private_update_no_weight(tiny_model: Path, tmp_path: Path) -> None:
    worker = Worker(settings(tiny_model, *STAGES, "continual.replay=0.75"))
    data = (*rows(30, "a", "a"), *rows(40, "b", "b"))
    weights = [
        (a.update.weight, a.report.replayed)
        for n in (1, 3)
        if isinstance(a := worker.train(site(tmp_path, data), n, payload(worker)), Visit)
    ]
    assert weights == [(16.0, 0), (4.0, 12)]  # 2 steps of 8 expected rows, a quarter of them new once there is a buffer


def test_what_a_client_keeps_is_for_its_owner(tiny_model: Path, tmp_path: Path) -> None:
    steps = 'curate.steps=["mask"]'
    for unit in ("record", "none"):
        worker = Worker(settings(tiny_model, f"privacy.unit={unit}", *STAGES, steps))
        for number in (1, 3):
            worker.train(site(tmp_path, (*rows(30), *rows(30, "wax", "b"))), number, payload(worker))
    assert (tmp_path / "run").stat().st_mode & 0o077 == 0
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    kinds = ("ledger.json", ".ledger.json.lock", "privacy.key", "released.txt", "steps.jsonl")
    numbered = ("release-0003-*", "curated-*", "buffer-*", "round-*")
    assert all(any(path.match(name) for path in kept) for name in (*kinds, *numbered))
    assert {path.name for path in kept if path.stat().st_mode & 0o077} == set()


@pytest.mark.slow
def test_stages_charge_each_cohort_for_what_it_met(tiny_model: Path, tmp_path: Path) -> None:
    worker = Worker(settings(tiny_model, *STAGES))
    data = (*rows(30, "a", "a"), *rows(20, "b", "b"), *rows(40, "c", "c"))
    for number in range(1, 7):
        last = worker.train(site(tmp_path, data), number, payload(worker))
    # By hand: 8 expected rows a step; from the second stage on half of them from a buffer of half of the earlier rows.
    rates = [{"0": 8 / 30}, {"0": 4 / 15, "1": 4 / 20}, {"0": 4 / 25, "1": 4 / 25, "2": 4 / 40}]
    for entry, wanted in zip(
        charges(tmp_path), [rates[0], rates[0], rates[1], rates[1], rates[2], rates[2]], strict=True
    ):
        assert entry["rates"] == pytest.approx(wanted)
    assert isinstance(last, Visit) and last.spent is not None
    planned = max(epsilon(history, 1e-5) for history in sampling.histories(worker.config, [30, 20, 40], 1.0))
    assert last.spent.epsilon == pytest.approx(planned, rel=1e-9)


def test_a_stage_without_rows_costs_nothing(tiny_model: Path, tmp_path: Path) -> None:
    worker = Worker(settings(tiny_model, *STAGES))
    assert worker.train(site(tmp_path, rows(30, skill="c")), 1, payload(worker)) == Decline("s", "idle")
    assert not (tmp_path / "ledger.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stages", [[], STAGES])
def test_the_noise_found_keeps_every_cohort_to_the_budget_and_is_the_least(stages: list[str], tiny_model: Path) -> None:
    run = settings(tiny_model, "privacy.epsilon=4.0", "rounds=6", *stages)
    run = run.model_copy(update={"privacy": run.privacy.model_copy(update={"noise_multiplier": None})})
    counts = [60, 80, 50] if stages else [60]
    noise = sampling.noise_multiplier(run, counts)
    costs = [max(epsilon(h, 1e-5) for h in sampling.histories(run, counts, z)) for z in (noise, 0.99 * noise)]
    assert costs[0] <= 4.0 < costs[1]


def test_more_rows_in_a_step_than_there_are_is_refused(tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"privacy\.batch_rows = 8: at most the 7 rows"):
        sampling.draw(settings(tiny_model), [7], 1)


class Seen:
    """What the training loop really did, noted where it draws, clips, adds noise and divides."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rates: list[np.ndarray] = []
        self.clips: list[float] = []
        self.longest = 0.0  # norm of a clipped row's gradient
        self.noise: list[tuple[float, int]] = []
        chosen, summed, privatised = SecretNoise.chosen, dp_sgd.clipped_sum, dp_sgd.privatised

        def drawing(stream: SecretNoise, rates: np.ndarray) -> np.ndarray:
            self.rates.append(rates.copy())
            return chosen(stream, rates)

        def clipping(lm: Any, objective: Any, corpus: Any, drawn: np.ndarray, clip: float, room: int) -> dp_sgd.Sum:
            self.clips.append(clip)
            for row in drawn[:2]:
                alone = summed(lm, objective, corpus, np.array([row]), clip, room).gradients.values()
                self.longest = max(self.longest, float(torch.stack([g.square().sum() for g in alone]).sum().sqrt()))
            return summed(lm, objective, corpus, drawn, clip, room)

        def adding(gradients: Any, noise: SecretNoise, deviation: float, divisor: int) -> Any:
            self.noise.append((deviation, divisor))
            return privatised(gradients, noise, deviation, divisor)

        monkeypatch.setattr(SecretNoise, "chosen", drawing)
        monkeypatch.setattr(dp_sgd, "clipped_sum", clipping)
        monkeypatch.setattr(dp_sgd, "privatised", adding)


def disagreements(seen: Seen, entry: dict[str, Any], clip: float, batch_rows: int) -> set[str]:
    """The parts in which what was done differs from what was charged."""
    rates = {float(rate) for one in seen.rates for rate in one}
    found = {
        "steps": len(seen.rates) != entry["steps"] or len(seen.noise) != entry["steps"],
        "rate": rates != set(entry["rates"].values()),
        "noise": {std for std, _ in seen.noise} != {entry["noise_multiplier"] * clip},
        "clip": set(seen.clips) != {clip} or seen.longest > clip,
        "denominator": {divisor for _, divisor in seen.noise} != {batch_rows},
    }
    return {part for part, differs in found.items() if differs}


@pytest.mark.parametrize("stages", [False, True])
def test_what_is_done_is_what_is_charged(
    stages: bool, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = (*rows(40), *rows(30, "wax", "b"), *rows(20, "comb", "c"))
    worker = Worker(settings(tiny_model, *(STAGES if stages else [])))
    for number in (1, 3) if stages else (1,):
        seen = Seen(monkeypatch)
        worker.train(site(tmp_path, mixed), number, payload(worker))
        entry = json.loads((tmp_path / "ledger.json").read_text())["entries"][-1]
        assert disagreements(seen, entry, clip=1.0, batch_rows=8) == set()
        assert len(entry["rates"]) == (2 if number == 3 else 1) and seen.longest > 0
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("steps", lambda m: m._replace(sampler=m.sampler._replace(steps=m.sampler.steps + 1))),
        ("rate", lambda m: m._replace(sampler=m.sampler._replace(new=1.0))),
        ("noise", lambda m: m._replace(noise_multiplier=m.noise_multiplier / 100)),
        ("clip", lambda m: m._replace(sensitivity=m.sensitivity._replace(l2=2.0), noise_multiplier=0.5)),
        ("denominator", lambda m: m._replace(batch_rows=4)),
    ],
)
def test_a_part_that_is_changed_on_its_way_into_training_is_seen(
    part: str, change: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard above would notice each part alone, were it charged as planned and run otherwise."""
    fit = dp_sgd.fit_private

    def other(*given: Any) -> Any:
        *before, visit = given
        assert isinstance(visit.mechanism, VisitMechanism)
        return fit(*before, visit._replace(mechanism=change(visit.mechanism)))

    monkeypatch.setattr(private_visit, "fit_private", other)
    seen, worker = Seen(monkeypatch), Worker(settings(tiny_model))
    worker.train(site(tmp_path, rows(40)), 1, payload(worker))
    entry = json.loads((tmp_path / "ledger.json").read_text())["entries"][-1]
    assert disagreements(seen, entry, clip=1.0, batch_rows=8) == {part}
    assert math.isfinite(entry["noise_multiplier"])
