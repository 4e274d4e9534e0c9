"""Arithmetic on named tensors against numpy, and the independence of seeds."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from apiary.core import tensors

_arrays = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4),
    elements=st.floats(-1e3, 1e3, width=32),
)
_states = st.dictionaries(st.text(max_size=5), _arrays, max_size=4)


def _state(seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {"b": torch.randn(3, 2, generator=rng), "a": torch.randn(4, generator=rng)}


@given(_states, _states, st.floats(-10, 10, width=32))
@settings(max_examples=60, deadline=None)
def test_arithmetic_agrees_with_numpy(
    arrays: dict[str, np.ndarray], others: dict[str, np.ndarray], scale: float
) -> None:
    other = {k: np.resize(others.get(k, np.ones(1, np.float32)), a.shape) for k, a in arrays.items()}
    a = {k: torch.from_numpy(v) for k, v in arrays.items()}
    b = {k: torch.from_numpy(v) for k, v in other.items()}
    for name, tensor in tensors.subtract(a, b).items():
        np.testing.assert_array_equal(tensor.numpy(), arrays[name] - other[name])
    for name, tensor in tensors.add(a, b, scale).items():
        np.testing.assert_allclose(tensor.numpy(), arrays[name] + np.float32(scale) * other[name], rtol=1e-5, atol=1e-3)
    flat = [v.astype(np.float64).ravel() for v in arrays.values()]
    expected = np.linalg.norm(np.concatenate(flat)) if flat else 0.0
    assert tensors.norm(a) == pytest.approx(expected, rel=1e-12)


def test_the_norm_of_many_small_entries_is_summed_in_float64() -> None:
    # In float32 this running sum would stop growing at 2**24 ones.
    state = {"x": torch.ones(2**24 + 1000)}
    assert tensors.norm(state) == pytest.approx(np.sqrt(2**24 + 1000), rel=1e-12)
    assert tensors.norm({}) == 0.0


def test_nothing_is_changed_in_place() -> None:
    a, b = _state(0), _state(1)
    before = [tensors.digest(a), tensors.digest(b)]
    tensors.add(a, b, 2.0)
    tensors.subtract(a, b)
    tensors.zeros_like(a)["a"].add_(1.0)
    tensors.norm(a)
    assert [tensors.digest(a), tensors.digest(b)] == before


def test_a_sum_keeps_the_dtype_of_its_first_term() -> None:
    low = {"x": torch.ones(2, dtype=torch.bfloat16)}
    assert tensors.add(low, {"x": torch.ones(2)})["x"].dtype is torch.bfloat16
    assert tensors.zeros_like(low, torch.float64)["x"].dtype is torch.float64


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_entry_is_seen(bad: float) -> None:
    state = _state()
    assert tensors.is_finite(state)
    state["b"][2, 1] = bad
    assert not tensors.is_finite(state)


def test_the_digest_is_of_the_content_and_not_of_the_order() -> None:
    state = _state()
    digest = tensors.digest(state)
    assert tensors.digest(dict(reversed(state.items()))) == digest
    assert tensors.digest({k: v.clone() for k, v in state.items()}) == digest
    strided = {k: torch.stack([v, v], dim=-1)[..., 0] for k, v in state.items()}  # not contiguous
    assert not strided["a"].is_contiguous()
    assert tensors.digest(strided) == digest
    assert len(digest) == 16
    assert int(digest, 16) >= 0


def test_the_digest_sees_every_kind_of_difference() -> None:
    state = _state()
    one_bit = {**state, "a": state["a"].clone()}
    one_bit["a"].view(torch.int32)[0] ^= 1
    variants = [
        state,
        one_bit,
        {"b": state["b"]},
        {"c": state["a"], "b": state["b"]},
        {**state, "b": state["b"].reshape(2, 3)},
        {**state, "a": state["a"].double()},
        {**state, "a": -torch.zeros(4)},
        {**state, "a": torch.zeros(4)},
        {**state, "s": torch.tensor(1.0)},
        {**state, "s": torch.tensor(2.0)},
        {},
    ]
    digests = [tensors.digest(variant) for variant in variants]
    for one, two in itertools.combinations(range(len(variants)), 2):
        assert digests[one] != digests[two], (one, two)


def test_seeds_of_different_purposes_are_unrelated() -> None:
    paths: list[tuple[int | str, ...]] = [
        (),
        (1,),
        ("1", "2"),
        (12,),
        (1, 2),
        ("a", "b"),
        ("ab",),
        ("a", "b", ""),
    ]
    seeds = [tensors.derive_seed(0, *path) for path in paths if path != ("1", "2")]
    seeds += [tensors.derive_seed(1), tensors.derive_seed(10), tensors.derive_seed(0, 0)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_bits_of_neighbouring_seeds_are_balanced() -> None:
    seeds = [tensors.derive_seed(7, "round", i) for i in range(2000)]
    bits = np.array([[seed >> place & 1 for place in range(63)] for seed in seeds])
    # 2,000 fair coins: five standard deviations are 0.056.
    assert np.abs(bits.mean(0) - 0.5).max() < 0.06
    flips = (bits[1:] ^ bits[:-1]).mean()
    assert flips == pytest.approx(0.5, abs=0.01)


@pytest.mark.slow
def test_a_generator_gives_the_same_numbers_in_every_process() -> None:
    code = (
        "import torch; from apiary.core.tensors import generator;"
        "print(torch.rand(3, generator=generator(3, 'x', 1)).tolist())"
    )
    root = Path(__file__).resolve().parents[2]
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
        env={**os.environ, "PYTHONHASHSEED": "123"},
    )
    assert out.stdout.strip() == str(torch.rand(3, generator=tensors.generator(3, "x", 1)).tolist())
    assert not torch.equal(
        torch.rand(3, generator=tensors.generator(3, "x", 2)),
        torch.rand(3, generator=tensors.generator(3, "x", 1)),
    )
