"""Many virtual clients: none of them changes what another gets, and the process does not grow with them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import instruction_rows, overrides_for

from apiary.config import loading
from apiary.core.messages import Payload, Visit
from apiary.core.tensors import StateDict
from apiary.models import adapters
from client import handlers
from server import checkpoint

_PEAK = """
import json, resource, sys
from pathlib import Path
from apiary.config import loading
from apiary.tracking.event_log import RunLog
from server.app import make_app
from simulation.engines import ENGINES
folder, clients, overrides = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
run = loading.load(None, overrides)
log = RunLog(folder)
ENGINES.build("local", config=run)(make_app(log), run, clients, folder)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def settings(model: Path, rows: Path, clients: int) -> list[str]:
    plain = ["rounds=1", "train.steps=1", "train.batch_tokens=64", f"data.clients={clients}", "data.test_fraction=0"]
    return [*overrides_for(model, rows), *plain, "evaluate.every=0", "evaluate.clients=false", "evaluate.baselines=[]"]


def rows_of(folder: Path, count: int) -> Path:
    path = folder / "many.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in instruction_rows(count)), encoding="utf-8")
    return path


def mean_of_visits(overrides: list[str], clients: int, folder: Path) -> dict[str, torch.Tensor]:
    """The adapter after a round by the definition of federated averaging, each client trained by itself."""
    run = loading.load(None, overrides)
    lm = adapters.load(run.model, run.adapter)
    start = adapters.fresh_adapter(lm, run.seed)
    worker = handlers.worker(run.to_json())
    total = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in start.items()}
    weight = 0.0
    for index in reversed(range(clients)):  # in another order than the server's
        site = handlers.virtual_site(run.to_json(), index, folder)
        visit = worker.train(site, 1, Payload({name: tensor.clone() for name, tensor in start.items()}, {}))
        assert isinstance(visit, Visit)
        weight += visit.update.weight
        for name, tensor in visit.update.delta.items():
            total[name] += visit.update.weight * tensor.double()
    return {name: start[name] + (total[name] / weight).float() for name in start}


def trained(run: Path, overrides: list[str]) -> StateDict:
    found = checkpoint.load(run / "checkpoints", loading.load(None, overrides))
    assert found is not None
    return found[0].adapter


@pytest.mark.parametrize("clients", [40, pytest.param(1000, marks=pytest.mark.long)])
def test_the_adapter_is_the_mean_of_clients_that_know_nothing_of_each_other(
    tiny_model: Path, tmp_path: Path, clients: int
) -> None:
    overrides = [*settings(tiny_model, rows_of(tmp_path, 2 * clients), clients), "evaluate.generate=false"]
    overrides += ["strategy.server_optimizer=none"]  # a mean, and no step along earlier ones
    expected = mean_of_visits(overrides, clients, tmp_path / "apart")
    _, log = in_process(overrides, clients, tmp_path / "run")
    assert log.count('"event":"client"') == clients
    found = trained(tmp_path / "run", overrides)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-7)


def in_process(overrides: list[str], clients: int, folder: Path) -> tuple[int, str]:
    """The peak of memory of a process, in KiB, that does the rounds of a run and nothing else; and the run's log."""
    folder.mkdir()
    command = [sys.executable, "-c", _PEAK, str(folder), str(clients), json.dumps(overrides)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]), (folder / "log.jsonl").read_text()


@pytest.mark.long
def test_memory_does_not_grow_with_the_clients(tiny_model: Path, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, 2000)
    few, _ = in_process(settings(tiny_model, rows, 20), 20, tmp_path / "few")
    many, _ = in_process(settings(tiny_model, rows, 1000), 1000, tmp_path / "many")
    assert many - few < 25 * 1024  # KiB: messages under way, and what each client's rows are held in
