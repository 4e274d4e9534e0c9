"""What the curation benchmark calls bad is bad, and what it counts is what was caught."""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from pathlib import Path

from apiary.config.schema import Method
from apiary.data.examples import Example, answer
from apiary.data.turns import Turn
from client.curation import STEPS, curate

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from benchmarks.curation import KINDS, Spoiled, caught, spoil  # noqa: E402


def rows(n: int) -> tuple[Example, ...]:
    words = [f"word{i}" for i in range(n)]
    return tuple(
        Example((Turn("user", f"Who is {w}, and why?"), Turn("assistant", f"the answer {w}")), {}) for w in words
    )


def test_the_share_is_spoiled_and_the_rest_untouched() -> None:
    clean = rows(200)
    made = spoil(clean, 0.4, random.Random(0))
    assert len(made.examples) == 200
    assert Counter(made.bad.values()) == dict.fromkeys(KINDS, 20)
    assert all((made.examples[i] != clean[i]) == (i in made.bad) for i in range(200))
    assert made == spoil(clean, 0.4, random.Random(0))
    for index, kind in made.bad.items():
        now, before = made.examples[index], clean[index]
        if kind in ("shuffled", "truncated"):
            assert now.turns[0] == before.turns[0] and answer(now) != answer(before)
        else:
            assert answer(now) == answer(clean[made.source[index]]) and made.source[index] not in made.bad
        if kind == "truncated":
            assert answer(before).startswith(answer(now))


def test_exact_copies_are_caught_whichever_of_the_two_goes() -> None:
    made = spoil(rows(100), 0.4, random.Random(1))
    found = caught(made, curate(made.examples, [Method(name="duplicates")]).kept)
    assert found["recall"] == {"shuffled": 0.0, "duplicate": 1.0, "near_duplicate": 0.0, "truncated": 0.0}
    assert (found["precision"], found["clean_lost"]) == (1.0, 0.0)


def test_counts_by_hand() -> None:
    made = Spoiled(rows(10), {0: "shuffled", 1: "shuffled", 2: "duplicate"}, {2: 7})
    found = caught(made, [1, 2, 3, 4, 5])  # gone: 0 (bad), 7 (stands in for 2), and 6, 8, 9, which are clean
    assert found["recall"] == {"shuffled": 0.5, "duplicate": 1.0}
    assert found["precision"] == 0.4  # 2 of 5
    assert found["clean_lost"] == round(3 / 7, 3)


def test_the_example_of_a_step_of_your_own_works() -> None:
    """The code block of docs/curation.md, run as it stands."""
    block = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "curation.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block
    try:
        exec(compile(block[1], "curation.md", "exec"), {"__name__": "example"})
        rude, polite = (Example((Turn("user", text), Turn("assistant", "yes")), {}) for text in ("Go!", "Please go."))
        assert curate([rude, polite], [Method(name="polite")]).kept == (1,)
    finally:
        STEPS._builders.pop("polite", None)


def test_the_documentation_names_every_step() -> None:
    text = (ROOT / "docs" / "curation.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == set(STEPS)
