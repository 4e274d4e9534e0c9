from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import small_models
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM

from apiary.config.schema import AdapterConfig, ModelConfig
from apiary.data.batches import Batch, Corpus, collate
from apiary.models import adapters, inference
from apiary.models.fused_layers import LeanLinear
from apiary.models.inference import ModelProbe, stop_ids
from apiary.models.loss import row_losses, token_nats

ADAPTER = AdapterConfig(rank=4, alpha=6)


def config(folder: Path, dtype: str = "float32") -> ModelConfig:
    return ModelConfig(name=str(folder), dtype=dtype, device="cpu")


@pytest.fixture
def lm(tiny_model: Path) -> adapters.LanguageModel:
    return tuned(tiny_model)


def tuned(folder: Path, dtype: str = "float32", scale: float = 0.1) -> adapters.LanguageModel:
    lm = adapters.load(config(folder, dtype), ADAPTER)
    adapters.set_adapter(lm, small_models.random_state(adapters.get_adapter(lm), scale))
    return lm


def plain_peft(folder: Path, lm: adapters.LanguageModel) -> PeftModel:
    """The same model and adapter as anyone would make it, without anything of ours."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lora = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).eval()
    state = adapters.get_adapter(lm)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state[name.replace(".default", "")])
    return model


def full_losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The textbook way: all logits, with an attention mask of the real tokens, then the masked cross-entropy."""
    real = (batch.ids != 0).long()
    logits = model(input_ids=batch.ids, attention_mask=real).logits[:, :-1].float()
    nats = functional.cross_entropy(logits.transpose(1, 2), batch.ids[:, 1:], reduction="none")
    return (nats * batch.targets[:, 1:]).sum(1)


def gradient(model: torch.nn.Module) -> torch.Tensor:
    named = sorted((n, p) for n, p in model.named_parameters() if p.requires_grad)
    return torch.cat([p.grad.flatten() for _, p in named])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:fan_in_fan_out")
@pytest.mark.parametrize("family", small_models.FAMILIES)
def test_losses_and_gradients_are_those_of_plain_peft(family: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = small_models.make_folder(family, tiny_model, tmp_path / family)
    lm = tuned(folder)
    assert any(isinstance(module, LeanLinear) for module in lm.model.modules())
    theirs = plain_peft(folder, lm)
    batch = collate(small_models.make_corpus(6), np.arange(6), 0)
    ours, expected = row_losses(lm.model, batch), full_losses(theirs, batch)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    lm.model.zero_grad()
    weights = torch.linspace(0.5, 2, 6)
    (ours * weights).sum().backward()
    (expected * weights).sum().backward()
    gap = (gradient(lm.model) - gradient(theirs)).norm() / gradient(theirs).norm()
    assert gap < 1e-5
    lm.model.zero_grad()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_in_bfloat16_the_lean_gradient_is_as_near_the_true_one_as_pefts(
    family: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = small_models.make_folder(family, tiny_model, tmp_path / family)
    lm = tuned(folder, "bfloat16", scale=0.02)
    true, rounded = plain_peft(folder, lm), plain_peft(folder, lm)
    for parameter in rounded.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    batch = collate(small_models.make_corpus(16), np.arange(16), 0)
    full_losses(true, batch).sum().backward()
    lm.model.zero_grad()
    with adapters.autocast(lm):
        ours, theirs = row_losses(lm.model, batch), full_losses(rounded, batch)
    ours.sum().backward()
    theirs.sum().backward()
    exact = gradient(true)
    gaps = [float((gradient(m) - exact).norm() / exact.norm()) for m in (lm.model, rounded)]
    assert gaps[0] < 1.3 * gaps[1] + 0.01, gaps
    assert ours.dtype is torch.float32
    lm.model.zero_grad()


def test_the_cross_entropy_of_many_rows_is_pytorchs() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(600, 11, generator=rng)).requires_grad_()
    tokens = torch.randint(0, 11, (600,), generator=rng)
    weights = torch.rand(600, generator=rng)
    expected = functional.cross_entropy(logits, tokens, reduction="none")
    (theirs,) = torch.autograd.grad((expected * weights).sum(), logits)
    ours = token_nats(logits, tokens)
    (mine,) = torch.autograd.grad((ours * weights).sum(), logits)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(mine, theirs)


def test_a_row_does_not_feel_its_company(lm: adapters.LanguageModel) -> None:
    corpus = small_models.make_corpus(8)
    with torch.no_grad():
        together = row_losses(lm.model, collate(corpus, np.arange(8), 0))
        alone = [row_losses(lm.model, collate(corpus, np.array([row]), 0)) for row in range(8)]
        other_pad = row_losses(lm.model, collate(corpus, np.arange(8), 5))
    torch.testing.assert_close(together, torch.cat(alone))
    assert torch.equal(together, other_pad)


def test_the_head_sees_only_the_trained_positions(lm: adapters.LanguageModel) -> None:
    rows = []
    hook = lm.model.get_output_embeddings().register_forward_hook(
        lambda _module, _inputs, output: rows.append(output.shape[0])
    )
    corpus = small_models.make_corpus(5)
    row_losses(lm.model, collate(corpus, np.arange(5), 0))
    hook.remove()
    assert rows == [int(corpus.trained.sum())]
    assert lm.model(input_ids=torch.tensor([[3, 4, 5]])).logits.shape == (1, 3, 320)


def test_probe_losses_come_in_the_corpus_order(lm: adapters.LanguageModel) -> None:
    corpus = small_models.make_corpus(30)
    nats, tokens = ModelProbe(lm, batch_tokens=64).losses(corpus)
    assert nats.dtype == np.float64
    for row in range(len(corpus)):
        part = slice(corpus.offsets[row], corpus.offsets[row + 1])
        assert tokens[row] == corpus.trained[part].sum()
        with torch.no_grad():
            alone = float(row_losses(lm.model, collate(corpus, np.array([row]), 0)))
        assert nats[row] == pytest.approx(alone, rel=1e-5)


def test_probe_losses_of_nothing_are_nothing(lm: adapters.LanguageModel) -> None:
    empty = Corpus(np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(1, np.int64), small_models.make_corpus(1).stats)
    nats, tokens = ModelProbe(lm).losses(empty)
    assert nats.shape == tokens.shape == (0,)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_answers_are_those_of_one_by_one_decoding(family: str, tiny_model: Path, tmp_path: Path) -> None:
    lm = tuned(small_models.make_folder(family, tiny_model, tmp_path / family))
    rng = np.random.default_rng(1)
    prompts = [rng.integers(2, 320, n).tolist() for n in (9, 3, 30, 1, 17, 4)]
    expected = [small_models.greedy(lm, prompt, 6, stop_ids(lm)) for prompt in prompts]
    texts = [lm.tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    assert len(set(texts)) > 2
    assert ModelProbe(lm, batch_tokens=80).generate(prompts, 6) == texts
    assert ModelProbe(lm, batch_tokens=1).generate(prompts, 6) == texts


def test_an_answer_ends_at_the_end_mark(lm: adapters.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[5, 6, 7], [40, 41], [9, 8, 7, 6]]
    long = [small_models.greedy(lm, prompt, 8, []) for prompt in prompts]
    stop = long[0][3]
    monkeypatch.setattr(lm.model.generation_config, "eos_token_id", [stop])
    assert stop_ids(lm) == sorted({stop, 1})
    answers = ModelProbe(lm).generate(prompts, 8)
    for answer, ids in zip(answers, long, strict=True):
        end = min([ids.index(s) for s in (stop, 1) if s in ids], default=8)
        assert answer == lm.tokenizer.decode(ids[:end], skip_special_tokens=True)
    assert answers[0] == lm.tokenizer.decode(long[0][: long[0].index(stop)], skip_special_tokens=True)


def answers_by_hand(lm: adapters.LanguageModel, prompts: list[list[int]], new: int) -> list[str]:
    stops = stop_ids(lm)
    return [lm.tokenizer.decode(small_models.greedy(lm, p, new, stops), skip_special_tokens=True) for p in prompts]


def many_prompts(count: int = 24) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(2, 320, int(rng.integers(2, 20))).tolist() for _ in range(count)]


def stop_often(lm: adapters.LanguageModel, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model end its answers at many different places: its stop tokens are those that it writes most."""
    written = Counter(token for prompt in prompts for token in small_models.greedy(lm, prompt, 12, []))
    stops = [token for token, _ in written.most_common(9)[2:]]
    monkeypatch.setattr(lm.model.generation_config, "eos_token_id", stops)
    lengths = {len(small_models.greedy(lm, prompt, 12, stop_ids(lm))) for prompt in prompts}
    assert len(lengths) > 2 and {0, 12} <= lengths


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("again", [False, True])
def test_rows_that_have_ended_are_left_behind_and_change_no_answer(
    family: str, again: bool, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the other rows go on from their keys and values, or (`again`) read their prompt a second time."""
    lm = tuned(small_models.make_folder(family, tiny_model, tmp_path / family))
    prompts = many_prompts()
    stop_often(lm, prompts, monkeypatch)
    expected = answers_by_hand(lm, prompts, 12)
    if again:
        monkeypatch.setattr(inference, "_rows_of", lambda cache, rows: None)
    fed: list[tuple[int, int]] = []
    hook = lm.model.get_input_embeddings().register_forward_hook(lambda _, args, out: fed.append(tuple(args[0].shape)))
    assert ModelProbe(lm).generate(prompts, 12) == expected
    hook.remove()
    rows = [count for count, _ in fed]
    assert rows == sorted(rows, reverse=True) and rows[0] == len(prompts) and rows[-1] <= len(prompts) / 2
    assert sum(width > 1 for _, width in fed) == (len(set(rows)) if again else 1)
    assert ModelProbe(lm, batch_tokens=120).generate(prompts, 12) == expected


def test_answers_of_several_adapters_are_greedy_whatever_the_model_suggests(
    lm: adapters.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = many_prompts(12)
    for name, value in {"do_sample": True, "temperature": 5.0, "top_p": 0.9, "top_k": 50, "num_beams": 3}.items():
        monkeypatch.setattr(lm.model.generation_config, name, value)
    seen = set()
    for seed in range(3):
        adapters.set_adapter(lm, small_models.random_state(adapters.get_adapter(lm), 0.1 + 0.1 * seed))
        expected = answers_by_hand(lm, prompts, 7)
        assert ModelProbe(lm).generate(prompts, 7) == expected
        seen.add(tuple(expected))
    assert len(seen) == 3


def test_answers_without_any_stop_token_have_the_length_asked_for(
    lm: adapters.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "stop_ids", lambda lm: [])
    prompts = many_prompts(5)
    expected = [small_models.greedy(lm, prompt, 9, []) for prompt in prompts]
    assert ModelProbe(lm).generate(prompts, 9) == [lm.tokenizer.decode(e, skip_special_tokens=True) for e in expected]


def test_no_prompts_and_empty_prompts(lm: adapters.LanguageModel) -> None:
    assert ModelProbe(lm).generate([], 4) == []
    assert ModelProbe(lm).generate([[], [5]], 2)[0] == ""


@pytest.mark.gpu
def test_losses_on_a_gpu_are_those_of_the_cpu(tiny_model: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    corpus = small_models.make_corpus(12)
    there = adapters.load(ModelConfig(name=str(tiny_model), dtype="float32", device="cuda"), ADAPTER)
    here = tuned(tiny_model)
    adapters.set_adapter(there, adapters.get_adapter(here))
    np.testing.assert_allclose(ModelProbe(there).losses(corpus)[0], ModelProbe(here).losses(corpus)[0], rtol=1e-4)
