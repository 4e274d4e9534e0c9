"""Gated layers against the equation y = W x + alpha(x) s B A x + (1 - alpha(x)) D x, written out in plain torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import model_families
import numpy as np
import pytest
import small_models
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from apiary.config.schema import AdapterConfig, ModelConfig, TrainConfig
from apiary.core import lora
from apiary.core.errors import UserError
from apiary.data.batches import Batch, collate
from apiary.models import adapter_files, adapters, gates
from apiary.models.adapters import LanguageModel
from apiary.models.inference import ModelProbe
from apiary.models.loss import row_losses
from client.training import trainer
from client.training.trainer import VisitPlan

SCALE = 6 / 2  # alpha / sqrt(rank)


class Plain(nn.Module):
    """A layer of the base with the equation around it, and nothing of ours."""

    def __init__(self, base: nn.Module, state: Mapping[str, Tensor], module: str) -> None:
        super().__init__()
        self.base = base
        self.a, self.b, self.gate = (
            nn.Parameter(state[f"{module}.lora_{kind}.weight"].clone()) for kind in ("A", "B", "gate")
        )
        self.d = state[f"base_delta.{module}.lora_B.weight"] @ state[f"base_delta.{module}.lora_A.weight"]

    def forward(self, x: Tensor) -> Tensor:
        alpha = torch.softmax(torch.cat([x @ self.gate.T, torch.zeros_like(x[..., :1])], -1), -1)[..., :1]
        return self.base(x) + alpha * SCALE * ((x @ self.a.T) @ self.b.T) + (1 - alpha) * (x @ self.d.T)


def load(folder: Path, dtype: str = "float32") -> LanguageModel:
    config = AdapterConfig.model_validate({"rank": 4, "alpha": 6})
    return adapters.load(ModelConfig(name=str(folder), dtype=dtype, device="cpu"), config)


def gated(lm: LanguageModel, factor: float = 1.0) -> dict[str, Tensor]:
    """A state with random factors, gates and something added to the base, of another rank."""
    state = small_models.random_state(adapters.get_adapter(lm))
    rng = torch.Generator().manual_seed(3)
    for module, (b, a) in lora.split(state).items():
        other = lora.Factors(0.3 * torch.randn(len(b), 3, generator=rng), torch.randn(3, a.shape[1], generator=rng))
        state[f"{module}.lora_gate.weight"] = factor * torch.randn(1, a.shape[1], generator=rng)
        state |= {f"base_delta.{name}": tensor for name, tensor in lora.join({module: other}).items()}
    return state


def plain_model(folder: Path, lm: LanguageModel, state: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, Plain]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    made = {}
    for module in {lora.module_of(name) for name in lm.adapter}:
        path = module.removeprefix(adapters.PREFIX)
        parent, _, name = path.rpartition(".")
        made[module] = Plain(model.get_submodule(path), state, module)
        setattr(model.get_submodule(parent), name, made[module])
    return model, made


def batch_of(rows: int = 6) -> Batch:
    return collate(small_models.make_corpus(rows), np.arange(rows), 0)


@pytest.fixture(params=["llama", "gpt2", "phi3", "gemma2"])
def folder(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> Path:
    return small_models.make_folder(request.param, tiny_model, tmp_path / request.param)


def test_a_gated_model_and_its_gradients_are_those_of_the_equation(folder: Path) -> None:
    lm, batch = load(folder), batch_of()
    state = gated(lm, 0.3)
    adapters.set_adapter(lm, state)
    model, layers = plain_model(folder, lm, state)
    assert any(isinstance(m, Conv1D) for m in model.modules()) == (folder.name == "gpt2")
    for one in (lm.model, model):
        for p in one.parameters():
            p.grad = None
    ours, theirs = row_losses(lm.model, batch), row_losses(model, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    ours.sum().backward()
    theirs.sum().backward()
    live = adapters.live(lm)
    assert len(live) == 3 * len(layers)
    for module, layer in layers.items():
        for kind, expected in (("A", layer.a), ("B", layer.b), ("gate", layer.gate)):
            mine = live[f"{module}.lora_{kind}.weight"].grad
            assert mine is not None and expected.grad is not None and float(expected.grad.abs().max()) > 0
            tolerance = 1e-4 * float(expected.grad.abs().max())
            torch.testing.assert_close(mine, expected.grad, rtol=1e-3, atol=tolerance)
            live[f"{module}.lora_{kind}.weight"].grad = None


def test_a_gate_of_zero_is_the_mean_of_both_by_hand(tiny_model: Path) -> None:
    lm = load(tiny_model)
    state = {n: torch.zeros_like(t) if lora.is_gate(n) else t for n, t in gated(lm).items()}
    adapters.set_adapter(lm, state)
    layer = lm.model.get_base_model().model.layers[0].mlp.up_proj
    (module,) = [m for m in lora.split(lm.adapter) if m.endswith("layers.0.mlp.up_proj")]
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    a, b = state[f"{module}.lora_A.weight"], state[f"{module}.lora_B.weight"]
    row = state[f"base_delta.{module}.lora_B.weight"] @ state[f"base_delta.{module}.lora_A.weight"]
    expected = x @ (layer.base_layer.weight + 0.5 * SCALE * b @ a + 0.5 * row).T
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def logits(lm: LanguageModel) -> Tensor:
    with torch.no_grad():
        return lm.model(input_ids=batch_of().ids, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("sign", [1, -1])
def test_gates_that_are_all_open_or_shut_leave_one_of_the_two_models(tiny_model: Path, sign: int) -> None:
    """By a gate along an entry of x that is 1 everywhere."""
    lm = load(tiny_model)
    layer = lm.model.get_base_model().model.layers[1].self_attn.q_proj
    state = gated(lm)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 1.0
    for name in state:
        if lora.is_gate(name):
            state[name] = torch.zeros(1, state[name].shape[1])
            state[name][0, 0] = sign * 1e4
    adapters.set_adapter(lm, state)
    mixed = layer(x)
    rest, _ = lora.ungated(state)
    own, row = lora.parts(rest)
    alone = {n: torch.zeros_like(t) if lora.is_b(n) else t for n, t in own.items()}
    adapters.set_adapter(lm, own if sign > 0 else lora.whole(alone, row))
    torch.testing.assert_close(mixed, layer(x), rtol=1e-5, atol=1e-5)


def test_a_model_whose_gates_are_taken_back_is_as_before_to_the_bit(tiny_model: Path) -> None:
    lm = load(tiny_model)
    state = gated(lm)
    plain, _ = lora.ungated(state)
    adapters.set_adapter(lm, plain)
    with_delta = logits(lm)
    own = lora.parts(plain)[0]
    adapters.set_adapter(lm, own)
    before = logits(lm)
    adapters.set_adapter(lm, state)
    assert not torch.equal(logits(lm), with_delta) and len(lm.gates) == len(lm.adapter) / 2
    assert lm.gates.keys() == {n for n in state if lora.is_gate(n)}
    adapters.set_adapter(lm, plain)
    assert torch.equal(logits(lm), with_delta) and not lm.gates
    adapters.set_adapter(lm, state)
    adapters.set_adapter(lm, own)
    assert torch.equal(logits(lm), before) and adapters.live(lm).keys() == lm.adapter.keys()


def test_a_gate_that_does_not_fit_is_refused_and_changes_nothing(tiny_model: Path) -> None:
    lm = load(tiny_model)
    state = gated(lm)
    adapters.set_adapter(lm, lora.ungated(state)[0])
    before = logits(lm)
    name = next(n for n in state if lora.is_gate(n))
    bare = {n: t for n, t in state.items() if not n.startswith("base_delta.")}
    with pytest.raises(ValueError, match="nothing to weigh"):
        adapters.set_adapter(lm, bare)
    with pytest.raises(ValueError, match="shape"):
        adapters.set_adapter(lm, {**state, name: torch.zeros(1, 5)})
    with pytest.raises(ValueError, match="no LoRA factor"):  # nor is it ever written or merged as if it were not there
        adapter_files.as_written(lm, state)
    assert torch.equal(logits(lm), before) and not lm.gates


def test_training_moves_gates_and_factors_and_leaves_the_rest(tiny_model: Path) -> None:
    """Two batches a step are one batch of all rows: the change of a step of gradient descent is its gradient."""
    lm = load(tiny_model)
    state, corpus = gated(lm, 0.3), small_models.make_corpus(30)
    settings = {"batch_tokens": 200, "lr": 1.0, "warmup": 0.0, "steps": 1, "optimizer": "sgd", "clip_norm": 0.0}
    config = TrainConfig.model_validate({**settings, "accumulate": 2, "schedule": "constant"})
    result = trainer.fit(lm, state, corpus, config, VisitPlan(5, "a", steps=1, total_steps=1))
    assert result.delta.keys() == {n for n in state if not n.startswith("base_delta.")}
    rows = trainer.BatchStream(corpus, 200, lambda epoch: trainer.generator(5, "a", "epoch", epoch), trainer.Cursor())
    batches = rows.take(2, lm)
    tokens = sum(int(batch.targets.sum()) for batch in batches)
    adapters.set_adapter(lm, state)
    live = adapters.live(lm)
    loss = torch.stack([row_losses(lm.model, batch).sum() for batch in batches]).sum() / tokens
    grads = torch.autograd.grad(loss, list(live.values()))
    for (name, _), grad in zip(live.items(), grads, strict=True):
        torch.testing.assert_close(result.delta[name], -grad, rtol=1e-3, atol=1e-5)
    assert all(float(d.abs().max()) > 0 for n, d in result.delta.items() if lora.is_gate(n))


def test_in_bfloat16_it_is_nearly_the_same(tiny_model: Path) -> None:
    """As near to its own float32 model as an adapter without gates is to its own."""
    corpus, far = small_models.make_corpus(20), []
    for bare in (False, True):
        losses = []
        for dtype in ("float32", "bfloat16"):
            lm = load(tiny_model, dtype)
            state = gated(lm, 0.3)
            adapters.set_adapter(lm, lora.ungated(state)[0] if bare else state)
            losses.append(ModelProbe(lm).losses(corpus)[0])
        far.append(np.abs(losses[0] - losses[1]).max() / losses[0].mean())
    assert far[0] < 2 * far[1] + 5e-3
    lm = load(tiny_model, "bfloat16")
    state = gated(lm, 0.3)
    config = TrainConfig.model_validate({"batch_tokens": 200, "lr": 1e-2, "warmup": 0.0, "steps": 1})
    moved = trainer.fit(lm, state, corpus, config, VisitPlan(5, "a", steps=2, total_steps=2)).delta
    assert all(t.dtype == torch.float32 and float(t.abs().max()) > 0 for t in moved.values())


def test_answers_are_those_of_a_model_of_the_equation(tiny_model: Path) -> None:
    """In batches of prompts of different lengths, from a cache, and by the whole text again and again without one."""
    lm = load(tiny_model)
    state = gated(lm, 0.5)
    adapters.set_adapter(lm, state)
    prompts = [[5, 9, 40], [7, 100, 32, 8, 61, 77], [12]]
    given = ModelProbe(lm).generate(prompts, 6)
    model, _ = plain_model(tiny_model, lm, state)
    for prompt, text in zip(prompts, given, strict=True):
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token == 1:
                break
            ids.append(token)
        assert text == lm.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


def test_the_fixed_form_has_the_mean_of_each_layers_weights(tiny_model: Path) -> None:
    lm, corpus = load(tiny_model), small_models.make_corpus(12)
    state = gated(lm, 0.5)
    model, layers = plain_model(tiny_model, lm, state)
    seen: dict[str, list[Tensor]] = {module: [] for module in layers}
    for module, layer in layers.items():
        layer.register_forward_pre_hook(
            lambda layer, args, seen=seen[module]: seen.append(torch.sigmoid(args[0] @ layer.gate.T).flatten())
        )
    with torch.no_grad():
        for i in range(len(corpus)):  # one by one, so without padding
            row = corpus.ids[corpus.offsets[i] : corpus.offsets[i + 1]]
            model(input_ids=torch.tensor(row[None].astype(np.int64)), use_cache=False)
    expected = {module: float(torch.cat(found).mean()) for module, found in seen.items()}
    found = gates.means(lm, state, corpus)
    assert found.keys() == expected.keys()
    for module, mean in expected.items():
        assert found[module] == pytest.approx(mean, abs=1e-5) and abs(mean - 0.5) > 1e-4
    plain = gates.fixed(lm, state, corpus)
    for module, mean in expected.items():
        name = f"{module}.lora_B.weight"
        torch.testing.assert_close(plain[name], mean * state[name], rtol=1e-4, atol=1e-6)
        row = state[f"base_delta.{name}"]
        torch.testing.assert_close(plain[f"base_delta.{name}"], (1 - mean) * row, rtol=1e-4, atol=1e-6)
    assert adapter_files.as_written(lm, plain).rank == 4 + 3
    bare = lora.ungated(state)[0]
    assert gates.fixed(lm, bare, corpus) is bare
    assert set(gates.means(lm, state, small_models.make_corpus(0)).values()) == {0.5}


def test_the_mean_is_over_rows_from_end_to_end() -> None:
    assert gates.sample(list(range(5))) == [0, 1, 2, 3, 4] and gates.sample([]) == []
    drawn = gates.sample(list(range(1000)))
    assert (len(drawn), drawn[0], drawn[-1]) == (32, 0, 999) and len(set(drawn)) == 32


def test_experts_of_one_weight_are_refused_with_a_way_out(tmp_path: Path) -> None:
    folder = model_families.make_folder("Mixtral", tmp_path)
    lm = load(folder)
    with pytest.raises(UserError, match="in one parameter") as told:
        gates.check(lm, "strategy.name = 'x'")
    (line,) = told.value.problems
    assert line.startswith("strategy.name = 'x': ") and "adapter.targets" in line
    expert = next(m for m in lora.split(lm.adapter) if m[-1].isdigit())
    state = gated(lm)
    with pytest.raises(ValueError, match="experts of one weight"):
        adapters.set_adapter(lm, state)
    assert f"{expert}.lora_gate.weight" in state
    config = AdapterConfig.model_validate({"rank": 4, "alpha": 6, "targets": ["q_proj"]})
    gates.check(adapters.load(ModelConfig(name=str(folder), dtype="float32", device="cpu"), config), "x")
