"""What an audit says in plain words follows from its figures."""

from __future__ import annotations

from typing import Any

import pytest

from apiary.report.audit import verdict

FOUND: dict[str, Any] = {
    "claim": None,
    "lower_bound": {"epsilon": 0.0, "right": 12, "guesses": 25, "canaries": 200},
    "membership": [{"attack": "loss", "auc": {"value": 0.52, "low": 0.47, "high": 0.57}}, {"attack": "x", "auc": None}],
    "exposure": [{"copies": 1, "p_value": 0.5}, {"copies": 4, "p_value": 0.03}],
    "inversion": [{"rows": 8, "recovered": {"value": 0.3, "low": 0.1, "high": 0.5}, "chance": 0.2}],
}
AUC = {"attack": "update", "auc": {"value": 0.64, "low": 0.56, "high": 0.71}}
READ = {"rows": 1, "recovered": {"value": 0.99, "low": 0.98, "high": 1.0}, "chance": 0.11}


def test_figures_whose_intervals_hold_chance_are_no_finding() -> None:
    """Nor is the least of several p-values that is below 0.05 by itself."""
    assert verdict(FOUND).startswith("No attack did better than chance, beyond doubt. Nothing is claimed")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"membership": [*FOUND["membership"], AUC]}, "tells which is which in 64% of cases (the AUC; a coin: 50%)"),
        ({"exposure": [{"copies": 4, "p_value": 0.01}]}, "a secret code that stands in 4 rows is likelier"),
        ({"inversion": [READ]}, "on 1 row gives 99% of its words away: the worst case, for an update of several steps"),
        (
            {"lower_bound": {"epsilon": 1.47, "right": 25, "guesses": 25, "canaries": 200}},
            "which canaries (planted rows) were in is told rightly in 25 of 25 guesses",
        ),
    ],
)
def test_what_was_found_is_said_in_words(change: dict[str, Any], words: str) -> None:
    said = verdict({**FOUND, **change})
    assert said.startswith("Found: ") and words in said
