from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import small_models
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

from apiary.config.schema import AdapterConfig, ModelConfig
from apiary.core.errors import UserError
from apiary.models import adapter_files, adapters, base


def config(folder: Path, dtype: str = "float32") -> ModelConfig:
    return ModelConfig(name=str(folder), dtype=dtype, device="cpu")


@pytest.fixture
def lm(tiny_model: Path) -> adapters.LanguageModel:
    return adapters.load(config(tiny_model), AdapterConfig(rank=4, alpha=8))


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


IDS = torch.arange(2, 34).reshape(2, 16)


def test_a_base_is_read_once_and_shared_by_all_adapters(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "copy")
    before = adapters.base_loads()
    first = adapters.load(config(folder), AdapterConfig(rank=2))
    assert adapters.load(config(folder), AdapterConfig(rank=2)) is first
    other = adapters.load(config(folder), AdapterConfig(rank=3, targets=("q_proj",)))
    adapters.load_base(config(folder))
    assert adapters.base_loads() == before + 1
    mine = first.model.get_input_embeddings().weight
    assert mine.data_ptr() == other.model.get_input_embeddings().weight.data_ptr()
    assert len(first.adapter) == 2 * 2 * 7
    assert len(other.adapter) == 2 * 2


def test_only_the_adapter_is_trainable_and_in_float32(tiny_model: Path) -> None:
    lm = adapters.load(config(tiny_model, "bfloat16"), AdapterConfig(rank=2))
    trainable = [p for p in lm.model.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in lm.adapter.values()}
    assert {p.dtype for p in trainable} == {torch.float32}
    frozen = [p for p in lm.model.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    assert {b.dtype for b in lm.model.buffers() if b.is_floating_point()} == {torch.float32}


def test_adapter_names_are_those_of_a_peft_folder(lm: adapters.LanguageModel) -> None:
    theirs = get_peft_model_state_dict(lm.model, save_embedding_layers=False)
    mine = adapters.get_adapter(lm)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_what_is_set_is_what_is_got_and_a_copy(lm: adapters.LanguageModel) -> None:
    state = small_models.random_state(adapters.get_adapter(lm))
    adapters.set_adapter(lm, state)
    got = adapters.get_adapter(lm)
    assert all(torch.equal(got[name], state[name]) for name in state)
    next(iter(got.values())).zero_()
    again = adapters.get_adapter(lm)
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_a_wrong_adapter_is_refused_and_changes_nothing(lm: adapters.LanguageModel) -> None:
    state = adapters.get_adapter(lm)
    first, last = next(iter(state)), list(state)[-1]
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    short = {name: tensor for name, tensor in zeros.items() if name != last}
    with pytest.raises(ValueError, match=rf"lacks '{last}' \(1 missing, 0 unknown\)"):
        adapters.set_adapter(lm, short)
    with pytest.raises(ValueError, match="unknown tensor 'x'"):
        adapters.set_adapter(lm, {**zeros, "x": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"shape \(1, 2\), not"):
        adapters.set_adapter(lm, {**zeros, last: torch.zeros(1, 2)})
    assert torch.equal(adapters.get_adapter(lm)[first], state[first])


def test_a_fresh_adapter_changes_nothing_and_is_the_same_everywhere(lm: adapters.LanguageModel) -> None:
    fresh = adapters.fresh_adapter(lm, 3)
    again, other = adapters.fresh_adapter(lm, 3), adapters.fresh_adapter(lm, 4)
    assert all(torch.equal(fresh[name], again[name]) for name in fresh)
    a_names = [name for name in fresh if "lora_A" in name]
    for name in a_names:
        bound = 1 / math.sqrt(fresh[name].shape[1])
        assert 0.9 * bound < fresh[name].abs().max() <= bound
        assert not torch.equal(fresh[name], other[name])
    assert not torch.equal(fresh[a_names[0]], fresh[a_names[1]])
    assert all(not fresh[name].any() for name in fresh if "lora_B" in name)
    adapters.set_adapter(lm, fresh)
    tuned = logits(lm.model, IDS)
    with lm.model.disable_adapter():
        assert torch.equal(logits(lm.model, IDS), tuned)


def test_without_its_adapter_the_model_is_its_base(lm: adapters.LanguageModel, tiny_model: Path) -> None:
    adapters.set_adapter(lm, small_models.random_state(adapters.get_adapter(lm)))
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with lm.model.disable_adapter():
        torch.testing.assert_close(logits(lm.model, IDS), logits(plain, IDS))
    assert (logits(lm.model, IDS) - logits(plain, IDS)).abs().max() > 0.01
    assert all(p.requires_grad for p in lm.adapter.values())


@pytest.mark.parametrize("scaling", ["rslora", "lora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_saved_adapter_loads_in_plain_peft(family: str, scaling: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = small_models.make_folder(family, tiny_model, tmp_path / family)
    lm = adapters.load(config(folder), AdapterConfig(rank=4, alpha=6, scaling=scaling))
    state = small_models.random_state(adapters.get_adapter(lm))
    adapters.set_adapter(lm, state)
    adapter_files.save_adapter(lm, state, tmp_path / "out" / "adapter", card="# A card\n")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "out" / "adapter").eval()
    torch.testing.assert_close(logits(theirs, IDS), logits(lm.model, IDS), rtol=0, atol=1e-5)
    assert (tmp_path / "out" / "adapter" / "README.md").read_text() == "# A card\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["adapter"]


def test_a_failed_save_leaves_the_old_folder_and_nothing_else(
    lm: adapters.LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = adapters.fresh_adapter(lm, 0)
    adapter_files.save_adapter(lm, old, tmp_path / "adapter")
    weights = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        adapter_files.save_adapter(lm, small_models.random_state(old), tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == weights
    monkeypatch.undo()
    adapter_files.save_adapter(lm, small_models.random_state(old), tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() != weights


@pytest.mark.parametrize(("scaling", "factor"), [("rslora", 6 / 2), ("lora", 6 / 4)])
def test_merging_adds_the_scaled_product_of_the_factors(scaling: str, factor: float, tiny_model: Path) -> None:
    lm = adapters.load(config(tiny_model), AdapterConfig(rank=4, alpha=6, scaling=scaling))
    state = small_models.random_state(adapters.get_adapter(lm))
    whole = adapter_files.merged(lm, state)
    plain, _ = adapters.load_base(config(tiny_model))
    stem = "base_model.model.model.layers.1.mlp.up_proj"
    a, b = state[f"{stem}.lora_A.weight"].numpy(), state[f"{stem}.lora_B.weight"].numpy()
    expected = plain.model.layers[1].mlp.up_proj.weight.numpy() + factor * (b @ a)
    np.testing.assert_allclose(whole.model.layers[1].mlp.up_proj.weight.detach().numpy(), expected, atol=1e-6)
    adapters.set_adapter(lm, state)
    torch.testing.assert_close(logits(whole, IDS), logits(lm.model, IDS), rtol=1e-5, atol=1e-5)


def test_the_digest_sees_weights_and_not_how_they_are_held(tiny_model: Path, tmp_path: Path) -> None:
    wide = adapters.load(config(tiny_model, "float32"), AdapterConfig(rank=2)).digest
    assert wide == adapters.load(config(tiny_model, "bfloat16"), AdapterConfig(rank=2)).digest
    assert len(wide) == 16
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert base.base_digest(model) == wide
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 0.1
    assert base.base_digest(model) != wide


def test_the_fingerprint_follows_modules_not_values_or_rank(tiny_model: Path) -> None:
    class Template:
        digest = "t"

    narrow = adapters.load(config(tiny_model), AdapterConfig(rank=2))
    other_rank = adapters.load(config(tiny_model), AdapterConfig(rank=3))
    fewer = adapters.load(config(tiny_model), AdapterConfig(rank=2, targets=("q_proj",)))
    before = adapters.fingerprint(narrow, Template())
    adapters.set_adapter(narrow, small_models.random_state(adapters.get_adapter(narrow)))
    assert adapters.fingerprint(narrow, Template()) == before
    assert adapters.fingerprint(other_rank, Template()) == before  # clients may differ in it; the handshake tells it
    assert adapters.fingerprint(fewer, Template())._replace(adapter=before.adapter) == before
    assert adapters.fingerprint(fewer, Template()).adapter != before.adapter
    assert before.template == "t"


def refused(model: ModelConfig, adapter: AdapterConfig | None = None) -> str:
    with pytest.raises(UserError) as caught:
        adapters.load(model, adapter or AdapterConfig())
    assert len(caught.value.problems) == 1
    assert "\n" not in caught.value.problems[0]
    return caught.value.problems[0]


def test_a_base_that_cannot_be_had_is_one_clear_line(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    line = refused(ModelConfig(name="nobody/no-such-model", device="cpu"))
    assert "nobody/no-such-model" in line
    assert "offline" in line
    assert "no such folder" in refused(ModelConfig(name=str(tmp_path / "gone"), device="cpu"))
    assert "not a causal language model" in refused(ModelConfig(name=str(tmp_path), device="cpu"))
    assert "'builtin:tiny'" in refused(ModelConfig(name="builtin:big", device="cpu"))
    line = refused(ModelConfig(name=str(tiny_model), device="cpu", quantization="nf4"))
    assert "needs a CUDA GPU" in line
    line = refused(config(tiny_model), AdapterConfig(targets=("query",)))
    assert "no module 'query'" in line
    assert "q_proj" in line


def test_a_tokenizer_larger_than_the_embedding_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "copy")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"extra{i}" for i in range(100)])
    tokenizer.save_pretrained(folder)
    assert "do not belong together" in refused(config(folder))


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "tpu:0", ""])
def test_unknown_devices_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="allowed are auto, cpu, cuda"):
        adapters.resolve_device(ModelConfig(device=name))


def test_an_absent_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert adapters.resolve_device(ModelConfig(device="auto")).type == "cpu"
    with pytest.raises(UserError, match="use auto or cpu"):
        adapters.resolve_device(ModelConfig(device="cuda"))
    with pytest.raises(UserError, match="no MPS"):
        adapters.resolve_device(ModelConfig(device="mps"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert adapters.resolve_device(ModelConfig(device="cuda:1")) == torch.device("cuda:1")
    with pytest.raises(UserError, match="cuda:0 to cuda:1"):
        adapters.resolve_device(ModelConfig(device="cuda:2"))


@pytest.mark.gpu
def test_a_gpu_base_has_the_digest_of_the_cpu(tiny_model: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    there = adapters.load(ModelConfig(name=str(tiny_model), device="cuda"), AdapterConfig(rank=2))
    assert there.digest == adapters.load(config(tiny_model), AdapterConfig(rank=2)).digest
    assert there.dtype is torch.bfloat16


def test_the_adapter_names_its_base(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """A saved adapter says which base it belongs to, also for the built-in one, and making it warns of nothing."""
    lm = adapters.load(ModelConfig(dtype="float32", device="cpu"), AdapterConfig(rank=3))
    adapter_files.save_adapter(lm, adapters.fresh_adapter(lm, 0), tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "builtin:tiny"
    assert not [w for w in recwarn if "renamed" in str(w.message)]
