"""Which model a client keeps, against choices worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from client.personal.choice import FEWEST, Candidate, Kind, choose, loss_of

TOKENS = np.full(20, 2.0)


def candidate(kind: Kind, nats: object, distance: float, weight: float = 0.0) -> Candidate:
    return Candidate(kind, weight, 36, distance, np.asarray(nats, np.float64))


def wavy(level: float, swing: float) -> np.ndarray:
    """Twenty rows around a level, half above and half below by `swing`."""
    return level + swing * np.where(np.arange(20) % 2, 1.0, -1.0)


def test_a_clear_winner_is_kept() -> None:
    joint, alone = candidate("federated", wavy(2.0, 0.1), 0.0), candidate("alone", wavy(1.0, 0.1), 9.0)
    found = choose([joint, alone], TOKENS, 1.0)
    assert (found.chosen, found.best, found.enough) == (1, 1, True)
    assert found.losses == (1.0, 0.5)  # nats of a row over its two tokens


def test_of_those_that_rows_cannot_tell_apart_the_nearest_to_the_federated_is_kept() -> None:
    """The difference to the best is 0.1 nats a row, +-1: by hand 0.05 a token, standard error 0.5 / sqrt(19)."""
    best = candidate("alone", np.full(20, 1.0), 9.0)
    near = candidate("federated", 1.1 + wavy(0.0, 1.0), 0.0)
    found = choose([near, best], TOKENS, 1.0)
    assert found.errors[0] == pytest.approx(0.5 / math.sqrt(19))
    assert (found.best, found.chosen) == (1, 0)
    assert choose([near, best], TOKENS, 0.0).chosen == 1  # without a margin the lowest loss decides
    assert choose([near, best], TOKENS, 0.4).chosen == 1  # 0.05 is 0.44 standard errors
    assert choose([near, best], TOKENS, 0.5).chosen == 0


def test_the_error_is_of_the_difference_so_what_is_hard_for_both_does_not_blur_it() -> None:
    hard = np.arange(20.0)
    joint, mixed = candidate("federated", hard + 1.0, 0.0), candidate("mixed", hard + 0.9, 1.0, 0.5)
    found = choose([joint, mixed], TOKENS, 1.0)
    assert found.chosen == 1 and found.errors[0] == pytest.approx(0.0, abs=1e-12)


def test_distance_decides_among_equals_and_not_the_order() -> None:
    rows = wavy(1.0, 0.2)
    far, near, joint = (
        candidate("alone", rows, 5.0, 1.0),
        candidate("mixed", rows, 2.0, 0.25),
        candidate("federated", rows + 3, 0.0),
    )
    assert choose([joint, far, near], TOKENS, 1.0).chosen == 2
    assert choose([near, joint, far], TOKENS, 0.0).chosen == 0


def test_on_too_few_rows_the_federated_model_stays() -> None:
    few = FEWEST - 1
    joint, alone = candidate("federated", np.full(few, 9.0), 0.0), candidate("alone", np.full(few, 1.0), 9.0)
    found = choose([alone, joint], np.ones(few), 1.0)
    assert found.chosen == 1 and not found.enough and all(map(math.isnan, found.errors))
    enough = [candidate(c.kind, np.full(FEWEST, c.nats[0]), c.distance) for c in (alone, joint)]
    assert choose(enough, np.ones(FEWEST), 1.0).chosen == 0


def test_a_candidate_without_a_number_is_never_kept() -> None:
    broken = wavy(0.1, 0.0)
    broken[3] = math.nan
    joint, lost = candidate("federated", wavy(2.0, 0.1), 0.0), candidate("tuned", broken, 1.0)
    found = choose([joint, lost], TOKENS, 10.0)
    assert found.chosen == 0 and found.losses[1] == math.inf and math.isnan(found.errors[1])
    # ... even where it is the nearest, as a federated model without a number is
    lost, alone = candidate("federated", broken, 0.0), candidate("alone", wavy(1.0, 0.1), 4.0)
    assert choose([lost, alone], TOKENS, 10.0).chosen == 1
    assert not choose([lost, candidate("alone", broken, 4.0)], TOKENS, 1.0).enough


def test_the_federated_model_is_always_a_candidate() -> None:
    with pytest.raises(ValueError, match="federated"):
        choose([candidate("alone", TOKENS, 1.0)], TOKENS, 1.0)


def test_the_loss_of_no_rows_is_infinite() -> None:
    assert loss_of(np.zeros(0), np.zeros(0)) == math.inf


def test_the_margin_holds_the_winners_curse_in_check() -> None:
    """Twelve rows and seven candidates that are no better than the federated model, each off by noise of its own.

    The lowest loss alone picks one of them nearly always; within a standard error the federated model stays more often,
    and what is chosen is promised less that is not there. 400 draws; the shares stray by less than 0.1.
    """
    rng, kept, promised = np.random.default_rng(0), {0.0: 0, 1.0: 0}, {0.0: 0.0, 1.0: 0.0}
    tokens = np.ones(12)
    for _ in range(400):
        nats = 1 + 0.5 * rng.standard_normal((8, 12))
        found = [candidate("federated", nats[0], 0.0)]
        found += [candidate("mixed", row, 1.0 + i, 0.5) for i, row in enumerate(nats[1:])]
        for margin in kept:
            choice = choose(found, tokens, margin)
            kept[margin] += choice.chosen == 0
            promised[margin] += 1 - choice.losses[choice.chosen]
    assert kept[0.0] / 400 == pytest.approx(1 / 8, abs=0.1) and kept[1.0] / 400 > 0.25
    assert promised[0.0] / 400 > 0.15 and promised[1.0] < 0.7 * promised[0.0]
