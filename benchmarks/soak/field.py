"""Where a soak takes place: the processes of a deployment, with everything around them that can be made to fail."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.deployment import ROOT, below, write_rows
from benchmarks.soak.relay import Relay
from deploy.processes import free_port

SITES = ("ant", "bee", "cricket")
_MARK = "APIARY_SOAK"  # in the environment of each process that a soak starts, and so of those that these start
_LONGEST_S = 300.0
_SITE_MB, _SERVER_MB = 64, 512
_CLOCK = """import datetime, os, sys
if "deploy.node" in sys.orig_argv:
    real = datetime.datetime
    class Kind(type):
        def __instancecheck__(cls, value):
            return isinstance(value, real)
    class Clock(real, metaclass=Kind):
        @classmethod
        def now(cls, tz=None):
            with open(os.environ["APIARY_SOAK_CLOCK"]) as file:
                return real.now(tz) + datetime.timedelta(seconds=float(file.read() or 0))
    datetime.datetime = Clock
"""


class Disk:
    """A folder of its own file system, which can be filled; or a plain folder, which cannot."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0700", "soak", str(folder)]
        self.mounted = subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
        self._full = False

    def fill(self) -> None:
        """Take all room that there is now."""
        self._full = True
        with contextlib.suppress(OSError), (self.folder / "filler").open("ab", buffering=0) as file:
            while True:
                file.write(b"\0" * 65536)
        with contextlib.suppress(OSError), (self.folder / "filler").open("ab", buffering=0) as file:
            while True:
                file.write(b"\0" * 512)

    def look(self) -> None:
        """Take what room has come about while it is full."""
        if self._full:
            self.fill()

    def free(self) -> None:
        """Give the room back."""
        self._full = False
        (self.folder / "filler").unlink(missing_ok=True)

    def end(self) -> None:
        """Unmount it."""
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], stderr=subprocess.DEVNULL)


class Field:
    """A server and sites; it owns their processes, disks, relays and clocks.

    Args:
        folder: new, and all that they write is in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.kits, self.mark = folder, folder / "kits", secrets.token_hex(8)
        self.port = free_port()
        self.kept: dict[str, subprocess.Popen[bytes]] = {}
        sizes = {"server": _SERVER_MB, **dict.fromkeys(SITES, _SITE_MB)}
        self.disks = {name: Disk(folder / "disks" / name, size) for name, size in sizes.items()}
        self.relays = {site: Relay(free_port(), self.port) for site in SITES}
        self._rows = write_rows(folder)

    @property
    def state(self) -> Path:
        """Of the server."""
        return self.disks["server"].folder / "state"

    def run_folder(self, name: str) -> Path:
        """Of a run."""
        return self.disks["server"].folder / "runs" / name

    def site_state(self, site: str) -> Path:
        """Of a site."""
        return self.disks[site].folder / "state"

    def begin(self) -> None:
        """Start the server and the sites, and wait until all are connected."""
        words = [word for site in SITES for word in ("--site", site)]
        self.run("deploy", "init", str(self.kits), "--server", f"127.0.0.1:{self.port}", *words)
        for site, relay in self.relays.items():
            file = self.kits / site / "kit.toml"
            file.write_text(file.read_text().replace(f":{self.port}", f":{relay.port}"))
            self._clock(site).mkdir(parents=True)
            (self._clock(site) / "sitecustomize.py").write_text(_CLOCK)
            self.set_clock(site, 0.0)
        self.serve()
        self.wait_until(lambda: "server ready" in self.said("server"), "the server is not ready")
        for site in SITES:
            self.join(site)
        self.wait_until(lambda: all("connected to" in self.said(site) for site in SITES), "a site is not connected")

    def serve(self) -> None:
        """Start the server."""
        where = ("--bind", "127.0.0.1", "--state", str(self.state))
        self.start("server", "deploy", "server", str(self.kits / "server"), *where)

    def join(self, site: str) -> None:
        """Start a site."""
        where = ("--data", str(self._rows), "--counts", "exact", "--state", str(self.site_state(site)))
        self.start(site, "deploy", "client", str(self.kits / site), *where)

    def submit(self, name: str, settings: Sequence[str]) -> None:
        """Start a run, and what follows it."""
        words = [word for text in settings for word in ("-s", text)]
        where = ("--state", str(self.state), "--out", str(self.run_folder(name)))
        config = str(ROOT / "configs" / "deployment.toml")
        self.start("submit", "deploy", "submit", str(self.kits / "server"), config, *where, *words)

    def start(self, name: str, *words: str) -> None:
        """Start a command that stays."""
        with (self.folder / f"{name}.log").open("ab") as out:
            self.kept[name] = subprocess.Popen(
                [*_APIARY, *words],
                cwd=self.folder,
                env=self._environment(name),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, *words: str) -> None:
        """Run a command to its end."""
        done = subprocess.run([*_APIARY, *words], env=self._environment(""), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)

    def _environment(self, name: str) -> dict[str, str]:
        found = {**os.environ, _MARK: self.mark, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if name in SITES:
            found |= {
                "PYTHONPATH": f"{self._clock(name)}{os.pathsep}{ROOT}",
                "APIARY_SOAK_CLOCK": str(self._clock(name) / "ahead"),
            }
        return found

    def _clock(self, site: str) -> Path:
        return self.folder / "clocks" / site

    def set_clock(self, site: str, ahead_s: float) -> None:
        """Put a site's clock ahead of the machine's."""
        new = self._clock(site) / "new"
        new.write_text(str(ahead_s))
        new.replace(self._clock(site) / "ahead")

    def said(self, name: str, since: int = 0) -> str:
        """What a command printed, from a byte on."""
        with (self.folder / f"{name}.log").open("rb") as file:
            file.seek(since)
            return file.read().decode(errors="replace")

    def length(self, name: str) -> int:
        """How many bytes a command has printed."""
        return (self.folder / f"{name}.log").stat().st_size

    def part(self, name: str, word: str) -> int | None:
        """The process below a command in whose own command line a word is; None where there is none now."""
        for pid in below(self.kept[name].pid):
            with contextlib.suppress(OSError):
                if word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        return None

    def below(self, name: str) -> list[int]:
        """The processes below a command."""
        return below(self.kept[name].pid)

    def kill(self, name: str) -> None:
        """End a command and all below it at once, as when a machine loses its power."""
        keeper = self.kept[name]
        os.kill(keeper.pid, signal.SIGSTOP)  # or it would start anew what is killed
        for pid in reversed([keeper.pid, *below(keeper.pid)]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        keeper.wait()

    def strays(self) -> list[str]:
        """The command lines of processes that a soak's process started and no command of it keeps any more."""
        kept = {pid for each in self.kept.values() if each.poll() is None for pid in (each.pid, *below(each.pid))}
        return [words_of(pid) for pid in self._marked() if pid not in kept]

    def _marked(self) -> Iterator[int]:
        mark = f"{_MARK}={self.mark}".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes():
                    yield int(path.parent.name)

    def look(self) -> None:
        """Keep full what is to be full."""
        for disk in self.disks.values():
            disk.look()

    def wait_until(self, true: Callable[[], object], why: str, limit_s: float = _LONGEST_S) -> None:
        """Wait.

        Raises:
            TimeoutError: it did not become true.
        """
        deadline = time.monotonic() + limit_s
        while not true():
            if time.monotonic() > deadline:
                raise TimeoutError(why)
            time.sleep(0.1)

    def end(self) -> None:
        """End everything, whatever state it is in."""
        for disk in self.disks.values():
            disk.free()
        for each in self.kept.values():
            if each.poll() is None:
                each.send_signal(signal.SIGCONT)
                each.terminate()
        deadline = time.monotonic() + 30.0
        for each in self.kept.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                each.wait(max(0.1, deadline - time.monotonic()))
        for pid in list(self._marked()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for each in self.kept.values():
            each.wait()
        for relay in self.relays.values():
            relay.end()
        for disk in self.disks.values():
            disk.end()


_APIARY = (sys.executable, "-P", "-m", "apiary.cli.main")


def words_of(pid: int) -> str:
    """The command line of a process, as far as it tells what it is."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
    return f"process {pid}"
