"""A site's processes: its worker, which keeps the base model, and its node, which fetches the worker's messages."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import shutil
import socket
import ssl
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from apiary.core import counts
from apiary.core.counts import ROUNDED, CountPolicy
from apiary.core.errors import UserError
from apiary.data import split
from apiary.data.availability import check_rows
from deploy import certificates, flower_cli, kits, processes, session
from deploy.kits import Kit
from deploy.processes import SupervisedProcess

_START_S = 300.0
_GIVE_UP_S = 90.0  # a session that was killed elsewhere counts as online for half a minute
_FLOWER = "1.41"  # the node calls what is private to it
_WRONG_DATA, _LET_GO = 2, 5  # the worker's exit codes
_TRIES = 10  # of a node that ends soon after its start and never once was connected
_HEALTH_S = 60.0  # how often the server is asked whether it is there
_SOCKET, _TEMPORARY = "worker.sock", "apiary-"
_SOON_READ_BYTES = 50_000_000
_SOON_READ = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_PLAIN = re.compile(r"[A-Za-z0-9/._-]{1,100}")  # a path that Flower and gRPC take as it is; 107 bytes at most


class Options(NamedTuple):
    """What the site's operator chooses."""

    data: Path
    model: str | None = None
    device: str | None = None
    port: int | None = None  # of 127.0.0.1, where /health answers; None: nowhere
    max_epsilon: float | None = None  # take part only in runs that promise each row this much privacy
    max_delta: float = 1e-5  # likewise, where there is a `max_epsilon`
    rank: int | None = None  # the highest of an adapter that it trains; None: as the run says
    counts: CountPolicy = ROUNDED  # how counts are told
    columns: Mapping[str, str] = MappingProxyType({})  # its own names of them, as in `data.columns`


class _Line(NamedTuple):
    """What is known of the line to the server."""

    connected: bool = False
    refused_since: float | None = None  # monotonic seconds
    reason: str = ""  # of the refusal
    ever: bool = False  # connected, since this program began
    asked: float = 0.0  # monotonic seconds, when the server's health was last asked
    there: bool = True


def run(kit: Kit, state: Path, options: Options) -> int:
    """Take part until SIGTERM or SIGINT; returns the exit code.

    Args:
        kit: the site's.
        state: what the site remembers, and logs.
        options: where its data and model are.

    Raises:
        UserError: no such data or model, a defective kit, a port that is taken, a held-out split that cannot be read,
            or another process with this state.
    """
    _check(kit, options)
    split.load(state)  # the worker looks at it too, but only once it has loaded torch
    with processes.hold(state):
        end = processes.wait_for_end()
        processes.adopt_orphans()
        sockets = socket_folder(state)
        path = sockets / _SOCKET
        worker = _worker(kit, state, options, f"unix:{path}")
        node = _node(kit, state, f"unix:{path}", options.port)
        try:
            code = _wait_for_worker(worker, path, end)
            if code is None and not end.is_set():
                code = _look_for_server(kit) or _watch(kit, worker, node, end)
            return code or 0
        finally:
            processes.end_all([node, worker])
            shutil.rmtree(sockets, ignore_errors=True)


def socket_folder(state: Path) -> Path:
    """A folder for the owner alone, without anything in it, for the worker's socket.

    It is in the state folder, where the path is short and plain enough; else in the temporary one, and noted in the
    state folder so that the next start clears it away if this one cannot.
    """
    note = state / "socket-folder"
    if note.exists():
        left = Path(note.read_text(encoding="utf-8"))
        if left.parent == Path(tempfile.gettempdir()) and left.name.startswith(_TEMPORARY) and not left.is_symlink():
            (left / _SOCKET).unlink(missing_ok=True)
            shutil.rmtree(left, ignore_errors=True)
        note.unlink()
    folder = state / "socket"
    if _PLAIN.fullmatch(str(folder / _SOCKET)):
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
        (folder / _SOCKET).unlink(missing_ok=True)
        return folder
    folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY))
    kits.write(note, str(folder), 0o600)
    return folder


def _check(kit: Kit, options: Options) -> None:
    if not (installed := importlib.metadata.version("flwr")).startswith(f"{_FLOWER}."):
        raise UserError(f"flwr {installed} is installed, and a site needs {_FLOWER}: see constraints.txt")
    key = kit.folder / kits.SITE_KEY
    try:
        certificates.check_site_key(key.read_bytes())
    except OSError as error:
        raise UserError(f"{str(key)!r} cannot be read: {error.strerror}; it is for its owner alone") from None
    except ValueError as error:
        raise UserError(f"{str(key)!r}: {error}; copy it anew, or make another site") from None
    flower_cli.check_trust(kit.folder / kits.CA)
    if options.port is not None:
        processes.check_port("127.0.0.1", options.port, f"--port {options.port}")
    if not _is_there(options.data, Path.exists):
        raise UserError(f"--data {str(options.data)!r}: no such file or folder")
    model = options.model
    if model and (model.startswith(("/", ".", "~"))) and not _is_there(Path(model), Path.is_dir):
        raise UserError(f"--model {model!r}: no such folder")
    data = options.data.expanduser().resolve()
    if _soon_read(data):  # the worker looks at them too, but can tell of an empty file only once it has loaded torch
        check_rows(str(data), "--data", options.columns)


def _is_there(path: Path, kind: Callable[[Path], bool]) -> bool:
    try:
        return kind(path.expanduser())
    except (OSError, RuntimeError):  # in a folder closed to us, a name that no file system takes, of nobody's home
        return False


def _soon_read(data: Path) -> bool:
    """Whether rows take less time to read than torch takes to load.

    Only plain text is: Arrow's readers start threads, and this process may have none when it starts others; a packed
    file may hold far more than its size.
    """
    total = 0
    for path in (data, *data.rglob("*")):
        if path.is_file() and path.suffix.lower() not in _SOON_READ:
            return False
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total <= _SOON_READ_BYTES


def _worker(kit: Kit, state: Path, options: Options, address: str) -> SupervisedProcess:
    command = [
        *(sys.executable, "-P", "-m", "client.site_worker"),
        *("--address", address, "--site", kit.site, "--key", str(kit.folder / kits.SITE_KEY)),
        *("--data", str(options.data.expanduser().resolve()), "--state", str(state)),
        *("--counts", counts.text_of(options.counts)),
        *(word for field, name in options.columns.items() for word in ("--column", f"{field}={name}")),
    ]
    if options.model:
        local = _is_there(Path(options.model), Path.is_dir)
        command += ["--model", str(Path(options.model).expanduser().resolve()) if local else options.model]
    if options.device:
        command += ["--device", options.device]
    if options.rank is not None:
        command += ["--rank", str(options.rank)]
    if options.max_epsilon is not None:
        command += ["--max-epsilon", str(options.max_epsilon), "--max-delta", str(options.max_delta)]
    return SupervisedProcess(command, processes.environment(state), state)


def _node(kit: Kit, state: Path, address: str, port: int | None) -> SupervisedProcess:
    command = [
        *(sys.executable, "-P", "-m", "deploy.node"),
        *("--server", str(kit.server), "--ca", str(kit.folder / kits.CA), "--key", str(kit.folder / kits.SITE_KEY)),
        *("--site", kit.site, "--worker", address, "--state", str(state)),
        *(("--port", str(port)) if port is not None else ()),
    ]
    return SupervisedProcess(command, processes.environment(state), state, state / "node.log")


def _wait_for_worker(worker: SupervisedProcess, path: Path, end: threading.Event) -> int | None:
    """None when the worker answers; else the exit code of it all."""
    deadline = time.monotonic() + _START_S
    while not end.wait(0.2):
        code = worker.look()
        if code is not None:
            return _WRONG_DATA if code == _WRONG_DATA else _failed(f"the worker ended at its start (exit code {code})")
        if _answers(path):
            return None
        if time.monotonic() > deadline:
            return _failed(f"the worker did not come up within {_START_S:g} s")
    return None


def _answers(path: Path) -> bool:
    # Not by gRPC's health service, which others may ask: its threads do not go with starting processes.
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def _look_for_server(kit: Kit) -> int | None:
    try:
        if not flower_cli.healthy(str(kit.server), kit.folder / kits.CA):
            _say(kit, f"no server answers at {kit.server} yet; trying again and again")
    except ssl.SSLCertVerificationError as error:
        return _failed(f"who answers at {kit.server} is not this federation's server: {error.verify_message}")
    return None


def _watch(kit: Kit, worker: SupervisedProcess, node: SupervisedProcess, end: threading.Event) -> int | None:
    line = _Line()
    while not end.wait(0.2):
        code = worker.look()
        if code == _LET_GO:
            _say(kit, "the worker is started again, for nobody waited any more for what it was doing")
        elif code is not None:
            _say(kit, f"the worker ended (exit code {code}) and is started again; its message is lost")
        code = node.look()
        if code is not None:
            if code == session.NOT_TRUSTED and not line.ever:
                return _failed(f"who answers at {kit.server} is not this federation's server")
            line = _after_end(kit, line, code, node.said())
            if line.refused_since is not None and time.monotonic() - line.refused_since > _GIVE_UP_S:
                return _failed(
                    f"the server at {kit.server} refuses the key of site {kit.site} ({line.reason}): is its "
                    "NAME.pub in the server's folder `sites`? One that was struck off cannot come back: "
                    "`apiary deploy add` makes new keys"
                )
            if not line.ever and node.failures >= _TRIES:
                return _failed(f"the node ended {_TRIES} times at its start; node.log in the state says why")
        elif not line.connected and node.has_said(f" {session.CONNECTED}\n"):
            line = _Line(connected=True, ever=True, asked=time.monotonic())
            _say(kit, f"connected to {kit.server}")
        line = _ask_health(kit, line)
        processes.reap([worker, node])
    return None


def _ask_health(kit: Kit, line: _Line) -> _Line:
    """Ask now and then whether the server is there, for Flower tries again in silence; a change is said."""
    if not line.connected or time.monotonic() - line.asked < _HEALTH_S:
        return line
    try:
        there, why = flower_cli.healthy(str(kit.server), kit.folder / kits.CA), "does not answer"
    except ssl.SSLCertVerificationError as error:
        there, why = False, f"is not this federation's any more ({error.verify_message})"
    if there != line.there:
        _say(kit, f"the server at {kit.server} " + ("answers again" if there else f"{why}; trying again and again"))
    return line._replace(asked=time.monotonic(), there=there)


def _after_end(kit: Kit, line: _Line, code: int, said: str) -> _Line:
    if code == session.REFUSED:
        reason = said.rstrip().rpartition("\n")[2].partition(" ")[2].partition(" ")[2]  # without its time
        if reason != line.reason:
            _say(kit, f"the server refuses the key of site {kit.site}: {reason}; trying for {_GIVE_UP_S:g} s")
        return _Line(refused_since=line.refused_since or time.monotonic(), reason=reason, ever=line.ever)
    _say(kit, f"the node ended (exit code {code}) and is started again; node.log says more")
    return _Line(ever=line.ever)


def _failed(line: str) -> int:
    print(f"apiary: {line}", file=sys.stderr, flush=True)
    return 1


def _say(kit: Kit, line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {kit.site}: {line}", flush=True)
