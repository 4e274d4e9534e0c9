"""Flower's `flwr-clientapp` at a site, which runs no code that came over the network.

A SuperNode starts its programs by name. `install` puts a folder in front of its PATH in which `flwr-clientapp` is this
module, and the programs that a site has no use for (a run may ask for any) only end.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy import bundle

_CLIENT = "flwr-clientapp"
_OTHERS = ("flwr-agentapp", "flwr-connector", "flwr-model", "flwr-serverapp", "flwr-simulation")


def install(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a SuperNode whose programs are guarded; `folder` holds them."""
    folder.mkdir(mode=0o700, exist_ok=True)
    ours = f'exec {shlex.quote(sys.executable)} -P -m deploy.guard "$@"'
    for name in (_CLIENT, *_OTHERS):
        path = folder / name
        path.write_text(f"#!/bin/sh\n{ours if name == _CLIENT else 'exit 1'}\n", encoding="utf-8")
        path.chmod(0o700)
    return {**environment, "PATH": f"{folder}{os.pathsep}{environment['PATH']}"}


def main() -> None:
    """Flower's own program, but for a look at each bundle before it is unpacked."""
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp

    runtime: Any = run_clientapp
    unpack = runtime.install_from_fab  # private to flwr 1.41; a test sends foreign code

    def checked(content: bytes, *arguments: Any, **options: Any) -> Any:
        bundle.check(content)
        return unpack(content, *arguments, **options)

    runtime.install_from_fab = checked
    flwr_clientapp()


if __name__ == "__main__":
    main()
