"""One whole federation of real processes on this machine, as the command line starts them."""

from __future__ import annotations

import contextlib
import sqlite3
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from deployment import SITES, Deployment, events_of, overrides, running, write_held_out
from safetensors.torch import load_file

from apiary.config import loading
from deploy import flower_cli, kits
from simulation.run import simulate

ROOT = Path(__file__).resolve().parents[2]


def compared(folder: Path) -> list[str]:
    """What makes a federation equal its rehearsal: no site holds rows out, which each does by a key of its own."""
    return [f"data.test={write_held_out(folder / 'held-out.jsonl')}", "data.test_fraction=0"]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Deployment]:
    """A server and three sites as real processes, after a run of three rounds in `run`."""
    folder = tmp_path_factory.mktemp("federation")
    with running(folder, tiny_model) as made:
        _come_as_a_stranger(made, folder / "other")
        words = [word for text in overrides(tiny_model, folder / "rows") for word in ("-s", text)]
        words += [word for text in compared(folder) for word in ("-s", text)]
        done = made.call("deploy", "submit", str(made.kits / "server"), "--out", "run", *words)
        (folder / "submit.out").write_text(f"{done.stdout}\n{done.stderr}\nexit code {done.returncode}\n")
        yield made


def _come_as_a_stranger(made: Deployment, folder: Path) -> None:
    """A site of another federation that trusts this one; it takes a minute and a half until it gives up."""
    kits.init(folder, f"127.0.0.1:{made.port}", ["stranger"])
    (folder / "stranger" / "ca.crt").write_bytes((made.kits / "ant" / "ca.crt").read_bytes())
    rows = made.folder / "rows" / "ant.jsonl"
    made.start("stranger", "deploy", "client", str(folder / "stranger"), "--data", str(rows))


@pytest.mark.slow
def test_a_federation_of_processes_learns_what_a_simulation_does(
    federation: Deployment, tiny_model: Path, tmp_path: Path
) -> None:
    assert "exit code 0" in federation.said("submit"), federation.said("submit")
    rows = federation.folder / "rows"
    simulate(loading.load(None, [*overrides(tiny_model, rows), *compared(federation.folder)]), tmp_path / "run")
    theirs, ours = (
        load_file(folder / "run" / "adapter" / "adapter_model.safetensors") for folder in (tmp_path, federation.folder)
    )
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)
    assert any(tensor.abs().max() > 1e-3 for name, tensor in ours.items() if "lora_B" in name)


@pytest.mark.long
def test_coded_messages_travel_between_processes_as_in_a_simulation(
    federation: Deployment, tiny_model: Path, tmp_path: Path
) -> None:
    """Up with feedback, which lies on the sites' disks between rounds, and down as changes of what they hold."""
    coded = [*overrides(tiny_model, federation.folder / "rows"), *compared(federation.folder)]
    coded += ["wire.up=int4", "wire.down=int8"]
    words = [word for text in coded for word in ("-s", text)]
    done = federation.call("deploy", "submit", str(federation.kits / "server"), "--out", "coded", *words)
    assert done.returncode == 0, done.stderr
    simulate(loading.load(None, coded), tmp_path / "run")
    theirs, ours = (
        load_file(folder / "adapter" / "adapter_model.safetensors")
        for folder in (tmp_path / "run", federation.folder / "coded")
    )
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)
    told, said = (events_of(folder, "round") for folder in (federation.folder / "coded", tmp_path / "run"))
    assert [(e["bytes_up"], e["bytes_down"]) for e in told] == [(e["bytes_up"], e["bytes_down"]) for e in said]


@pytest.mark.slow
def test_the_base_is_loaded_once_at_each_site(federation: Deployment) -> None:
    for site in SITES:
        lines = [line for line in federation.said(site).splitlines() if "base loads" in line]
        trained = [line for line in lines if " train: " in line]
        assert len(trained) == 3 and all("0 base loads" in line for line in trained)
        assert sum("1 base loads" in line for line in lines) == 1


@pytest.mark.slow
def test_the_server_keeps_a_whole_run_directory(federation: Deployment) -> None:
    folder = federation.folder / "run"
    for name in ("config.toml", "log.jsonl", "metrics.json", "report.html", "adapter/adapter_config.json"):
        assert (folder / name).exists(), name
    (start,) = events_of(folder, "start")
    assert start["clients"] == 3 and start["versions"]["flwr"]
    assert [event["round"] for event in events_of(folder, "round")] == [1, 2, 3]
    measured = [event["loss"] for event in events_of(folder, "evaluate")]
    assert len(measured) == 4 and measured[-1] < measured[0]
    assert "federated" in federation.said("submit") and "base" in federation.said("submit")
    assert all(f"round {number}/3: 3 of 3 clients" in federation.said("submit") for number in (1, 2, 3))
    assert not list(federation.folder.rglob("row_losses.json"))  # no loss of a single row, neither here nor at a site
    private = str(federation.folder / "rows")
    assert private not in (folder / "log.jsonl").read_text()


@pytest.mark.slow
def test_the_superlink_was_told_how_large_an_answer_may_be(federation: Deployment) -> None:
    adapter = load_file(federation.folder / "run" / "adapter" / "adapter_model.safetensors")
    numbers = sum(tensor.numel() for tensor in adapter.values())
    database = federation.kits / "server" / "state" / flower_cli.DATABASE
    with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as opened:
        (told,) = opened.execute("SELECT size, objects FROM apiary_limits").fetchall()
    assert told == (8 * numbers + 2**20, (8 * numbers + 2**20) // 2**20 + 16)


@pytest.mark.slow
def test_the_door_asks_no_honest_site_to_do_less_at_a_time(federation: Deployment) -> None:
    assert "at a time" not in (federation.kits / "server" / "state" / "door.log").read_text()


@pytest.mark.slow
def test_from_outside_only_signed_calls_of_sites_are_reached(federation: Deployment) -> None:
    trust = ssl.create_default_context(cafile=federation.kits / "ant" / "ca.crt")
    with httpx.Client(base_url=f"https://127.0.0.1:{federation.port}", verify=trust, trust_env=False) as outside:
        headers = {"content-type": "application/protobuf", "accept": "application/protobuf"}
        calls = ("list-runs", "list-nodes", "start-run", "register-node")
        for path in [*(f"/v1/control/{call}" for call in calls), "/v1/runtime/acquire-task"]:
            assert outside.post(path, headers=headers, content=b"").status_code == 404, path
        assert outside.post("/v1/fleet/pull-messages", headers=headers, content=b"").status_code in (401, 415)
        assert outside.get("/health").status_code == 200


_FOREIGN = {
    "pyproject.toml": """[project]
name = "foreign"
version = "1.0.0"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.41.0"]
[tool.flwr.app]
publisher = "apiary"
fab-format-version = 1
flwr-version-target = "1.41.0"
[tool.flwr.app.components]
serverapp = "run_server:app"
clientapp = "run_client:app"
[tool.flwr.app.config]
told = ""
""",
    "LICENSE": "none",
    "run_client.py": """from pathlib import Path
from flwr.clientapp import ClientApp
app = ClientApp()
@app.train()
def train(message, context):
    Path("foreign-code-ran").touch()
""",
    "run_server.py": """import time
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    asked = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
    told = [r.error.reason if r.has_error() else "answered" for r in grid.send_and_receive(asked, timeout=600)]
    Path(context.run_config["told"]).write_text("\\n".join(told) + "\\nend")
""",
}


@pytest.mark.slow
def test_a_site_runs_no_code_that_the_server_sends(federation: Deployment, tmp_path: Path) -> None:
    app, told, state = tmp_path / "foreign", tmp_path / "told", federation.kits / "server" / "state"
    app.mkdir()
    for name, text in _FOREIGN.items():
        (app / name).write_text(text)
    flower_cli.call(state, "run", str(app), options=("--run-config", f'told="{told}"'))
    deadline = time.monotonic() + 600
    while not (told.exists() and told.read_text().endswith("end")):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    *answers_, _ = told.read_text().splitlines()
    assert len(answers_) == 3 and all("runs what is installed there" in line for line in answers_)
    assert not list(federation.kits.rglob("foreign-code-ran"))


@pytest.mark.slow
def test_status_names_the_sites(federation: Deployment) -> None:
    status = federation.status_once("finished:completed")
    for site in SITES:
        assert f"site {site}: online" in status
    assert str(federation.folder / "run") in status


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (['continual.stages=[["first"]]'], "continual.by, continual.stages: this site has pinned another value"),
        (["data.test_fraction=0.3"], "data.test_fraction = 0.3: this site has pinned 0 and takes no other"),
    ],
)
def test_sites_that_refuse_a_run_are_named(
    other: list[str], reason: str, federation: Deployment, tiny_model: Path
) -> None:
    texts = [*overrides(tiny_model, federation.folder / "rows"), *compared(federation.folder), *other]
    words = [word for text in texts if not text.startswith("data.test=") for word in ("-s", text)]
    out = f"refused-{reason[:4]}"
    done = federation.call("deploy", "submit", str(federation.kits / "server"), "--out", out, *words)
    assert done.returncode == 1, done.stderr
    refused = events_of(federation.folder / out, "refused")
    assert sorted(event["client"] for event in refused) == sorted(SITES)
    assert all(reason in event["reason"] for event in refused)


@pytest.mark.slow
def test_a_server_of_another_authority_is_refused(federation: Deployment, tmp_path: Path) -> None:
    kits.init(tmp_path / "other", f"127.0.0.1:{federation.port}", ["stranger"])
    words = ("--data", str(federation.folder / "rows" / "ant.jsonl"))
    done = federation.call("deploy", "client", str(tmp_path / "other" / "stranger"), *words)
    assert done.returncode == 1 and "is not this federation's server" in done.stderr


@pytest.mark.long
def test_an_unknown_key_is_refused(federation: Deployment) -> None:
    assert federation.running["stranger"].wait(timeout=180) == 1
    said = federation.said("stranger")
    assert "refuses the key of site stranger" in said and "Traceback" not in said


@pytest.mark.slow
def test_wrong_data_is_told_before_anything_starts(federation: Deployment) -> None:
    (federation.folder / "odd.txt").write_text("odd")
    state = str(federation.folder / "elsewhere")
    done = federation.call("deploy", "client", str(federation.kits / "ant"), "--data", "odd.txt", "--state", state)
    assert done.returncode == 2
    assert "extension" in done.stderr and len(done.stderr.strip().splitlines()) == 1
