from __future__ import annotations

import functools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM

from apiary.config.schedule import learning_rate, lr_sum
from apiary.config.schema import AdapterConfig, Method, ModelConfig, RunConfig, TrainConfig
from apiary.core.errors import UnsoundStart, UserError
from apiary.core.tensors import StateDict, generator, norm
from apiary.data.batches import Corpus, collate, plan_batches
from apiary.models import adapters
from client.training import objectives, trainer
from client.training.trainer import Cursor, FitResult, StepRecord, VisitPlan
from strategies.local import Hooks

CORPUS = small_models.make_corpus(40)


def load(folder: Path, dtype: str = "float32", **adapter: object) -> adapters.LanguageModel:
    config = AdapterConfig.model_validate({"rank": 4, "alpha": 6, **adapter})
    return adapters.load(ModelConfig(name=str(folder), dtype=dtype, device="cpu"), config)


@pytest.fixture
def lm(tiny_model: Path) -> adapters.LanguageModel:
    return load(tiny_model)


def settings_of(**keys: object) -> TrainConfig:
    base = {"batch_tokens": 96, "lr": 1e-2, "warmup": 0.0, "steps": 1}
    return TrainConfig.model_validate({**base, **keys})


def fit(
    lm: adapters.LanguageModel,
    config: TrainConfig,
    steps: int,
    *,
    start: StateDict | None = None,
    corpus: Corpus = CORPUS,
    **keys: Any,
) -> FitResult:
    plan = VisitPlan(**{"seed": 5, "client": "a", "steps": steps, "total_steps": steps, **keys})
    return trainer.fit(lm, adapters.fresh_adapter(lm, 0) if start is None else start, corpus, config, plan)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize("lr_b", [1, 4])
def test_a_visit_is_adamw_by_the_book_on_plain_peft(lm: adapters.LanguageModel, tiny_model: Path, lr_b: int) -> None:
    """Loshchilov and Hutter 2019, algorithm 2, with clipping, on an ordinary peft model and full logits.

    With LoRA+ (Hayou et al. 2024) every B has a learning rate `lr_b` times as high.
    """
    config = settings_of(weight_decay=0.1, clip_norm=0.5, warmup=0.5, lr_b=lr_b)
    start = small_models.random_state(adapters.get_adapter(lm))
    result = fit(lm, config, 4, start=start, first_step=1, total_steps=6)

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    lora = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(base, lora).eval()
    live = {n.replace(".default", ""): p for n, p in peft_model.named_parameters() if p.requires_grad}
    for name, parameter in live.items():
        parameter.data = start[name].clone()
    plan = plan_batches(CORPUS.lengths, 96, generator(5, "a", "epoch", 0))
    first = {n: torch.zeros_like(p) for n, p in live.items()}
    second = {n: torch.zeros_like(p) for n, p in live.items()}
    tokens, nats = 0, 0.0
    for step in range(4):
        batch = collate(CORPUS, plan[step], 0)
        logits = peft_model(input_ids=batch.ids).logits[:, :-1]
        wanted = batch.ids[:, 1:].masked_fill(~batch.targets[:, 1:], -100)
        loss = functional.cross_entropy(logits.transpose(1, 2), wanted)  # mean over trained tokens
        grads = dict(zip(live, torch.autograd.grad(loss, list(live.values())), strict=True))
        length = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        peak = 1e-2 * [2 / 3, 1, 1, 0.75][step]  # steps 1 to 4 of 6, of which 3 warm up; cos(pi/3) = 1/2
        for name, parameter in live.items():
            lr = peak * (lr_b if "lora_B" in name else 1)
            g = grads[name] * min(1.0, 0.5 / (length + 1e-6))
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g * g
            m, v = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
            parameter.data = parameter.data * (1 - lr * 0.1) - lr * m / (v.sqrt() + 1e-8)
        tokens += int(batch.targets.sum())
        nats += float(loss.detach()) * int(batch.targets.sum())
    for name, parameter in live.items():
        torch.testing.assert_close(result.delta[name], parameter.data - start[name], rtol=1e-3, atol=2e-5)
    assert result.report.tokens == tokens
    assert result.report.loss == pytest.approx(nats / tokens, rel=1e-5)
    assert result.report.examples == sum(len(rows) for rows in plan[:4])
    assert result.report.steps == 4


def step_gradient(lm: adapters.LanguageModel, config: TrainConfig) -> dict[str, torch.Tensor]:
    """The whole gradient of one optimizer step, added up from what reaches the parameters."""
    total = {name: torch.zeros_like(p) for name, p in lm.adapter.items()}
    start = small_models.random_state(adapters.get_adapter(lm))

    def note(name: str, gradient: torch.Tensor) -> None:
        total[name] += gradient

    hooks = [p.register_hook(functools.partial(note, n)) for n, p in lm.adapter.items()]
    fit(lm, config, 1, start=start)
    for hook in hooks:
        hook.remove()
    return total


def test_accumulated_batches_have_the_gradient_of_one_large_batch(lm: adapters.LanguageModel) -> None:
    batches = len(plan_batches(CORPUS.lengths, 96, generator(5, "a", "epoch", 0)))
    whole = step_gradient(lm, settings_of(batch_tokens=100_000))
    parts = step_gradient(lm, settings_of(accumulate=batches))
    assert batches > 4
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-7)


def visited(lm: adapters.LanguageModel, steps: list[int], **keys: object) -> list[list[int]]:
    small_models.SEEN.clear()
    cursor = Cursor()
    for count in steps:
        config = settings_of(objective="small_models:recording", **keys)
        cursor = fit(lm, config, count, cursor=cursor).cursor
    return list(small_models.SEEN)


def test_visits_walk_through_the_data_where_the_last_one_stopped(lm: adapters.LanguageModel) -> None:
    plans = [plan_batches(CORPUS.lengths, 96, generator(5, "a", "epoch", e)) for e in range(3)]
    expected = [rows.tolist() for plan in plans for rows in plan]
    one = visited(lm, [2 * len(plans[0])])
    assert one == expected[: len(one)]
    assert visited(lm, [3, 1, 2 * len(plans[0]) - 4]) == one
    epoch = [row for rows in one[: len(plans[0])] for row in rows]
    assert sorted(epoch) == list(range(len(CORPUS)))
    assert one[: len(plans[0])] != one[len(plans[0]) :]


def test_the_cursor_says_what_comes_next(lm: adapters.LanguageModel) -> None:
    batches = len(plan_batches(CORPUS.lengths, 96, generator(5, "a", "epoch", 0)))
    assert fit(lm, settings_of(), 2).cursor == Cursor(0, 2)
    assert fit(lm, settings_of(), batches).cursor == Cursor(1, 0)
    assert fit(lm, settings_of(accumulate=2), batches).cursor.epoch == 2
    assert fit(lm, settings_of(), 1, cursor=Cursor(4, 10_000)).cursor == Cursor(5, 1)


def test_the_same_visit_gives_the_same_bits(tiny_model: Path) -> None:
    lm = load(tiny_model, dropout=0.5)
    config = settings_of()
    first = fit(lm, config, 3)
    before = torch.get_rng_state()
    torch.rand(7)
    assert small_models.same(first.delta, fit(lm, config, 3).delta)
    assert not small_models.same(first.delta, fit(lm, config, 3, client="b").delta)
    assert not small_models.same(first.delta, fit(lm, config, 3, seed=6).delta)
    torch.set_rng_state(before)
    fit(lm, config, 1)
    assert torch.equal(torch.get_rng_state(), before)
    dry = fit(load(tiny_model), config, 3)
    assert not small_models.same(first.delta, dry.delta)
    assert not any(module.training for module in lm.model.modules())


def test_training_learns_and_leaves_the_base_alone(tiny_model: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        lm = load(tiny_model, dtype)
        frozen = {n: p.clone() for n, p in lm.model.named_parameters() if not p.requires_grad}
        seen: list[StepRecord] = []
        result = fit(lm, settings_of(batch_tokens=4096), 30, observers=(seen.append,))
        assert [record.step for record in seen] == list(range(30))
        assert seen[-1].loss < seen[0].loss - 0.2
        assert result.report.loss == pytest.approx(np.mean([r.loss for r in seen]), rel=1e-6)
        for name, parameter in lm.model.named_parameters():
            assert name not in frozen or torch.equal(parameter, frozen[name])
        assert all(parameter.grad is None for parameter in lm.model.parameters())


def test_the_learning_rate_by_hand() -> None:
    cosine = settings_of(lr=0.1, warmup=0.2)
    assert [learning_rate(s, 10, cosine) for s in (0, 1, 2)] == pytest.approx([0.05, 0.1, 0.1])
    assert learning_rate(6, 10, cosine) == pytest.approx(0.05)
    assert learning_rate(9, 10, cosine) == pytest.approx(0.05 * (1 + math.cos(7 / 8 * math.pi)))
    assert learning_rate(99, 10, cosine) == pytest.approx(0)
    flat = settings_of(lr=0.1, warmup=0.2, schedule="constant")
    assert [learning_rate(s, 10, flat) for s in (0, 1, 9)] == pytest.approx([0.05, 0.1, 0.1])


@given(st.integers(1, 300), st.floats(0, 0.99), st.sampled_from(["cosine", "constant"]))
@settings(max_examples=50, deadline=None)
def test_no_step_of_a_run_is_wasted_or_above_the_peak(total: int, warmup: float, kind: str) -> None:
    config = settings_of(lr=1.0, warmup=warmup, schedule=kind)
    rates = [learning_rate(step, total, config) for step in range(total)]
    assert all(0 < rate <= 1 for rate in rates)
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


@given(st.integers(1, 9), st.integers(1, 40), st.floats(0, 0.99), st.sampled_from(["cosine", "constant"]), st.data())
@settings(max_examples=80, deadline=None)
def test_how_far_a_visit_walks_is_the_sum_of_its_learning_rates(
    rounds: int, steps: int, warmup: float, kind: str, data: st.DataObject
) -> None:
    train = settings_of(lr=0.3, warmup=warmup, schedule=kind)
    config, number = RunConfig(rounds=rounds, train=train), data.draw(st.integers(1, rounds))
    visit = range((number - 1) * steps, number * steps)
    expected = math.fsum(learning_rate(step, rounds * steps, train) for step in visit)
    assert lr_sum(config, number, steps) == pytest.approx(expected, rel=1e-9)


def test_how_far_a_visit_walks_takes_no_longer_for_more_steps() -> None:
    """The number is a client's word; a server that added it up step by step could be kept busy for weeks."""
    train = settings_of(lr=0.3, warmup=0.1, schedule="cosine")
    assert 0 < lr_sum(RunConfig(rounds=3, train=train), 2, 10**15) < 0.3 * 10**15


def test_steps_per_round() -> None:
    batches = len(plan_batches(CORPUS.lengths, 96, generator(0, "", "epoch", 0)))
    assert trainer.steps_per_round(settings_of(steps=7), CORPUS) == 7
    epochs = {"steps": None, "epochs": 2.5}
    assert trainer.steps_per_round(settings_of(**epochs), CORPUS) == math.ceil(2.5 * batches)
    assert trainer.steps_per_round(settings_of(**epochs, accumulate=100), CORPUS) == 1


def test_fedprox_is_half_mu_times_the_squared_distance(lm: adapters.LanguageModel) -> None:
    start = small_models.random_state(adapters.get_adapter(lm))
    (penalty,) = objectives.build_penalties([Method.model_validate({"name": "fedprox", "mu": 0.6})], start)
    moved = {n: (t + 0.1).requires_grad_() for n, t in start.items()}
    value = penalty(moved)
    count = sum(t.numel() for t in start.values())
    assert float(value.detach()) == pytest.approx(0.6 / 2 * 0.01 * count, rel=1e-4)
    value.backward()
    for tensor in moved.values():
        torch.testing.assert_close(tensor.grad, torch.full_like(tensor, 0.06))
    with pytest.raises(UserError, match="mu = -1"):
        objectives.build_penalties([Method.model_validate({"name": "fedprox", "mu": -1})], start)


def test_fedprox_keeps_a_client_near_the_start(lm: adapters.LanguageModel) -> None:
    start = adapters.fresh_adapter(lm, 0)
    lengths = []
    for mu in (0.0, 1.0, 100.0):
        penalty = objectives.fedprox(start=start, mu=mu)
        lengths.append(norm(fit(lm, settings_of(), 8, hooks=Hooks(penalties=(penalty,)), start=start).delta))
    assert lengths[0] > 1.05 * lengths[1] > 1.1 * lengths[2] > 0
    assert small_models.same(
        fit(lm, settings_of(), 3, hooks=Hooks(penalties=(objectives.fedprox(start=start, mu=0.0),))).delta,
        fit(lm, settings_of(), 3).delta,
    )


def test_projections_apply_to_the_delta(lm: adapters.LanguageModel) -> None:
    free = fit(lm, settings_of(), 2).delta

    def halved(delta: StateDict) -> StateDict:
        return {name: tensor / 2 for name, tensor in delta.items()}

    def without_a(delta: StateDict) -> StateDict:
        return {name: tensor * ("lora_B" in name) for name, tensor in delta.items()}

    sent = fit(lm, settings_of(), 2, hooks=Hooks(projections=(halved, without_a))).delta
    assert any(free[name].any() for name in free if "lora_A" in name)
    for name in free:
        torch.testing.assert_close(sent[name], free[name] / 2 if "lora_B" in name else torch.zeros_like(free[name]))


def test_nan_is_an_error_and_not_an_update(lm: adapters.LanguageModel) -> None:
    start = adapters.fresh_adapter(lm, 0)
    name = next(iter(start))
    broken = {**start, name: torch.full_like(start[name], float("nan"))}
    with pytest.raises(UnsoundStart, match=r"loss nan .* with the adapter as it was sent$"):
        fit(lm, settings_of(), 2, start=broken)
    far = fit(lm, settings_of(), 1).delta
    with pytest.raises(FloatingPointError, match=r" at step 2 .* a lower train\.lr ") as own:
        fit(lm, settings_of(lr=1e30), 3)
    assert not isinstance(own.value, UnsoundStart) and all(torch.isfinite(t).all() for t in far.values())
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        fit(lm, settings_of(), 1, hooks=Hooks(projections=(lambda delta: {**delta, name: broken[name]},)))
    assert all(torch.isfinite(t).all() for t in fit(lm, settings_of(), 1).delta.values())


def test_an_empty_corpus_is_refused(lm: adapters.LanguageModel) -> None:
    empty = Corpus(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(1, np.int64), CORPUS.stats)
    with pytest.raises(ValueError, match="nothing to train on"):
        fit(lm, settings_of(), 1, corpus=empty)


def test_threads_are_set_for_the_visit_only(lm: adapters.LanguageModel) -> None:
    seen = []
    fit(lm, settings_of(threads=2), 1, observers=(lambda _: seen.append(torch.get_num_threads()),))
    assert seen == [2]
    assert torch.get_num_threads() == 1


@pytest.mark.slow
def test_the_trainer_needs_torch_transformers_and_peft_only() -> None:
    blocked = ("flwr", "flwr_datasets", "datasets", "opacus", "ray", "trl")
    code = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in blocked)
    code += "import client.training.trainer, apiary.models.adapters, apiary.models.inference, benchmarks.training\n"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3], timeout=120)


@pytest.mark.gpu
def test_training_on_a_gpu_goes_where_the_cpu_goes(tiny_model: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    config = ModelConfig(name=str(tiny_model), dtype="float32", device="cuda")
    there = adapters.load(config, AdapterConfig(rank=4, alpha=6))
    start = small_models.random_state(adapters.get_adapter(there))
    gpu, cpu = (fit(lm, settings_of(), 3, start=start).delta for lm in (there, load(tiny_model)))
    for name in cpu:
        torch.testing.assert_close(gpu[name], cpu[name], rtol=1e-2, atol=1e-4)
