"""Seeds and scalars: the same bits everywhere, an unbiased slope, and few bytes."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import philox
from torch import Tensor

from apiary.core.messages import Update
from apiary.core.tensors import StateDict, digest
from strategies import AGGREGATORS, ServerState, seed_scalars

ROOT = Path(__file__).resolve().parents[2]
# Of other lengths than whole words, and one longer than a block of signs.
SHAPES = {"b.lora_B.weight": (7, 3), "a.lora_A.weight": (3, 11), "c": (20_000,), "d": ()}
SEEDS = seed_scalars.candidates(5, 300)


def _start(seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}


def _scalars(n: int = 100, seed: int = 1) -> dict[int, float]:
    rng = np.random.default_rng(seed)  # of very different sizes, where a float32 sum would depend on its order
    return {
        s: seed_scalars.on_grid(float(c))
        for s, c in zip(SEEDS, rng.normal(size=n) * 10.0 ** rng.uniform(-9, 0, n), strict=False)
    }


def _after(pool: seed_scalars.Scalars, changes: list[dict[int, float]], weights: list[float]) -> dict[int, float]:
    """The server's scalars after a round of fedkseed with these answers, in their order."""
    method = AGGREGATORS.build("fedkseed", {"candidates": len(SEEDS)}, seed=5, weighting="tokens")
    state = ServerState(3, {"x": torch.zeros(4)}, {}, {seed_scalars.NAME: seed_scalars.to_tensor(pool, SEEDS)})
    acc = method.reduce.start(state)
    for i, (change, weight) in enumerate(zip(changes, weights, strict=True)):
        acc = method.reduce.add(
            acc, Update(f"c{i}", {seed_scalars.NAME: seed_scalars.to_tensor(change, SEEDS)}, weight, 4)
        )
    after = method.step(state, method.reduce.finish(state, acc, torch.Generator()))
    return seed_scalars.of_tensor(after.memory[seed_scalars.NAME], SEEDS)


def test_the_reference_is_philox() -> None:
    """The known answer for zeros of Random123, the authors' own library (kat_vectors, philox4x64 10)."""
    expected = (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B)
    assert philox.block(0, (0, 0)) == expected


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 25])
def test_directions_are_the_bits_of_philox(seed: int) -> None:
    """So that no release of a library can change what a run's scalars mean."""
    made, words = seed_scalars.perturb(SHAPES, seed), philox.words((seed, 0))
    assert list(made) == list(SHAPES)
    for name in sorted(SHAPES):
        size = math.prod(SHAPES[name])
        used = list(itertools.islice(words, -(-size // 64)))
        expected = [2.0 * (used[i // 64] >> (i % 64) & 1) - 1 for i in range(size)]
        assert made[name].shape == SHAPES[name]
        assert made[name].dtype == torch.float32
        assert made[name].flatten().tolist() == expected


def test_candidates_are_different_and_belong_to_the_run() -> None:
    assert len(set(seed_scalars.candidates(5))) == 4096
    assert seed_scalars.candidates(5)[:300] == SEEDS
    assert not set(SEEDS) & set(seed_scalars.candidates(6))


def test_a_rebuilt_model_is_the_exact_sum_rounded_once() -> None:
    start, scalars = {"a.lora_A.weight": _start()["a.lora_A.weight"]}, _scalars()
    total = [Fraction(0)] * 33
    for seed, c in scalars.items():
        z = seed_scalars.perturb({"a.lora_A.weight": (3, 11)}, seed)["a.lora_A.weight"].flatten().tolist()
        total = [t + Fraction(c) * Fraction(sign) for t, sign in zip(total, z, strict=True)]
    expected = [
        np.float32(x + float(t)) for x, t in zip(start["a.lora_A.weight"].flatten().tolist(), total, strict=True)
    ]
    assert seed_scalars.rebuild(start, scalars)["a.lora_A.weight"].flatten().tolist() == expected


def test_the_order_of_seeds_does_not_show_in_a_single_bit() -> None:
    scalars = _scalars()
    expected = digest(seed_scalars.rebuild(_start(), scalars))
    rng = np.random.default_rng(0)
    for _ in range(3):
        order = [list(scalars)[i] for i in rng.permutation(len(scalars))]
        assert digest(seed_scalars.rebuild(_start(), {seed: scalars[seed] for seed in order})) == expected
    one_by_one = {name: tensor.double() for name, tensor in _start().items()}
    moved = {name: torch.zeros_like(tensor) for name, tensor in one_by_one.items()}
    for seed, c in scalars.items():
        moved = {name: t + c * seed_scalars.perturb(SHAPES, seed)[name] for name, t in moved.items()}
    assert digest({name: (one_by_one[name] + t).float() for name, t in moved.items()}) == expected


_SCRIPT = """
import sys, torch
from strategies import seed_scalars
from apiary.core.tensors import digest
torch.set_num_threads(int(sys.argv[1]))
rng = torch.Generator().manual_seed(3)
start = {"x": torch.randn(200, 300, generator=rng), "y": torch.randn(77, generator=rng)}
seeds = seed_scalars.candidates(9, 500)
message = torch.frombuffer(bytearray.fromhex(sys.stdin.read()), dtype=torch.float32)
print(digest(seed_scalars.rebuild(start, seed_scalars.of_tensor(message, seeds)), 64))
"""


@pytest.mark.slow
def test_two_processes_rebuild_the_same_weights_bit_for_bit() -> None:
    seeds = seed_scalars.candidates(9, 500)
    rng = np.random.default_rng(0)
    scalars = {seed: seed_scalars.on_grid(float(c)) for seed, c in zip(seeds, rng.normal(size=500), strict=True)}
    message = seed_scalars.to_tensor(scalars, seeds).numpy().tobytes()

    def told(threads: int) -> str:
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
        env |= {"PYTHONHASHSEED": str(threads), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT, str(threads)],
            input=message.hex(), capture_output=True, text=True, env=env, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    here = torch.Generator().manual_seed(3)
    start = {"x": torch.randn(200, 300, generator=here), "y": torch.randn(77, generator=here)}
    assert told(1) == told(2) == digest(seed_scalars.rebuild(start, scalars), 64)


class _Quadratic:
    """L(x) = x^T H x / 2 + b^T x."""

    def __init__(self, n: int = 6) -> None:
        rng = np.random.default_rng(0)
        root = rng.normal(size=(n, n))
        self.h, self.b, self.x = root @ root.T, rng.normal(size=n), rng.normal(size=n)
        self.gradient = self.h @ self.x + self.b

    def loss(self, state: StateDict) -> float:
        x = state["x"].double().numpy()
        return float(x @ self.h @ x / 2 + self.b @ x)


def test_the_slope_of_a_quadratic_gives_its_gradient_without_bias() -> None:
    quadratic, n = _Quadratic(), 4000
    x = {"x": torch.from_numpy(quadratic.x)}
    guesses = np.empty((n, 6))
    for i in range(n):
        z = seed_scalars.perturb({"x": (6,)}, i)
        guesses[i] = seed_scalars.estimate(quadratic.loss, x, z, 0.01) * z["x"].numpy()
    error = (guesses.mean(0) - quadratic.gradient) / (guesses.std(0) / math.sqrt(n))
    assert np.abs(error).max() < 4  # one of six normal numbers is beyond it once in 2,600
    # The estimate's second moment for signs: d ||gradient||^2, where normal numbers have d + 2.
    power = np.square(guesses).sum(1).mean() / np.square(quadratic.gradient).sum()
    assert power == pytest.approx(6, rel=0.15)


def test_the_slope_looks_ahead_and_back_from_x_itself() -> None:
    seen: list[float] = []

    def loss(state: StateDict) -> float:
        seen.append(float(state["x"]))
        return float(state["x"] ** 3)

    x = {"x": torch.tensor(2.0)}
    # ((2 - h)^3 - (2 + h)^3) / 2h = -(12 + h^2) with h = 0.5
    assert seed_scalars.estimate(loss, x, {"x": torch.tensor(-1.0)}, 0.5) == -(12 + 0.25)
    assert seen == [1.5, 2.5]
    assert x["x"].item() == 2.0


def _least_squares(d: int = 10) -> tuple[seed_scalars.Loss, dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(0)
    inputs, truth = torch.randn(64, d, generator=rng), torch.randn(d, 2, generator=rng)
    return lambda state: float((inputs @ (state["w"] - truth)).square().mean()), {"w": torch.zeros(d, 2)}


def test_a_walk_learns_and_is_told_by_its_scalars_to_the_bit() -> None:
    loss, start = _least_squares()
    seeds = seed_scalars.candidates(0, 64)
    went = seed_scalars.descend([(loss, 0.02)] * 400, start, seeds, epsilon=1e-3, rng=torch.Generator().manual_seed(1))
    assert loss(went.x) < 0.02 * loss(start)
    assert went.skipped == 0
    told = seed_scalars.of_tensor(seed_scalars.to_tensor(went.scalars, seeds), seeds)
    assert digest(seed_scalars.rebuild(start, told)) == digest(went.x)
    again = seed_scalars.descend([(loss, 0.02)] * 400, start, seeds, epsilon=1e-3, rng=torch.Generator().manual_seed(1))
    assert again.scalars == went.scalars
    assert start["w"].abs().max() == 0


def test_a_federated_run_of_scalars_learns() -> None:
    """Four clients with a quarter of the rows each; the server has nothing but their scalars."""
    rng = torch.Generator().manual_seed(0)
    inputs, truth = torch.randn(64, 10, generator=rng), torch.randn(10, 2, generator=rng)
    seeds, start, pool = SEEDS, {"w": torch.zeros(10, 2)}, dict[int, float]()

    def loss(rows: Tensor) -> seed_scalars.Loss:
        return lambda state: float((rows @ (state["w"] - truth)).square().mean())

    for number in range(10):
        x = seed_scalars.rebuild(start, pool)
        walks = [
            seed_scalars.descend(
                [(loss(rows), 0.02)] * 50, x, seeds, epsilon=1e-3, rng=torch.Generator().manual_seed(10 * number + i)
            )
            for i, rows in enumerate(inputs.chunk(4))
        ]
        pool = _after(pool, [went.scalars for went in walks], [16.0] * 4)
        mean = torch.stack([went.x["w"] for went in walks]).mean(0)
        torch.testing.assert_close(seed_scalars.rebuild(start, pool)["w"], mean, rtol=0, atol=1e-6)
    assert loss(inputs)(seed_scalars.rebuild(start, pool)) < 0.05 * loss(inputs)(start)


def test_a_step_without_a_number_is_left_out() -> None:
    loss, start = _least_squares()
    rng = torch.Generator().manual_seed(1)
    broken: list[seed_scalars.Loss] = [loss, lambda state: math.nan, lambda state: math.inf, loss]
    went = seed_scalars.descend([(one, 0.01) for one in broken], start, SEEDS, epsilon=1e-3, rng=rng)
    assert went.skipped == 2
    assert len(went.scalars) == 2


def test_steps_that_explode_are_an_error_and_not_a_model() -> None:
    loss, start = _least_squares()
    with pytest.raises(ValueError, match="lower the lr"):
        seed_scalars.descend([(loss, 1e3)] * 100, start, SEEDS, epsilon=1e-3, rng=torch.Generator().manual_seed(1))


def test_the_order_of_answers_does_not_show_in_the_pool() -> None:
    """Sixths and ninety-thousandths of numbers of very different sizes, exactly, then to the grid."""
    pool, changes, weights = _scalars(), [_scalars(80, seed) for seed in range(5)], [17.0, 512.0, 3.0, 90_001.0, 44.0]
    made = [
        _after(pool, [changes[i] for i in order], [weights[i] for i in order])
        for order in itertools.permutations(range(5))
    ]
    assert all(one == made[0] for one in made)
    for seed in SEEDS:
        terms = [Fraction(w) * Fraction(c.get(seed, 0.0)) for w, c in zip(weights, changes, strict=True)]
        mean = seed_scalars.on_grid(float(sum(terms) / Fraction(sum(weights))))
        assert made[0].get(seed, 0.0) == seed_scalars.on_grid(pool.get(seed, 0.0) + mean)


def test_what_cannot_be_told_or_taken_is_refused() -> None:
    told = seed_scalars.to_tensor(_scalars(10), SEEDS)
    with pytest.raises(ValueError, match="do not fit 5 candidate"):
        seed_scalars.of_tensor(told, SEEDS[:5])
    with pytest.raises(ValueError, match="not among the 5"):
        seed_scalars.to_tensor(_scalars(10), SEEDS[:5])
    with pytest.raises(ValueError, match="on_grid"):
        seed_scalars.to_tensor({SEEDS[0]: 1 / 3}, SEEDS)
    for wrong in (math.nan, 1e-13, 1e4):
        with pytest.raises(ValueError, match=r"on_grid|too much"):
            seed_scalars.of_tensor(told.index_fill(0, torch.tensor([3]), wrong), SEEDS)


@pytest.mark.parametrize("wrong", [1e-13, math.nan, math.inf])
def test_scalars_off_the_grid_are_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="on_grid"):
        seed_scalars.rebuild(_start(), {SEEDS[0]: wrong})


def test_the_grid() -> None:
    for value in (0.0, 1e-20, 3e-7, -1.2345e-3, 1 / 3, 2047.1):
        made = seed_scalars.on_grid(value)
        assert made == float(np.float32(made))
        assert made % seed_scalars.GRAIN == 0
        assert abs(made - value) <= seed_scalars.GRAIN / 2 + abs(value) * 2**-24
    for wrong in (2048.0, math.nan, -math.inf):
        with pytest.raises(ValueError, match="lower the lr"):
            seed_scalars.on_grid(wrong)
    with pytest.raises(ValueError, match="lower the lr"):
        seed_scalars.rebuild(_start(), dict.fromkeys(SEEDS, 8.0))
