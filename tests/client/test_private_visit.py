"""Private visits of a worker: what is charged, what is released again, and what the server can tell from an answer."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from private_visits import STAGES, payload, rows, settings, site

from apiary.core.errors import UserError
from apiary.core.messages import Decline, Payload, Visit
from apiary.core.tensors import norm, subtract
from apiary.data import tokenization
from apiary.data.examples import Example
from apiary.data.turns import Turn
from apiary.models import adapters
from apiary.models.loss import row_losses
from apiary.privacy import sampling
from apiary.privacy.accounting import epsilon
from apiary.privacy.noise import SecretNoise
from client import private_visit
from client.site import Site
from client.training import dp_sgd
from client.training.dp_sgd import PrivateVisit
from client.worker import Worker


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
        self.drawn: list[np.ndarray] = []
        self.added: list[np.ndarray] = []  # the noise on each tensor, over its deviation
        self.corpus: Any = None
        self.clips: list[float] = []
        self.longest = 0.0  # norm of a clipped row's gradient
        self.noise: list[tuple[float, int]] = []
        chosen, summed, privatised = SecretNoise.chosen, dp_sgd.clipped_sum, dp_sgd.privatised

        def drawing(stream: SecretNoise, rates: np.ndarray) -> np.ndarray:
            self.rates.append(rates.copy())
            self.drawn.append(chosen(stream, rates))
            return self.drawn[-1]

        def clipping(lm: Any, objective: Any, corpus: Any, drawn: np.ndarray, clip: float) -> dp_sgd.Sum:
            self.clips.append(clip)
            self.corpus = corpus
            for row in drawn[:2]:
                alone = summed(lm, objective, corpus, np.array([row]), clip).gradients
                self.longest = max(self.longest, norm(alone))
            return summed(lm, objective, corpus, drawn, clip)

        def adding(gradients: Any, noise: SecretNoise, deviation: float, divisor: int) -> Any:
            self.noise.append((deviation, divisor))
            made = privatised(gradients, noise, deviation, divisor)
            for name, gradient in gradients.items():
                self.added.append((made[name].double() * divisor - gradient).flatten().numpy() / deviation)
            return made

        monkeypatch.setattr(SecretNoise, "chosen", drawing)
        monkeypatch.setattr(dp_sgd, "clipped_sum", clipping)
        monkeypatch.setattr(dp_sgd, "privatised", adding)


WORDS = {"0": "honey", "1": "wax", "2": "comb"}  # that tell the rows of each stage


def disagreements(seen: Seen, folder: Path, worker: Worker, clip: float, batch_rows: int) -> set[str]:
    """The parts in which what was done differs from the newest charge in the ledger of `folder`."""
    entry = charges(folder)[-1]
    key = (folder / "privacy.key").read_bytes()
    rates = {float(rate) for one in seen.rates for rate in one}
    met: dict[str, set[float]] = {}
    for start, stop, rate in zip(seen.corpus.offsets, seen.corpus.offsets[1:], seen.rates[0], strict=False):
        text = worker.tokenizer.decode(seen.corpus.ids[start:stop])
        (stage,) = (stage for stage, word in WORDS.items() if word in text)
        met.setdefault(stage, set()).add(float(rate))
    sampling_stream, noise_stream = (SecretNoise(key, purpose, entry["request"]) for purpose in ("rows", "noise"))
    drawn = [np.flatnonzero(sampling_stream.uniform(len(one)) < one) for one in seen.rates]
    numbers = [noise_stream.normal(len(one)) for one in seen.added]
    found = {
        "steps": len(seen.rates) != entry["steps"] or len(seen.noise) != entry["steps"],
        "rate": rates != set(entry["rates"].values()),
        "stage": {stage: {rate} for stage, rate in entry["rates"].items()} != met
        and rates == set(entry["rates"].values()),
        "noise": {std for std, _ in seen.noise} != {entry["noise_multiplier"] * clip},
        "clip": set(seen.clips) != {clip} or seen.longest > clip,
        "denominator": {divisor for _, divisor in seen.noise} != {batch_rows},
        "sampling stream": not all(map(np.array_equal, drawn, seen.drawn)),
        "noise stream": not all(np.allclose(a, b, atol=1e-4) for a, b in zip(numbers, seen.added, strict=True)),
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
        worker.train(site(tmp_path, mixed if stages else rows(40)), number, payload(worker))
        assert disagreements(seen, tmp_path, worker, clip=1.0, batch_rows=8) == set()
        assert len(charges(tmp_path)[-1]["rates"]) == (2 if number == 3 else 1) and seen.longest > 0
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("steps", lambda v: mechanism_of(v, sampler=v.mechanism.sampler._replace(steps=3))),
        ("rate", lambda v: mechanism_of(v, sampler=v.mechanism.sampler._replace(new=1.0))),
        ("noise", lambda v: mechanism_of(v, noise_multiplier=v.mechanism.noise_multiplier / 100)),
        ("clip", lambda v: mechanism_of(v, sensitivity=v.mechanism.sensitivity._replace(l2=2.0), noise_multiplier=0.5)),
        ("denominator", lambda v: mechanism_of(v, batch_rows=4)),
        ("sampling stream", lambda v: v._replace(sampling=SecretNoise(bytes(32), "rows", "public"))),
        ("noise stream", lambda v: v._replace(noise=SecretNoise(bytes(32), "noise", "public"))),
        ("stage", lambda v: v._replace(new=v.new - 10)),
    ],
)
def test_a_part_that_is_changed_on_its_way_into_training_is_seen(
    part: str, change: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard above would notice each part alone, were it charged as planned and run otherwise."""
    staged = part == "stage"  # rows of the new stage are drawn at the rate of the buffer
    worker, number = Worker(settings(tiny_model, *(STAGES if staged else []))), 3 if staged else 1
    data = (*rows(40), *rows(30, "wax", "b"))
    fit = dp_sgd.fit_private

    def other(*given: Any) -> Any:
        *before, visit = given
        return fit(*before, change(visit))

    monkeypatch.setattr(private_visit, "fit_private", other)
    seen = Seen(monkeypatch)
    worker.train(site(tmp_path, data if staged else rows(40)), number, payload(worker))
    assert disagreements(seen, tmp_path, worker, clip=1.0, batch_rows=8) == {part}


def mechanism_of(visit: PrivateVisit, **changed: Any) -> PrivateVisit:
    return visit._replace(mechanism=visit.mechanism._replace(**changed))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blanking_a_row_moves_a_release_by_that_rows_clipped_gradient_and_nothing_else(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two visits with the same noise and all rows drawn; in one of them the fifth row has nothing to train on."""
    monkeypatch.setattr(private_visit, "request_digest", lambda *_: "0" * 32)
    monkeypatch.setattr(private_visit, "open_key", lambda _: bytes(32))
    lr, clip, count = 1e4, 1e-3, 40  # far above the resolution of the released adapter
    keys = [f"train.lr={lr}", "train.steps=1", "train.optimizer=sgd", "train.warmup=0", "train.schedule=constant"]
    private = [f"privacy.clip={clip}", f"privacy.batch_rows={count}", "privacy.noise_multiplier=2"]
    worker = Worker(settings(Path("builtin:tiny"), *keys, *private, f"model.dtype={dtype}", "train.batch_tokens=1024"))
    words = [("wax " * (9 if i == 4 else 1 + i % 5), f"honey {i} " * (1 + i % 3)) for i in range(count)]
    whole = tuple(Example((Turn("user", q), Turn("assistant", a)), {}) for q, a in words)
    unusable = Example((Turn("user", "wax " * 99), Turn("assistant", "honey")), {})  # it leaves no room for an answer
    blanked = (*whole[:4], unusable, *whole[5:])
    sent = Payload(small_models.random_state(dict(payload(worker).adapter), 0.3), {})
    found = []
    for name, data in (("whole", whole), ("blanked", blanked)):
        answer = worker.train(site(tmp_path / name, data), 1, sent)
        assert isinstance(answer, Visit)
        found.append({name: -t.double() * count / lr for name, t in answer.update.delta.items()})
    lm = adapters.load(worker.config.model, worker.config.adapter)
    adapters.set_adapter(lm, sent.adapter)
    row = tokenization.encode_all(whole[4:5], worker.template, worker.tokenizer, worker.config.prompt)
    own = dp_sgd.clipped_sum(lm, row_losses, row, np.array([0]), clip).gradients
    assert norm(own) == pytest.approx(clip, rel=1e-5)
    # What is left is the rounding of the released adapter to float32. Rows that share batches leave 1.4e-3 in bfloat16.
    assert norm(subtract(subtract(*found), own)) < 1e-4 * clip
