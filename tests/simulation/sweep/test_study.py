"""A search by Optuna: what it draws, what it keeps, and how it goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from apiary.core.errors import UserError
from simulation.sweep import definition
from simulation.sweep.definition import SEARCHES, Sweep
from simulation.sweep.study import Search

pytest.importorskip("optuna")

TEXTS = ["train.lr=1e-4..1e-2:log", "adapter.rank=4..16:4", 'adapter.targets=["q_proj"],all-linear']


def searching(search: str = "tpe", pruner: str = "none", texts: list[str] = TEXTS) -> Sweep:
    return definition.make(None, [*texts, "rounds=4"], search=search, pruner=pruner, trials=20, seeds=2)


def loss(values: object) -> float:
    """A made-up loss with its best at a rate of 1e-3."""
    import math

    return (math.log10(values["train.lr"]) + 3) ** 2  # type: ignore[index]


@pytest.mark.parametrize("search", [name for name in SEARCHES if name != "grid"])
def test_settings_are_drawn_within_the_ranges_and_are_the_same_after_a_kill(search: str, tmp_path: Path) -> None:
    sweep = searching(search)
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = Search(tmp_path / "whole", sweep)
    for expected in range(8):
        assert whole.ask() == expected
        whole.tell(expected, loss(whole.settings[expected]))
    for number in range(8):  # opened anew for every setting, as after a kill
        Search(tmp_path / "parts", sweep).ask()
        parts = Search(tmp_path / "parts", sweep)
        assert parts.open == [number]
        parts.tell(number, loss(parts.settings[number]))
    assert whole.settings == Search(tmp_path / "parts", sweep).settings
    assert len({str(values) for values in whole.settings}) > 4
    for values in whole.settings[1:]:
        assert 1e-4 <= values["train.lr"] <= 1e-2
        assert values["adapter.rank"] in (4, 8, 12, 16) and isinstance(values["adapter.rank"], int)
        assert values["adapter.targets"] in (["q_proj"], "all-linear")
        sweep.config(values, 0)
    # The configuration's own values come first, so that there is something to compare with.
    assert whole.settings[0] == {"train.lr": 6e-3, "adapter.rank": 16, "adapter.targets": "all-linear"}


def test_tpe_comes_closer_than_chance(tmp_path: Path) -> None:
    found = {}
    for search in ("tpe", "random"):
        (tmp_path / search).mkdir()
        study = Search(tmp_path / search, searching(search, texts=TEXTS[:1]))
        losses = []
        for _ in range(30):
            number = study.ask()
            losses.append(loss(study.settings[number]))
            study.tell(number, losses[-1])
        found[search] = sum(losses[15:]) / 15
    assert found["tpe"] < 0.7 * found["random"]


def test_a_setting_far_behind_is_given_up(tmp_path: Path) -> None:
    study = Search(tmp_path, searching(pruner="median"))
    for number in range(6):
        assert study.ask() == number
        behind = [study.report(number, step, 1.0 - number / 100 - step / 10) for step in range(3)]
        assert not any(behind)
        study.tell(number, 0.8)
    number = study.ask()
    assert study.report(number, 0, 5.0)
    study.tell(number, None, pruned=True)
    number = study.ask()
    assert not study.report(number, 0, 0.5)
    study.tell(number, None)  # one that failed
    assert study.open == [] and len(study.settings) == 8


def test_without_a_pruner_nothing_is_given_up(tmp_path: Path) -> None:
    study = Search(tmp_path, searching())
    for _ in range(6):
        study.tell(study.ask(), 0.1)
    assert not study.report(study.ask(), 0, 100.0)


def test_a_broken_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_text("no database " * 100)
    with pytest.raises(UserError, match=r"study\.db cannot be opened"):
        Search(tmp_path, searching())


def test_where_optuna_is_not_there_the_line_says_how_to_get_it() -> None:
    code = (
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'optuna':\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
        "from simulation.sweep import study\n"
        "try:\n"
        "    study.need()\n"
        "except study.UserError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("a search needs Optuna: pip install 'apiary[sweep]'")
