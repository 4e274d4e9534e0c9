"""Server optimisers against the papers' equations, torch.optim, and what a run needs of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import server_opt as papers
from torch import Tensor

from apiary.config.schema import AdapterConfig, RunConfig
from apiary.core.errors import UserError
from apiary.core.lora import is_b, scaling, split
from apiary.core.messages import Update
from apiary.core.tensors import digest
from server import checkpoint
from strategies import AGGREGATORS, Aggregator, Gradient, ServerState
from strategies.aggregator import plain_step
from strategies.server_optimizers import SERVER_OPTIMIZERS, with_optimizer

SHAPES = {"m.x.lora_A.weight": (2, 5), "m.x.lora_B.weight": (3, 2)}
FEDAVG = AGGREGATORS.build("fedavg")
# Against rounding to float32 in each of some ten steps.
CLOSE: Mapping[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


def _tensors(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    return {n: torch.from_numpy((scale * rng.standard_normal(s)).astype(np.float32)) for n, s in SHAPES.items()}


def _rounds(n: int, scale: float = 1.0) -> list[dict[str, Tensor]]:
    # Rounds of very different sizes, in which the adaptive methods differ.
    return [_tensors(10 + i, scale * 10.0 ** (i % 3 - 1)) for i in range(n)]


def _method(optimizer: str, options: Mapping[str, Any] | None = None, **more: Any) -> Aggregator:
    return with_optimizer(FEDAVG, SERVER_OPTIMIZERS.build(optimizer, options), **more)


def _run(method: Aggregator, deltas: Sequence[Mapping[str, Tensor]], state: ServerState | None = None) -> ServerState:
    state = state or ServerState(0, _tensors(0), {}, {})
    for delta in deltas:
        state = method.step(state, Gradient(delta))
    return state


def _digests(state: ServerState) -> list[str]:
    return [digest(part) for part in state[1:]]


PAPERS: Mapping[str, tuple[Mapping[str, float], Callable[..., np.ndarray]]] = {
    "plain": ({"lr": 0.3}, lambda x, d: papers.plain(x, d, 0.3)),
    "momentum": ({"lr": 0.7, "momentum": 0.8}, lambda x, d: papers.momentum(x, d, 0.7, 0.8)),
    "nesterov": ({"lr": 0.6, "momentum": 0.9}, lambda x, d: papers.nesterov(x, d, 0.6, 0.9)),
    "adam": (
        {"lr": 0.02, "beta1": 0.8, "beta2": 0.95, "tau": 0.01},
        lambda x, d: papers.adaptive("adam", x, d, 0.02, 0.8, 0.95, 0.01),
    ),
    "yogi": (
        {"lr": 0.02, "beta1": 0.8, "beta2": 0.95, "tau": 0.01},
        lambda x, d: papers.adaptive("yogi", x, d, 0.02, 0.8, 0.95, 0.01),
    ),
    "adagrad": ({"lr": 0.02, "tau": 0.01}, lambda x, d: papers.adaptive("adagrad", x, d, 0.02, 0.0, 0.0, 0.01)),
}


@pytest.mark.parametrize("name", PAPERS)
def test_rounds_are_those_of_the_paper(name: str) -> None:
    options, expected = PAPERS[name]
    deltas = _rounds(8)
    after = _run(_method(name, options), deltas).adapter
    for tensor, start in _tensors(0).items():
        want = expected(start.double().numpy(), [delta[tensor].double().numpy() for delta in deltas])
        np.testing.assert_allclose(after[tensor].numpy(), want, **CLOSE)


def test_adagrad_takes_momentum_as_algorithm_2_has_it() -> None:
    deltas = _rounds(6)
    after = _run(_method("adagrad", {"lr": 0.02, "beta1": 0.5, "tau": 0.01}), deltas).adapter
    for tensor, start in _tensors(0).items():
        d = [delta[tensor].double().numpy() for delta in deltas]
        want = papers.adaptive("adagrad", start.double().numpy(), d, 0.02, 0.5, 0.0, 0.01)
        np.testing.assert_allclose(after[tensor].numpy(), want, **CLOSE)


def _late_adam(parameters: list[Tensor], tau: float, **more: Any) -> torch.optim.Optimizer:
    """torch's Adam, as it is when its bias correction has died away: the paper has none, and starts with v = tau^2."""
    made = torch.optim.Adam(parameters, eps=tau, **more)
    for p in parameters:
        made.state[p] = {
            "step": torch.tensor(1e6),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.full_like(p, tau**2),
        }
    return made


TORCH: Mapping[str, tuple[Mapping[str, Any], Callable[[list[Tensor]], torch.optim.Optimizer]]] = {
    "momentum": ({"lr": 0.7, "momentum": 0.8}, lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.8)),
    "nesterov": ({"lr": 0.6, "momentum": 0.9}, lambda p: torch.optim.SGD(p, lr=0.6, momentum=0.9, nesterov=True)),
    "adam": (
        {"lr": 0.02, "beta1": 0.8, "beta2": 0.95, "tau": 0.01},
        lambda p: _late_adam(p, 0.01, lr=0.02, betas=(0.8, 0.95)),
    ),
    "adagrad": (
        {"lr": 0.02, "tau": 0.01},
        lambda p: torch.optim.Adagrad(p, lr=0.02, initial_accumulator_value=1e-4, eps=0.01),
    ),
}


@pytest.mark.parametrize("name", TORCH)
def test_torch_goes_the_same_way_with_the_opposite_gradient(name: str) -> None:
    options, build = TORCH[name]
    live = {tensor: value.clone().requires_grad_() for tensor, value in _tensors(0).items()}
    other = build(list(live.values()))
    deltas = _rounds(8)
    for delta in deltas:
        for tensor, value in live.items():
            value.grad = -delta[tensor]
        other.step()
    after = _run(_method(name, options), deltas).adapter
    for tensor, value in live.items():
        np.testing.assert_allclose(after[tensor].numpy(), value.detach().numpy(), **CLOSE)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("none", {}),
        ("plain", {"lr": 1.0}),
        ("momentum", {"lr": 1.0, "momentum": 0.0}),
        ("nesterov", {"lr": 1.0, "momentum": 0.0}),
    ],
)
def test_a_step_of_one_without_momentum_is_federated_averaging_to_the_bit(name: str, options: Any) -> None:
    deltas = _rounds(3)
    assert digest(_run(_method(name, options), deltas).adapter) == digest(_run(FEDAVG, deltas).adapter)


@pytest.mark.parametrize("name", list(SERVER_OPTIMIZERS))
def test_a_run_that_never_moved_stays(name: str) -> None:
    still = [{n: torch.zeros(s) for n, s in SHAPES.items()}] * 3
    assert digest(_run(_method(name), still).adapter) == digest(_tensors(0))


def test_momentum_goes_on_without_gradient_and_dies_away() -> None:
    state = ServerState(0, {"w": torch.zeros(1)}, {}, {})
    one, none = {"w": torch.ones(1)}, {"w": torch.zeros(1)}
    heavy = _run(_method("momentum", {"lr": 1.0, "momentum": 0.5}), [one, none, none], state)
    assert heavy.adapter["w"].item() == 1 + 0.5 + 0.25
    assert heavy.memory["optimizer.m/w"].item() == 0.25
    ahead = _run(_method("nesterov", {"lr": 1.0, "momentum": 0.5}), [one, none, none], state)
    assert ahead.adapter["w"].item() == 1.5 + 0.25 + 0.125


@pytest.mark.parametrize("name", list(SERVER_OPTIMIZERS))
def test_a_run_resumed_from_its_checkpoint_is_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    method, deltas = _method(name), _rounds(6)
    whole = _run(method, deltas)
    checkpoint.save(tmp_path, _run(method, deltas[:3]), {}, RunConfig())
    loaded = checkpoint.load(tmp_path)
    assert loaded is not None
    resumed = _run(_method(name), deltas[3:], loaded[0])
    assert (resumed.round, _digests(resumed)) == (6, _digests(whole))
    assert {(t.dtype, t.device.type) for t in whole.memory.values()} <= {(torch.float32, "cpu")}


def test_state_and_gradient_are_never_changed() -> None:
    for name in SERVER_OPTIMIZERS:
        method, delta = _method(name), _rounds(1)[0]
        state = _run(method, [delta])
        before = [*_digests(state), digest(delta)]
        method.step(state, Gradient(delta))
        assert [*_digests(state), digest(delta)] == before


@pytest.mark.parametrize("name", ["momentum", "nesterov", "adam", "yogi", "adagrad"])
def test_factors_that_rest_neither_move_nor_forget(name: str) -> None:
    """With halves in turn each factor goes as if the rounds of the other were not there."""
    trained = AdapterConfig(train="alternate").trained
    deltas = [
        {n: d if is_b(n) == (trained(number) == "b") else torch.zeros_like(d) for n, d in delta.items()}
        for number, delta in enumerate(_rounds(6), 1)
    ]
    in_turns = _run(_method(name, trained=trained), deltas)
    only = {"b": deltas[0::2], "a": deltas[1::2]}
    for tensor, moved in in_turns.adapter.items():
        alone = _run(_method(name), only["b" if is_b(tensor) else "a"])
        assert torch.equal(moved, alone.adapter[tensor])
    after_b = _run(_method(name, trained=trained), deltas[:1])
    assert {key for key in after_b.memory if not is_b(key)} == set()


def test_factors_that_are_never_trained_take_no_memory() -> None:
    state = _run(_method("adam", trained=AdapterConfig(train="b").trained), _rounds(2))
    assert set(state.memory) == {"optimizer.m/m.x.lora_B.weight", "optimizer.v/m.x.lora_B.weight"}


def test_a_method_keeps_its_own_memory_and_sees_nothing_else() -> None:
    def step(state: ServerState, gradient: Gradient) -> ServerState:
        assert set(state.memory) <= {"rounds"}
        count = state.memory.get("rounds", torch.zeros(()))
        return plain_step(state, gradient)._replace(memory={"rounds": count + 1})

    optimizer = SERVER_OPTIMIZERS.build("momentum")
    method = with_optimizer(FEDAVG._replace(step=step), optimizer)
    state = _run(method, _rounds(3))
    assert state.memory["rounds"].item() == 3
    assert digest(state.adapter) == digest(_run(with_optimizer(FEDAVG, optimizer), _rounds(3)).adapter)


def _fold(method: Aggregator, state: ServerState) -> Gradient:
    acc = method.reduce.start(state)
    for i in range(3):
        acc = method.reduce.add(acc, Update(f"c{i}", _tensors(20 + i, 0.1), 1.0 + i, 2))
    return method.reduce.finish(state, acc, torch.Generator().manual_seed(0))


_GIVEN: Mapping[str, Any] = {"scaling": scaling(16.0, "rslora"), "seed": 3}


@pytest.mark.parametrize("name", ["flora", "flexlora"])
def test_a_step_size_scales_a_change_of_products_once(name: str) -> None:
    """Half a step makes half the change of the model, where the factors can hold it."""
    method = AGGREGATORS.build(name, **_GIVEN)
    fresh = ServerState(0, {n: t * (not is_b(n)) for n, t in _tensors(0).items()}, {}, {})
    gradient = _fold(method, fresh)
    change = {m: f.b @ f.a for m, f in split(gradient.adapter).items()}
    half = with_optimizer(method, SERVER_OPTIMIZERS.build("plain", {"lr": 0.5})).step(fresh, gradient)
    scale = _GIVEN["scaling"](2)
    for module, dense in change.items():
        got = scale * torch.linalg.multi_dot([split(half.adapter)[module].b, split(half.adapter)[module].a])
        if half.base_delta:
            got = got + split(half.base_delta)[module].b @ split(half.base_delta)[module].a
        want = 0.5 * scale * dense
        if name == "flexlora":  # the best of rank 2 for it
            u, s, vt = torch.linalg.svd(want)
            want = (u[:, :2] * s[:2]) @ vt[:2]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["momentum", "nesterov", "adam", "yogi", "adagrad"])
@pytest.mark.parametrize("name", ["flora", "flexlora"])
def test_a_memory_is_refused_where_the_basis_changes(name: str, optimizer: str) -> None:
    with pytest.raises(
        UserError, match=f"server_optimizer = '{optimizer}': this strategy.name answers with changes of the products"
    ):
        with_optimizer(AGGREGATORS.build(name, **_GIVEN), SERVER_OPTIMIZERS.build(optimizer))


@pytest.mark.parametrize("optimizer", ["plain", "momentum", "adam"])
def test_a_residual_in_the_base_allows_no_other_step(optimizer: str) -> None:
    fedex, made = AGGREGATORS.build("fedex", **_GIVEN), SERVER_OPTIMIZERS.build(optimizer)
    state = ServerState(0, _tensors(0), {}, {})
    gradient = _fold(fedex, state)
    with pytest.raises(UserError, match="adds a residual to the base"):
        with_optimizer(fedex._replace(base=True), made)
    with pytest.raises(UserError, match="adds a residual to the base"):
        with_optimizer(fedex._replace(base=False), made).step(state, gradient)
    none = with_optimizer(fedex._replace(base=True), SERVER_OPTIMIZERS.build("none"))
    assert _digests(none.step(state, gradient)) == _digests(fedex.step(state, gradient))


def test_options_are_checked() -> None:
    with pytest.raises(
        UserError, match=r"strategy.server_optimizer.momentum = 1.0: must be a number, at least 0 and below 1"
    ):
        SERVER_OPTIMIZERS.build("momentum", {"momentum": 1.0})
    with pytest.raises(UserError, match=r"strategy.server_optimizer.lr = 0: must be a number, above 0"):
        SERVER_OPTIMIZERS.build("adam", {"lr": 0})
    with pytest.raises(UserError, match="did you mean 'adagrad'"):
        SERVER_OPTIMIZERS.build("adagard")


def test_half_a_step_of_a_robust_method_leaves_the_factor_that_rests() -> None:
    method = AGGREGATORS.build("multi_krum", {"byzantine": 1}, scaling=scaling(16.0, "rslora"), seed=0)
    trained = AdapterConfig(train="alternate").trained
    half = with_optimizer(method, SERVER_OPTIMIZERS.build("plain", {"lr": 0.5}), trained)
    rng = torch.Generator().manual_seed(0)
    held = {"m.lora_A.weight": torch.randn(2, 5, generator=rng), "m.lora_B.weight": torch.randn(6, 2, generator=rng)}
    for number, moves in ((1, "b"), (2, "a")):
        state = ServerState(number - 1, held, {}, {})
        acc = half.reduce.start(state)
        for i in range(5):
            delta = {n: torch.full_like(t, 0.1 if is_b(n) == (moves == "b") else 0.0) for n, t in held.items()}
            acc = half.reduce.add(acc, Update(f"c{i}", delta, 1.0, 2))
        after = half.step(state, half.reduce.finish(state, acc, torch.Generator()))
        for name, tensor in held.items():
            moved = 0.05 if is_b(name) == (moves == "b") else 0.0
            torch.testing.assert_close(after.adapter[name], tensor + moved)
