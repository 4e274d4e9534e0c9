"""What is read of methods from their source is what their registries say once they are imported."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from apiary.config import loading, methods
from apiary.config.registry import Registry
from apiary.core.errors import UserError


def _registries() -> dict[str, Registry[Any]]:
    import strategies.server_optimizers
    from apiary.data import partitions
    from apiary.transport import codecs
    from client.curation import STEPS
    from client.training import objectives
    from simulation import attacks, engines

    return {
        "strategy.name": strategies.AGGREGATORS,
        "strategy.server_optimizer": strategies.server_optimizers.SERVER_OPTIMIZERS,
        "wire.up": codecs.CODECS,
        "wire.down": codecs.CODECS,
        "data.partition": partitions.PARTITIONS,
        "train.objective": objectives.OBJECTIVES,
        "train.penalties": objectives.PENALTIES,
        "curate.steps": STEPS,
        "simulate.engine": engines.ENGINES,
        "simulate.attack": attacks.ATTACKS,
    }


KEYS = tuple(_registries())
LISTS = ("train.penalties", "curate.steps")  # the other keys take one name


def _settings(key: str, name: str) -> list[str]:
    return [f'{key}=["{name}"]' if key in LISTS else f"{key}={name}"]


def test_every_kind_of_method_is_found() -> None:
    assert set(methods.kinds()) == set(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_names_options_defaults_and_meanings_are_those_of_the_registry(key: str) -> None:
    told = sorted(methods.kinds()[key].describe())
    assert told == sorted(_registries()[key].describe())
    assert all(summary for _, summary, _ in told)


@pytest.mark.parametrize("key", [key for key in KEYS if key != "simulate.engine"])  # which the schema checks
def test_a_wrong_name_is_refused_in_the_words_of_the_registry(key: str) -> None:
    name = f"{next(iter(_registries()[key]))}x"
    (line,) = methods.problems(loading.load(None, _settings(key, name)))
    with pytest.raises(UserError) as caught:
        _registries()[key].builder(name)
    registry, _, rest = str(caught.value).partition(" = ")
    assert line == f"{key} = {rest}"
    assert registry in (key, "wire.up/down")


@pytest.mark.parametrize("key", [key for key in KEYS if key != "simulate.engine"])
def test_code_of_the_users_own_is_left_alone(key: str) -> None:
    assert methods.problems(loading.load(None, _settings(key, "no_such_module:function"))) == []


def test_no_recipe_names_a_wrong_method() -> None:
    recipes = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
    assert len(recipes) > 5
    for recipe in recipes:
        assert methods.problems(loading.load(recipe)) == []
    assert methods.problems(loading.load()) == []


def test_what_goes_by_another_key_is_told_where() -> None:
    (line,) = methods.problems(loading.load(None, ["strategy.name=FedAvgM"]))
    assert line.endswith('; for FedAvgM set strategy.server_optimizer = "momentum"')


def test_all_wrong_names_are_told_at_once() -> None:
    wrong = ["strategy.name=fedavvg", "wire.down=int9", 'curate.steps=["mask", "msk", "lenght"]']
    lines = methods.problems(loading.load(None, wrong))
    assert [line.partition(": ")[0] for line in lines] == [
        "curate.steps = 'msk'",
        "curate.steps = 'lenght'",
        "strategy.name = 'fedavvg'",
        "wire.down = 'int9'",
    ]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package whose modules fail as soon as they are imported."""
    folder = tmp_path / "apiary_of_a_test"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(methods, "_PACKAGES", (folder.name,))
    for cached in (methods._modules, methods.kinds):
        cached.cache_clear()
    yield folder
    for cached in (methods._modules, methods.kinds):
        cached.cache_clear()
    assert folder.name not in sys.modules


def test_a_file_that_is_dropped_in_is_known_and_never_imported(package: Path) -> None:
    (package / "registry.py").write_text(
        'import torch_is_not_here\nHIVES: Registry[int] = Registry("strategy.name", given=("seed",))\n'
        "FEW, MANY = 3, 0.5\n"
    )
    (package / "deep").mkdir()
    (package / "deep" / "own.py").write_text(
        "from apiary_of_a_test import registry\n"
        "from apiary_of_a_test.registry import HIVES, MANY as much\n"
        "OWN: int = 7\n\n\n"
        '@HIVES.register("log")\n'
        "def log(seed: int, bees, few=registry.FEW, share: float = much, own=OWN, *, kind: str = 'x', odd=f(1)):\n"
        '    """Bees in a log.\n\n    Args:\n        few: how many,\n            at least.\n    """\n'
    )
    (kind,) = methods.kinds().values()
    assert list(kind.describe()) == [
        (
            "log",
            "Bees in a log.",
            [
                ("bees", "needed", ""),
                ("few", "3", "how many, at least"),
                ("share", "0.5", ""),
                ("own", "7", ""),
                ("kind", '"x"', ""),
                ("odd", "f(1)", ""),
            ],
        )
    ]
    (line,) = methods.problems(loading.load())
    assert re.fullmatch(r"strategy.name = 'fedavg': allowed are log; your own goes by module:function", line)
