"""The server's processes: the SuperLink on this machine alone, and the front door before it."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from apiary.core.errors import UserError
from apiary.core.files import write_atomic
from deploy import certificates, flower_cli, kits, processes
from deploy.kits import Kit
from deploy.processes import SupervisedProcess

_RUNNING, _NODES = "running.json", "nodes.json"
_NODES_VARIABLE = "APIARY_NODES"  # tells the runs' own processes where the latter is: they name a site by it
_KEY_IS_KNOWN, _NODE_IS_GONE = "[code: 23]", "[code: 24]"
_NAMES = ("SuperLink", "SuperExec", "door")
_WRONG_FLOWER = 3  # the SuperLink's exit code
_START_S = 120.0
_RUNS_S = 1.0  # how often the runs are looked at
_KEYS_S = 5.0  # how often the folder of public keys is looked at
_AGAIN_S = 30.0  # until what Flower refused is tried again

_Failures = dict[tuple[str, str], tuple[str, float]]  # by site and key: the line, and when (monotonic seconds)


def run(kit: Kit, state: Path, bind: str = "0.0.0.0") -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code.

    Args:
        kit: the server's.
        state: Flower's database, its logs, and which site is which node.
        bind: address of this machine that the door listens on, at the kit's port.

    Raises:
        UserError: the port is taken, the kit's files do not fit, or another server runs with this state.
    """
    _check(kit)
    processes.check_port(bind, kit.server.port, f"--bind {bind}, port {kit.server.port} of the kit")
    with processes.hold(state):
        end = processes.wait_for_end()
        processes.adopt_orphans()
        port = processes.free_port()
        flower_cli.configure(kit, state, port)
        kept = [_superlink(kit, state, port), _superexec(kit, state, port), _door(kit, state, port, bind)]
        try:
            if not _wait_until_up(kit, kept, port, end):
                return 0 if end.is_set() else 1
            failures: _Failures = {}
            known = register(kit, state, failures)
            write_atomic(state / _RUNNING, json.dumps({"port": port}))
            _say(f"server ready at {kit.server}; sites: {', '.join(known)}")
            from deploy.tending import Tending  # here, for it asks this module where the server listens

            _watch(kit, state, kept, end, known, failures, Tending(state, _say).look)
        finally:
            (state / _RUNNING).unlink(missing_ok=True)
            processes.end_all(reversed(kept))
    return 0


def port_of(state: Path) -> int:
    """Where the SuperLink of a running server listens on this machine.

    Raises:
        UserError: no server runs with this state folder.
    """
    try:
        return int(json.loads((state / _RUNNING).read_text(encoding="utf-8"))["port"])
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"no server is running with the state {str(state)!r}: start `apiary deploy server KIT`, or give its --state"
        ) from None


def site_nodes(state: Path) -> dict[str, str]:
    """The node id of each site that was registered, by name."""
    return {name: entry["node"] for name, entry in _nodes(state).items()}


def _nodes(state: Path) -> dict[str, dict[str, str]]:
    try:
        values: dict[str, dict[str, str]] = json.loads((state / _NODES).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    # Without the comment, for one key is one node; without a node there is nothing to remember.
    keys = {name: " ".join(entry["key"].split()[:2]) for name, entry in values.items()}
    return {name: {"node": entry["node"], "key": keys[name]} for name, entry in values.items() if entry["node"]}


def _superlink(kit: Kit, state: Path, port: int) -> SupervisedProcess:
    command = [
        *(sys.executable, "-P", "-m", "deploy.superlink"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--isolation", "process"),  # its SuperExec is a process of ours, started again by itself
        *("--ssl-certfile", str(kit.folder / kits.CERTIFICATE), "--ssl-keyfile", str(kit.folder / kits.SERVER_KEY)),
        *("--ssl-ca-certfile", str(kit.folder / kits.CA)),
        "--enable-supernode-auth",
        *("--database", str(state / flower_cli.DATABASE)),
        "--disable-runtime-dependency-installation",
    ]
    return SupervisedProcess(command, processes.environment(state), state, state / "superlink.log")


def _superexec(kit: Kit, state: Path, port: int) -> SupervisedProcess:
    """What starts a ServerApp process for each run."""
    command = [
        *(sys.executable, "-P", "-m", "deploy.superexec"),
        *(f"127.0.0.1:{port}", str(kit.folder / kits.CA)),
    ]
    environment = {**processes.environment(state), _NODES_VARIABLE: str(state / _NODES)}
    return SupervisedProcess(command, environment, state, state / "superexec.log")


def _door(kit: Kit, state: Path, port: int, bind: str) -> SupervisedProcess:
    command = [
        *(sys.executable, "-P", "-m", "deploy.proxy"),
        *("--bind", bind, "--port", str(kit.server.port)),
        *("--upstream", f"https://127.0.0.1:{port}"),
        *("--certificate", str(kit.folder / kits.CERTIFICATE), "--key", str(kit.folder / kits.SERVER_KEY)),
        *("--ca", str(kit.folder / kits.CA)),
        *("--sites", str(kit.folder / kits.SITES), "--nodes", str(state / _NODES)),
    ]
    return SupervisedProcess(command, processes.environment(state), state, state / "door.log")


def _check(kit: Kit) -> None:
    files = [kit.folder / name for name in (kits.CA, kits.CERTIFICATE, kits.SERVER_KEY)]
    try:
        certificates.check_server(*(file.read_bytes() for file in files))
    except OSError as error:
        raise UserError(f"{str(kit.folder)!r}: {error.filename} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{str(kit.folder)!r}: {error}") from None


def _wait_until_up(kit: Kit, kept: list[SupervisedProcess], port: int, end: threading.Event) -> bool:
    deadline = time.monotonic() + _START_S
    while not end.wait(0.3):
        codes = [each.look() for each in kept]
        if codes[0] == _WRONG_FLOWER:
            _say(kept[0].said().strip().rpartition("\n")[2])
            return False
        if flower_cli.healthy(f"127.0.0.1:{port}", kit.folder / kits.CA):
            return True
        if time.monotonic() > deadline:
            _say(f"the SuperLink did not come up within {_START_S:g} s; superlink.log in the state folder says more")
            return False
    return False


def _watch(
    kit: Kit,
    state: Path,
    kept: list[SupervisedProcess],
    end: threading.Event,
    known: list[str],
    failures: _Failures,
    tend: Callable[[], None],
) -> None:
    looked = tended = time.monotonic()
    while not end.wait(0.3):
        for name, each in zip(_NAMES, kept, strict=True):
            code = each.look()
            if code is not None:
                _say(f"the {name} ended (exit code {code}) and is started again")
                if name in _NAMES[:2]:
                    _end_runs(kept)
        processes.reap(kept)
        now = time.monotonic()
        if now - looked > _KEYS_S:
            looked = now
            try:
                before, known = known, register(kit, state, failures)
            except OSError as error:  # the disk is full; what Flower took meanwhile is remembered once there is room
                _fail("", "", f"keys cannot be looked after now: {error.strerror}", failures)
            else:
                failures.pop(("", ""), None)
                if known != before:
                    _say(f"sites: {', '.join(known)}")
        if now - tended > _RUNS_S:
            tend()
            tended = time.monotonic()


def _end_runs(kept: list[SupervisedProcess]) -> None:
    """End the SuperExec and the processes of runs, and nothing else of `kept`: each run goes on in a new process."""
    superexec = kept[_NAMES.index("SuperExec")].process
    if superexec is not None:
        superexec.kill()
        superexec.wait()
    processes.end_orphans(signal.SIGKILL, kept)


def register(kit: Kit, state: Path, failures: _Failures) -> list[str]:
    """Make Flower's list of keys that of the kit: new ones are registered, those taken away are struck off.

    Args:
        kit: the server's.
        state: where it is remembered which site is which node; what failed is not, and so tried again.
        failures: of earlier calls; each is said once.

    Returns:
        The names of the sites that are registered.

    Raises:
        OSError: the disk is full, or a folder cannot be read.
    """
    known = _nodes(state)
    files = kits.public_keys(kit)
    keys = {name: key for name, file in files.items() if (key := _key(name, file, failures))}
    for name, entry in list(known.items()):
        # A file that cannot be read (it may just be being copied) strikes nobody off: Flower takes no key twice.
        gone = name not in files or keys.get(name, entry["key"]) != entry["key"]
        if gone and _try(name, entry["key"], failures, partial(_strike_off, state, entry["node"])):
            del known[name]
            _remember(state, known)
    new = {name: key for name, key in keys.items() if name not in known and _is_due(name, key, failures)}
    for name, told in _entered(state, new).items():
        others = {entry["node"]: other for other, entry in known.items()}
        node = _try(name, new[name], failures, partial(_settle, state, files[name], new[name], told, others))
        if node:
            known[name] = {"node": node, "key": new[name]}
    _remember(state, known)
    return sorted(known)


def _remember(state: Path, known: dict[str, dict[str, str]]) -> None:
    if known != _nodes(state):
        write_atomic(state / _NODES, json.dumps(known, indent=1))


def _key(name: str, file: Path, failures: _Failures) -> str | None:
    try:
        key = kits.public_key(file)
    except UserError as error:
        _fail(name, "", str(error), failures)
        return None
    failures.pop((name, ""), None)
    return key


def _try(name: str, key: str, failures: _Failures, act: Callable[[], str]) -> str | None:
    """What `act` returns; None where it failed, which is said, or failed a moment ago."""
    if not _is_due(name, key, failures):
        return None
    try:
        answer = act()
    except flower_cli.FlowerError as error:
        _fail(name, key, str(error), failures)
        return None
    failures.pop((name, key), None)
    return answer


def _is_due(name: str, key: str, failures: _Failures) -> bool:
    return time.monotonic() - failures.get((name, key), ("", -math.inf))[1] >= _AGAIN_S


def _fail(name: str, key: str, line: str, failures: _Failures) -> None:
    if failures.get((name, key), ("", 0.0))[0] != line:
        _say(f"site {name}: {line}" if name else line)
    failures[name, key] = line, time.monotonic()


def _strike_off(state: Path, node: str) -> str:
    try:
        flower_cli.call(state, "supernode", "unregister", node)
    except flower_cli.FlowerError as error:
        if _NODE_IS_GONE not in str(error):  # by a server that was killed before it wrote it down
            raise
    return node


def _entered(state: Path, keys: Mapping[str, str]) -> Mapping[str, str | flower_cli.FlowerError]:
    """By name what Flower says to new keys: a node, or why not."""
    if not keys:
        return {}
    try:
        return flower_cli.register(state, {name: certificates.public_pem(key) for name, key in keys.items()})
    except flower_cli.FlowerError as error:
        return dict.fromkeys(keys, error)


def _settle(state: Path, file: Path, key: str, told: str | flower_cli.FlowerError, others: Mapping[str, str]) -> str:
    """The node that Flower knows by a key after it was asked to; `others` names the sites of the other nodes.

    Raises:
        flower.FlowerError: it refused; or the key is that of another site, or of one that was struck off.
    """
    if isinstance(told, str):
        return told
    if _KEY_IS_KNOWN not in str(told):
        raise told
    # Registered by a server that was killed before it wrote it down, or used up.
    found = flower_cli.node_of(state, certificates.public_pem(key))
    if found is None:
        raise told
    node, struck_off = found
    if struck_off:
        raise flower_cli.FlowerError(
            "this key was struck off and cannot come back: make new ones by `apiary deploy add`"
        )
    if node in others:
        raise flower_cli.FlowerError(f"{file.name} is the key of site {others[node]} as well: each site needs its own")
    return node


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
