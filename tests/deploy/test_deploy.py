"""Deployment: kits, what is sent to the sites, processes that are kept, and the front door."""

from __future__ import annotations

import datetime
import errno
import hashlib
import io
import ipaddress
import json
import os
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from command_line import apiary, in_a_process
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from deployment import descendants

from apiary.config import loading
from apiary.core.errors import UserError
from apiary.tracking import run_directory
from apiary.tracking.console import Lines
from apiary.tracking.event_log import RunLog, truncate_after
from client import site_worker, worker_rpc
from client.site import Facts
from deploy import bundle, certificates, flower_cli, following, kits, processes, site, starting
from deploy import server as deployed_server
from server import deployment_run

ROOT = Path(__file__).resolve().parents[2]

# -- kits ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kits") / "federation"
    kits.init(folder, "fl.example.org:8443", ["north", "south"])
    return folder


def _certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


@pytest.mark.parametrize("name", ["fl.example.org", "localhost", "127.0.0.1"])
def test_the_server_is_certified_for_its_name_and_this_machine(made: Path, name: str) -> None:
    subject: Any = x509.IPAddress(ipaddress.ip_address(name)) if name[0].isdigit() else x509.DNSName(name)
    trust = PolicyBuilder().store(Store([_certificate(made / "north" / "ca.crt")]))
    trust.build_server_verifier(subject).verify(_certificate(made / "server" / "server.crt"), [])


def test_another_name_and_another_authority_are_not_certified(made: Path, tmp_path: Path) -> None:
    leaf = _certificate(made / "server" / "server.crt")
    ours = PolicyBuilder().store(Store([_certificate(made / "ca" / "ca.crt")]))
    with pytest.raises(VerificationError):
        ours.build_server_verifier(x509.DNSName("elsewhere.example.org")).verify(leaf, [])
    kits.init(tmp_path / "other", "fl.example.org:8443", ["north"])
    theirs = PolicyBuilder().store(Store([_certificate(tmp_path / "other" / "ca" / "ca.crt")]))
    with pytest.raises(VerificationError):
        theirs.build_server_verifier(x509.DNSName("fl.example.org")).verify(leaf, [])


def test_the_authority_signs_certificates_and_the_server_none(made: Path) -> None:
    authority, leaf = (_certificate(made / folder / f"{name}.crt") for folder, name in (("ca", "ca"), ("server",) * 2))
    uses = [c.extensions.get_extension_for_class(x509.KeyUsage) for c in (authority, leaf)]
    assert all(use.critical for use in uses)
    assert (uses[0].value.key_cert_sign, uses[0].value.digital_signature) == (True, False)
    assert (uses[1].value.key_cert_sign, uses[1].value.digital_signature) == (False, True)
    assert leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert leaf.not_valid_after_utc > datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=365)


def test_private_keys_are_for_their_owner_alone_and_nowhere_else(made: Path) -> None:
    private = {path for path in made.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()}
    assert private == {made / "ca" / "ca.key", made / "server" / "server.key", *(made.glob("*/site.key"))}
    assert len(private) == 4
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}
    folders = [made, *(path for path in made.rglob("*") if path.is_dir())]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o700}


def test_the_server_knows_each_site_by_its_own_key(made: Path) -> None:
    known = {name: load_ssh_public_key(path.read_bytes()) for name, path in kits.public_keys(_server(made)).items()}
    assert set(known) == {"north", "south"}
    for name, public in known.items():
        assert load_ssh_private_key((made / name / "site.key").read_bytes(), None).public_key() == public
    assert known["north"] != known["south"]


def _server(folder: Path) -> kits.Kit:
    return kits.read(folder / "server", "server")


def test_a_site_comes_later_without_the_authority(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "federation"
    kits.init(folder, "10.0.0.7:8443", ["north"])
    (folder / "ca" / "ca.key").rename(tmp_path / "safe.key")
    kits.add(folder, ["east"])
    assert set(kits.public_keys(_server(folder))) == {"north", "east"}
    assert kits.read(folder / "east", "site") == kits.Kit(
        (folder / "east").resolve(), "site", kits.Address("10.0.0.7", 8443), "east"
    )
    with pytest.raises(UserError, match="there is one of this name already"):
        kits.add(folder, ["East"])
    with pytest.raises(UserError, match=r"ca\.key.*bring it back"):
        kits.renew(folder)
    (tmp_path / "safe.key").rename(folder / "ca" / "ca.key")
    before = _certificate(folder / "server" / "server.crt")
    kits.renew(folder)
    after = _certificate(folder / "server" / "server.crt")
    assert after.serial_number != before.serial_number
    PolicyBuilder().store(Store([_certificate(folder / "north" / "ca.crt")])).build_server_verifier(
        x509.IPAddress(ipaddress.ip_address("10.0.0.7"))
    ).verify(after, [])


@pytest.mark.parametrize(
    ("address", "sites", "line"),
    [
        ("fl.example.org", ["a"], "expected HOST:PORT"),
        ("fl.example.org:0", ["a"], "expected HOST:PORT"),
        ("https://fl.example.org:8443", ["a"], "expected HOST:PORT"),
        ("::1:8443", ["a"], "expected HOST:PORT"),
        ("fl.example.org:8443", [], "name at least one"),
        ("fl.example.org:8443", ["a", "a"], "there is one of this name already"),
        ("fl.example.org:8443", ["../a"], "letters, digits"),
        ("fl.example.org:8443", [".a"], "letters, digits"),
        ("fl.example.org:8443", ["a b"], "letters, digits"),
        ("fl.example.org:8443", ["Server"], "kept for a folder of ours"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    address: str, sites: list[str], line: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=line) as caught:
        kits.init(tmp_path / "new", address, sites)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        kits.init(tmp_path, "[::1]:8443", ["a"])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_kit_of_the_wrong_kind_is_told(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a site's kit"):
        kits.read(made / "north", "server")
    with pytest.raises(UserError, match="the server's kit"):
        kits.read(made / "server", "site")
    with pytest.raises(UserError, match=r"holds no kit\.toml: give a folder in it: north, server, south"):
        kits.read(made, "site")
    with pytest.raises(UserError, match=r"holds no kit\.toml: `apiary deploy init` makes one"):
        kits.read(tmp_path / "nowhere", "site")


def test_a_server_that_is_gone_is_told_as_such(made: Path, tmp_path: Path) -> None:
    flower_cli.configure(kits.read(made / "server", "server"), tmp_path, processes.free_port())
    with pytest.raises(flower_cli.FlowerError, match="it is being started again, or `apiary deploy server` has ended"):
        flower_cli.ask(tmp_path, "runs")


def test_a_site_is_added_where_the_servers_key_no_longer_lies(tmp_path: Path) -> None:
    folder = tmp_path / "federation"
    kits.init(folder, "10.0.0.7:8443", ["north"])
    (folder / "server" / "server.key").unlink()
    kits.add(folder, ["east"])
    assert kits.read(folder / "east", "site").site == "east"
    with pytest.raises(UserError, match=r"lacks server\.key"):
        _server(folder)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('role = "site"\nsite = "a"\nserver = 8443', "server = 8443: expected a text"),
        ('role = "site"\nsite = "a"\nserver = "host:\u00b2"', "expected HOST:PORT"),
        ('role = "site"\nsite = 7\nserver = "host:1"', "site = 7"),
        ('role = "site"\nserver = "host:1"', "site = ''"),
        ('role = "site"', "cannot be read"),
    ],
)
def test_a_defective_kit_is_told_in_a_line(text: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "kit.toml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=line) as caught:
        kits.read(tmp_path, "site")
    assert "\n" not in str(caught.value)


def test_a_server_does_not_start_with_files_that_do_not_fit(made: Path, tmp_path: Path) -> None:
    ca, leaf, key = ((made / "server" / name).read_bytes() for name in ("ca.crt", "server.crt", "server.key"))
    kits.init(tmp_path / "other", "fl.example.org:8443", ["a"])
    other = tmp_path / "other" / "server"
    certificates.check_server(ca, leaf, key)
    for files, line in (
        (((other / "ca.crt").read_bytes(), leaf, key), "not signed by the authority"),
        ((ca, leaf, (other / "server.key").read_bytes()), "not the key"),
        ((b"garbage", leaf, key), "ca.crt is no certificate"),
        ((ca, leaf, b"garbage"), "no private key"),
    ):
        with pytest.raises(ValueError, match=line):
            certificates.check_server(*files)
    (other / "ca.crt").write_bytes(ca)
    with pytest.raises(UserError, match="not signed"):
        deployed_server.run(_server(tmp_path / "other"), tmp_path / "state")


def test_an_expired_certificate_is_told(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "_SERVER_DAYS", -1)
    ca, ca_key = ((made / "ca" / name).read_bytes() for name in ("ca.crt", "ca.key"))
    builder = x509.CertificateBuilder.not_valid_before
    monkeypatch.setattr(
        x509.CertificateBuilder, "not_valid_before", lambda self, time: builder(self, time - datetime.timedelta(days=9))
    )
    key, leaf = certificates.server(ca, ca_key, "localhost")
    with pytest.raises(ValueError, match="renew"):
        certificates.check_server(ca, leaf, key)


@pytest.mark.parametrize(
    ("call", "options", "line"),
    [
        (apiary, ["--data", "nothing.jsonl"], "no such file or folder"),
        (apiary, ["--data", "x" * 300], "no such file or folder"),
        # Rows are read by a worker of its own, which has the standard error of the process.
        pytest.param(in_a_process, ["--data", "empty.jsonl"], "empty.jsonl is empty", marks=pytest.mark.slow),
        (apiary, ["--data", "rows.jsonl", "--model", "./base"], "no such folder"),
    ],
)
def test_a_site_that_could_take_no_part_ends_before_it_connects(
    call: Callable[..., subprocess.CompletedProcess[str]], options: list[str], line: str, made: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    done = call("deploy", "client", made / "north", "--state", "state", *options, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert line in done.stderr and len(done.stderr.splitlines()) == 1
    assert "answers" not in done.stdout and "connected" not in done.stdout  # the server was not even looked for


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("site.key", b"garbage", "no private key"),
        ("site.key", b"", "no private key"),
        ("ca.crt", b"garbage", "is no certificate"),
    ],
)
def test_a_site_does_not_start_with_a_defective_file(name: str, content: bytes, line: str, tmp_path: Path) -> None:
    kits.init(tmp_path / "f", "localhost:8443", ["a"])
    (tmp_path / "f" / "a" / name).write_bytes(content)
    with pytest.raises(UserError, match=line):
        site.run(kits.read(tmp_path / "f" / "a", "site"), tmp_path / "state", site.Options(tmp_path))


def test_a_site_does_not_start_on_a_port_that_is_taken(made: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}"):
            site.run(kits.read(made / "north", "site"), tmp_path / "state", site.Options(tmp_path, port=port))
    with pytest.raises(UserError, match="from 1 to 65535"):
        site.run(kits.read(made / "north", "site"), tmp_path / "state", site.Options(tmp_path, port=70_000))


# -- the list of sites ---------------------------------------------------------------------------


class _Flower:
    """The SuperLink's list of keys: a key is taken once and never again, as in Flower's own database."""

    def __init__(self, state: Path) -> None:
        self.down, self.asked = False, 0
        self.database = sqlite3.connect(state / flower_cli.DATABASE)
        self.database.execute("CREATE TABLE node (node_id INTEGER, status TEXT, public_key BLOB UNIQUE)")

    def call(self, state: Path, *words: str, options: tuple[str, ...] = ()) -> dict[str, Any]:
        self.asked += 1
        if self.down:
            raise flower_cli.FlowerError("not now")
        if words[1] == "unregister":
            sql = "UPDATE node SET status = 'unregistered' WHERE node_id = ? AND status != 'unregistered'"
            if not self.database.execute(sql, (_signed(int(words[2])),)).rowcount:
                raise flower_cli.FlowerError("[code: 24] not found")
            self.database.commit()
            return {}
        raise AssertionError(words)

    def register(self, state: Path, keys: dict[str, bytes]) -> dict[str, str | flower_cli.FlowerError]:
        self.asked += 1
        if self.down:
            raise flower_cli.FlowerError("not now")
        return {
            name: self._enter(2**64 - 100 * self.asked - number, key) for number, (name, key) in enumerate(keys.items())
        }

    def _enter(self, node: int, key: bytes) -> str | flower_cli.FlowerError:
        try:
            self.database.execute("INSERT INTO node VALUES (?, 'registered', ?)", (_signed(node), key))
        except sqlite3.IntegrityError:
            return flower_cli.FlowerError("[code: 23] in use")
        self.database.commit()
        return str(node)

    def active(self) -> set[str]:
        found = self.database.execute("SELECT node_id FROM node WHERE status != 'unregistered'")
        return {str(node % 2**64) for (node,) in found}


def _signed(node: int) -> int:
    return node - 2**64 if node >= 2**63 else node


class _List(NamedTuple):
    folder: Path
    state: Path
    flower: _Flower
    failures: dict[tuple[str, str], tuple[str, float]]

    def look(self) -> list[str]:
        return deployed_server.register(_server(self.folder), self.state, self.failures)

    def file(self, name: str) -> Path:
        return self.folder / "server" / "sites" / f"{name}.pub"


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _List:
    kits.init(tmp_path / "f", "localhost:8443", ["a", "b"])
    (tmp_path / "state").mkdir()
    made = _List(tmp_path / "f", tmp_path / "state", _Flower(tmp_path / "state"), {})
    monkeypatch.setattr(flower_cli, "call", made.flower.call)
    monkeypatch.setattr(flower_cli, "register", made.flower.register)
    monkeypatch.setattr(deployed_server, "_AGAIN_S", 0.0)
    return made


def test_keys_are_looked_after_on_a_full_disk_too(listed: _List, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Flower took meanwhile is known once there is room; a list that stays as it is is not written."""

    def full(path: Path, body: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as no_room:
        no_room.setattr(deployed_server, "write_atomic", full)
        with pytest.raises(OSError, match="No space left"):
            listed.look()
    assert listed.look() == ["a", "b"] == sorted(deployed_server.site_nodes(listed.state))
    assert set(deployed_server.site_nodes(listed.state).values()) == listed.flower.active()
    with monkeypatch.context() as no_room:
        no_room.setattr(deployed_server, "write_atomic", full)
        assert listed.look() == ["a", "b"]


def test_a_key_that_was_written_over_is_taken_up_and_the_old_one_struck_off(listed: _List) -> None:
    assert listed.look() == ["a", "b"]
    before = deployed_server.site_nodes(listed.state)
    listed.file("a").write_bytes(certificates.site_keys()[1])
    assert listed.look() == ["a", "b"]
    after = deployed_server.site_nodes(listed.state)
    assert after["a"] != before["a"] and after["b"] == before["b"]
    assert listed.flower.active() == set(after.values())
    listed.file("a").unlink()
    assert listed.look() == ["b"]
    assert listed.flower.active() == {after["b"]}


def test_another_comment_is_no_other_key(listed: _List) -> None:
    listed.look()
    asked = listed.flower.asked
    listed.file("a").write_text(" ".join(listed.file("a").read_text().split()[:2]) + " somebody else\n")
    assert listed.look() == ["a", "b"]
    assert listed.flower.asked == asked


@pytest.mark.parametrize("forgotten", ["all", "node"])
def test_a_site_that_flower_knows_already_can_be_struck_off(listed: _List, forgotten: str) -> None:
    listed.look()
    nodes, file = deployed_server.site_nodes(listed.state), listed.state / "nodes.json"
    entries = json.loads(file.read_text())
    file.write_text(json.dumps({} if forgotten == "all" else {n: {**e, "node": ""} for n, e in entries.items()}))
    assert listed.look() == ["a", "b"]
    assert deployed_server.site_nodes(listed.state) == nodes
    listed.file("a").unlink()
    listed.look()
    assert listed.flower.active() == {nodes["b"]}


def test_what_failed_is_tried_again_and_said_once(listed: _List, capsys: pytest.CaptureFixture[str]) -> None:
    listed.flower.down = True
    assert listed.look() == listed.look() == []
    assert capsys.readouterr().out.count("site a: not now") == 1
    listed.flower.down = False
    assert listed.look() == ["a", "b"]
    listed.flower.down = True
    listed.file("a").unlink()
    assert listed.look() == ["a", "b"]
    listed.flower.down = False
    assert listed.look() == ["b"]
    assert listed.flower.active() == set(deployed_server.site_nodes(listed.state).values())


def test_a_key_that_cannot_be_used_is_told_and_the_others_stay(
    listed: _List, capsys: pytest.CaptureFixture[str]
) -> None:
    text = listed.file("a").read_text()
    listed.file("c").write_bytes(b"\xff\xfe")
    listed.file("d").symlink_to("nowhere")
    listed.file("e").mkdir()
    listed.file("g").write_text(text)
    assert listed.look() == listed.look() == ["a", "b"]
    said = capsys.readouterr().out
    assert all(said.count(f"site {name}: {name}.pub") == 1 for name in "cdeg") and "key of site a" in said
    listed.file("a").write_text("")  # it is just being copied
    assert listed.look() == ["a", "b"]
    listed.file("a").unlink()
    listed.file("g").unlink()
    assert listed.look() == ["b"]
    listed.file("a").write_text(text)
    assert listed.look() == ["b"]
    assert "cannot come back" in capsys.readouterr().out


def test_a_run_knows_a_site_by_its_key(listed: _List, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the site has told its name, which one that refuses the handshake never does."""
    listed.look()
    nodes = {name: int(node) for name, node in deployed_server.site_nodes(listed.state).items()}
    assert deployment_run.site_name(nodes["a"]) is None  # in a simulation
    started = deployed_server._superexec(_server(listed.folder), listed.state, 4000)
    for name, value in started._environment.items():
        monkeypatch.setenv(name, value)
    assert [deployment_run.site_name(node) for node in (nodes["a"], nodes["b"], _signed(nodes["b"]))] == ["a", "b", "b"]
    assert deployment_run.site_name(7) == ""
    (listed.state / "nodes.json").unlink()
    assert deployment_run.site_name(nodes["a"]) == ""


def test_without_a_running_server_nothing_is_submitted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no server is running"):
        starting.start(tmp_path, loading.load(), tmp_path / "run")
    with pytest.raises(UserError, match="no server is running"):
        deployed_server.port_of(tmp_path)


@pytest.mark.parametrize("text", ["../../etc", "..", "a b", ".hidden", "ä", "x" * 300, "", "runs/7", "plain-1.0"])
def test_every_site_takes_the_name_of_a_run(text: str, tmp_path: Path) -> None:
    name = starting.run_name(text)
    call = worker_rpc.Envelope({"kind": "train", "round": "1", "config": "{", "name": name})
    answer = site_worker.Service(Facts("a", tmp_path, tmp_path)).answer(call)
    assert "name" not in str(answer.header["error"])  # it is the configuration that cannot be read


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_directory_is_not_mixed_up_with_another(resume: bool, tmp_path: Path) -> None:
    run = loading.load()
    run_directory.check_folder(run, tmp_path / "new", resume=resume)
    run_directory.check_folder(run, tmp_path, resume=resume)  # empty
    (tmp_path / "run-id").write_text("0123abcd\n")  # of a run that was refused before it began
    run_directory.check_folder(run, tmp_path, resume=resume)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no run" if resume else "is not empty"):
        run_directory.check_folder(run, tmp_path, resume=resume)
    (tmp_path / "config.toml").write_text(run.to_toml())
    if resume:
        run_directory.check_folder(run, tmp_path, resume=True)
    other = loading.load(None, ["seed=1"])
    with pytest.raises(UserError, match="differs from the run's own" if resume else "is not empty"):
        run_directory.check_folder(other, tmp_path, resume=resume)


def test_a_run_is_followed_to_its_end(tmp_path: Path) -> None:
    def follow(*kinds: str) -> tuple[str | None, list[str]]:
        seen: list[str] = []
        log = RunLog(tmp_path / "-".join(kinds))
        late = threading.Timer(0.2, lambda: [log.event(kind, message="too few", run="1") for kind in kinds])
        late.start()
        end = following.follow(tmp_path, "1", tmp_path / "-".join(kinds), [lambda event: seen.append(event["event"])])
        log.close()
        return end, seen

    assert follow("start", "finish") == (None, ["start", "finish"])
    assert follow("start", "failed") == ("too few", ["start", "failed"])


@pytest.mark.parametrize("checkpoint", [0, 1])
def test_a_resumed_run_is_followed_from_its_start(checkpoint: int, tmp_path: Path) -> None:
    """Though the log, cut back to the checkpoint, is no longer than it was."""
    out, shown = tmp_path / "run", io.StringIO()

    def write(run: str, *rounds: int) -> None:
        log = RunLog(out)
        log.event("start", rounds=3, clients=2, seed=0, run=run)
        log.event("evaluate", round=0, loss=2.0)
        for number in rounds:
            log.event("asked", round=number, clients=["ant"])
            log.event("round", round=number, clients=1, asked=1, tokens=9, seconds=1.0)
        log.event("failed" if run == "1" else "finish", message="the power went")
        log.close()

    def resume() -> None:
        truncate_after(out, checkpoint)
        write("2", *range(checkpoint + 1, 4))

    write("1", *range(1, checkpoint + 1))
    late = threading.Timer(0.2, resume)
    late.start()
    assert following.follow(tmp_path, "2", out, [Lines(shown)]) is None
    assert "run: 2 clients, 3 rounds" in shown.getvalue() and "round 3/3" in shown.getvalue()
    assert f"round {checkpoint}/3" not in shown.getvalue() and "/0" not in shown.getvalue()


# -- processes -----------------------------------------------------------------------------------


def test_processes_die_with_the_one_that_keeps_them_even_by_kill_9(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from deploy.processes import SupervisedProcess;"
        "kept = SupervisedProcess([sys.executable, '-c', 'import time; time.sleep(600)'], os.environ, Path('.'));"
        "kept.look(); print(kept.process.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as keeper:
        assert keeper.stdout is not None
        child = int(keeper.stdout.readline())
        assert child in descendants(keeper.pid)
        keeper.kill()
    deadline = threading.Event()
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        deadline.wait(0.1)
    else:
        pytest.fail("the child lives on")


def test_orphans_of_one_process_are_ended_and_nothing_that_is_kept(tmp_path: Path) -> None:
    """The door and the SuperLink live on when a SuperExec dies, whose runs are ended."""
    code = (
        "import os, signal, subprocess, sys, time; from pathlib import Path; from deploy import processes;"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(600)'];"
        "kept = processes.SupervisedProcess(sleep, os.environ, Path('.')); kept.look();"
        "orphan = subprocess.Popen(sleep); processes.end_orphans(signal.SIGKILL, [kept]);"
        "print(kept.process.poll(), Path(f'/proc/{orphan.pid}').exists(), flush=True); processes.end_all([kept])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["None", "False"], done.stderr


def test_pauses_grow_to_a_bound() -> None:
    pauses = [processes.pause(failures) for failures in range(8)]
    assert pauses == sorted(pauses)
    assert pauses[0] >= 2 and pauses[-1] == pauses[-2] <= 60


def test_a_log_is_searched_for_what_the_present_process_wrote(tmp_path: Path) -> None:
    log = tmp_path / "its.log"
    log.write_text("connected\n")
    code = (
        "import pathlib, time\nprint('conn', end='', flush=True)\n"
        "while not pathlib.Path('go').exists(): time.sleep(0.01)\nprint('ected')"
    )
    kept = processes.SupervisedProcess([sys.executable, "-c", code], os.environ, tmp_path, log)
    assert kept.look() is None and kept.process is not None
    while not log.read_text().endswith("conn"):
        time.sleep(0.01)
    assert not kept.has_said("connected")
    (tmp_path / "go").touch()
    kept.process.wait()
    assert kept.has_said("connected") and not kept.has_said("connected")
    assert kept.look() == 0 and kept.failures == 1
    assert kept.said().strip() == "connected" and kept.said(most=5).strip() == "cted"


def test_a_log_is_kept_short_while_its_process_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 20_000
    monkeypatch.setattr("apiary.core.files.LOG_BYTES", most)
    log, older = tmp_path / "its.log", tmp_path / "its.old.log"
    code = "import sys, time\nn = 0\nwhile True:\n    print(f'{n:099d}', flush=True); n += 1; time.sleep(0.0005)"
    kept = processes.SupervisedProcess([sys.executable, "-c", code], os.environ, tmp_path, log)
    kept.look()
    assert kept.process is not None
    first, turned, longest, deadline = kept.process.pid, 0, 0, time.monotonic() + 120
    try:
        before = 0
        while turned < 3:
            assert time.monotonic() < deadline
            assert kept.look() is None
            size = log.stat().st_size
            turned, longest, before = turned + (size < before), max(longest, size), size
            time.sleep(0.01)
        found = [older.read_text().splitlines(), log.read_text().splitlines()]
        assert kept.process.pid == first and kept.said().splitlines()[0].isdigit()
    finally:
        processes.end_all([kept])
    assert longest < 20 * most and older.stat().st_size <= most
    for lines in found:  # whole, but for the ends; what is cut off leaves no hole before what comes next
        numbers = [int(line) for line in lines[1:-1]]
        assert numbers and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert int(found[0][-2]) < int(found[1][1])


def test_the_workers_socket_is_for_its_owner_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "t"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    state, odd = tmp_path / "s", tmp_path / "with space"
    state.mkdir()
    folder = site.socket_folder(state)
    (folder / "worker.sock").touch()  # left by kill -9
    assert site.socket_folder(state) == folder and not list(folder.iterdir())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    odd.mkdir()
    first = site.socket_folder(odd)
    (first / "worker.sock").touch()
    second = site.socket_folder(odd)
    assert stat.S_IMODE(second.stat().st_mode) == 0o700
    assert first != second and list(temporary.glob("apiary-*")) == [second]


def test_a_state_folder_has_one_user(tmp_path: Path) -> None:
    with processes.hold(tmp_path / "state"), pytest.raises(UserError, match="another `apiary deploy`"):
        processes.hold(tmp_path / "state")
    processes.hold(tmp_path / "state").close()


@pytest.mark.parametrize("made", [True, False])
def test_a_state_folder_is_for_its_owner_alone_though_made_before(made: bool, tmp_path: Path) -> None:
    """As an operator or a container's volume makes it: every site's updates come to lie in it."""
    state = tmp_path / "above" / "state"
    before = os.umask(0o022)
    try:
        if made:
            state.mkdir(parents=True)
            state.chmod(0o777)
        processes.hold(state).close()
    finally:
        os.umask(before)
    assert stat.S_IMODE(state.stat().st_mode) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may act as another user")
def test_a_state_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    state.chmod(0o777)
    tmp_path.chmod(0o755)
    code = (
        "import os, sys; from pathlib import Path; from deploy import processes\n"
        "os.chdir(sys.argv[1]); os.setgroups([]); os.setuid(65534)\n"
        "try: processes.hold(Path('state'))\nexcept processes.UserError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "belongs to another user, who could read it; name a folder in it" in done.stdout, done.stderr


# -- what is sent --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bundle as Flower itself makes it."""
    folder = bundle.write(tmp_path_factory.mktemp("bundle") / "apiary-run")
    environment = {**os.environ, "FLWR_HOME": str(folder.parent), "FLWR_TELEMETRY_ENABLED": "0"}
    environment["FLWR_DISABLE_UPDATE_CHECK"] = "1"
    subprocess.run([processes.program("flwr"), "build"], cwd=folder, env=environment, capture_output=True, check=True)
    (built,) = folder.glob("*.fab")
    return built.read_bytes()


def test_our_bundle_passes_and_carries_no_code_of_ours(bundled: bytes) -> None:
    bundle.check(bundled)
    assert len(bundled) < 5_000


def _changed(fab: bytes, change: dict[str, str], twice: str = "") -> bytes:
    with zipfile.ZipFile(io.BytesIO(fab)) as archive:
        files = {name: archive.read(name).decode() for name in archive.namelist()}
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a name that stands there twice
        if twice:
            archive.writestr(twice, "import os")
        for name, text in {**files, **change}.items():
            archive.writestr(name, text)
    return made.getvalue()


def test_every_other_bundle_is_refused(bundled: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(bundled)) as archive:
        project = archive.read("pyproject.toml").decode()
    bundle.check(_changed(bundled, {}))
    foreign = [
        _changed(bundled, {"extra.py": ""}),
        _changed(bundled, {"client/app.py": ""}),
        _changed(bundled, {"../outside.py": ""}),
        _changed(bundled, {".info/more.py": ""}),
        _changed(bundled, {"run_client.py": "import os\n"}),
        _changed(bundled, {"pyproject.toml": project.replace("run_client:app", "os:app")}),
        _changed(bundled, {"pyproject.toml": project + "[tool.other]\n"}),
        _changed(bundled, {"pyproject.toml": "a = " + "[" * 50_000}),
        _changed(bundled, {}, twice="run_client.py"),
        b"no archive",
        b"",
    ]
    for fab in foreign:
        with pytest.raises(bundle.ForeignCode):
            bundle.check(fab)


def _packed(bundled: bytes, name: str, content: bytes, way: int = zipfile.ZIP_DEFLATED) -> bytearray:
    """The bundle with this in the place of one of its files, which stands last."""
    with zipfile.ZipFile(io.BytesIO(bundled)) as archive:
        files = {each: archive.read(each) for each in archive.namelist() if each != name}
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", way) as archive:
        for each, text in {**files, name: content}.items():
            archive.writestr(each, text)
    return bytearray(made.getvalue())


def _heads(archive: bytearray) -> tuple[int, int]:
    """Where the last file's entry begins among the archive's own list, and where its own head does."""
    entry = archive.rindex(b"PK\x01\x02")
    return entry, int.from_bytes(archive[entry + 42 : entry + 46], "little")


@pytest.mark.parametrize("way", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("lies", [False, True])
@pytest.mark.parametrize("name", ["run_client.py", "extra.py"])
def test_a_small_bundle_that_unpacks_to_much_is_refused_unpacked_little(
    way: int, lies: bool, name: str, bundled: bytes
) -> None:
    fab = _packed(bundled, name, b"#" * 2**26, way)
    if lies:  # of its size, in both heads: it is then cut to that, but only once it is unpacked
        entry, head = _heads(fab)
        fab[entry + 24 : entry + 28] = fab[head + 22 : head + 26] = (50).to_bytes(4, "little")
    assert len(fab) < 2**20
    tracemalloc.start()
    try:
        with pytest.raises(bundle.ForeignCode):
            bundle.check(bytes(fab))
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_a_bundle_that_is_encrypted_or_broken_is_refused_in_a_line(bundled: bytes) -> None:
    name = "run_client.py"
    with zipfile.ZipFile(io.BytesIO(bundled)) as archive:
        text = archive.read(name)
    bundle.check(bytes(_packed(bundled, name, text)))
    encrypted, broken, other, cut = (_packed(bundled, name, text) for _ in range(4))
    for fab, flag, value in ((encrypted, 8, 1), (other, 10, 99)):
        entry, head = _heads(fab)
        fab[entry + flag] = fab[head + flag - 2] = value
    _, head = _heads(broken)
    begin = head + 30 + len(name)
    broken[begin] |= 0b110  # a kind of block that there is none of
    entry, head = _heads(cut)
    cut[entry + 20 : entry + 24] = cut[head + 18 : head + 22] = (3).to_bytes(4, "little")
    for fab in (encrypted, broken, other, cut):
        with pytest.raises(bundle.ForeignCode):
            bundle.check(bytes(fab))
    for end in range(0, len(bundled), 7):
        with pytest.raises(bundle.ForeignCode):
            bundle.check(bundled[:end])


@pytest.mark.parametrize(
    "wrong",
    [
        ("a/b", bundle.VERSION, "0" * 64),
        ("apiary/../../foreign", bundle.VERSION, "0" * 64),
        ("apiary/apiary-run", "../x", "0" * 64),
        ("apiary/apiary-run", bundle.VERSION, "../"),
        ("apiary/apiary-run", bundle.VERSION, ""),
    ],
)
def test_a_run_of_another_app_is_refused_by_its_name(wrong: tuple[str, str, str], bundled: bytes) -> None:
    from flwr.cli.config_utils import get_fab_metadata

    bundle.check_names(*get_fab_metadata(bundled), hashlib.sha256(bundled).hexdigest())
    with pytest.raises(bundle.ForeignCode):
        bundle.check_names(*wrong)
