"""Flower's SuperExec, which starts the process of each run: `python -P -m deploy.superexec ADDRESS CA`.

Its own command loads what starts every other kind of task as well, for a third more memory. What is imported here is
private to flwr 1.41.
"""

from __future__ import annotations

import sys

from flwr.supercore.superexec.run_superexec import run_superexec
from flwr.supercore.utils import disable_process_dumping


def main() -> None:
    """Start what the SuperLink at ADDRESS has to be started, until the process is ended."""
    address, ca = sys.argv[1:]
    disable_process_dumping(strict=False)  # it holds the tokens of runs
    run_superexec(address, insecure=False, root_certificates_path=ca, runtime_dependency_install=False)


if __name__ == "__main__":
    main()
