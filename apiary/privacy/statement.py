"""What a run claims about privacy: the run's `ledger.json`, and the one sentence that report and model card print."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apiary.config.schema import RunConfig
from apiary.core.files import write_atomic

if TYPE_CHECKING:  # with torch, which a report does without
    from apiary.core.messages import Spent

LEDGER = "ledger.json"


def account(config: RunConfig, spent: Mapping[str, Spent]) -> dict[str, Any]:
    """The run's account: the largest epsilon of any client, for clients hold different rows (parallel composition).

    `epsilon` is that of the accountant that the account names.

    Args:
        config: the run.
        spent: by client, what its rows have spent, all told.
    """
    privacy = config.privacy
    return {
        "unit": privacy.unit,
        "epsilon": max((s.epsilon for s in spent.values()), default=0.0),
        "epsilon_rdp": max((s.epsilon_rdp for s in spent.values()), default=0.0),
        "budget": privacy.epsilon,
        "delta": privacy.delta,
        "clip": privacy.clip,
        "adjacency": "one row of one client blanked",
        "sampler": "Poisson sampling, each row by itself",
        "accountant": privacy.accountant,
        "clients": {name: spent[name]._asdict() for name in sorted(spent)},
    }


def write(folder: Path, config: RunConfig, spent: Mapping[str, Spent]) -> None:
    """Write `ledger.json` of a run that promises something."""
    if config.privacy.unit != "none":
        write_atomic(folder / LEDGER, json.dumps(account(config, spent), indent=1) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """The account of a run, or `{"unit": "none"}`."""
    path = folder / LEDGER
    if not path.exists():
        return {"unit": "none"}
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def rounded_up(epsilon: float, digits: int = 2) -> str:
    """An epsilon for people, never below the true one."""
    return f"{math.ceil(epsilon * 10**digits - 1e-9) / 10**digits:.{digits}f}"


def sentence(privacy: Mapping[str, Any]) -> str:
    """What protects the updates, without promising more than was done."""
    if privacy.get("unit", "none") == "none":
        return (
            "Examples stayed with their clients. The updates themselves were not protected by differential privacy, "
            "and a curious server might learn something about the data from them."
        )
    by = privacy["accountant"].upper()
    if privacy["accountant"] != "rdp":
        by += f"; {rounded_up(privacy['epsilon_rdp'])} by Rényi"
    return (
        "Each row that a client trained on is protected by differential privacy: epsilon = "
        f"{rounded_up(privacy['epsilon'])} at delta = {privacy['delta']:g} ({by}). The unit is one row, neighbours "
        f"differ by blanking it, and rows are drawn by {privacy['sampler']}. The number of rows by which a client "
        "plans its sampling rate is taken to be public. For somebody with k rows it is k times that epsilon, with a "
        "larger delta. Held-out rows, and baselines trained beside the federation, "
        "are not protected."
    )
