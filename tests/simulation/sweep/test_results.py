"""The figures of a sweep against plain arithmetic, and what is said of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from report_pages import Page
from scipy import stats

from apiary.core.errors import RunFailed
from apiary.evaluation.row_losses import RowLosses
from simulation.sweep import definition, page, results, words
from simulation.sweep.definition import Sweep
from simulation.sweep.results import MEASURED, PART, Run, Setting

ROWS, MANY = tuple(f"row {n}" for n in range(80)), 80


def run(nats: np.ndarray, choosing: float, tokens: np.ndarray | None = None, **more: Any) -> Run:
    tokens = np.full(len(nats), 4.0) if tokens is None else tokens
    loss = float(nats.sum() / tokens.sum())
    facts = {"chose": 60, "accuracy": 0.5, "seconds": 2.0, "bytes": 1000, "curve": {1: loss + 1, 2: loss}, **more}
    return Run(RowLosses(ROWS[: len(nats)], tokens, {"federated": nats}), choosing=choosing, loss=loss, **facts)


def runs(
    shift: float, choosing: list[float], seeds: tuple[int, ...] = (0, 1, 2), spread: float = 0.1
) -> dict[int, Run]:
    """Runs whose loss lies `shift` nats per token from that of the others, give or take."""
    found = {}
    for place, seed in enumerate(seeds):
        base = 8 + np.random.default_rng(seed).normal(size=MANY)
        own = np.random.default_rng([seed, int(1000 * abs(shift)) + 1]).normal(size=MANY)
        found[seed] = run(base + 4 * shift + spread * own + 0.02 * seed * shift, choosing[place])
    return found


def sweep(*values: float, seeds: int = 3, more: tuple[str, ...] = ()) -> Sweep:
    return definition.make(None, [f"train.lr={','.join(map(str, values))}", *more], seeds=seeds)


def settings(made: Sweep, *of: Mapping[int, Run]) -> list[Setting]:
    named = made.settings() or []
    states = [MEASURED if len(one) == len(made.seeds) else PART for one in of]
    return [Setting(n, named[n], one, state) for n, (one, state) in enumerate(zip(of, states, strict=True))]


def found_of(made: Sweep, given: list[Setting], fresh: Mapping[int, Mapping[int, Run]] | None = None) -> dict[str, Any]:
    found = results.document(made, given, fresh or {})
    found |= {"spent": "", "seconds": 60.0, "runs": {"begun": 6, "finished": 6}, "machine": {}, "baselines": 0}
    found["warnings"] = [*words.at_the_start(made), *words.remarks(found)]
    found["verdict"] = words.verdict(found)
    return found


def by_hand(ours: Mapping[int, Run], other: Mapping[int, Run], level: float) -> tuple[float, float, float]:
    """Mean difference and half width over seeds and rows, where all seeds share all rows, in plain numpy."""
    less = np.array([ours[s].losses.nats["federated"] - other[s].losses.nats["federated"] for s in sorted(ours)])
    tokens = np.array([ours[s].losses.tokens for s in sorted(ours)])
    ratios = less.sum(1) / tokens.sum(1)
    of_seeds = ratios.var(ddof=1) / len(ratios)
    influence = ((less - ratios[:, None] * tokens) / tokens.sum(1, keepdims=True)).mean(0)
    of_rows = (influence**2).sum() * MANY / (MANY - 1)
    freedom = (of_seeds + of_rows) ** 2 / (of_seeds**2 / (len(ratios) - 1) + of_rows**2 / (MANY - 1))
    half = stats.t.ppf((1 + level) / 2, freedom) * np.sqrt(of_seeds + of_rows)
    return float(ratios.mean()), float(half), float(ratios.std(ddof=1))


def test_differences_are_paired_by_seed_and_row_and_widened_for_many_comparisons() -> None:
    made = sweep(1e-3, 4e-3, 1e-2)
    given = settings(made, runs(0.0, [1, 1, 1]), runs(-0.1, [0.9, 0.9, 0.9]), runs(0.3, [1.3, 1.3, 1.3]))
    found = found_of(made, given)
    assert found["comparisons"] == 2
    for number in (1, 2):
        pair = found["table"][number]["paired"]
        mean, half, spread = by_hand(given[number].runs, given[0].runs, 0.95)
        assert pair["difference"] == pytest.approx(mean, rel=1e-9)
        assert pair["sd"] == pytest.approx(spread, rel=1e-9)
        assert pair["ci95"] == pytest.approx([mean - half, mean + half], rel=0.02)
        wide = by_hand(given[number].runs, given[0].runs, 1 - 0.05 / 2)[1]
        assert pair["simultaneous"] == pytest.approx([mean - wide, mean + wide], rel=0.02)
        assert wide > half
        assert (pair["seeds"], pair["rows"], pair["over"]) == ([0, 1, 2], 80, "seeds and rows")
    assert found["table"][0]["paired"] is None


def test_the_rows_that_choose_choose_and_not_those_of_the_figures() -> None:
    """The last setting looks best on the figures, the second one to the rows that choose."""
    made = sweep(1e-3, 4e-3, 1e-2)
    found = found_of(
        made, settings(made, runs(0.0, [1, 1, 1]), runs(-0.1, [0.8, 0.9, 1.0]), runs(-0.5, [0.95, 0.95, 0.95]))
    )
    assert found["winner"]["number"] == 1
    assert found["winner"]["choosing"] == pytest.approx(0.9)
    assert found["command"] == "apiary simulate -s train.lr=0.004"


def test_the_configurations_own_setting_is_the_reference_where_it_is_among_them() -> None:
    made = sweep(1e-3, 6e-3)  # 6e-3 is the default
    found = found_of(made, settings(made, runs(0.0, [1, 1, 1]), runs(-0.1, [0.9, 0.9, 0.9])))
    assert found["reference"] == {"number": 1, "configured": True}
    assert found["table"][0]["paired"]["difference"] > 0
    other = sweep(1e-3, 4e-3)
    assert found_of(other, settings(other, runs(0.0, [1, 1, 1]), runs(-0.1, [0.9, 0.9, 0.9])))["reference"] == {
        "number": 0,
        "configured": False,
    }


def test_one_seed_gives_intervals_over_rows_and_says_so() -> None:
    made = sweep(1e-3, 4e-3, seeds=1)
    found = found_of(made, settings(made, runs(0.0, [1.0], (0,)), runs(-0.1, [0.9], (0,))))
    pair = found["table"][1]["paired"]
    assert pair["over"] == "rows" and pair["sd"] is None
    less = found["table"][1]["loss"] - found["table"][0]["loss"]
    assert pair["difference"] == pytest.approx(less) and pair["ci95"][0] < less < pair["ci95"][1]
    assert any("one seed" in line for line in found["warnings"])


def test_of_few_rows_there_is_no_interval() -> None:
    made = sweep(1e-3, 4e-3)
    few = [{s: run(np.full(20, 8.0 + n + 0.1 * s), 1.0 - n) for s in range(3)} for n in range(2)]
    found = found_of(made, settings(made, *few))
    assert found["table"][1]["paired"]["ci95"] is None and found["table"][1]["paired"]["simultaneous"] is None
    assert any(line.startswith("no intervals: 20 held-out rows") for line in found["warnings"])
    assert "too few rows to say whether that is chance" in " ".join(found["verdict"])


def test_settings_that_were_measured_on_other_rows_are_not_paired() -> None:
    ours, other = runs(0.0, [1, 1, 1]), runs(-0.1, [1, 1, 1])
    assert results.paired(ours, other, 1) is not None
    moved = {s: one._replace(losses=one.losses._replace(rows=ROWS[::-1])) for s, one in other.items()}
    assert results.paired(ours, moved, 1) is None
    longer = {s: one._replace(losses=one.losses._replace(tokens=one.losses.tokens + 1)) for s, one in other.items()}
    assert results.paired(ours, longer, 1) is None
    assert results.paired(ours, {9: other[0]}, 1) is None


def test_a_grid_that_was_cut_short_is_compared_on_the_seeds_that_all_settings_have() -> None:
    made = sweep(1e-3, 4e-3, 1e-2)
    first, second, third = runs(0.0, [1, 1, 1]), runs(-0.1, [0.9, 0.9, 0.9]), runs(-0.2, [0.8, 0.8, 0.8])
    cut = settings(made, first, second, {s: third[s] for s in (0, 1)})
    between, seeds = results.compared(cut, whole=True)
    assert [one.number for one in between] == [0, 1, 2] and seeds == [0, 1]
    assert found_of(made, cut)["winner"]["number"] == 2
    # A search runs all seeds of a setting before the next one: what it has of the last one is no match.
    between, seeds = results.compared(cut, whole=False)
    assert [one.number for one in between] == [0, 1] and seeds == [0, 1, 2]


def test_what_failed_or_has_no_run_is_out_of_the_choice() -> None:
    made = sweep(1e-3, 4e-3, 1e-2)
    given = settings(made, runs(0.0, [1, 1, 1]), {}, runs(-0.5, [0.1, 0.1, 0.1]))
    given[2] = given[2]._replace(state="failed", why="the federated model gives no number")
    found = found_of(made, given)
    assert found["winner"]["number"] == 0
    assert any("train.lr = 0.01: the federated model gives no number" in line for line in found["warnings"])
    nan = settings(made, runs(0.0, [1, 1, 1]), runs(0.0, [float("nan"), 0, 0]), {})
    assert results.choose(results.compared(nan, whole=True)[0], [0, 1, 2]).number == 0


def test_without_a_finished_run_the_reasons_are_told() -> None:
    made = sweep(1e-3, 4e-3)
    given = [one._replace(state="failed", why="it diverged") for one in settings(made, {}, {})]
    with pytest.raises(RunFailed, match=r"no run of the sweep has come to a result; train\.lr = 0\.001: it diverged"):
        results.document(made, given, {})


def test_a_winner_that_is_no_clear_one_and_was_chosen_by_luck_is_told_as_such() -> None:
    made = sweep(1e-3, 4e-3)
    near = found_of(made, settings(made, runs(0.0, [1, 1, 1]), runs(-0.001, [0.99, 0.99, 0.99], spread=1.0)))
    said = " ".join(near["verdict"])
    assert "no clear difference" in said and "makes the winner look better than it is" in said
    assert "lies at the end of what was tried for train.lr" in said
    fresh = {0: runs(0.0, [1, 1, 1], (3, 4, 5)), 1: runs(-0.1, [1, 1, 1], (3, 4, 5))}
    again = found_of(made, settings(made, runs(0.0, [1, 1, 1]), runs(-0.2, [0.8, 0.8, 0.8])), fresh)
    said = " ".join(again["verdict"])
    assert "Run again with seeds 3, 4, 5, which chose nothing" in said and "look better than it is" not in said
    assert again["confirmed"]["difference"] == pytest.approx(-0.1, abs=0.02)
    assert "a clear difference" in said


def test_a_reference_that_wins_is_told() -> None:
    made = sweep(6e-3, 3e-3)
    found = found_of(made, settings(made, runs(0.0, [0.5, 0.5, 0.5]), runs(0.1, [1, 1, 1])))
    said = " ".join(found["verdict"])
    assert said.startswith("train.lr = 0.006, the configuration's own setting, is the best of 2 settings")
    assert "No setting did clearly better" in said


def test_the_line_on_privacy_is_told_of_private_sweeps_alone() -> None:
    assert words.at_the_start(sweep(1e-3, 4e-3)) == []
    (line,) = words.at_the_start(sweep(1e-3, 4e-3, more=("privacy.unit=record",)))
    assert "spends its epsilon anew" in line and "Papernot and Steinke 2022" in line and "\n" not in line
    varied = definition.make(None, ["privacy.unit=none,record", "strategy.server_optimizer=none"])
    assert words.at_the_start(varied) == [line]


def test_a_default_that_varies_with_what_is_varied_is_told() -> None:
    """Averaging has momentum by default and fedex none: their difference is not of the method alone."""
    (line,) = words.at_the_start(definition.make(None, ["strategy.name=fedavg,fedex"]))
    assert "auto comes to nesterov in some settings and none in others" in line
    assert words.at_the_start(definition.make(None, ["strategy.name=median,fedex"])) == []
    named = definition.make(None, ["strategy.name=fedavg,fedex", "strategy.server_optimizer=none"])
    assert words.at_the_start(named) == []


def test_that_own_models_are_compared_by_everybodys_rows_is_said() -> None:
    (line,) = words.at_the_start(
        definition.make(None, ["strategy.name=fedavg,ditto", "strategy.server_optimizer=none"])
    )
    assert "a sweep chooses by everybody's rows" in line and "clients[].own" in line


def test_the_page_shows_the_table_the_curves_and_the_command_and_runs_nothing() -> None:
    made = sweep(1e-3, 4e-3, 1e-2)
    given = settings(made, runs(0.0, [1, 1, 1]), runs(-0.1, [0.9, 0.9, 0.9]), runs(0.3, [1.3, 1.3, 1.3]))
    given[2] = given[2]._replace(state="failed", why="<script>alert(1)</script>")
    found = found_of(made, given)
    text = page.render(found, "first")
    assert text == page.render(found, "first")
    shown = Page(text)
    for row in found["table"]:
        for cell in words.cells(row, found):
            assert cell in shown.text or not cell, cell
    for line in [*found["verdict"], found["command"], *found["warnings"]]:
        assert line in shown.text, line
    assert "<script" not in text and "default-src 'none'" in text and "http" not in text.replace("http-equiv", "")
    assert text.count("<svg") == 2  # wide and narrow
    assert "chosen" in shown.text and "Bonferroni" in shown.text


def test_many_settings_are_drawn_without_their_names() -> None:
    made = sweep(*[n / 1000 for n in range(1, 14)])
    given = settings(made, *[runs(n / 100, [1.0 + n] * 3) for n in range(13)])
    text = page.render(found_of(made, given), "many")
    assert "other settings are not named" in text
    flat = [one._replace(runs={s: r._replace(curve={2: 1.0}) for s, r in one.runs.items()}) for one in given]
    assert "<svg" not in page.render(found_of(made, flat), "one round")
