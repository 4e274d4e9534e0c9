"""Clustered federation: grouping by angles, an adapter for each group, and what newcomers are sent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killing import killed_before_checkpoint
from reference import clusters as reference
from safetensors.torch import load_file
from torch import Tensor

import strategies
from apiary.config import loading
from apiary.core.errors import UserError
from apiary.core.lora import Factors, join, scaling, split
from apiary.core.messages import ClientInfo, Update
from apiary.core.tensors import StateDict, digest
from apiary.report import table_plain
from apiary.tracking.event_log import read_events
from server import checkpoint
from simulation.run import simulate
from strategies import AGGREGATORS, Aggregator, ServerState
from strategies.clustered import group_of, grouping, silhouette

SHAPES, RANK = {"x": (7, 6), "y": (5, 8)}, 2
GROUPED = ["strategy.name=clustered", "evaluate.generate=false", "evaluate.baselines=[]"]
# Splits whatever it finds: what clients of the tests' random model learn in a few steps is not far apart.
FORCED = ["strategy.options.after=1", "strategy.options.most=2", "strategy.options.separation=0.0"]


def build(**options: Any) -> Aggregator:
    return AGGREGATORS.build("clustered", options, scaling=scaling(4.0, "rslora"), weighting="tokens")


def drawn(seed: int, size: float = 1.0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return join(
        {
            m: Factors(size * torch.randn(o, RANK, generator=rng), size * torch.randn(RANK, i, generator=rng))
            for m, (o, i) in SHAPES.items()
        }
    )


def dense(adapter: StateDict) -> np.ndarray[Any, Any]:
    """The products of all modules as one long vector."""
    factors = split(adapter).values()
    return np.concatenate([(f.b.double().numpy() @ f.a.double().numpy()).ravel() for f in factors])


def change(start: StateDict, delta: StateDict) -> np.ndarray[Any, Any]:
    return dense({name: t + delta[name] for name, t in start.items()}) - dense(start)


def towards(kind: int, k: int, noise: float = 0.2) -> dict[str, Tensor]:
    """The change of client k of a kind: mostly that of its kind."""
    own, common = drawn(1000 + k, 0.1 * noise), drawn(kind, 0.1)
    return {name: t + own[name] for name, t in common.items()}


def fold(method: Aggregator, state: ServerState, updates: Sequence[Update]) -> ServerState:
    acc = method.reduce.start(state)
    for update in updates:
        acc = method.reduce.add(acc, update)
    return method.step(state, method.reduce.finish(state, acc, torch.Generator()))


def updates_of(kinds: dict[str, int], noise: float = 0.2) -> list[Update]:
    return [Update(c, towards(kind, k, noise), 10.0 + 3 * k, RANK) for k, (c, kind) in enumerate(kinds.items())]


# -- the grouping --------------------------------------------------------------------------------


def test_a_silhouette_by_hand() -> None:
    """Points 0, 1 and 10, 12: by a = 1, 1, 2, 2 and b = 11, 10, 9.5, 11.5."""
    points = np.array([0.0, 1.0, 10.0, 12.0])
    expected = np.mean([10 / 11, 9 / 10, 7.5 / 9.5, 9.5 / 11.5])
    apart = abs(points[:, None] - points)
    assert silhouette(apart, np.array([0, 0, 1, 1])) == pytest.approx(expected, rel=1e-12)
    # One that is alone counts 0; of the others a = 1, 1, 10.5 -> with b = 12, 11 and least 1.
    assert silhouette(apart[:3, :3], np.array([0, 0, 1])) == pytest.approx(np.mean([9 / 10, 8 / 9, 0.0]), rel=1e-12)


@pytest.mark.parametrize("seed", range(12))
def test_the_groups_are_those_of_average_linkage_and_the_best_silhouette(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kinds = rng.standard_normal((3, 9))
    points = [kinds[k % 3] + 0.7 * rng.standard_normal(9) for k in range(11)]
    gram = torch.tensor(np.array([[x @ y for y in points] for x in points]))
    expected, score = reference.best_split(reference.apart(points), 5)
    found = grouping(gram, 5, 0.0)
    groups = {frozenset(np.flatnonzero(np.array(found.labels) == label).tolist()) for label in set(found.labels)}
    assert groups == expected and found.silhouette == pytest.approx(score, rel=1e-9)
    firsts = [found.labels.index(label) for label in range(len(groups))]
    assert firsts == sorted(firsts)  # numbered by who comes first
    assert grouping(gram, 5, score + 1e-6) == ((0,) * 11, found.silhouette)
    assert grouping(gram, 5, score - 1e-6).labels == found.labels


def test_lengths_do_not_count_and_who_moved_nothing_is_no_trouble() -> None:
    points = np.array([[1.0, 0.0], [50.0, 1.0], [0.0, 1e-3], [0.1, 9.0]])
    assert grouping(torch.tensor(points @ points.T), 3, 0.1).labels == (0, 0, 1, 1)
    assert grouping(torch.zeros(5, 5, dtype=torch.float64), 4, 0.1) == ((0,) * 5, 0.0)
    still = np.vstack([points, np.zeros((1, 2))])
    assert grouping(torch.tensor(still @ still.T), 3, 0.1).labels[:4] == (0, 0, 1, 1)
    alike = torch.ones(6, 6, dtype=torch.float64)
    assert grouping(alike, 4, 0.0).labels == (0,) * 6  # nothing sets them apart


def test_the_angle_is_that_of_the_weights_whatever_the_factors() -> None:
    """A client that sends other factors of the same matrices is in the same group, and the score is the same."""
    start = drawn(99)
    kinds = {f"c{k}": 200 + k % 2 for k in range(6)}
    updates = updates_of(kinds)
    state, method = ServerState(0, start, {}, {}), build(after=1, separation=0.05)
    gauge = torch.tensor([[3.0, 1.0], [-2.0, 0.5]])
    turned = []
    for update in updates:
        end = {name: t + update.delta[name] for name, t in start.items()}
        other = join({m: Factors(f.b @ gauge, torch.linalg.solve(gauge, f.a)) for m, f in split(end).items()})
        turned.append(update._replace(delta={name: other[name] - t for name, t in start.items()}))
    told = []
    for cohort in (updates, [*turned[:3], *updates[3:]]):
        acc = method.reduce.start(state)
        for update in cohort:
            acc = method.reduce.add(acc, update)
        told.append(method.reduce.finish(state, acc, torch.Generator()).told)
    expected, score = reference.best_split(reference.apart([change(start, u.delta) for u in updates]), 4)
    assert told[0]["silhouette"] == pytest.approx(score, abs=1e-5)
    assert told[0]["groups"] == {client: kind - 200 for client, kind in kinds.items()}
    assert expected == {frozenset({0, 2, 4}), frozenset({1, 3, 5})}
    assert told[1]["groups"] == told[0]["groups"] and told[1]["silhouette"] == pytest.approx(score, abs=1e-4)


# -- rounds --------------------------------------------------------------------------------------


def test_rounds_by_hand_each_group_averages_its_own_changes() -> None:
    method, kinds = build(after=2, separation=0.05), {f"c{k}": 300 + k // 2 for k in range(6)}
    state = ServerState(0, drawn(98), {}, {})
    groups = {client: kind - 300 for client, kind in kinds.items()}
    first = updates_of(dict.fromkeys(kinds, 7))
    before = fold(method, state, first)
    plain = AGGREGATORS.build("fedavg")
    assert digest(before.adapter) == digest(fold(plain, state, first).adapter) and not before.memory
    adapters = {g: {n: t.double().numpy() for n, t in before.adapter.items()} for g in range(3)}
    after = before
    for number in range(3):
        updates = [u for u in updates_of(kinds) if number < 2 or u.client in ("c0", "c3")]  # some are away later
        for client in kinds:
            sent = method.payload(after, ClientInfo(client, RANK, 0)).adapter
            for name, tensor in sent.items():
                np.testing.assert_allclose(tensor, adapters[groups[client]][name], atol=1e-6)
        after = fold(method, after, updates)
        for g in range(3):
            own = [u for u in updates if groups[u.client] == g]
            for name in state.adapter:
                total = sum(u.weight * u.delta[name].double().numpy() for u in own)
                adapters[g][name] = adapters[g][name] + (total / sum(u.weight for u in own) if own else 0.0)
        assert {c: group_of(after, c) for c in kinds} == groups
    for g, name in ((g, name) for g in range(3) for name in state.adapter):
        np.testing.assert_allclose(method.models(after)[f"group-{g}"][name], adapters[g][name], atol=1e-5)
    for module, held in split(after.adapter).items():
        products = {
            g: adapters[g][f"{module}.lora_B.weight"] @ adapters[g][f"{module}.lora_A.weight"] for g in range(3)
        }
        expected = reference.mean_of_groups(products, groups, RANK)
        np.testing.assert_allclose(held.b.double() @ held.a.double(), expected, atol=1e-4)
    assert after.round == 4 and len(method.models(before)) == 0


def test_the_mean_of_the_groups_counts_each_by_its_clients() -> None:
    kinds = {"a": 400, "b": 400, "c": 400, "d": 400, "e": 401, "f": 401}
    method, state = build(after=1, separation=0.05), ServerState(0, drawn(97), {}, {})
    after = fold(method, state, updates_of(kinds))
    models = [split(model) for model in method.models(after).values()]
    assert len(models) == 2
    for module, held in split(after.adapter).items():
        products = {
            g: model[module].b.double().numpy() @ model[module].a.double().numpy() for g, model in enumerate(models)
        }
        expected = reference.best_of_rank((4 * products[0] + 2 * products[1]) / 6, RANK)
        np.testing.assert_allclose(held.b.double() @ held.a.double(), expected, atol=1e-4)


@pytest.mark.parametrize("goes_to", [0, 1])
def test_who_comes_later_is_sent_the_mean_once_and_joins_the_group_that_it_points_to(goes_to: int) -> None:
    kinds = {f"c{k}": 500 + k % 2 for k in range(6)}
    method, state = build(after=1, separation=0.05), ServerState(0, drawn(96), {}, {})
    after = fold(method, state, updates_of(kinds))
    sent = method.payload(after, ClientInfo("new", RANK, 0)).adapter
    assert digest(sent) == digest(after.adapter) and group_of(after, "new") is None
    # By a step of B from the mean towards the weights of that group's adapter, and a little besides.
    delta = {name: 0.01 * tensor for name, tensor in drawn(5).items()}
    goal = split(method.models(after)[f"group-{goes_to}"])
    for module, held in split(sent).items():
        towards_it = goal[module].b @ goal[module].a - held.b @ held.a
        delta[module + ".lora_B.weight"] += 0.1 * towards_it @ held.a.T
    ways = [dense(model) - dense(sent) for model in method.models(after).values()]
    cosines = [change(sent, delta) @ way / np.linalg.norm(way) for way in ways]
    nearest = int(np.argmax(cosines))
    assert nearest == goes_to and max(cosines) > 0 > min(cosines)
    members = [u for u in updates_of(kinds) if u.client != "c2"]
    with_it = fold(method, after, [*members, Update("new", delta, 1e6, RANK)])
    without = fold(method, after, members)
    assert group_of(with_it, "new") == nearest
    for name, model in method.models(without).items():
        assert digest(method.models(with_it)[name]) == digest(model)  # its change moves no group
    later = method.payload(with_it, ClientInfo("new", RANK, 1)).adapter
    assert digest(later) == digest(method.models(with_it)[f"group-{nearest}"])
    again = fold(method, with_it, [Update("new", towards(500, 1), 1.0, RANK)])
    assert group_of(again, "new") == nearest and digest(again.adapter) != digest(with_it.adapter)
    assert {c: group_of(again, c) for c in kinds} == {c: group_of(after, c) for c in kinds}


def test_where_nothing_sets_clients_apart_it_is_federated_averaging_bit_for_bit() -> None:
    method, plain = build(after=1, separation=0.9), AGGREGATORS.build("fedavg")
    ours = theirs = ServerState(0, drawn(95), {}, {})
    kinds = {f"c{k}": 600 for k in range(5)}
    for _ in range(3):
        ours, theirs = (fold(m, s, updates_of(kinds)) for m, s in ((method, ours), (plain, theirs)))
        assert digest(ours.adapter) == digest(theirs.adapter)
    assert group_of(ours, "c0") is None and method.models(ours) == {}
    assert digest(method.payload(ours, ClientInfo("c1", RANK, 0)).adapter) == digest(theirs.adapter)


def test_it_waits_for_three_clients_and_decides_once() -> None:
    method, state = build(after=1, separation=0.05), ServerState(0, drawn(94), {}, {})
    two = fold(method, state, updates_of({"a": 700, "b": 701}))
    assert not two.memory and two.round == 1
    four = fold(method, two, updates_of({"a": 700, "b": 701, "c": 700, "d": 701}))
    assert [group_of(four, client) for client in "abcd"] == [0, 1, 0, 1]
    others = fold(method, four, updates_of({"a": 700, "b": 700, "c": 701, "d": 701}))
    assert [group_of(others, client) for client in "abcd"] == [0, 1, 0, 1]


def test_answers_in_any_order_make_the_same_bits() -> None:
    method, kinds = build(after=1, separation=0.05), {f"c{k}": 800 + k % 3 for k in range(9)}
    state = ServerState(0, drawn(93), {}, {})
    once = [fold(method, state, order) for order in (updates_of(kinds), updates_of(kinds)[::-1])]
    later = [*updates_of(kinds), Update("z", towards(801, 3), 1.0, RANK), Update("y", towards(802, 4), 2.0, RANK)]
    for pair in (once, [fold(method, once[0], order) for order in (later, later[::-1])]):
        assert [digest(part) for part in pair[0][1:]] == [digest(part) for part in pair[1][1:]]


# -- whole runs ----------------------------------------------------------------------------------


def run(folder: Path, overrides: list[str], **keys: Any) -> dict[str, Any]:
    return simulate(loading.load(None, overrides), folder, **keys)


SKILLS = ['data.partition={ name = "pathological", by = "skill", classes = 1 }', "data.clients=4"]


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows_file: Path
) -> tuple[Path, dict[str, Any]]:
    """A run of four clients in two groups."""
    from conftest import overrides_for

    folder = tmp_path_factory.mktemp("grouped") / "run"
    more = ["data.test_fraction=0.3", "evaluate.max_examples=100", "train.steps=4"]
    return folder, run(folder, [*overrides_for(tiny_model, rows_file), *SKILLS, *GROUPED, *FORCED, *more])


def weights(place: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(place / "adapter_model.safetensors")
    return found


def test_each_client_has_the_adapter_of_its_group(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = finished
    told = [event for event in read_events(folder) if event["event"] == "round"]
    groups = told[0]["groups"]
    assert set(groups.values()) == {0, 1} and not any("groups" in event for event in told[1:])
    assert -1 <= told[0]["silhouette"] <= 1 and not any("gauge" in event for event in told)
    assert {client["client"]: client["group"] for client in metrics["clients"]} == groups
    for client, group in groups.items():
        at_home, kept = weights(folder / "clients" / client / "adapter"), weights(folder / "personal" / client)
        of_group = weights(folder / "groups" / f"group-{group}")
        for name, tensor in of_group.items():
            assert torch.equal(tensor, kept[name]) and torch.equal(tensor, at_home[name])
    assert digest(weights(folder / "groups" / "group-0")) != digest(weights(folder / "groups" / "group-1"))
    assert digest(weights(folder / "adapter")) not in {
        digest(weights(folder / "groups" / f"group-{g}")) for g in (0, 1)
    }
    assert "share the adapter of their group" in table_plain(metrics)
    assert "for clients that have no other yet" in (folder / "adapter" / "README.md").read_text()
    assert "This one is of group-1" in (folder / "groups" / "group-1" / "README.md").read_text()


def test_clients_are_measured_with_the_adapter_of_their_group(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = finished
    told = [event for event in read_events(folder) if event["event"] == "evaluate"]
    assert not any("loss" in event for event in told)
    for client in metrics["clients"]:
        assert told[-1]["clients"][client["client"]] == pytest.approx(client["own"]["federated"], rel=1e-4)


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(small_run: list[str], tmp_path: Path) -> None:
    settings = [*small_run, *SKILLS, *GROUPED, *FORCED, "rounds=4", "strategy.fraction=0.75"]
    run(tmp_path / "whole", settings)
    with killed_before_checkpoint(3):
        run(tmp_path / "cut", settings)
    run(tmp_path / "cut", settings, resume=True)
    ends = [checkpoint.load(tmp_path / f / "checkpoints") for f in ("whole", "cut")]
    assert ends[0] and ends[1]
    assert [digest(part) for part in ends[0][0][1:]] == [digest(part) for part in ends[1][0][1:]]
    assert (
        len([name for name in ends[0][0].memory if name.startswith("member/")]) == 4
    )  # who came later has a group too
    for place in ("adapter", "groups/group-0", "groups/group-1", "personal/client-03"):
        assert digest(weights(tmp_path / "whole" / place)) == digest(weights(tmp_path / "cut" / place))


@pytest.mark.slow
def test_groups_of_private_changes_cost_no_privacy(small_run: list[str], tmp_path: Path) -> None:
    """What clients send, and what it costs them, is what it is without groups; only the server makes more of it."""
    private = ["privacy.unit=record", "privacy.batch_rows=8", "rounds=2", "evaluate.every=0"]
    spent = []
    for name, more in (("grouped", [*GROUPED, *FORCED]), ("plain", GROUPED[1:])):
        run(tmp_path / name, [*small_run, *more, *private])
        told = [event for event in read_events(tmp_path / name) if event["event"] == "client"]
        spent.append({(event["round"], event["client"]): event["spent"] for event in told})
        assert all(event["tokens"] and event["steps"] for event in told)
    assert spent[0] == spent[1] and len(spent[0]) == 6
    assert any("groups" in event for event in read_events(tmp_path / "grouped") if event["event"] == "round")


@pytest.mark.parametrize(
    ("settings", "why", "way_out"),
    [
        (["adapter.train=b"], "clients hold fixed", "allows 'both'"),
        (["adapter.share=a"], "one factor alone", "fedavg"),
        (["adapter.ranks=[4, 16]"], "takes the rank 16 alone", "methods for several ranks"),
        (["strategy.server_optimizer=nesterov"], "for each group", "use none"),
        (["wire.up=int4"], "those of its group", "feedback = false"),
        (["wire.down=int8"], "each group of clients another adapter", "use fp32"),
        (['continual.stages=[["first"], ["last"]]'], "measured on one model for all", "one a client"),
        (["simulate.attackers=0.2"], "one model for all", "set 0"),
        (["evaluate.patience=2"], "a model of the last round", "set 0"),
        (["evaluate.clients=false"], "clients score themselves", "leave the key out"),
        (["strategy.options.most=1"], "strategy.options.most", "at least 2"),
    ],
)
def test_what_does_not_go_with_it_is_refused(settings: list[str], why: str, way_out: str) -> None:
    with pytest.raises(UserError) as told:
        strategies.from_config(loading.load(None, ["strategy.name=clustered", *settings]))
    (line,) = told.value.problems
    assert why in line and way_out in line
