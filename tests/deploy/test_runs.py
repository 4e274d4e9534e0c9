"""The runs of a deployment's server: starting and ending them, following them, how they stand, and going on alone."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import threading
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from deployment import SITES, overrides, write_rows

from apiary.config import defaults, loading
from apiary.core import files
from apiary.core.errors import RunFailed, UserError
from apiary.core.tensors import StateDict
from apiary.evaluation.comparison import HeldOut
from apiary.tracking import run_directory
from apiary.tracking.event_log import RunLog
from client import site_worker
from deploy import flower_cli, following, going, run_checks, runs, starting, stopping
from deploy.tending import Tending
from server import deployment_run


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows")


class SuperLink:
    """Stands in for Flower's command line: takes runs, and says of each what it is told to say."""

    def __init__(self, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: list[dict[str, object]] = []
        self.runs: list[dict[str, object]] = []
        self.stopped: list[str] = []
        self.status, self.busy = "running", False
        self.meanwhile: dict[str, Callable[[], object]] = {}  # by command: what happens once while it is answered
        state.mkdir()
        self.online: set[str] = set()
        self.know(state, "7")
        self.up(state, 4000)
        monkeypatch.setattr(flower_cli, "call", self.call)
        monkeypatch.setattr(starting, "_PATIENCE_S", 0.0)

    def up(self, state: Path, port: int) -> None:
        (state / "running.json").write_text(json.dumps({"port": port}))

    def know(self, state: Path, *nodes: str) -> None:
        """Let sites be registered, and be online."""
        entries = {name: {"node": node, "key": ""} for name, node in zip(SITES, nodes, strict=False)}
        (state / "nodes.json").write_text(json.dumps(entries))
        self.online = set(nodes)

    def call(self, state: Path, *words: str, options: tuple[str, ...] = ()) -> dict[str, object]:
        if words[0] == "supernode":
            return {"nodes": [{"node-id": node, "status": "online"} for node in sorted(self.online)]}
        if words[0] == "list":
            if self.status == "gone":
                raise flower_cli.FlowerError("no answer")
            return {"runs": [{"run-id": options[1], "status": self.status}] if options else self.runs}
        self.meanwhile.pop(words[0], lambda: None)()
        if words[0] == "stop":
            if self.busy:
                raise flower_cli.FlowerError("the SuperLink gives no answer: HTTP Error 503: Service Unavailable")
            if words[1] in self.stopped:
                raise flower_cli.FlowerError("[code: 18] The run is already finished.")
            self.stopped.append(words[1])
            return {}
        assert Path(words[1], "pyproject.toml").exists()
        self.given.append(tomllib.loads(Path(options[1]).read_text(encoding="utf-8")))
        if self.status == "refused":
            raise flower_cli.FlowerError("no")
        return {"run-id": len(self.given)}


@pytest.fixture
def superlink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SuperLink:
    return SuperLink(tmp_path / "state", monkeypatch)


def test_a_run_gets_a_name_of_its_own_and_keeps_it(superlink: SuperLink, tmp_path: Path) -> None:
    run, state = loading.load(), tmp_path / "state"
    for folder in ("exp1", "exp2"):
        starting.start(state, run, tmp_path / folder / "first")
    superlink.status = "finished:failed"
    (tmp_path / "exp1" / "first" / "config.toml").write_text(run.to_toml())
    starting.start(state, run, tmp_path / "exp1" / "first", resume=True)
    one, two, again = (str(values["name"]) for values in superlink.given)
    assert one == again != two and one.startswith("first-") and two.startswith("first-")
    assert all(site_worker._RUN_NAME.fullmatch(name) for name in (one, two))
    kept = ["directories", "nodes.json", "running.json", "runs", "started"]  # no drafts
    assert sorted(path.name for path in state.iterdir()) == kept


def test_a_run_that_is_to_go_on_begins_where_there_is_none(superlink: SuperLink, tmp_path: Path) -> None:
    """A scheduler gives --resume from the first time on."""
    run, state, out = loading.load(), tmp_path / "state", tmp_path / "run"
    starting.start(state, run, out, resume=True)
    superlink.status = "finished:failed"
    (out / "config.toml").write_text(run.to_toml())
    starting.start(state, run, out, resume=True)
    first, again = superlink.given
    assert first == again and first["out"] == str(out)


def test_a_configuration_of_any_characters_arrives(superlink: SuperLink, tmp_path: Path) -> None:
    run = loading.load(None, ['prompt.system=be kind \U0001f41d\x7f\\ "quoted"'])
    starting.start(tmp_path / "state", run, tmp_path / "\U0001f41d")
    (values,) = superlink.given
    assert loading.from_json(str(values["config"])) == defaults.resolved(run)
    assert values["out"] == str(tmp_path / "\U0001f41d") and values["expected"] == run.strategy.min_clients


def test_a_directory_takes_no_second_run_while_one_goes_on(superlink: SuperLink, tmp_path: Path) -> None:
    run, state, out = loading.load(), tmp_path / "state", tmp_path / "run"
    starting.start(state, run, out)
    with pytest.raises(UserError, match=r"still goes on in it \(run 1\)"):  # its process is not up yet
        starting.start(state, run, out)
    superlink.status = "finished:failed"
    (out / "config.toml").write_text(run.to_toml())
    with run_directory.claim(out), pytest.raises(UserError, match="still goes on"):  # Flower has lost it, but it works
        starting.start(state, run, out, resume=True)
    assert len(superlink.given) == 1
    starting.start(state, run, out, resume=True)
    superlink.status = "running"
    superlink.up(state, 4001)  # a server that was killed: Flower's database still has the run alive
    starting.start(state, run, out, resume=True)
    assert len(superlink.given) == 3


def test_a_run_that_is_not_started_leaves_no_trace(superlink: SuperLink, tmp_path: Path) -> None:
    superlink.status = "refused"
    with pytest.raises(flower_cli.FlowerError):
        starting.start(tmp_path / "state", loading.load(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "own.txt").write_text("{instruction}{response}")
    own = loading.load(None, [f"prompt.template={tmp_path / 'own.txt'}"])
    with pytest.raises(UserError, match=r"prompt\.template.*built-in"):
        starting.start(tmp_path / "state", own, tmp_path / "run")
    assert len(superlink.given) == 1
    with pytest.raises(UserError, match=r"data\.max_rows = 7: sites choose their rows.*leave it out"):
        starting.start(tmp_path / "state", loading.load(None, ["data.max_rows=7"]), tmp_path / "run")
    assert len(superlink.given) == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.name=./nowhere", "model.name = './nowhere': no such folder"),
        ("model.name=builtin:large", "model.name = 'builtin:large'"),
        ("model.name={folder}", "model.name = .*: has no configuration"),
        ("model.device=cuda:99", "model.device = 'cuda:99'"),
        ("data.test={folder}/none.jsonl", "data.test = .*none.jsonl': no such file"),
        ("data.test={folder}/odd.jsonl", "odd.jsonl: no columns known .*text, label"),
    ],
)
def test_what_the_server_has_not_is_told_before_the_start(
    superlink: SuperLink, tmp_path: Path, override: str, line: str
) -> None:
    (tmp_path / "odd.jsonl").write_text('{"text": "a", "label": "b"}\n')
    run = loading.load(None, [override.format(folder=tmp_path)])
    with pytest.raises(UserError, match=line) as caught:
        starting.start(tmp_path / "state", run, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert superlink.given == [] and not (tmp_path / "run").exists()


def test_a_run_that_failed_at_once_may_be_started_again_in_its_directory(
    superlink: SuperLink, tmp_path: Path, tiny_model: Path, rows: Path
) -> None:
    run, state, out = loading.load(None, overrides(tiny_model, rows)), tmp_path / "state", tmp_path / "run"
    number = []

    def federate(log: RunLog, held_out: HeldOut | None) -> StateDict:
        raise RunFailed("0 of 3 clients joined")

    for seed in (1, 2):  # what was wrong with the configuration may be mended
        starting.start(state, run.model_copy(update={"seed": seed}), out)
        number.append((out / "run-id").read_text())
        assert [path.name for path in out.iterdir()] == ["run-id"]
        with pytest.raises(RunFailed):
            deployment_run.run(run, out, 1, federate)
        superlink.status = "finished:failed"
    assert number[0] != number[1]
    starting.start(state, run, out, resume=True)
    superlink.status = "running"  # and its process is not up yet
    with pytest.raises(UserError, match="still goes on"):
        starting.start(state, run, out)
    assert (out / "log.jsonl").exists()
    superlink.status = "finished:failed"
    (out / "checkpoints").mkdir()
    with pytest.raises(UserError, match="is not empty"):
        starting.start(state, run, out)
    assert (out / "log.jsonl").exists()


def test_status_tells_where_each_run_writes_and_how_long_it_took(superlink: SuperLink, tmp_path: Path) -> None:
    starting.start(tmp_path / "state", loading.load(), tmp_path / "first")
    superlink.runs = [
        {"run-id": "2", "status": "running", "elapsed": 7500.0},
        {"run-id": "1", "status": "finished:completed", "elapsed": 185.2},
    ]
    sites, site, header, *rows = runs.describe(runs.standing(tmp_path / "state"))
    assert (sites, site) == ("1 of 1 sites online", "site ant: online")
    assert header.split("  ")[0].strip() == "run" and header.endswith("run directory")
    assert rows[0].split("  ")[0].strip() == "2" and "2 h 05 min" in rows[0] and rows[0].endswith("not known")
    assert "finished:completed" in rows[1] and "3 min 05 s" in rows[1] and rows[1].endswith(str(tmp_path / "first"))
    assert len({line.index(word) for line, word in zip([header, *rows], ("time", "2 h", "3 min"), strict=True)}) == 1
    assert runs.document(runs.standing(tmp_path / "state")) == {
        "sites": [{"name": "ant", "status": "online"}],
        "runs": [
            {"id": "2", "status": "running", "seconds": 7500.0, "folder": None},
            {"id": "1", "status": "finished:completed", "seconds": 185.2, "folder": str(tmp_path / "first")},
        ],
    }
    superlink.runs = []
    assert runs.describe(runs.standing(tmp_path / "state"))[-1] == "no run yet"


def test_who_follows_is_told_that_the_server_is_gone(
    superlink: SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("_LOOK_S", 0.01), ("_ASK_S", 0.02), ("_LOST_S", 0.1)):
        monkeypatch.setattr(following, name, seconds)
    superlink.status = "gone"
    with pytest.raises(flower_cli.FlowerError, match=r"cannot be asked.*goes on by itself"):
        following.follow(tmp_path / "state", "1", tmp_path / "run", [])


def _log(out: Path, run: int, *events: dict[str, object]) -> None:
    log = RunLog(out)
    log.event("start", run=str(run))
    for event in events:
        log.event(**event)  # type: ignore[arg-type]
    log.close()


def test_a_run_whose_process_is_gone_is_submitted_again_by_the_server(superlink: SuperLink, tmp_path: Path) -> None:
    state, out, said = tmp_path / "state", tmp_path / "run", list[str]()
    starting.start(state, loading.load(None, ["strategy.min_clients=1"]), out)
    tending = Tending(state, said.append)
    tending.look()
    assert len(superlink.given) == 1  # its process is not up yet
    with run_directory.claim(out):
        (out / run_directory.CHECKPOINTS / "round-0001").mkdir(parents=True)
        _log(out, 1, {"kind": "round", "round": 1}, {"kind": "round", "round": 2})  # which was not kept any more
        tending.look()
        assert len(superlink.given) == 1  # it works
    tending.look()
    first, again = superlink.given
    assert first == again and superlink.stopped == ["1"]
    assert "goes on after round 1, as run 2" in said[-1]
    superlink.runs = [{"run-id": "2", "status": "running"}, {"run-id": "1", "status": "finished:stopped"}]
    assert [row["status"] for row in runs.runs(state)] == ["running", "resumed as 2"]
    seen: list[str] = []
    late = threading.Timer(0.3, lambda: _log(out, 2, {"kind": "finish"}))
    late.start()
    assert (
        following.follow(state, "1", out, [lambda event: seen.append(str(event.get("message", event["event"])))])
        is None
    )
    assert "goes on after round 1, as run 2" in seen[0] and seen[1:] == ["start", "finish"]
    tending.look()
    assert len(superlink.given) == 2


@pytest.mark.parametrize(
    ("again", "status", "goes_on"),
    [(False, "finished:failed", False), (True, "finished:failed", True), (True, "finished:stopped", False)],
)
def test_what_ends_by_its_own_error_or_by_a_person_stays_ended(
    again: bool, status: str, goes_on: bool, superlink: SuperLink, tmp_path: Path
) -> None:
    state, out = tmp_path / "state", tmp_path / "run"
    starting.start(state, loading.load(None, ["strategy.min_clients=1"]), out)
    _log(out, 1, {"kind": "failed", "message": "why", **({"again": True} if again else {})})
    superlink.status = status
    Tending(state, print).look()
    Tending(state, print).look()  # the next one waits for the process of the second
    assert len(superlink.given) == (2 if goes_on else 1)


def test_a_run_that_never_gets_on_is_given_up(
    superlink: SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(going, "pause", lambda tries: 0.0)
    state, out, said = tmp_path / "state", tmp_path / "run", list[str]()
    run = starting.start(state, loading.load(None, ["strategy.min_clients=1"]), out)
    tending = Tending(state, said.append)
    for number in range(1, going.TRIES + 3):
        _log(out, number)
        tending.look()
    assert len(superlink.given) == going.TRIES + 1 and "is given up" in said[-1]
    assert "ended 5 times" in str(following.follow(state, run, out, []))


def test_status_says_why_a_run_cannot_be_submitted_again_and_it_is_tried_less_and_less(
    superlink: SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, out, said, now = tmp_path / "state", tmp_path / "run", list[str](), [0.0]
    monkeypatch.setattr("deploy.tending.time", SimpleNamespace(monotonic=lambda: now[0]))
    starting.start(state, loading.load(None, ["strategy.min_clients=1"]), out)
    _log(out, 1)
    superlink.runs = [{"run-id": "1", "status": "finished:failed"}]
    assert [row["status"] for row in runs.runs(state)] == ["going: its process ended, it is to be resumed"]
    superlink.status = "refused"
    tending = Tending(state, said.append)
    for now[0] in range(1, 601):  # type: ignore[assignment]
        tending.look()
    assert len(said) == 1
    assert [row["status"] for row in runs.runs(state)] == ["going: cannot be submitted again now: no"]
    assert 10 <= len(superlink.given) <= 20
    superlink.status = "finished:failed"
    for now[0] in range(601, 662):  # type: ignore[assignment]
        tending.look()
    assert "goes on after round 0" in said[1]


def test_a_run_waits_for_its_sites_and_for_room(
    superlink: SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, out, said = tmp_path / "state", tmp_path / "run", list[str]()
    starting.start(state, loading.load(None, ["strategy.min_clients=2"]), out)
    _log(out, 1)
    tending = Tending(state, said.append)
    places = (out, state, Path(tempfile.gettempdir()))
    for place in places:
        with monkeypatch.context() as full:
            full.setattr(going, "has_room", lambda out, place=place: out != place)
            tending.look()
            tending.look()
    tending.look()
    assert len(superlink.given) == 1
    *full, last = (line.rpartition("): ")[2] for line in said)
    assert full == [f"waits for room on the disk of {str(place)!r}" for place in places]
    assert "waits for its sites (1 of 2 are online)" in last


def test_a_run_goes_on_with_fewer_sites_than_it_began_with_but_not_with_too_few(
    superlink: SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long nobody was there: those who are first back are not taken for all."""
    state, out, said, now = tmp_path / "state", tmp_path / "run", list[str](), [0.0]
    monkeypatch.setattr("deploy.tending.time", SimpleNamespace(monotonic=lambda: now[0]))
    superlink.know(state, "7", "8", "9")
    run = starting.start(state, loading.load(None, ["strategy.min_clients=2"]), out)
    assert superlink.given[0]["expected"] == 3
    _log(out, 1)
    watch = Tending(state, said.append)

    def look(seconds: float, *online: str) -> int:
        """How many sites the newest of Flower's runs waits for, some seconds later; 0 = it was not submitted again."""
        now[0] += seconds
        superlink.online = set(online)
        watch.look()
        return int(str(superlink.given[-1]["expected"])) if len(superlink.given) > 1 else 0

    assert (look(0), look(5000, "7"), look(5000, "8")) == (0, 0, 0)
    assert "waits for its sites (1 of 3 are online)" in said[-1]
    superlink.runs = [{"run-id": run, "status": "finished:failed"}]
    assert [row["status"] for row in runs.runs(state)] == ["going: waits for its sites (1 of 3 are online)"]
    assert (look(10), look(5000, "7", "8"), look(170, "8", "9")) == (0, 0, 0)
    assert look(11, "8", "9") == 2 and _going(state, out).expected == 3
    _log(out, 2, {"kind": "round", "round": 1})
    (out / run_directory.CHECKPOINTS / "round-0001").mkdir(parents=True)
    superlink.status = "finished:failed"
    assert look(10, "7", "8", "9") == 3 and len(superlink.given) == 3


def test_who_follows_is_told_what_a_run_waits_for(superlink: SuperLink, tmp_path: Path) -> None:
    state, out, seen = tmp_path / "state", tmp_path / "run", list[str]()
    run = starting.start(state, loading.load(None, ["strategy.min_clients=2"]), out)
    _log(out, 1)
    Tending(state, print).look()
    late = threading.Timer(0.2, lambda: stopping.stop(state, run))
    late.start()
    assert following.follow(state, run, out, [lambda event: seen.append(str(event.get("message")))]) == going.STOPPED
    late.join()
    assert seen.count("the run waits for its sites (1 of 2 are online)") == 1


def test_a_full_disk_is_said_and_waited_out(
    superlink: SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where even the lock's own word cannot be written, and Flower, whose database is full too, gives no answer."""

    def full(handle: int, text: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name, seconds in (("_LOOK_S", 0.01), ("_ASK_S", 0.02), ("_LOST_S", 0.1)):
        monkeypatch.setattr(following, name, seconds)
    state, out, said, seen = tmp_path / "state", tmp_path / "run", list[str](), list[str]()
    run = starting.start(state, loading.load(None, ["strategy.min_clients=1"]), out)
    _log(out, 1)
    watch = Tending(state, said.append)
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "write", full)
        patch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=10**9, free=1_000_000))
        superlink.status = "gone"
        watch.look()
        watch.look()
        (line,) = said
        assert line.endswith(f"waits for room on the disk of {str(out)!r}")
        late = threading.Timer(0.5, lambda: stopping.stop(state, run))
        late.start()
        tell = [lambda event: seen.append(str(event.get("message")))]
        assert following.follow(state, run, out, tell) == going.STOPPED
        late.join()  # it asks Flower, or what stands in for it here, after it has noted the end
    assert seen.count("the run waits for room on the disk") == 1


@pytest.mark.parametrize(("status", "goes_on"), [("running", False), ("finished:failed", True)])
def test_where_no_lock_can_be_taken_flower_says_whether_a_run_works(
    status: str, goes_on: bool, superlink: SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> tuple[int, bool]:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    state, out, said = tmp_path / "state", tmp_path / "run", list[str]()
    starting.start(state, loading.load(None, ["strategy.min_clients=1"]), out)
    _log(out, 1)
    superlink.status = status
    monkeypatch.setattr(files, "_lock", refused)
    Tending(state, said.append).look()
    assert [line.partition("): ")[2][:33] for line in said] == ["cannot be submitted again now: [E"] * goes_on


def test_without_locks_a_run_that_works_is_left_alone(
    superlink: SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until Flower says that its process is gone."""
    monkeypatch.setattr(files, "_flock", lambda handle: False)
    state, out = tmp_path / "state", tmp_path / "run"
    starting.start(state, loading.load(None, ["strategy.min_clients=1"]), out)
    _log(out, 1, {"kind": "round", "round": 1})
    Tending(state, print).look()
    _log(out, 1, {"kind": "failed", "message": "the disk was full", "again": True})
    Tending(state, print).look()  # its process is about to end
    assert len(superlink.given) == 1
    superlink.status = "finished:failed"
    Tending(state, print).look()
    assert len(superlink.given) == 2


def test_a_run_is_ended_for_good(superlink: SuperLink, tmp_path: Path) -> None:
    state, out = tmp_path / "state", tmp_path / "run"
    run = starting.start(state, loading.load(None, ["strategy.min_clients=1"]), out)
    _log(out, 1)
    with pytest.raises(UserError, match="no run of this server"):
        stopping.stop(state, "7")
    assert stopping.stop(state, str(out)) == run and superlink.stopped == [run]
    Tending(state, print).look()
    assert len(superlink.given) == 1
    assert following.follow(state, run, out, []) == going.STOPPED
    for _ in range(2):
        with pytest.raises(UserError, match="has ended already"):
            stopping.stop(state, run)


def test_who_could_not_end_a_run_says_it_again(superlink: SuperLink, tmp_path: Path) -> None:
    state, out = tmp_path / "state", tmp_path / "run"
    run = starting.start(state, loading.load(None, ["strategy.min_clients=1"]), out)
    _log(out, 1)
    superlink.busy = True
    with pytest.raises(flower_cli.FlowerError, match="503"):
        stopping.stop(state, run)
    Tending(state, print).look()
    assert len(superlink.given) == 1  # it does not go on all the same
    superlink.busy = False
    assert stopping.stop(state, run) == run and superlink.stopped == [run]


def _going(state: Path, out: Path) -> going.Going:
    found = going.of_folder(state, out)
    assert found is not None
    return found


def test_who_ends_a_run_waits_for_a_resume_that_is_under_way_and_ends_it(superlink: SuperLink, tmp_path: Path) -> None:
    state, out, said = tmp_path / "state", tmp_path / "run", list[str]()
    starting.start(state, loading.load(None, ["strategy.min_clients=1"]), out)
    _log(out, 1)
    person = threading.Thread(target=lambda: said.append(stopping.stop(state, "1")))

    def meanwhile() -> None:
        person.start()
        person.join(0.5)
        assert superlink.stopped == ["1"]  # by the resume

    superlink.meanwhile["run"] = meanwhile
    Tending(state, print).look()
    person.join(60)
    assert said == ["2"] and superlink.stopped == ["1", "2"]
    assert _going(state, out).ended == going.STOPPED
    Tending(state, print).look()
    assert len(superlink.given) == 2


@pytest.mark.parametrize("during", ["stop", "run"])
def test_a_run_that_is_ended_while_it_is_resumed_stays_ended_without_locks_too(
    during: str, superlink: SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Flower is given the new run, and after."""
    monkeypatch.setattr(files, "_flock", lambda handle: False)
    state, out, said = tmp_path / "state", tmp_path / "run", list[str]()
    starting.start(state, loading.load(None, ["strategy.min_clients=1"]), out)
    _log(out, 1, {"kind": "failed", "message": "the disk was full", "again": True})
    superlink.status = "finished:failed"
    superlink.meanwhile[during] = lambda: stopping.stop(state, str(out))
    tending = Tending(state, said.append)
    tending.look()
    tending.look()
    assert said == [] and len(superlink.given) == (2 if during == "run" else 1)
    now = _going(state, out)
    assert (now.ended, now.run) == (going.STOPPED, superlink.stopped[-1])
    assert superlink.stopped == (["1", "2"] if during == "run" else ["1"])


def test_what_differs_from_a_simulation_is_said_before_the_start() -> None:
    (line,) = run_checks.remarks(loading.load(None, []))
    assert line.startswith("strategy.deadline_s =")
    assert run_checks.remarks(loading.load(None, ["strategy.deadline_s=60"])) == []
    (line,) = run_checks.remarks(loading.load(None, ["strategy.deadline_s=60", "personal.enabled=true"]))
    assert "each makes its own at home" in line and "apiary deploy personal" in line
