"""The algebra of factors against dense matrices in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apiary.core import lora
from apiary.core.lora import Factors

_sizes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12))  # the rank may exceed both sides


def _factors(rng: np.random.Generator, d_out: int, d_in: int, rank: int) -> Factors:
    return Factors(
        *(torch.from_numpy(rng.standard_normal(s).astype(np.float32)) for s in ((d_out, rank), (rank, d_in)))
    )


def _dense(x: Factors) -> np.ndarray:
    return x.b.double().numpy() @ x.a.double().numpy()


def _is_the_best(found: np.ndarray, dense: np.ndarray, rank: int) -> None:
    """No matrix of that rank is nearer (Eckart and Young, 1936); of equal singular values any may be kept."""
    left_over = np.linalg.svd(dense, compute_uv=False)[rank:]
    assert np.linalg.matrix_rank(found, tol=1e-4) <= rank
    np.testing.assert_allclose(np.linalg.norm(dense - found), np.linalg.norm(left_over), atol=1e-4)


@given(_sizes, st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
def test_svd_is_that_of_the_dense_product(sizes: tuple[int, int, int], seed: int) -> None:
    x = _factors(np.random.default_rng(seed), *sizes)
    made = lora.svd(x)
    expected = np.linalg.svd(_dense(x), compute_uv=False)
    np.testing.assert_allclose(made.s.numpy()[: len(expected)], expected[: len(made.s)], atol=2e-5)
    np.testing.assert_allclose((made.u * made.s) @ made.vt, _dense(x), atol=5e-5)
    for side in (made.u.T, made.vt):
        np.testing.assert_allclose(side @ side.T, np.eye(len(made.s)), atol=1e-5)


@given(_sizes, st.integers(0, 12), st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
def test_a_few_singular_vectors_are_the_first_ones_of_all(sizes: tuple[int, int, int], rank: int, seed: int) -> None:
    x = _factors(np.random.default_rng(seed), *sizes)
    few, every = lora.svd(x, rank), lora.svd(x)
    assert len(few.s) == few.u.shape[1] == len(few.vt) == min(rank, *sizes)
    _is_the_best(((few.u * few.s) @ few.vt).double().numpy(), _dense(x), len(few.s))
    assert few.u.is_contiguous() and few.vt.is_contiguous() and every.u.is_contiguous()


@given(_sizes, st.integers(1, 12), st.floats(0, 2), st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
def test_balanced_is_the_best_approximation_of_its_rank(
    sizes: tuple[int, int, int], rank: int, floor: float, seed: int
) -> None:
    x = _factors(np.random.default_rng(seed), *sizes)
    made = lora.balanced(lora.svd(x), rank, floor)
    assert made.b.shape == (sizes[0], rank) and made.a.shape == (rank, sizes[1])
    _is_the_best(_dense(made), _dense(x), rank)


def test_balanced_shares_the_singular_value_but_keeps_rows_of_a_alive() -> None:
    x = Factors(torch.diag(torch.tensor([9.0, 1e-4, 0.0])), torch.eye(3))
    made = lora.balanced(lora.svd(x), 3, floor=0.5)
    torch.testing.assert_close(made.a.norm(dim=1), torch.tensor([3.0, 0.5, 0.5]))
    torch.testing.assert_close(made.b.norm(dim=0), torch.tensor([3.0, 2e-4, 0.0]))


def test_a_long_thin_product_keeps_its_small_singular_values() -> None:
    rng = np.random.default_rng(0)
    x = _factors(rng, 300, 200, 6)
    x = Factors(x.b * torch.tensor([1.0, 1e-1, 1e-2, 1e-3, 1e-3, 1e-3]), x.a)
    np.testing.assert_allclose(lora.svd(x).s, np.linalg.svd(_dense(x), compute_uv=False)[:6], rtol=1e-3)


def test_norms_and_inner_products_do_not_see_the_gauge() -> None:
    rng = np.random.default_rng(1)
    x, y = _factors(rng, 7, 5, 3), _factors(rng, 7, 5, 4)
    assert lora.inner(x, y) == pytest.approx(float((_dense(x) * _dense(y)).sum()), rel=1e-6)
    assert lora.norm(x) == pytest.approx(float(np.linalg.norm(_dense(x))), rel=1e-6)
    assert lora.norm(Factors(x.b * 1e6, x.a * 1e-6)) == pytest.approx(lora.norm(x), rel=1e-6)


def test_gram_is_all_inner_products() -> None:
    rng = np.random.default_rng(2)
    parts = [_factors(rng, 8, 6, rank) for rank in (1, 3, 2, 9)]
    expected = [[float((_dense(x) * _dense(y)).sum()) for y in parts] for x in parts]
    np.testing.assert_allclose(lora.gram(parts), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_the_gram_matrix_of_changes_is_that_of_their_dense_products(scale: float) -> None:
    rng = np.random.default_rng(5)
    start = _factors(rng, 8, 6, 4)
    deltas = [Factors(*(scale * t for t in _factors(rng, 8, 6, rank))) for rank in (4, 1, 3)]
    deltas += [Factors(1e4 * start.b - start.b, 1e-4 * start.a - start.a)]  # another gauge: next to no change
    dense = []
    for delta in deltas:
        b, a, db, da = (t.double().numpy() for t in (*lora.resize(start, delta.rank), *delta))
        dense.append((b + db) @ (a + da) - b @ a)
    expected = np.array([[(x * y).sum() for y in dense] for x in dense])
    made = lora.change_gram(start, deltas).numpy()
    norms = np.sqrt(np.diag(expected))
    plain = slice(0, 3)
    np.testing.assert_allclose(
        (made / np.outer(norms, norms))[plain, plain], (expected / np.outer(norms, norms))[plain, plain], atol=2e-6
    )
    # What is left of the gauge's change is what float32 rounds away of its factors: small beside the product itself.
    assert made[3, 3] < 1e-6 * np.linalg.norm(_dense(start)) ** 2


def test_a_stack_is_the_weighted_sum_and_counts_each_weight_once() -> None:
    rng = np.random.default_rng(3)
    parts, weights = [_factors(rng, 8, 6, rank) for rank in (2, 5, 1)], [0.5, 0.2, 3.0]
    expected = sum(w * _dense(x) for w, x in zip(weights, parts, strict=True))
    np.testing.assert_allclose(_dense(lora.stack(parts, weights)), expected, rtol=1e-5, atol=1e-6)


def test_a_small_change_of_large_factors_is_not_lost() -> None:
    rng = np.random.default_rng(4)
    start, delta = _factors(rng, 8, 6, 3), _factors(rng, 8, 6, 3)
    delta = Factors(delta.b * 1e-6, delta.a * 1e-6)
    b, a, db, da = (t.double().numpy() for t in (*start, *delta))
    expected = db @ a + b @ da + db @ da
    got = _dense(lora.change(start, delta))
    assert np.linalg.norm(got - expected) < 1e-3 * np.linalg.norm(expected)


def test_split_and_join_are_inverse_and_refuse_what_is_no_adapter() -> None:
    state = {"m.x.lora_A.weight": torch.ones(2, 3), "m.x.lora_B.weight": torch.ones(4, 2)}
    assert lora.join(lora.split(state)).keys() == state.keys()
    with pytest.raises(ValueError, match=r"'w' is no LoRA factor"):
        lora.split({**state, "w": torch.ones(1)})
    with pytest.raises(ValueError, match=r"lora_A.weight' is no LoRA factor with its other half"):
        lora.split({"m.x.lora_A.weight": torch.ones(2, 3)})
    with pytest.raises(ValueError, match="do not multiply"):
        lora.split({**state, "m.x.lora_B.weight": torch.ones(4, 3)})


def test_resize_and_scaling() -> None:
    x = _factors(np.random.default_rng(5), 4, 3, 2)
    wide = lora.resize(x, 5)
    assert wide.rank == 5
    np.testing.assert_allclose(_dense(wide), _dense(x), rtol=1e-6)
    assert all(torch.equal(p, q) for p, q in zip(lora.resize(wide, 2), x, strict=True))
    assert (lora.scaling(16.0, "rslora")(16), lora.scaling(16.0, "lora")(16)) == (4.0, 1.0)
