"""Every family that people bring: trained, exported and read again as plain Transformers and peft have it, or refused.

The reference is peft on Transformers with an attention mask and all logits, nothing of ours.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import model_families
import numpy as np
import pytest
import small_models
import torch
from model_families import FAMILIES
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from apiary.config.schema import AdapterConfig, ModelConfig, TrainConfig
from apiary.core import lora
from apiary.core.errors import UserError
from apiary.core.tensors import StateDict, add
from apiary.data.batches import Batch, Corpus, collate
from apiary.models import adapter_files, adapters, experts
from apiary.models.adapters import LanguageModel
from apiary.models.inference import ModelProbe
from apiary.models.loss import row_losses
from client.training import trainer
from client.training.trainer import VisitPlan

ROOT = Path(__file__).resolve().parents[2]
WORKING = [name for name, family in FAMILIES.items() if not family.refused]
ADAPTER = AdapterConfig(rank=4, alpha=6)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing", "ignore:fan_in_fan_out", "ignore:.*tie_word_embeddings"
)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a family's model once."""
    return functools.cache(lambda name: model_families.make_folder(name, tmp_path_factory.mktemp("family")))


def opened(folder: Path, dtype: str = "float32", **adapter: object) -> LanguageModel:
    config = AdapterConfig.model_validate({**ADAPTER.model_dump(), **adapter})
    return adapters.load(ModelConfig(name=str(folder), dtype=dtype, device="cpu"), config)


@functools.cache
def corpus(seed: int = 0) -> Corpus:
    made = small_models.make_corpus(6, seed)
    made.ids[:] = made.ids % 250 + 2
    return made


def federated(lm: LanguageModel) -> dict[str, Tensor]:
    """Two rounds of two clients of two steps each, averaged."""
    adapter: StateDict = adapters.fresh_adapter(lm, 0)
    train = TrainConfig(steps=2, batch_tokens=96, lr=0.02, threads=1)
    for number in range(2):
        deltas = []
        for client in ("a", "b"):
            plan = VisitPlan(0, client, 2, 4, first_step=2 * number)
            deltas.append(trainer.fit(lm, adapter, corpus(ord(client)), train, plan).delta)
        mean = {name: (deltas[0][name] + deltas[1][name]) / 2 for name in deltas[0]}
        adapter = add(adapter, mean)
    return dict(adapter)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 42).reshape(2, 20), use_cache=False).logits.float()


def full_losses(model: nn.Module, batch: Batch) -> Tensor:
    """The textbook way: all logits under an attention mask, then the cross-entropy of the trained tokens."""
    real = (torch.arange(batch.ids.shape[1]) < torch.tensor(corpus().lengths)[batch.rows][:, None]).long()
    given = model(input_ids=batch.ids, attention_mask=real, use_cache=False).logits[:, :-1].float()
    nats = functional.cross_entropy(given.transpose(1, 2), batch.ids[:, 1:], reduction="none")
    return (nats * batch.targets[:, 1:]).sum(1)


def gradients(lm: LanguageModel, theirs: PeftModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Ours and plain peft's, of the same sum of losses, by our names."""
    batch = collate(corpus(), np.arange(6), 0)
    weights = torch.linspace(0.5, 2, 6)
    lm.model.zero_grad()
    with adapters.autocast(lm):
        (row_losses(lm.model, batch) * weights).sum().backward()
        (full_losses(theirs, batch) * weights).sum().backward()
    named = {n.replace(".default.", "."): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    found = {name: p.grad.clone() for name, p in lm.adapter.items()}
    lm.model.zero_grad()
    return found, experts.from_peft(lm.model, named)


def gap(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The relative distance of two adapters' worth of numbers."""
    assert ours.keys() == theirs.keys()
    apart = sum(float((ours[n] - theirs[n]).square().sum()) for n in ours)
    return (apart / sum(float(t.square().sum()) for t in theirs.values())) ** 0.5


def reloaded(folder: Path, adapter: Path, dtype: torch.dtype) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def greedy(model: nn.Module, prompt: list[int], new: int) -> list[int]:
    """Tokens of one prompt by itself, without a cache."""
    ids = [*prompt]
    with torch.no_grad():
        for _ in range(new):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == 1:
                break
    return [token for token in ids[len(prompt) :] if token > 1]


@pytest.mark.parametrize("name", WORKING)
def test_a_family_is_trained_and_handed_on(name: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folder_of(name)
    lm = opened(folder)
    trained = federated(lm)
    fresh = adapters.fresh_adapter(lm, 0)
    moved = {n for n in fresh if not torch.equal(fresh[n], trained[n])}
    assert all(n in moved for n in fresh if not re.search(r"expert.*\.\d+\.lora_|\.gate\.|router", n))
    state = small_models.random_state(trained, 0.2)
    adapters.set_adapter(lm, state)
    adapter_files.save_adapter(lm, state, tmp_path / "adapter")
    back = adapter_files.read_adapter(lm, tmp_path / "adapter" / "adapter_model.safetensors")
    assert small_models.same(back, state)
    theirs = reloaded(folder, tmp_path / "adapter", torch.float32)
    torch.testing.assert_close(logits(lm.model), logits(theirs), rtol=1e-4, atol=1e-4)
    ours, expected = gradients(lm, theirs)
    assert gap(ours, expected) < 1e-4
    assert all(bool(g.any()) for n, g in ours.items() if "expert" not in n)  # all that has an adapter is reached
    merged = adapter_files.merged(lm, state)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-3, atol=1e-3)
    assert (logits(again) - logits(theirs.get_base_model())).abs().max() < 1e-3  # the adapter is in its base
    with theirs.disable_adapter():
        assert (logits(again) - logits(theirs)).abs().max() > 1e-3
    prompts = [[5, 9, 30], [77, 8, 41, 19, 60, 12, 33], [200]]
    alone = [lm.tokenizer.decode(greedy(theirs, prompt, 5)) for prompt in prompts]
    assert ModelProbe(lm).generate(prompts, 5) == alone


@pytest.mark.parametrize("name", WORKING)
def test_a_family_in_bfloat16(name: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """The lean gradient is as near the true one as plain peft's, and what is handed on says the same."""
    folder = folder_of(name)
    lm = opened(folder, "bfloat16")
    state = small_models.random_state(adapters.get_adapter(lm), 0.05)
    adapters.set_adapter(lm, state)
    adapter_files.save_adapter(lm, state, tmp_path / "adapter")
    rounded, true = (reloaded(folder, tmp_path / "adapter", t) for t in (torch.bfloat16, torch.float32))
    wide = opened(folder)
    adapters.set_adapter(wide, state)
    _, exact = gradients(wide, true)
    ours, theirs = gradients(lm, rounded)
    routed = any("expert" in name for name in ours)  # rounding sends a token between two experts to the other one
    assert gap(ours, exact) < 1.5 * gap(theirs, exact) + (0.06 if routed else 0.02)
    with adapters.autocast(lm):
        apart = [float((logits(m) - logits(true)).norm() / logits(true).norm()) for m in (lm.model, rounded)]
    assert apart[0] < 1.5 * apart[1] + 0.01
    assert all(p.dtype is torch.float32 for p in lm.adapter.values())


@pytest.mark.parametrize(
    ("name", "dtype", "warns"), [("Mixtral", "bfloat16", 1), ("Mixtral", "float32", 0), ("Llama", "bfloat16", 0)]
)
def test_experts_in_bfloat16_are_warned_of(
    name: str,
    dtype: str,
    warns: int,
    folder_of: Callable[[str], Path],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A change of 0.1% of a weight is there in float32, and mostly rounded away in bfloat16."""
    weight = torch.full((1,), 0.03, dtype=getattr(torch, dtype))
    kept = float((weight + weight * 1e-3).float() - weight.float()) / 0.03e-3
    assert kept == (pytest.approx(1, abs=0.01) if dtype == "float32" else 0)
    monkeypatch.setattr(adapters, "_models", {})  # it is said of a model that is newly made
    opened(folder_of(name), dtype)
    assert sum("rounded away" in message for message in caplog.messages) == warns


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.refused])
def test_what_is_no_causal_model_is_refused_in_one_line(name: str, folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=FAMILIES[name].refused) as caught:
        opened(folder_of(name))
    assert len(caught.value.problems) == 1


def row(name: str, folder: Path) -> str:
    """The family's line in docs/models.md; what it says of those that work, the tests above hold it to."""
    try:
        lm = opened(folder)
    except UserError as error:
        why = error.problems[0].partition(": ")[2].partition(" (")[0]
        return f"| {name} | | | refused: {why} |"
    experts_own = {re.sub(r"\.\d+$", "", m) for m in lora.split(dict(lm.adapter)) if re.search(r"\.\d+$", m)}
    modules = {m.rpartition(".")[2] for m in lora.split(dict(lm.adapter)) if not re.search(r"\.\d+$", m)}
    stacks = {".".join(m.split(".")[-2:]) for m in experts_own}
    left = [kind for kind, size in lm.coverage.left.items() if size > 0.002 * lm.coverage.weights]
    named = ", ".join(f"`{kind}`" for kind in (*sorted(modules), *sorted(stacks)))
    kept = "all" if not left else "all but " + ", ".join(f"`{kind}`" for kind in left)
    return f"| {name} | {named} | {100 * lm.coverage.share:.0f}% | works; {kept} |"


def documented() -> dict[str, str]:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    lines = text.partition("<!-- table -->\n")[2].partition("<!-- end -->")[0].splitlines()[2:]
    return {line.split("|")[1].strip(): line for line in lines}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_in_the_docs_is_what_is_found(name: str, folder_of: Callable[[str], Path]) -> None:
    assert list(documented()) == list(FAMILIES)
    found = row(name, folder_of(name))
    assert documented()[name] == found, "run python tests/models/test_families.py"


def refused(folder: Path, **adapter: object) -> str:
    with pytest.raises(UserError) as caught:
        opened(folder, **adapter)
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


def test_code_that_a_model_brings_is_never_run(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = model_families.make_folder("Llama", tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "of_its_own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert "brings Python code of its own, which is never run here" in refused(folder)
    assert not (tmp_path / "ran").exists()


def test_targets_that_no_adapter_can_reach_are_refused_by_name(folder_of: Callable[[str], Path]) -> None:
    moe, mamba, gemma, falcon = (folder_of(n) for n in ("Mixtral", "Mamba", "Gemma 3 (multimodal)", "Falcon-H1"))
    assert "no dropout" in refused(moe, dropout=0.1)
    assert "experts: experts.down_proj, experts.gate_up_proj" in refused(moe, targets=["w1"])
    assert "state-space layer" in refused(mamba, targets=["out_proj"])
    assert "state-space layer" in refused(falcon, targets=["q_proj", "out_proj"])
    assert "is no linear layer but of the kind Conv1d" in refused(mamba, targets=["conv1d"])
    assert "is no linear layer but of the kind" in refused(moe, targets=["embed_tokens"])
    assert "which no token passes" in refused(gemma, targets=["fc1"])
    assert "those of the embedding as well" in refused(gemma, targets=["lm_head"])
    seen = opened(gemma, targets=["q_proj"])
    assert len(seen.adapter) == 2 * 2 and not any("vision" in n for n in seen.adapter)
    assert len(opened(moe, targets=["experts.down_proj"]).adapter) == 2 * 2 * 4
    assert opened(moe, targets=["q_proj"], dropout=0.1).coverage.left["gate_up_proj"] == 2 * 4 * 96 * 32


@pytest.mark.parametrize("name", ["Mixtral", "GPT-OSS", "Qwen3-MoE"])  # rows out, rows in, and dense layers beside
def test_what_the_base_has_taken_up_counts_for_each_expert(
    name: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """A base delta, folded by hand into the weights of another copy of the model, says the same."""
    folder = folder_of(name)
    lm = opened(folder)
    zero = {n: torch.zeros_like(p) for n, p in adapters.get_adapter(lm).items()}
    module = next(m for m in lora.split(zero) if m.endswith("down_proj.2"))
    wide, rng = lora.split(zero)[module], torch.Generator().manual_seed(3)
    b, a = torch.randn(len(wide.b), 2, generator=rng), torch.randn(2, wide.a.shape[1], generator=rng)
    state = lora.whole(zero, lora.join({module: lora.Factors(b, a)}))
    by_hand = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = logits(by_hand)
    path = module.removeprefix("base_model.model.").removesuffix(".down_proj.2")
    with torch.no_grad():
        by_hand.get_submodule(path).down_proj[2] += (b @ a).T if name == "GPT-OSS" else b @ a
    assert (logits(by_hand) - before).abs().max() > 0.01
    adapters.set_adapter(lm, state)
    torch.testing.assert_close(logits(lm.model), logits(by_hand), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(adapter_files.merged(lm, state)), logits(by_hand), rtol=1e-4, atol=1e-4)
    adapter_files.save_adapter(lm, state, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(theirs), logits(by_hand), rtol=1e-4, atol=1e-4)
    adapters.set_adapter(lm, zero)
    torch.testing.assert_close(logits(lm.model), before)


def write() -> None:
    """Writes the table of docs/models.md."""
    import tempfile

    page = ROOT / "docs" / "models.md"
    head, _, rest = page.read_text(encoding="utf-8").partition("<!-- table -->\n")
    lines = ["| family | what gets an adapter | of the weights | |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as place:
        lines += [row(name, model_families.make_folder(name, Path(place) / str(n))) for n, name in enumerate(FAMILIES)]
    table = "\n".join(lines) + "\n<!-- end -->"
    page.write_text(head + "<!-- table -->\n" + table + rest.partition("<!-- end -->")[2], encoding="utf-8")


if __name__ == "__main__":
    sys.exit(write())
