"""What a run ran on: versions, commit, machine."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from apiary.config.schema import RunConfig

_PACKAGES = ("torch", "transformers", "peft", "flwr")


def start_fields(config: RunConfig) -> dict[str, Any]:
    """What the first line of a log says: versions, commit, config digest, seed, machine.

    No host, user or path: a log can be shown to a partner as it is.
    """
    return {
        "versions": _versions(),
        "commit": _commit(Path(__file__).resolve().parents[2]),
        "config_digest": hashlib.sha256(config.to_json().encode()).hexdigest()[:16],
        "seed": config.seed,
        "machine": machine(gpu=config.model.device != "cpu"),
    }


def _versions() -> dict[str, str]:
    from apiary import __version__

    versions = {"apiary": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _commit(root: Path) -> str | None:
    """The commit of a source checkout at `root` (`-dirty` where edited), else None.

    Only a repository whose top is `root` counts: a package installed inside somebody's own
    repository must not claim that repository's commit.
    """
    if not (root / ".git").exists():
        return None
    command = [
        "git",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def machine(*, gpu: bool = True) -> dict[str, Any]:
    """Processor, usable cores, memory in bytes and GPU of this machine; None where unknown."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": cores,
        "memory_bytes": _memory_bytes(),
        "gpu": _gpu_name() if gpu else None,
    }


def _cpu_name() -> str | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _gpu_name() -> str | None:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "Apple GPU (MPS)" if torch.backends.mps.is_available() else None
