"""What stands beside a client's own model: `choice.json`, and the part of its model card that says what it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHOICE = "choice.json"


def label(kind: str, weight: float) -> str:
    """A candidate in words, such as `mixed (0.25 alone)`."""
    if kind == "earlier":
        return "the federated model of an earlier round"
    return f"mixed ({weight:g} alone)" if kind == "mixed" else kind


def note(choice: Mapping[str, Any]) -> str:
    """The paragraph of a model card on a client's own model.

    Args:
        choice: the content of its `choice.json`.
    """
    made = {
        "federated": "It is the federated model, which the client kept as it is.",
        "earlier": "It is the federated model as it was after an earlier round, which the client kept.",
        "mixed": (
            f"It is {1 - choice['weight']:g} of the federated model and {choice['weight']:g} of a training alone, "
            "mixed in the space of products, so that its rank is the sum of theirs."
        ),
        "tuned": "It is the federated model, trained further on the client's rows.",
        "alone": "It is a training on the client's rows alone; nothing of the federation is in it.",
    }[choice["kept"]]
    covered = (
        ""
        if choice["kept"] in ("federated", "earlier")
        else " It was made of that client's rows without the noise of differential privacy: whatever the run promises "
        "to rows does not cover it, and it may tell of them."
    )
    return f"\nThis is the own model of one client, for that client alone. {made}{covered}\n"


def read_choice(folder: Path) -> dict[str, Any] | None:
    """The `choice.json` of a folder; None where there is none that can be read."""
    try:
        found = json.loads((folder / CHOICE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
