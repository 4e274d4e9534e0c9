"""Mixtures of models against dense matrices in numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from apiary.config.schema import AdapterConfig, ModelConfig
from apiary.core import lora
from apiary.core.lora import Factors
from apiary.core.tensors import StateDict, generator
from apiary.models import adapter_files, adapters, mixtures
from apiary.models.adapters import LanguageModel


@pytest.fixture(scope="module")
def lm(tiny_model: Path) -> LanguageModel:
    config = ModelConfig(name=str(tiny_model), dtype="float32", device="cpu")
    return adapters.load(config, AdapterConfig(rank=3, alpha=7, targets=("q_proj", "down_proj")))


def drawn(lm: LanguageModel, seed: int, added: int = 0) -> StateDict:
    """A random adapter, with `added` ranks in the base in every other module."""
    state = {n: torch.randn(p.shape, generator=generator(seed, n)) * 0.1 for n, p in lm.adapter.items()}
    more = {
        module: Factors(
            torch.randn(len(f.b), added, generator=generator(seed, module, "b")),
            torch.randn(added, f.a.shape[1], generator=generator(seed, module, "a")),
        )
        for module, f in list(lora.split(state).items())[::2]
        if added
    }
    return lora.whole(state, lora.join(more))


def dense(lm: LanguageModel, state: StateDict) -> dict[str, np.ndarray]:
    """What a model adds to each weight: alpha / sqrt(rank) B A, and the base delta."""
    adapter, base_delta = lora.parts(state)
    scale, added = 7 / 3**0.5, lora.split(base_delta)
    found = {}
    for module, (b, a) in lora.split(adapter).items():
        found[module] = scale * b.double().numpy() @ a.double().numpy()
        if module in added:
            found[module] += added[module].b.double().numpy() @ added[module].a.double().numpy()
    return found


@pytest.mark.parametrize("added", [(0, 0), (2, 0), (0, 2), (2, 5)])
@pytest.mark.parametrize("weight", [0.0, 0.25, 0.9, 1.0])
def test_a_mixture_is_that_of_the_dense_matrices(lm: LanguageModel, added: tuple[int, int], weight: float) -> None:
    one, other = drawn(lm, 1, added[0]), drawn(lm, 2, added[1])
    found, first, second = (dense(lm, s) for s in (mixtures.mixed(lm, one, other, weight), one, other))
    for module in first:
        expected = (1 - weight) * first[module] + weight * second[module]
        np.testing.assert_allclose(found[module], expected, atol=2e-6)
        if 0 < weight < 1:  # the mean of factors is another matrix
            assert not np.allclose(expected, (1 - weight) ** 2 * first[module] + weight**2 * second[module], atol=1e-3)


def test_the_model_that_is_measured_and_the_folder_that_is_kept_are_the_mixture(
    lm: LanguageModel, tmp_path: Path
) -> None:
    one, other = drawn(lm, 1), drawn(lm, 2)
    made = mixtures.mixed(lm, one, other, 0.25)
    ids = torch.arange(2, 34).reshape(2, 16)
    adapters.set_adapter(lm, made)
    with torch.no_grad():
        live = lm.model(input_ids=ids, use_cache=False).logits
    adapter_files.save_adapter(lm, made, tmp_path / "kept")
    weights = load_file(tmp_path / "kept" / "adapter_model.safetensors")
    ranks = {factors.rank for factors in lora.split(weights).values()}
    assert ranks == {6}  # the sum of the two
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(lm.name)
    plain = PeftModel.from_pretrained(base, tmp_path / "kept").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids, use_cache=False).logits, live, atol=2e-5, rtol=1e-4)
    first, second = dense(lm, one), dense(lm, other)
    for name, layer in plain.named_modules():
        if hasattr(layer, "lora_A"):
            module = next(m for m in first if name.endswith(m.removeprefix("base_model.model.")))
            expected = 0.75 * first[module] + 0.25 * second[module]
            np.testing.assert_allclose(layer.get_delta_weight("default").detach().numpy(), expected, atol=2e-6)
    again = dense(lm, adapter_files.read_adapter(lm, tmp_path / "kept" / "adapter_model.safetensors"))
    for module, matrix in dense(lm, made).items():
        np.testing.assert_allclose(again[module], matrix, atol=2e-6)


def test_distance_is_the_frobenius_norm_and_blind_to_the_factors(lm: LanguageModel) -> None:
    one, other = drawn(lm, 1, 2), drawn(lm, 2)
    first, second = dense(lm, one), dense(lm, other)
    expected = sum(((first[module] - second[module]) ** 2).sum() for module in first) ** 0.5
    assert mixtures.distance(lm, one, other) == pytest.approx(expected, rel=1e-5)
    assert mixtures.distance(lm, one, one) == pytest.approx(0.0, abs=1e-5)
    turned = {n: t * (2.0 if lora.is_b(n) else 0.5) for n, t in other.items()}  # the same products
    assert mixtures.distance(lm, one, turned) == pytest.approx(expected, rel=1e-5)
    half = mixtures.mixed(lm, other, one, 0.5)
    assert mixtures.distance(lm, other, half) == pytest.approx(expected / 2, rel=1e-5)


def test_weights_beyond_the_two_models_are_refused(lm: LanguageModel) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        mixtures.mixed(lm, drawn(lm, 1), drawn(lm, 2), 1.5)
