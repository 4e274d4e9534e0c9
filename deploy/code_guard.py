"""Flower's `flwr-clientapp` at a site, which runs no code that came over the network.

A SuperNode starts its programs by name. `install` puts a folder in front of its PATH in which `flwr-clientapp` is this
module, and the programs that a site has no use for (a run may ask for any) only end.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deploy import bundle

_CLIENT = "flwr-clientapp"
_OTHERS = ("flwr-agentapp", "flwr-connector", "flwr-model", "flwr-serverapp", "flwr-simulation")
_ID = f"{bundle.PUBLISHER}/{bundle.NAME}"  # what Flower calls our bundle
_HASH = re.compile(r"[0-9a-f]{64}")
_INSTALLED = "client.app"


def install(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a SuperNode whose programs are guarded; `folder` holds them."""
    folder.mkdir(mode=0o700, exist_ok=True)
    ours = f'exec {shlex.quote(sys.executable)} -P -m deploy.code_guard "$@"'
    for name in (_CLIENT, *_OTHERS):
        path = folder / name
        path.write_text(f"#!/bin/sh\n{ours if name == _CLIENT else 'exit 1'}\n", encoding="utf-8")
        path.chmod(0o700)
    return {**environment, "PATH": f"{folder}{os.pathsep}{environment['PATH']}"}


def check_names(fab_id: str, fab_version: str, fab_hash: str) -> None:
    """Check what the server calls the bundle: Flower makes a path of it, as it comes.

    Raises:
        bundle.ForeignCode: the run names another app than the installed one.
    """
    if (fab_id, fab_version) != (_ID, bundle.VERSION) or not _HASH.fullmatch(fab_hash):
        raise bundle.ForeignCode("this site runs what is installed there, and no other app; do the versions differ?")


def seal(runtime: Any) -> None:
    """Leave Flower's module for messages one app to run: the installed one, whatever the server sends or names.

    Args:
        runtime: `flwr.supernode.runtime.run_clientapp`; the names replaced are private to flwr 1.41.
    """
    find = runtime.get_project_dir

    def check(content: bytes, *arguments: Any, **options: Any) -> None:
        bundle.check(content)  # and it stays packed: nothing in it is used

    def project_dir(fab_id: str, fab_version: str, fab_hash: str) -> Any:
        check_names(fab_id, fab_version, fab_hash)
        return find(fab_id, fab_version, fab_hash)

    def load(fab_id: str, fab_version: str, fab_hash: str) -> Any:
        check_names(fab_id, fab_version, fab_hash)
        return importlib.import_module(_INSTALLED).app

    def loader(*arguments: Any, **options: Any) -> Callable[[str, str, str], Any]:
        return load

    def refuse(*arguments: Any, **options: Any) -> None:
        raise bundle.ForeignCode("this site installs nothing for a run")

    replaced = {
        "install_from_fab": check,
        "get_project_dir": project_dir,
        "get_load_client_app_fn": loader,
        "install_app_dependencies": refuse,
    }
    for name, ours in replaced.items():
        getattr(runtime, name)  # another version of Flower must not run unguarded
        setattr(runtime, name, ours)


def main() -> None:
    """Flower's own program, but for where its app comes from."""
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp

    seal(run_clientapp)
    flwr_clientapp()


if __name__ == "__main__":
    main()
