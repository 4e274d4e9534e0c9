"""Clients of different ranks in whole runs, and the rank that a device has room for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

import strategies
from apiary.config import loading
from apiary.core.errors import UserError
from apiary.core.tensors import StateDict
from apiary.models import adapters
from apiary.tracking.event_log import read_events
from client import device_rank, site_worker
from client.site import Facts, at_home
from client.training import trainer
from deploy import site
from server import app
from simulation.run import simulate

RANKS = (2, 4, 8)
ALPHA = 16.0
MIXED = [
    "adapter.rank=8",
    f"adapter.ranks={list(RANKS)}",
    "strategy.fraction=0.5",
    "rounds=5",
    "evaluate.generate=false",
    "evaluate.baselines=[]",
]
Floats = NDArray[np.float64]


def run(folder: Path, overrides: list[str]) -> dict[str, Any]:
    return simulate(loading.load(None, overrides), folder)


def products(state: StateDict, scale: float, rank: int) -> dict[str, Floats]:
    """s B A of the first `rank` columns of B and rows of A, by module."""
    made = {}
    for name, b in state.items():
        if name.endswith(".lora_B.weight"):
            a = state[name.replace(".lora_B.", ".lora_A.")].double().numpy()
            made[name.removesuffix(".lora_B.weight")] = scale * (b.double().numpy()[:, :rank] @ a[:rank])
    return made


class Watch:
    """The model that each visit starts from, dense, beside the server's state of that moment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, start: StateDict) -> None:
        self.adapter, self.base = start, {}
        self.visits: list[tuple[str, int, float, dict[str, Floats], dict[str, Floats]]] = []
        self.server: list[tuple[StateDict, StateDict]] = []
        fit, save = trainer.fit, app.save

        def fitting(
            lm: adapters.LanguageModel, start: StateDict, corpus: Any, config: Any, plan: trainer.VisitPlan
        ) -> trainer.FitResult:
            own = {name: t for name, t in start.items() if not name.startswith("base_delta.")}
            base = {name.removeprefix("base_delta."): t for name, t in start.items() if name not in own}
            self.visits.append(
                (plan.client, lm.rank, lm.scale, products(own, lm.scale, 99), products(base, 1.0, 10**6))
            )
            self.server.append((self.adapter, self.base))
            return fit(lm, start, corpus, config, plan)

        def saving(folder: Path, run: Any, state: strategies.ServerState, *rest: Any) -> None:
            self.adapter, self.base = state.adapter, state.base_delta
            save(folder, run, state, *rest)

        monkeypatch.setattr(trainer, "fit", fitting)
        monkeypatch.setattr(app, "save", saving)


@pytest.mark.slow
@pytest.mark.parametrize("scaling", ["rslora", "lora"])
@pytest.mark.parametrize("name", ["flexlora", "rank_slices", "hetlora", "flora"])
def test_a_client_trains_from_the_servers_model_cut_to_its_rank(
    name: str, scaling: str, small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after rounds that it missed: W + D + s_R B A with the leading r of A and B, whatever r and its own scale."""
    settings = [*small_run, *MIXED, f"strategy.name={name}", f"adapter.scaling={scaling}", f"adapter.alpha={ALPHA}"]
    loaded = loading.load(None, settings)
    watch = Watch(monkeypatch, adapters.fresh_adapter(adapters.load(loaded.model, loaded.adapter), loaded.seed))
    metrics = run(tmp_path / "run", settings)
    asked = [event["clients"] for event in read_events(tmp_path / "run") if event["event"] == "asked"]
    assert len(asked) == 5 and all(len(clients) == 2 for clients in asked)
    assert {client for clients in asked for client in clients} == {"client-00", "client-01", "client-02"}
    assert len(watch.visits) == 10

    def scale(rank: int) -> float:
        return ALPHA / (math.sqrt(rank) if scaling == "rslora" else rank)

    for (client, rank, own_scale, held, base), (adapter, base_delta) in zip(watch.visits, watch.server, strict=True):
        assert rank == dict(zip(("client-00", "client-01", "client-02"), RANKS, strict=True))[client]
        assert own_scale == pytest.approx(scale(rank))
        for module, expected in products(adapter, scale(8), rank).items():
            np.testing.assert_allclose(held[module], expected, rtol=1e-4, atol=1e-6)
        expected_base = products(base_delta, 1.0, 10**6)
        assert base.keys() == expected_base.keys()
        for module, expected in expected_base.items():
            np.testing.assert_allclose(base[module], expected, rtol=1e-4, atol=1e-6)
    late = watch.visits[-1]
    assert max(np.abs(m).max() for m in (late[4] if name == "flora" else late[3]).values()) > 1e-4
    assert bool(late[4]) == (name == "flora")
    sizes = {e["client"]: e["bytes_up"] for e in read_events(tmp_path / "run") if e["event"] == "client"}
    assert sizes["client-00"] < sizes["client-01"] < sizes["client-02"]
    assert metrics["rounds"][-1]["loss"] < metrics["rounds"][0]["loss"]


def test_ranks_above_the_adapters_are_refused() -> None:
    with pytest.raises(UserError, match=r"adapter.ranks = \[4, 32\]: 32 is not from 1 to adapter.rank = 16"):
        loading.load(None, ["strategy.name=flexlora", "adapter.ranks=[4, 32]"])
    with pytest.raises(UserError, match=r"'memory': strategy.name = 'fedavg' takes the rank 16 alone"):
        strategies.from_config(loading.load(None, ["adapter.ranks=memory"]))
    with pytest.raises(UserError, match="must be a list"):
        loading.load(None, ["adapter.ranks=disk"])


# -- by memory ----------------------------------------------------------------------------------


def test_the_rank_that_fits_by_hand() -> None:
    """Llama-2-7B with all linear modules has 2,498,560 entries a rank: 640 MB at rank 16 with AdamW."""
    entries = 39_976_960 // 16
    assert device_rank.fitting(16, entries, 2_558_525_440, "adamw") == 16  # a quarter is 639,631,360 = 16 entries 16
    assert device_rank.fitting(16, entries, 2_558_525_439, "adamw") == 8
    assert device_rank.fitting(16, entries, 2_558_525_439 // 2, "sgd") == 8
    assert device_rank.fitting(16, entries, 2_558_525_440 // 2, "sgd") == 16
    assert device_rank.fitting(24, entries, 2_558_525_440, "adamw") == 16
    assert device_rank.fitting(12, entries, 2_558_525_440, "adamw") == 12
    assert device_rank.fitting(12, entries, 1_900_000_000, "adamw") == 8
    assert device_rank.fitting(64, entries, 0, "adamw") == 1
    assert device_rank.fitting(64, entries, None, "adamw") == 64


def test_what_is_free_is_the_least_that_machine_and_container_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("_MEMORY", "_LIMIT", "_USED")
    for name in names:
        monkeypatch.setattr(device_rank, name, tmp_path / name)
    cpu = torch.device("cpu")
    assert device_rank.free_bytes(cpu) is None
    (tmp_path / "_MEMORY").write_text("MemTotal:       32000 kB\nMemFree:  10 kB\nMemAvailable:   20000 kB\n")
    assert device_rank.free_bytes(cpu) == 20_000 * 1024
    (tmp_path / "_LIMIT").write_text("max\n")
    (tmp_path / "_USED").write_text("5000\n")
    assert device_rank.free_bytes(cpu) == 20_000 * 1024
    (tmp_path / "_LIMIT").write_text("9000\n")
    assert device_rank.free_bytes(cpu) == 4000


def test_a_client_keeps_the_rank_that_it_first_had(
    small_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that others take in the middle of a run changes nothing."""
    loaded = loading.load(None, small_run)
    one = adapters.load(loaded.model, loaded.adapter.of_rank(1))
    entries = sum(parameter.numel() for parameter in one.adapter.values())
    rooms = iter([4 * 16 * entries * 8, 4 * 16 * entries * 2, 4 * 16 * entries * 4, *[0] * 100])
    monkeypatch.setattr(device_rank, "free_bytes", lambda device: next(rooms))
    settings = [*small_run, *MIXED, "adapter.ranks=memory", "strategy.name=flexlora", "strategy.fraction=1.0"]
    run(tmp_path / "run", settings)
    kept = [int((tmp_path / "run" / "clients" / f"client-0{i}" / "rank").read_text()) for i in range(3)]
    assert sorted(kept) == [2, 4, 8]
    done = [event for event in read_events(tmp_path / "run") if event["event"] == "round"]
    assert [event["clients"] for event in done] == [3] * 5
    assert not [event for event in read_events(tmp_path / "run") if event["event"] == "refused"]
    exported = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {t.shape[0] for name, t in exported.items() if "lora_A" in name} == {8}


# -- at a site ----------------------------------------------------------------------------------


def test_what_the_operator_says_reaches_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each word under its own name: a limit on privacy that became a rank would limit nothing."""
    monkeypatch.setattr(site, "SupervisedProcess", lambda command, *more: command)
    options = site.Options(tmp_path / "rows.jsonl", "base", "cpu", 1, 3.0, 1e-6, 8)
    command: Any = site._worker(_kit(tmp_path), tmp_path, options, "unix:socket")
    facts = site_worker._facts(site_worker._arguments(command[command.index("--address") :]))
    data = (tmp_path / "rows.jsonl").resolve()
    assert facts == Facts("ant", data, tmp_path, "base", "cpu", rank=8, max_epsilon=3.0, max_delta=1e-6)
    bare = site_worker._facts(
        site_worker._arguments(["--address", "a", "--site", "ant", "--data", "d", "--state", "s"])
    )
    assert (bare.rank, bare.max_epsilon, bare.model, bare.device) == (None, None, None, None)


def _kit(folder: Path) -> Any:
    return type("AnyKit", (), {"folder": folder, "site": "ant"})()


@pytest.mark.parametrize(("said", "given", "expected"), [(None, 16, 16), (8, 16, 8), (8, 4, 4)])
def test_a_site_trains_no_higher_rank_than_it_says(
    said: int | None, given: int, expected: int, rows_file: Path, tmp_path: Path
) -> None:
    facts = Facts("ant", rows_file, tmp_path, rank=said)
    run = at_home(loading.load(None, [f"adapter.rank={given}", "strategy.name=flexlora"]), facts)
    assert site_worker._read_site(run, facts, "run").rank == expected


def test_a_site_asked_by_memory_may_still_say_its_own(
    tiny_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_rank, "free_bytes", lambda device: 0)
    settings = ["adapter.ranks=memory", "strategy.name=flexlora", f"model.name={tiny_model}", "model.device=cpu"]
    facts = Facts("ant", rows_file, tmp_path)
    run = at_home(loading.load(None, settings), facts)
    assert site_worker._read_site(run, facts, "run").rank == 1
    assert site_worker._read_site(run, facts._replace(rank=4), "run").rank == 4


def test_a_rank_below_one_is_refused(rows_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--rank 0: expected 1 or more"):
        site_worker.check(Facts("ant", rows_file, tmp_path, rank=0))
