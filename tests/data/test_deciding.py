"""Held-out rows that decide when a run stops are never those of its figures."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

import pytest

from apiary.config import loading
from apiary.config.schema import RunConfig
from apiary.data.examples import Example
from apiary.data.federation import (
    FEWEST,
    ClientData,
    Federation,
    decides,
    federate,
    is_held_out,
    set_deciding_apart,
    undecided,
)
from apiary.data.turns import Turn


def rows(*numbers: int) -> tuple[Example, ...]:
    return tuple(Example((Turn("user", f"question {n}"), Turn("assistant", str(n))), {}) for n in numbers)


def questions(examples: Iterable[Example]) -> set[str]:
    return {example.turns[0].text for example in examples}


ROWS = rows(*range(400))
POOLED = Federation(
    (ClientData("a", (), ROWS[:200]), ClientData("b", (), ROWS[200:])),
    ROWS,
    (),
)


def configured(*overrides: str) -> RunConfig:
    return loading.load(None, ["evaluate.patience=3", *overrides])


def test_about_half_decide_whether_or_not_they_are_held_out_by_little() -> None:
    few = [row for row in rows(*range(4000)) if is_held_out(row, 0.1)]
    for some in (ROWS, few):  # 400 rows: half, give or take 5 standard deviations of 10
        assert abs(sum(map(decides, some)) - len(some) / 2) < 5 * (len(some) / 4) ** 0.5


def test_a_question_is_in_one_half_however_it_is_written_and_goes_on() -> None:
    for row in ROWS[:40]:
        text = row.turns[0].text
        other = Example((Turn("user", f"  {text.upper()} "), Turn("assistant", "x"), Turn("user", "and then?")), {})
        assert decides(other) == decides(row)


def test_without_patience_nothing_is_set_apart() -> None:
    figures, deciding = set_deciding_apart(POOLED, RunConfig())
    assert figures is POOLED and deciding == ()


@pytest.mark.parametrize("by", ["clients", "server"])
def test_no_figure_is_on_a_row_that_decides(by: str) -> None:
    config = configured() if by == "clients" else configured("evaluate.clients=false")
    figures, deciding = set_deciding_apart(POOLED, config)
    # What a client scores on is worked out at the client, from all of its held-out rows.
    scored = deciding or [row for client in POOLED.clients for row in client.test if decides(row)]
    assert bool(deciding) == (by == "server")
    everything = [figures.test, *(client.test for client in figures.clients)]
    assert all(questions(part) and not questions(part) & questions(scored) for part in everything)
    assert questions(figures.test) | questions(scored) == questions(ROWS)
    assert questions(figures.test) == set().union(*(questions(client.test) for client in figures.clients))


def test_separate_rows_of_the_table_lose_only_those_that_clients_decide_by() -> None:
    separate = rows(*range(390, 500))
    figures, _ = set_deciding_apart(POOLED._replace(test=separate), configured())
    lost = questions(separate) - questions(figures.test)
    assert lost == questions(row for row in ROWS[390:] if decides(row)) != set()


def test_too_few_rows_are_told_before_the_run() -> None:
    few = [row for row in ROWS if decides(row)][: FEWEST - 1]
    others = [row for row in ROWS if not decides(row)]
    small = Federation((ClientData("a", (), (*few, *others)),), (*few, *others), ())
    (line,) = undecided(small, configured())
    assert line.startswith("evaluate.patience = 3: ") and "no client has 5" in line and "the most is 4" in line
    assert undecided(small, configured("evaluate.clients=false")) == []  # the server needs but one
    assert undecided(small, RunConfig()) == []
    (line,) = undecided(small._replace(test=tuple(others)), configured("evaluate.clients=false"))
    assert "none is left to decide by" in line
    enough = [row for row in ROWS if decides(row)][:FEWEST]
    (line,) = undecided(Federation((ClientData("a", (), tuple(enough)),), tuple(enough), ()), configured())
    assert "none is left for the figures" in line


def test_a_real_federation_is_split_in_disjoint_parts(rows_file: Path) -> None:
    config = configured(f"data.source={rows_file}", "data.partition=iid", "data.clients=3", "data.test_fraction=0.4")
    whole = federate(config.data, config.seed)
    figures, _ = set_deciding_apart(whole, config)
    parts = [[row for client in whole.clients for row in client.test if decides(row)], figures.test]
    parts += [[row for client in whole.clients for row in client.train]]
    assert all(questions(one).isdisjoint(questions(other)) for one, other in itertools.combinations(parts, 2))
    assert [client.train for client in figures.clients] == [client.train for client in whole.clients]


@pytest.mark.parametrize("patience", [0, 3])
@pytest.mark.parametrize("clients", [True, False])
def test_rows_set_apart_for_choosing_between_runs_are_in_no_figure(patience: int, clients: bool) -> None:
    """With separate rows for the table, so that the server's and the clients' rows that decide are different ones."""
    separate = POOLED._replace(test=rows(*range(390, 600)))
    overrides = [f"evaluate.patience={patience}", f"evaluate.clients={str(clients).lower()}"]
    config = loading.load(None, ["evaluate.set_apart=true", *overrides])
    figures, deciding = set_deciding_apart(separate, config)
    assert questions(deciding) == questions(row for row in separate.test if decides(row)) != set()
    own = [row for row in ROWS if decides(row)] if patience and clients else []
    gone = questions(deciding) | questions(own)
    assert questions(figures.test) == questions(separate.test) - gone != set()
    assert {q for client in figures.clients for q in questions(client.test)} == questions(ROWS) - gone != set()


def test_too_few_rows_to_choose_between_runs_by_are_told() -> None:
    config = loading.load(None, ["evaluate.set_apart=true"])
    others = tuple(row for row in ROWS if not decides(row))
    (line,) = undecided(POOLED._replace(test=others), config)
    assert line.startswith("evaluate.set_apart = true: ") and "none is left to decide by" in line
    assert line.endswith("raise data.test_fraction, or set false")
    (line,) = undecided(POOLED._replace(test=tuple(row for row in ROWS if decides(row))), config)
    assert "none is left for the figures" in line
    assert undecided(POOLED, config) == []
