"""Training under record-level privacy against the papers' equations in numpy, row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from opacus_sum import opacus_sum
from scipy import optimize, stats
from small_models import same
from transformers import AutoModelForCausalLM, AutoTokenizer

from apiary.config.loading import parse
from apiary.config.schema import Method, ModelConfig, RunConfig
from apiary.core.errors import UserError
from apiary.core.tensors import StateDict, norm, subtract
from apiary.data.batches import Batch, Corpus, Encoded, collate, gather
from apiary.models import adapters, fused_layers
from apiary.models.loss import row_losses, to_device
from apiary.privacy.accounting import Mechanism, epsilon
from apiary.privacy.mechanism import BlankedRow, VisitMechanism
from apiary.privacy.noise import SecretNoise
from apiary.privacy.sampling import Draw
from client import releases
from client.training import dp_sgd
from client.training.dp_sgd import PrivateVisit
from client.training.objectives import build_penalties
from client.training.trainer import FitResult, StepRecord

KEY = bytes(32)
CORPUS = small_models.make_corpus(40)
CLIP = 0.5


def load(folder: Path, dtype: str = "float32", **adapter: object) -> adapters.LanguageModel:
    config = settings_of(adapter=adapter).adapter
    return adapters.load(ModelConfig(name=str(folder), dtype=dtype, device="cpu"), config)


def settings_of(
    adapter: dict[str, object] | None = None, privacy: dict[str, object] | None = None, **train: object
) -> RunConfig:
    return parse(
        {
            "adapter": {"rank": 4, "alpha": 6.0, **(adapter or {})},
            "train": {"batch_tokens": 96, "lr": 0.1, "warmup": 0.0, "schedule": "constant", "steps": 1, **train},
            "privacy": {"clip": CLIP, "batch_rows": 10, **(privacy or {})},
        }
    )


@pytest.fixture
def lm(tiny_model: Path) -> adapters.LanguageModel:
    return load(tiny_model)


def stream(purpose: str, request: str = "r") -> SecretNoise:
    return SecretNoise(KEY, purpose, request)


def fit(lm: adapters.LanguageModel, config: RunConfig, steps: int, **keys: Any) -> FitResult:
    """A visit of so many steps, at a sampling rate of a quarter and without noise unless told otherwise."""
    corpus, new_rate, kept_rate = keys.pop("corpus", CORPUS), keys.pop("rate", 0.25), keys.pop("kept_rate", 0.0)
    start = keys.pop("start", None) or small_models.random_state(adapters.get_adapter(lm))
    privacy = config.privacy
    mechanism = VisitMechanism(
        Draw(steps, new_rate, kept_rate, 0),
        BlankedRow(privacy.clip),
        keys.pop("noise_multiplier", 0.0),
        privacy.batch_rows,
    )
    given = {"new": len(corpus), "noise": stream("noise"), "sampling": stream("rows"), "first_step": 0}
    visit = PrivateVisit(mechanism, **{**given, "total_steps": steps, **keys})
    return dp_sgd.fit_private(lm, start, corpus, config, visit)


def clipped_by_hand(lm: adapters.LanguageModel, corpus: Corpus, rows: list[int], clip: float) -> dict[str, np.ndarray]:
    """One row at a time through the lean model: g_i min(1, C / ||g_i||) for the row's mean nats per trained token."""
    total = {name: np.zeros(tuple(p.shape)) for name, p in lm.adapter.items()}
    for row in rows:
        batch = collate(corpus, np.array([row]), 0)
        loss = row_losses(lm.model, batch).sum() / batch.targets.sum()
        grads = [g.double().numpy() for g in torch.autograd.grad(loss, list(lm.adapter.values()))]
        length = math.sqrt(sum(float((g**2).sum()) for g in grads))
        for name, g in zip(lm.adapter, grads, strict=True):
            total[name] += g * min(1.0, clip / length)
    return total


def summed(lm: adapters.LanguageModel, corpus: Corpus, rows: list[int], clip: float = CLIP) -> StateDict:
    return dp_sgd.clipped_sum(lm, row_losses, corpus, np.array(rows, np.int64), clip).gradients


def close(ours: StateDict, theirs: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    for name, expected in theirs.items():
        np.testing.assert_allclose(ours[name].numpy(), expected, rtol=tolerance, atol=tolerance * 0.1, err_msg=name)


@pytest.mark.parametrize("family", small_models.FAMILIES)
def test_the_clipped_sum_is_that_of_a_loop_over_rows(family: str, tiny_model: Path, tmp_path: Path) -> None:
    lm = load(small_models.make_folder(family, tiny_model, tmp_path / family))
    adapters.set_adapter(lm, small_models.random_state(adapters.get_adapter(lm)))
    rows = [0, 3, 4, 8, 9, 15, 16, 23, 30, 39]
    by_hand = clipped_by_hand(lm, CORPUS, rows, CLIP)
    free = clipped_by_hand(lm, CORPUS, rows, 1e9)
    assert any(not np.allclose(by_hand[n], free[n], rtol=0.1) for n in free)  # clipping is at work
    close(summed(lm, CORPUS, rows), by_hand, 1e-4 if family == "gemma2" else 3e-5)
    close(summed(lm, CORPUS, rows, clip=1e3), clipped_by_hand(lm, CORPUS, rows, 1e3), 1e-4)


def test_the_sum_of_a_step_is_that_of_opacus(lm: adapters.LanguageModel) -> None:
    """Opacus takes the gradients of all rows from one batch; in float32 the two differ by rounding alone."""
    adapters.set_adapter(lm, small_models.random_state(adapters.get_adapter(lm)))
    rows = list(range(0, 40, 3))
    for name, expected in opacus_sum(lm, CORPUS, rows, CLIP).items():
        torch.testing.assert_close(summed(lm, CORPUS, rows)[name], expected.double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_row_moves_the_sum_by_its_own_clipped_gradient_and_nothing_else(
    dtype: str, tiny_model: Path, tmp_path: Path
) -> None:
    """To the last bit, and by the clipping norm at most; here all gradients are far above it, so just that much."""
    lm = load(small_models.make_folder("llama", tiny_model, tmp_path / "m"), dtype)
    adapters.set_adapter(lm, small_models.random_state(adapters.get_adapter(lm), 0.3))
    rows, clip = list(range(12)), 2.0**-10  # a power of two, so that float64 holds the differences as they are
    whole = summed(lm, CORPUS, rows, clip)
    for row in rows:
        others = [r for r in rows if r != row]
        moved = subtract(whole, summed(lm, CORPUS, others, clip))
        assert same(moved, dict(summed(lm, CORPUS, [row], clip)))
        assert clip * (1 - 2e-6) < norm(moved) <= clip
        assert same(dict(whole), dict(summed(lm, CORPUS, [row, *others[::-1]], clip)))


def test_rows_that_share_a_batch_in_bfloat16_move_each_other(tiny_model: Path, tmp_path: Path) -> None:
    """Why each row passes alone: the gradients of one batch sum to something else without one of its rows."""
    lm = load(small_models.make_folder("llama", tiny_model, tmp_path / "m"), "bfloat16")
    adapters.set_adapter(lm, small_models.random_state(adapters.get_adapter(lm), 0.3))
    rows = list(range(40))
    whole, alone = opacus_sum(lm, CORPUS, rows, CLIP), [opacus_sum(lm, CORPUS, [row], CLIP) for row in rows]
    moved = [subtract(whole, opacus_sum(lm, CORPUS, [r for r in rows if r != row], CLIP)) for row in rows[:8]]
    beyond = [norm(subtract(change, own)) / CLIP for change, own in zip(moved, alone, strict=False)]
    assert max(beyond) > 1e-3


def test_the_model_is_left_as_it_was(lm: adapters.LanguageModel) -> None:
    start = small_models.random_state(adapters.get_adapter(lm))

    def shape() -> object:
        adapters.set_adapter(lm, start)
        batch = collate(CORPUS, np.arange(6), 0)
        loss = row_losses(lm.model, batch).sum()
        grads = torch.autograd.grad(loss, list(lm.adapter.values()))
        hooks = [(len(m._forward_hooks), len(m._backward_hooks), m.training) for m in lm.model.modules()]
        extra = [sorted(vars(p)) for p in lm.adapter.values()], [sorted(vars(m)) for m in lm.model.modules()]
        plain = [m.is_plain() for m in lm.model.modules() if isinstance(m, fused_layers.LeanLinear)]
        assert plain and all(plain)
        return hooks, extra, loss.item(), [g.sum().item() for g in grads]

    before = shape()
    fit(lm, settings_of(), 2, noise_multiplier=1.0)
    assert shape() == before
    blocker = lm.model.get_output_embeddings().register_full_backward_hook(lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        fit(lm, settings_of(), 1)
    blocker.remove()
    assert shape() == before


def by_hand(
    lm: adapters.LanguageModel, config: RunConfig, steps: int, noise_multiplier: float, rate: float = 0.25
) -> dict[str, np.ndarray]:
    """Abadi et al. 2016, algorithm 1, with stochastic gradient descent; the streams drawn from in the same order."""
    start = small_models.random_state(adapters.get_adapter(lm))
    now = {name: t.double().numpy() for name, t in start.items()}
    noise, sampling = stream("noise"), stream("rows")
    for _ in range(steps):
        adapters.set_adapter(lm, {name: torch.from_numpy(v).float() for name, v in now.items()})
        drawn = np.flatnonzero(sampling.uniform(len(CORPUS)) < rate).tolist()
        total = clipped_by_hand(lm, CORPUS, drawn, config.privacy.clip)
        for name in lm.adapter:
            z = noise.normal(now[name].size).reshape(now[name].shape) if noise_multiplier else 0.0
            step = (total[name] + noise_multiplier * config.privacy.clip * z) / config.privacy.batch_rows
            now[name] = now[name] - config.train.lr * (config.train.lr_b if "lora_B" in name else 1) * step
    return {name: now[name] - start[name].double().numpy() for name in now}


@pytest.mark.parametrize(("noise_multiplier", "lr_b"), [(0.0, 1.0), (0.7, 1.0), (0.0, 4.0)])
def test_a_visit_is_private_gradient_descent_by_the_paper(
    lm: adapters.LanguageModel, noise_multiplier: float, lr_b: float
) -> None:
    config = settings_of(optimizer="sgd", lr_b=lr_b)
    expected = by_hand(lm, config, 3, noise_multiplier)
    result = fit(lm, config, 3, noise_multiplier=noise_multiplier)
    for name, value in expected.items():
        np.testing.assert_allclose(result.delta[name].numpy(), value, rtol=2e-3, atol=2e-6, err_msg=name)
    size = math.sqrt(sum(float((v**2).sum()) for v in expected.values()))
    if noise_multiplier:  # three steps of noise z C lr / batch_rows on every number
        numbers = sum(v.size for v in expected.values())
        assert size == pytest.approx(0.1 * 0.7 * CLIP / 10 * math.sqrt(3 * numbers), rel=0.1)


def test_the_adam_of_a_visit_is_adamw_on_the_same_private_gradients(
    lm: adapters.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[StateDict] = []
    own: Callable[..., dict[str, torch.Tensor]] = dp_sgd.privatised

    def noting(*args: object) -> dict[str, torch.Tensor]:
        seen.append(own(*args))
        return seen[-1]

    monkeypatch.setattr(dp_sgd, "privatised", noting)
    start = small_models.random_state(adapters.get_adapter(lm))
    config = settings_of(lr=1e-2, weight_decay=0.1)
    result = fit(lm, config, 4, noise_multiplier=0.5, start=start)
    for name, first in start.items():
        p, m, v = first.double().numpy(), 0.0, 0.0
        for t, gradients in enumerate(seen, 1):
            g = gradients[name].double().numpy()
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            p = p * (1 - 1e-2 * 0.1) - 1e-2 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        np.testing.assert_allclose(result.delta[name].numpy(), p - first.double().numpy(), rtol=1e-3, atol=2e-6)


def test_an_empty_draw_is_a_step_of_noise_alone(lm: adapters.LanguageModel) -> None:
    config = settings_of(optimizer="sgd")
    result = fit(lm, config, 1, rate=0.0, noise_multiplier=2.0)
    numbers = torch.cat([t.flatten() for t in result.delta.values()]).double().numpy()
    deviation = 0.1 * 2.0 * CLIP / 10
    assert stats.kstest(numbers / deviation, "norm").pvalue > 1e-3


def test_the_sum_is_divided_by_the_expected_rows_never_by_the_drawn_ones(lm: adapters.LanguageModel) -> None:
    """With every row drawn, 40 of them where 10 were expected, the step is a tenth of the sum."""
    config = settings_of(optimizer="sgd")
    adapters.set_adapter(lm, start := small_models.random_state(adapters.get_adapter(lm)))
    total = clipped_by_hand(lm, CORPUS, list(range(40)), CLIP)
    result = fit(lm, config, 1, rate=1.0, start=start)
    for name, value in total.items():
        np.testing.assert_allclose(result.delta[name].numpy(), -0.1 * value / 10, rtol=1e-3, atol=1e-6)
    assert result.report.examples == 10


def test_rows_can_have_rates_of_their_own(lm: adapters.LanguageModel) -> None:
    seen: list[int] = []
    fit(lm, settings_of(), 1, rate=1.0, kept_rate=0.0, new=20, observers=(lambda record: seen.append(record.tokens),))
    assert seen == [sum(int(CORPUS.trained[CORPUS.offsets[i] : CORPUS.offsets[i + 1]].sum()) for i in range(20))]


def test_penalties_are_added_after_the_noise_and_cost_nothing(lm: adapters.LanguageModel) -> None:
    """The pull of FedProx, mu (w - anchor), is neither clipped nor divided."""
    start = small_models.random_state(adapters.get_adapter(lm))
    anchor = {name: torch.zeros_like(t) for name, t in start.items()}
    penalties = build_penalties((Method(name="fedprox", mu=3.0),), anchor)
    config = settings_of(optimizer="sgd", lr=0.01)
    without = fit(lm, config, 1, noise_multiplier=0.5, start=start).delta
    pulled = fit(lm, config, 1, noise_multiplier=0.5, start=start, penalties=penalties).delta
    for name, t in start.items():
        torch.testing.assert_close(pulled[name] - without[name], -0.01 * 3.0 * t, rtol=1e-3, atol=1e-6)


def test_no_number_about_the_rows_is_reported(lm: adapters.LanguageModel) -> None:
    """The same report, but for the clock, whatever the rows hold."""
    reports = []
    for seed in (0, 1):
        result = fit(
            lm, settings_of(), 3, noise_multiplier=1.0, corpus=small_models.make_corpus(40, seed, 24 - 10 * seed)
        )
        reports.append(result.report._replace(seconds=0.0))
    assert [tuple(map(str, r)) for r in reports[:1]] == [tuple(map(str, r)) for r in reports[1:]]
    assert math.isnan(reports[0].loss) and reports[0].tokens == reports[0].examples == 30


def test_the_same_request_is_the_same_bits_and_another_is_not(lm: adapters.LanguageModel) -> None:
    one, again = (fit(lm, settings_of(), 2, noise_multiplier=1.0).delta for _ in range(2))
    assert same(one, again)
    other = fit(lm, settings_of(), 2, noise_multiplier=1.0, noise=stream("noise", "another")).delta
    assert not same(one, other)


def test_an_answer_given_once_is_given_again(lm: adapters.LanguageModel, tmp_path: Path) -> None:
    made = []

    def make() -> FitResult:
        made.append(fit(lm, settings_of(), 1, noise_multiplier=1.0, noise=stream("noise", str(len(made)))))
        return made[-1]

    first = releases.released(tmp_path, 1, "a", make)
    again = releases.released(tmp_path, 1, "a", make)
    assert len(made) == 1
    assert same(first.delta, again.delta)
    assert str(first.report) == str(again.report)
    assert not same(releases.released(tmp_path, 1, "b", make).delta, first.delta)
    for number in (2, 3):
        releases.released(tmp_path, number, "c", make)
    assert len(list(tmp_path.glob("release-*"))) == 3


def with_row(row: Encoded) -> Corpus:
    bounds = zip(CORPUS.offsets[:-1], CORPUS.offsets[1:], strict=True)
    return gather([*(Encoded(CORPUS.ids[a:b], CORPUS.trained[a:b], False) for a, b in bounds), row])


@pytest.mark.parametrize("spoilt_by", [math.nan, math.inf])
def test_a_row_without_a_usable_gradient_adds_nothing(lm: adapters.LanguageModel, spoilt_by: float) -> None:
    adapters.set_adapter(lm, small_models.random_state(adapters.get_adapter(lm)))
    rows, bad = list(range(0, 40, 4)), 8
    good = [row for row in rows if row != bad]

    def spoiling(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        factor = torch.where(batch.rows == bad, spoilt_by, 1.0)
        return row_losses(model, batch) * factor

    spoilt = dp_sgd.clipped_sum(lm, spoiling, CORPUS, np.array(rows), CLIP).gradients
    close(spoilt, clipped_by_hand(lm, CORPUS, good, CLIP), 3e-5)


def test_a_row_with_one_infinite_number_in_its_gradient_adds_nothing(lm: adapters.LanguageModel) -> None:
    """Its norm is infinite and not NaN, and times a scale of 0 the other numbers would be 0, that one anything."""
    adapters.set_adapter(lm, small_models.random_state(adapters.get_adapter(lm)))
    name, spoilt = next(iter(lm.adapter.items()))

    def spoiling(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return row_losses(model, batch) + (math.inf * spoilt.flatten()[0] if 8 in batch.rows else 0.0)

    found, _ = dp_sgd.row_gradient(lm, spoiling, to_device(collate(CORPUS, np.array([8]), 0), lm.device))
    assert found[name].flatten()[0].isinf() and found[name].flatten()[1:].isfinite().all()
    total = dp_sgd.clipped_sum(lm, spoiling, CORPUS, np.array([0, 4, 8, 12]), CLIP).gradients
    close(total, clipped_by_hand(lm, CORPUS, [0, 4, 12], CLIP), 3e-5)


def test_a_row_without_trained_tokens_is_harmless(lm: adapters.LanguageModel) -> None:
    corpus = with_row(Encoded(np.array([5, 6, 7], np.int32), np.zeros(3, bool), False))
    adapters.set_adapter(lm, small_models.random_state(adapters.get_adapter(lm)))
    close(summed(lm, corpus, [1, 2, 40]), clipped_by_hand(lm, CORPUS, [1, 2], CLIP), 3e-5)


def test_dropout_and_strange_rates_are_refused(lm: adapters.LanguageModel) -> None:
    with pytest.raises(UserError, match=r"adapter\.dropout = 0\.1"):
        fit(
            lm,
            settings_of().model_copy(update={"adapter": settings_of().adapter.model_copy(update={"dropout": 0.1})}),
            1,
        )
    with pytest.raises(ValueError, match="41 new rows of 40"):
        fit(lm, settings_of(), 1, new=41)


def test_the_output_head_trains_privately(tiny_model: Path, tmp_path: Path) -> None:
    """It sees tokens of all rows in one list, so hooks cannot tell rows apart; a row that passes alone needs none."""
    whole: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    whole.config.tie_word_embeddings = False  # weights that are the embedding's as well get no adapter
    whole.lm_head.weight = torch.nn.Parameter(whole.lm_head.weight.detach().clone())
    whole.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    lm = load(tmp_path, targets=("q_proj", "lm_head"))
    adapters.set_adapter(lm, small_models.random_state(adapters.get_adapter(lm)))
    close(summed(lm, CORPUS, [0, 5, 9]), clipped_by_hand(lm, CORPUS, [0, 5, 9], CLIP), 3e-5)


def test_an_adapter_that_gradients_do_not_reach_is_an_error_not_noise(
    lm: adapters.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a row is drawn: an error that depends on the rows would tell of them."""

    def never(*_: object) -> np.ndarray:
        raise AssertionError("a row was drawn")

    monkeypatch.setattr(SecretNoise, "chosen", never)
    layer = next(m for name, m in lm.model.named_modules() if name.endswith("o_proj"))
    monkeypatch.setattr(layer, "forward", layer.base_layer.forward)  # as if the adapter were not there
    with pytest.raises(RuntimeError, match=r"o_proj\.lora_A.* gets no gradient \(2 of \d+ tensors\)"):
        fit(lm, settings_of(), 1, noise_multiplier=1.0)


def test_an_adapter_that_does_not_move_is_an_error(lm: adapters.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dp_sgd, "_take", lambda *_: None)
    with pytest.raises(RuntimeError, match="left the adapter as it was"):
        fit(lm, settings_of(), 1, noise_multiplier=1.0)


def test_a_bfloat16_base_trains_privately(tiny_model: Path) -> None:
    narrow, wide = load(tiny_model, "bfloat16"), load(tiny_model)
    start = small_models.random_state(adapters.get_adapter(wide))
    a, b = (fit(m, settings_of(optimizer="sgd"), 1, start=start).delta for m in (narrow, wide))
    assert all(t.dtype is torch.float32 for t in a.values())
    assert norm(subtract(a, b)) < 0.05 * norm(b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_makes_the_same_private_steps(tiny_model: Path, dtype: str) -> None:
    """The noise is the same to the bit, whatever the device; the gradients to its rounding."""
    here = load(tiny_model)
    there = adapters.load(ModelConfig(name=str(tiny_model), dtype=dtype, device="cuda"), settings_of().adapter)
    a, b = (fit(m, settings_of(optimizer="sgd"), 2, noise_multiplier=0.3).delta for m in (here, there))
    assert norm(subtract(a, b)) < (0.02 if dtype == "bfloat16" else 1e-3) * norm(a)
    a, b = (fit(m, settings_of(optimizer="sgd"), 2).delta for m in (here, there))
    assert norm(subtract(a, b)) < (0.1 if dtype == "bfloat16" else 1e-2) * norm(a)


# -- audit ------------------------------------------------------------------------------------------


CANARIES, AUDIT_STEPS, AUDIT_NOISE, LEVEL = 600, 2, 1.4, 1e-3


def mu_of(noise_multiplier: float) -> float:
    """Steps of Gaussian noise on sums in which a row is for certain are mu-GDP with mu = sqrt(T) / z (Dong et al.)."""
    return math.sqrt(AUDIT_STEPS) / noise_multiplier


def epsilon_of(mu: float, delta: float) -> float:
    """The least epsilon at `delta` of what is mu-GDP (Balle and Wang 2018, theorem 8)."""

    def slips(eps: float) -> float:
        spread = math.exp(min(eps, 700)) * stats.norm.cdf(-mu / 2 - eps / mu)
        return float(stats.norm.cdf(mu / 2 - eps / mu) - spread - delta)

    return optimize.brentq(slips, 0, 1000) if mu > 1e-3 and slips(0) > 0 else 0.0


def lower_bound(right: int, guesses: int) -> float:
    """A bound on epsilon at delta 1e-5 that is above the truth with a probability of `LEVEL` at most.

    Who guesses a fair coin behind a mu-GDP release is right with a probability of Phi(mu / 2) at most (Dong, Roth and
    Su 2022). The probability is bounded by Clopper and Pearson's interval; each canary is a trial of its own, since
    noise along canaries whose gradients have nothing in common is independent.
    """
    chance = stats.beta.ppf(LEVEL, right, guesses - right + 1)
    return epsilon_of(max(0.0, 2 * float(stats.norm.ppf(min(chance, 1 - 1e-12)))), 1e-5)


def audited(lm: adapters.LanguageModel, noise_multipliers: Sequence[float]) -> list[float]:
    """The bounds for visits on rows of random tokens, each there by a coin's flip and drawn in every step.

    Who audits a canary knows all other rows and takes away what they added. What is left along the canary's own clipped
    gradient is guessed to hold it where it is more than half of what the canary would have added.
    """
    rng = np.random.default_rng(1)
    rows = [Encoded(rng.integers(2, 320, 8).astype(np.int32), np.arange(8) >= 1, False) for _ in range(CANARIES)]
    inside = rng.random(CANARIES) < 0.5
    start = small_models.random_state(adapters.get_adapter(lm), 0.3)
    adapters.set_adapter(lm, start)
    every, held = gather(rows), gather([row for row, there in zip(rows, inside, strict=True) if there])
    single = [dp_sgd.clipped_sum(lm, row_losses, every, np.array([i]), 0.01).gradients for i in range(CANARIES)]
    gradients = torch.stack([torch.cat([g.flatten() for g in one.values()]) for one in single])
    config = settings_of(optimizer="sgd", lr=1e-2, privacy={"clip": 0.01, "batch_rows": 1})
    bounds = []
    for noise_multiplier in noise_multipliers:
        result = fit(lm, config, AUDIT_STEPS, corpus=held, rate=1.0, noise_multiplier=noise_multiplier, start=start)
        went = torch.cat([result.delta[name].flatten() for name in lm.adapter]).double() / (-1e-2 * AUDIT_STEPS)
        beyond = (gradients @ (went - gradients[inside].sum(0)) / gradients.square().sum(1)).numpy()  # what is known
        bounds.append(lower_bound(int(((beyond + inside > 0.5) == inside).sum()), CANARIES))
    return bounds


def test_the_audit_has_the_power_that_is_stated() -> None:
    """Half the noise is missed with a probability below 1e-6, even if overlap costs 3% of mu."""
    claimed = epsilon([Mechanism(AUDIT_NOISE, 1.0, AUDIT_STEPS)], 1e-5)
    enough = next(right for right in range(CANARIES // 2, CANARIES) if lower_bound(right, CANARIES) > claimed)
    as_claimed, halved = (
        stats.norm.cdf(share * mu_of(z) / 2) for share, z in ((1, AUDIT_NOISE), (0.97, AUDIT_NOISE / 2))
    )
    assert stats.binom.sf(enough - 1, CANARIES, as_claimed) <= LEVEL  # a false alarm
    assert stats.binom.cdf(enough - 1, CANARIES, halved) < 1e-6


@pytest.mark.slow
def test_an_audit_finds_half_the_noise_and_not_more_than_is_claimed_with_all_of_it(tiny_model: Path) -> None:
    lm = load(tiny_model, rank=16)
    claimed = epsilon([Mechanism(AUDIT_NOISE, 1.0, AUDIT_STEPS)], 1e-5)
    as_claimed, halved, without = audited(lm, (AUDIT_NOISE, AUDIT_NOISE / 2, 0.0))
    assert 0.5 < as_claimed <= claimed < halved, (as_claimed, claimed, halved)
    assert without > 2 * halved


def test_observers_see_what_stays_at_home(lm: adapters.LanguageModel) -> None:
    seen: list[StepRecord] = []
    fit(lm, settings_of(), 3, observers=(seen.append,), noise_multiplier=1.0)
    assert [record.step for record in seen] == [0, 1, 2]
    assert all(math.isfinite(record.loss) and record.grad_norm > 0 for record in seen)
