"""The server's processes: the SuperLink on this machine alone, and the front door before it."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apiary.config import UserError
from apiary.runlog import write_atomic
from deploy import flower, kits, processes
from deploy.kits import Kit
from deploy.processes import Kept

_RUNNING, _NODES = "running.json", "nodes.json"
_KEY_IS_KNOWN = "[code: 23]"
_START_S = 120.0
_KEYS_S = 5.0  # how often the folder of public keys is looked at


def run(kit: Kit, state: Path, bind: str = "0.0.0.0") -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code.

    Args:
        kit: the server's.
        state: Flower's database, its logs, and which site is which node.
        bind: address of this machine that the door listens on, at the kit's port.

    Raises:
        UserError: the port is taken, or another server runs with this state.
    """
    _check_port(bind, kit.server.port)
    with processes.hold(state):
        end = processes.wait_for_end()
        processes.adopt_orphans()
        port = processes.free_port()
        flower.configure(kit, state, port)
        kept = [_superlink(kit, state, port), _door(kit, state, port, bind)]
        try:
            if not _wait_until_up(kit, kept, port, end):
                return 0 if end.is_set() else 1
            known = _register(kit, state)
            write_atomic(state / _RUNNING, json.dumps({"port": port}))
            _say(f"server ready at {kit.server}; sites: {', '.join(known)}")
            _watch(kit, state, kept, end)
        finally:
            (state / _RUNNING).unlink(missing_ok=True)
            processes.end_all(reversed(kept))
    return 0


def port_of(state: Path) -> int:
    """Where the SuperLink of a running server listens on this machine.

    Raises:
        UserError: none is running.
    """
    try:
        return int(json.loads((state / _RUNNING).read_text(encoding="utf-8"))["port"])
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"no server is running with the state {str(state)!r}: start `apiary deploy server KIT`, or give its --state"
        ) from None


def site_nodes(state: Path) -> dict[str, str]:
    """The node id of each site that was registered, by name."""
    try:
        values: dict[str, dict[str, Any]] = json.loads((state / _NODES).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return {name: str(value["node"]) for name, value in values.items()}


def _superlink(kit: Kit, state: Path, port: int) -> Kept:
    command = [
        processes.program("flower-superlink"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--ssl-certfile", str(kit.folder / kits.CERTIFICATE), "--ssl-keyfile", str(kit.folder / kits.SERVER_KEY)),
        *("--ssl-ca-certfile", str(kit.folder / kits.CA)),
        "--enable-supernode-auth",
        *("--database", str(state / "superlink.db")),
        "--disable-runtime-dependency-installation",
    ]
    return Kept(command, processes.environment(state), state, state / "superlink.log")


def _door(kit: Kit, state: Path, port: int, bind: str) -> Kept:
    command = [
        *(sys.executable, "-P", "-m", "deploy.door"),
        *("--bind", bind, "--port", str(kit.server.port)),
        *("--upstream", f"https://127.0.0.1:{port}"),
        *("--certificate", str(kit.folder / kits.CERTIFICATE), "--key", str(kit.folder / kits.SERVER_KEY)),
        *("--ca", str(kit.folder / kits.CA)),
    ]
    return Kept(command, processes.environment(state), state, state / "door.log")


def _check_port(bind: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((bind, port))
        except OSError as error:
            raise UserError(
                f"--bind {bind}, port {port} of the kit: {error.strerror}; is a server running already?"
            ) from None


def _wait_until_up(kit: Kit, kept: list[Kept], port: int, end: threading.Event) -> bool:
    deadline = time.monotonic() + _START_S
    while not end.wait(0.3):
        for each in kept:
            each.look()
        if flower.healthy(f"127.0.0.1:{port}", kit.folder / kits.CA):
            return True
        if time.monotonic() > deadline:
            _say(f"the SuperLink did not come up within {_START_S:g} s; superlink.log in the state folder says more")
            return False
    return False


def _watch(kit: Kit, state: Path, kept: list[Kept], end: threading.Event) -> None:
    looked, seen = time.monotonic(), kits.public_keys(kit)
    while not end.wait(0.3):
        for name, each in zip(("SuperLink", "door"), kept, strict=True):
            code = each.look()
            if code is not None:
                _say(f"the {name} ended (exit code {code}) and is started again")
        processes.reap(kept)
        if time.monotonic() - looked > _KEYS_S:
            looked, now = time.monotonic(), kits.public_keys(kit)
            if now != seen:
                seen = now
                _say(f"sites: {', '.join(_register(kit, state))}")


def _register(kit: Kit, state: Path) -> list[str]:
    """Make Flower's list of keys that of the kit: new ones are registered, those taken away are struck off."""
    path = state / _NODES
    known: dict[str, dict[str, str]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    keys = {name: (file, file.read_text(encoding="utf-8").strip()) for name, file in kits.public_keys(kit).items()}
    for name in [n for n, entry in known.items() if n not in keys or keys[n][1] != entry["key"]]:
        if _tell(state, name, "unregister", known[name]["node"]) is not None:
            del known[name]
    for name, (file, key) in keys.items():
        if name not in known:
            answer = _tell(state, name, "register", str(file), options=("--name", name))
            if answer is not None:
                known[name] = {"node": str(answer.get("node-id", "")), "key": key}
                write_atomic(path, json.dumps(known, indent=1))
    write_atomic(path, json.dumps(known, indent=1))
    return list(known)


def _tell(state: Path, site: str, *words: str, options: Sequence[str] = ()) -> dict[str, Any] | None:
    """Flower's answer about a site; None where it refused, which is said."""
    try:
        return flower.call(state, "supernode", *words, options=options)
    except flower.FlowerError as error:
        if _KEY_IS_KNOWN in str(error):  # registered by a server that was killed before it wrote it down
            return {}
        _say(f"site {site}: {error}")
        return None


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
