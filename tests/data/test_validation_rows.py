"""Rows by which clients choose their own models are neither trained nor reported."""

from __future__ import annotations

import numpy as np
import pytest

from apiary.config import loading
from apiary.config.schema import RunConfig
from apiary.core.errors import UserError
from apiary.data.examples import Example
from apiary.data.federation import ClientData, Federation, is_held_out, set_validation_apart, validates
from apiary.data.turns import Turn


def row(number: int, answer: str = "") -> Example:
    return Example((Turn("user", f"question {number}"), Turn("assistant", answer or str(number))), {})


ROWS = tuple(map(row, range(4000)))


def configured(*overrides: str) -> RunConfig:
    return loading.load(None, ["personal.enabled=true", *overrides])


def federation(rows: tuple[Example, ...] = ROWS) -> Federation:
    return Federation((ClientData("a", rows, ROWS[:10]), ClientData("b", rows[:500], ())), (), ())


def test_the_asked_share_is_set_apart_and_no_row_is_lost() -> None:
    found = set_validation_apart(federation(), configured("personal.validation=0.2"))
    for client, before in zip(found.clients, federation().clients, strict=True):
        both = [*client.train, *client.validation]
        assert sorted(map(repr, both)) == sorted(map(repr, before.train)) and client.test == before.test
        assert abs(len(client.validation) - 0.2 * len(both)) < 5 * (0.16 * len(both)) ** 0.5  # binomial


def test_a_run_without_own_models_keeps_all_of_its_rows() -> None:
    assert set_validation_apart(federation(), loading.load(None, [])) == federation()


def test_equal_questions_stay_together_and_no_row_decides_about_another() -> None:
    twice = (*ROWS[:300], *(row(number, "another answer") for number in range(300)))
    found = set_validation_apart(federation(twice), configured()).clients[0]
    apart = {example.turns[0].text for example in found.validation}
    assert apart.isdisjoint(example.turns[0].text for example in found.train)
    alone = [set_validation_apart(federation((row(900), r)), configured()).clients[0] for r in ROWS[:60]]
    assert all(validates(r, 0.15, 0) == (r in c.validation) for r, c in zip(ROWS[:60], alone, strict=True))


def test_the_draw_follows_the_seed_and_the_key_and_not_the_hash_that_holds_rows_out() -> None:
    def apart(seed: int, key: bytes = b"") -> np.ndarray:
        return np.array([validates(example, 0.5, seed, key) for example in ROWS])

    held_out = np.array([is_held_out(example, 0.5) for example in ROWS])
    for other in (apart(1), apart(0, b"secret of a site"), held_out):
        agree = (apart(0) == other).mean()
        assert agree == pytest.approx(0.5, abs=0.04)  # 5 standard deviations of 0.008
    assert (apart(0) == apart(0)).all()
    largest = configured(f"seed={2**63 - 1}")
    assert set_validation_apart(federation(), largest).clients[0].validation


def test_a_client_that_would_have_nothing_left_to_train_on_is_named() -> None:
    one = next(r for r in ROWS if validates(r, 0.15, 0))
    with pytest.raises(UserError, match=r"personal.validation = 0.15: client 'a' has no training row left of 2"):
        set_validation_apart(federation((one, one)), configured())


def test_under_a_sites_own_key_the_seed_of_the_server_has_no_say() -> None:
    """A server that could draw the rows anew by another seed would learn from the counts of many draws."""
    key, other = b"secret of a site", b"secret of another"

    def apart(seed: int, key: bytes) -> list[Example]:
        made = set_validation_apart(federation(), configured(f"seed={seed}"), key, whole=False)
        return list(made.clients[0].validation)

    first = apart(0, key)
    assert len(first) > 400 and all(apart(seed, key) == first for seed in (1, 77, 2**63 - 1))
    assert apart(0, other) != first and apart(0, b"") != first and apart(1, b"") != apart(0, b"")
    # Of a smaller fraction it is a part, as of the held-out rows.
    smaller = set_validation_apart(federation(), configured("personal.validation=0.05"), key).clients[0].validation
    assert 0 < len(smaller) < len(first) and set(map(repr, smaller)) < set(map(repr, first))


def test_a_site_without_a_row_left_is_not_told_from_one_with_few() -> None:
    key = b"secret of a site"
    one = next(r for r in ROWS if validates(r, 0.15, 0, key))
    made = set_validation_apart(federation((one, one)), configured(), key, whole=False)
    assert made.clients[0].train == () and len(made.clients[0].validation) == 2
