"""A client's choice of rows: made once or every so often, found again after a kill, and made anew for other data."""

from __future__ import annotations

from pathlib import Path

import pytest

from apiary.config.schema import CurateConfig, Method
from apiary.data.examples import Example
from apiary.data.turns import Turn
from apiary.models.inference import ModelProbe
from client import curated_rows, round_files
from client.curation import Context, Reader

RANDOM = Method(name="random", keep=0.5, floor=0)


def rows(n: int, say: str = "hello") -> tuple[Example, ...]:
    return tuple(Example((Turn("user", f"{say} {i}"), Turn("assistant", f"mail me@{i}.org")), {}) for i in range(n))


def pick(folder: Path, number: int, *, every: int = 0, of: tuple[Example, ...] = rows(40), seed: int = 0):  # type: ignore[no-untyped-def]
    config = CurateConfig(steps=(Method(name="mask"), RANDOM), every=every)
    return curated_rows.choose(of, config, Context(seed=seed), folder, number)


def test_one_choice_lasts_and_reads_the_same_from_disk(tmp_path: Path) -> None:
    first = pick(tmp_path, 1)
    assert len(first.examples) == 20 and first.counts == (40, 20, {"mask": 0, "random": 20})
    assert all("<EMAIL_1>" in example.turns[1].text for example in first.examples)
    # Another seed would choose others: the stored choice is what counts.
    assert pick(tmp_path, 2, seed=1) == first
    assert pick(tmp_path / "elsewhere", 2, seed=1).examples != first.examples


def test_no_text_stands_in_the_file(tmp_path: Path) -> None:
    pick(tmp_path, 1)
    (path,) = tmp_path.iterdir()
    assert "hello" not in path.read_text() and ".org" not in path.read_text()


def test_every_so_many_rounds_rows_are_chosen_again(tmp_path: Path) -> None:
    made = [pick(tmp_path, number, every=3, seed=number).round for number in range(1, 9)]
    assert made == [1, 1, 1, 4, 4, 4, 7, 7]


def test_a_run_that_goes_back_finds_the_choice_of_that_moment(tmp_path: Path) -> None:
    before = [pick(tmp_path, number, every=2, seed=number) for number in range(1, 6)]
    # Killed in round 5 and gone on from round 4: round 5's own choice is forgotten and made anew.
    round_files.begin(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curated-0001.json", "curated-0003.json"]
    assert pick(tmp_path, 4, every=2, seed=99) == before[3]
    round_files.begin(tmp_path, 5)
    assert pick(tmp_path, 5, every=2, seed=5) == before[4]
    # Gone back once more, to a round that chooses: the new choice is the one that stands.
    round_files.begin(tmp_path, 3)
    anew = pick(tmp_path, 3, every=2, seed=98)
    assert anew.round == 3 and anew.examples != before[2].examples
    assert pick(tmp_path, 4, every=2, seed=97) == anew


def test_other_rows_are_chosen_from_anew(tmp_path: Path) -> None:
    pick(tmp_path, 1)
    other = pick(tmp_path, 2, of=rows(30, "good bye"))
    assert other.round == 2 and other.counts.rows == 30
    assert all("good bye" in example.turns[0].text for example in other.examples)


def test_the_rows_of_every_round_can_be_had_again(tmp_path: Path) -> None:
    """As they were trained on, what steps rewrote included; of other rows there is no choice."""
    made = {number: pick(tmp_path, number, every=2, seed=number) for number in range(1, 8)}
    config = CurateConfig(steps=(Method(name="mask"), RANDOM), every=2)
    found = curated_rows.choices(rows(40), config, Context(), tmp_path)
    assert sorted(found) == [1, 3, 5, 7]
    for number, choice in found.items():
        assert choice == made[number].examples
    with pytest.raises(ValueError, match="chosen in round 1 are no longer there"):
        curated_rows.choices(rows(30, "good bye"), config, Context(), tmp_path)


@pytest.mark.parametrize("number", [1, 4])
def test_a_choice_in_hand_is_used_only_for_its_own_round(tmp_path: Path, number: int) -> None:
    config = CurateConfig(steps=(RANDOM,), every=3)
    first = curated_rows.choose(rows(40), config, Context(), tmp_path, 1)
    marked = first._replace(examples=first.examples[:1])
    again = curated_rows.choose(rows(40), config, Context(seed=5), tmp_path, number + 1, marked)
    assert (again is marked) == (number == 1)


def test_a_judge_that_has_yet_to_learn_is_not_asked(tmp_path: Path) -> None:
    """Until the warm-up is over every row stays, and no model is needed."""

    def no_model() -> ModelProbe:
        raise AssertionError("asked before its time")

    config = CurateConfig(steps=(Method(name="ifd", warmup=2),), every=1)
    reader = Reader(None, None, None, no_model)  # type: ignore[arg-type]
    for number in (1, 2):
        made = curated_rows.choose(rows(40), config, Context(reader=reader, trained=number - 1), tmp_path, number)
        assert made.counts == (40, 40, {"ifd": 0})
    with pytest.raises(AssertionError, match="before its time"):
        curated_rows.choose(rows(40), config, Context(reader=reader, trained=2), tmp_path, 3)
