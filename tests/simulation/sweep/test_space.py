"""What a sweep varies: the syntax of `-s`, and the settings that come of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from apiary.config import loading
from apiary.core.errors import UserError
from simulation.sweep import definition, space
from simulation.sweep.definition import Budget
from simulation.sweep.space import Choice, Range


def test_values_between_commas_are_run_one_after_the_other() -> None:
    fixed, axes = space.parse(["rounds=3", "train.lr=1e-3, 3e-3,6e-3", "strategy.name=fedavg,median"])
    assert fixed == ["rounds=3"]
    assert axes == [Choice("train.lr", (1e-3, 3e-3, 6e-3)), Choice("strategy.name", ("fedavg", "median"))]


@pytest.mark.parametrize(
    "text",
    [
        'adapter.targets=["q_proj", "v_proj"]',
        'log.project="a, b"',
        "log.project='a,b'",
        'data.columns={instruction="text", output="label"}',
        "train.lr=1e-3",
        "model.name=some/model",
        "data.source=../rows.jsonl",
        "train.penalties=[{name='fedprox', mu=0.1}]",
    ],
)
def test_a_list_a_table_and_a_quoted_text_are_one_value(text: str) -> None:
    assert space.parse([text]) == ([text], [])


def test_lists_and_tables_may_be_values_among_several() -> None:
    _, axes = space.parse(['adapter.targets=["q_proj","v_proj"],["q_proj"],all-linear'])
    assert axes == [Choice("adapter.targets", (["q_proj", "v_proj"], ["q_proj"], "all-linear"))]
    _, axes = space.parse(['strategy.server_optimizer=none,{name="nesterov", lr=0.7},"a,b"'])
    assert axes == [Choice("strategy.server_optimizer", ("none", {"name": "nesterov", "lr": 0.7}, "a,b"))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.lr=1e-4..1e-2:log", Range("train.lr", 1e-4, 1e-2, log=True)),
        ("train.lr=0.001..0.01", Range("train.lr", 0.001, 0.01)),
        ("train.lr=1..2.5", Range("train.lr", 1.0, 2.5)),
        ("adapter.rank=4..64", Range("adapter.rank", 4, 64)),
        ("adapter.rank=4..64:log", Range("adapter.rank", 4, 64, log=True)),
        ("adapter.rank=8..32:8", Range("adapter.rank", 8, 32, step=8)),
        ("train.warmup=0..0.5:0.1", Range("train.warmup", 0.0, 0.5, step=0.1)),
    ],
)
def test_two_dots_make_a_range(text: str, expected: Range) -> None:
    fixed, (axis,) = space.parse([text])
    assert (fixed, axis) == ([], expected)
    assert type(axis.low) is type(expected.low) is type(axis.high)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["train.lr=1e-3,,3e-3"], "between the commas is empty"),
        (["train.lr=1e-3,"], "between the commas is empty"),
        (["train.lr=1e-3,3e-3,0.001"], "0.001 stands there twice"),
        (["train.lr=1e-3,3e-3", "train.lr=1e-2"], "train.lr: given 2 times"),
        (["train.lr=1e-3,3e-3", "train.lr=1e-2,2e-2"], "train.lr: given 2 times"),
        (["seed=1,2"], "--seeds 5"),
        (["evaluate.set_apart=true,false"], "always sets rows apart"),
        (["train.lr=1e-2..1e-4"], "the lower end comes first"),
        (["train.lr=0..1e-2:log"], "a logarithm needs ends above 0"),
        (["adapter.rank=4..8:16"], "a step between 0 and the width"),
        (["adapter.rank=4..8:0.5"], "whole numbers need such a step"),
    ],
)
def test_what_cannot_be_varied_is_told_in_one_line(texts: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        space.parse(texts)
    assert len(caught.value.problems) == 1


def test_a_grid_is_the_product_of_the_values() -> None:
    sweep = definition.make(None, ["train.lr=1e-3,3e-3", "adapter.rank=4,8,16", "rounds=2"], seeds=2)
    by_hand = [(1e-3, 4), (1e-3, 8), (1e-3, 16), (3e-3, 4), (3e-3, 8), (3e-3, 16)]
    settings = sweep.settings()
    assert settings == [{"train.lr": lr, "adapter.rank": rank} for lr, rank in by_hand]
    assert sweep.seeds == (0, 1)
    for (lr, rank), values in zip(by_hand, settings, strict=True):
        config = sweep.config(values, 1)
        assert (config.train.lr, config.adapter.rank, config.seed, config.rounds) == (lr, rank, 1, 2)
        assert config.evaluate.set_apart
        expected = loading.load(
            None, [f"train.lr={lr}", f"adapter.rank={rank}", "rounds=2", "seed=1", "evaluate.set_apart=true"]
        )
        assert config == expected


def test_options_of_a_method_are_set_beside_its_name() -> None:
    sweep = definition.make(None, ["strategy.server_optimizer=nesterov", "strategy.server_optimizer.lr=0.5,0.7"])
    found = [sweep.config(values, 0).strategy.server_optimizer for values in sweep.settings() or ()]
    assert [(method.name, method.options) for method in found] == [("nesterov", {"lr": 0.5}), ("nesterov", {"lr": 0.7})]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["rounds=3"], ["nothing is varied"]),
        (["train.lr=1e-3,fast,-1"], ["train.lr = 'fast'", "train.lr = -1"]),
        (["train.lrr=1,2"], ["did you mean 'train.lr'"]),
        (["strategy.name=fedavg,fedavvg"], ["strategy.name = 'fedavvg'"]),
        (["train.steps=2,4", "train.epochs=1,2"], ["are the same run"]),
        (["adapter.rank=4..2000:log"], ["adapter.rank = 2000"]),
        (["train.lr=1e-3,3e-3", "evaluate.patience=2", "evaluate.every=0"], ["evaluate.every = 0"]),
        (["privacy.unit=record", "curate.steps=['duplicates'],['mask']"], ["breaks privacy.unit"]),
    ],
)
def test_every_value_is_checked_with_the_whole_configuration(texts: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        definition.make(None, texts, trials=3 if ".." in str(texts) else None)
    for word in words:
        assert any(word in line for line in caught.value.problems), caught.value.problems
    assert len(caught.value.problems) == len(set(caught.value.problems))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"search": "annealing"}, "--search annealing: allowed are grid, tpe"),
        ({"search": "tpe"}, "a search has no end of its own"),
        ({"trials": 4}, "--trials is for a search"),
        ({"pruner": "median"}, "--pruner is for a search"),
        ({"search": "tpe", "trials": 4, "pruner": "axe"}, "--pruner axe: allowed are none, median"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        definition.make(None, ["train.lr=1e-3,3e-3"], **options)  # type: ignore[arg-type]


def test_seeds_stay_in_their_range() -> None:
    with pytest.raises(UserError, match=f"seeds from {2**63 - 2} on leave the allowed range"):
        definition.make(None, ["train.lr=1e-3,3e-3", f"seed={2**63 - 2}"], seeds=3)
    assert definition.make(None, ["train.lr=1e-3,3e-3", f"seed={2**63 - 2}"], seeds=2).seeds[-1] == 2**63 - 1


def test_a_range_is_searched_and_no_grid() -> None:
    sweep = definition.make(None, ["train.lr=1e-4..1e-2:log"], budget=Budget(runs=4))
    assert sweep.search == "tpe" and sweep.settings() is None
    with pytest.raises(UserError, match=r"train\.lr is a range"):
        definition.make(None, ["train.lr=1e-4..1e-2:log"], search="grid")


def test_what_the_configuration_has_by_itself_is_found_among_the_values() -> None:
    base = loading.load(None, ["train.lr=3e-3", "adapter.rank=16", "strategy.server_optimizer=none"])
    assert space.own(base, [Choice("train.lr", (1e-3, 0.003)), Range("adapter.rank", 4, 64)]) == {
        "train.lr": 0.003,
        "adapter.rank": 16,
    }
    assert space.own(base, [Choice("train.lr", (1e-3, 2e-3))]) is None
    assert space.own(base, [Range("adapter.rank", 4, 12)]) is None
    assert space.own(base, [Range("adapter.rank", 4, 64, step=5)]) is None
    assert space.own(base, [Choice("strategy.server_optimizer", ("none", {"name": "nesterov"}))]) == {
        "strategy.server_optimizer": "none"
    }
    assert space.own(base, [Range("strategy.server_optimizer.lr", 0.1, 1.0)]) is None


def test_what_a_default_comes_to_is_the_same_run_as_that_by_name() -> None:
    momentum = {"name": "nesterov", "lr": 0.7, "momentum": 0.5}
    key = "strategy.server_optimizer"
    assert space.own(loading.load(None, []), [Choice(key, ("none", momentum))]) == {key: momentum}
    with pytest.raises(UserError, match="are the same run"):
        definition.make(None, [f"{key}=auto,{{name='nesterov', lr=0.7, momentum=0.5}}"])
    with pytest.raises(UserError, match=r"'auto' takes no option \(lr\)"):
        definition.make(None, [f"{key}.lr=0.5,0.7"])


@pytest.mark.parametrize("text", ["personal.budget=2,4", "personal.weights=[0.5],[0.25]"])
def test_what_changes_no_loss_that_chooses_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"vary it on a finished run \(apiary personal RUN"):
        definition.make(None, ["personal.enabled=true", text])


def test_a_sweep_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    texts = ["train.lr=1e-4..1e-2:log", 'adapter.targets=["q_proj"],all-linear', "rounds=2"]
    sweep = definition.make(None, texts, seeds=3, trials=5, pruner="median")
    definition.write(tmp_path, sweep, {"jobs": 2, "threads": 1})
    again, machine = definition.read(tmp_path)
    assert machine == {"jobs": 2, "threads": 1}
    definition.check_same(again, sweep)
    assert [again.config({"train.lr": 1e-3, "adapter.targets": ["q_proj"]}, s) for s in again.seeds] == [
        sweep.config({"train.lr": 1e-3, "adapter.targets": ["q_proj"]}, s) for s in sweep.seeds
    ]
    definition.check_same(again, definition.make(None, texts, seeds=3, trials=9, pruner="median"))  # more of it
    others = {
        "begun with --seeds 3": definition.make(None, texts, seeds=2, trials=5, pruner="median"),
        "with --seeds 3; leave": definition.make(None, texts, seeds=4, trials=5, pruner="median"),  # learnt from three
        "begun with rounds = 2": definition.make(None, [*texts[:2], "rounds=3"], seeds=3, trials=5, pruner="median"),
        "begun with --pruner median": definition.make(None, texts, seeds=3, trials=5),
        r"train\.lr = 0\.0001\.\.0\.01:log": definition.make(
            None, texts[1:], seeds=3, search="tpe", pruner="median", trials=5
        ),
    }
    for words, other in others.items():
        with pytest.raises(UserError, match=words):
            definition.check_same(again, other)
    begun, more = (definition.make(None, ["train.lr=1e-3,2e-3"], seeds=n) for n in (2, 3))
    definition.check_same(begun, more)  # a grid runs the new seed too
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        definition.read(tmp_path)
    with pytest.raises(UserError, match="holds no sweep"):
        definition.read(tmp_path / "elsewhere")


def test_the_command_of_a_setting_gives_its_configuration(tmp_path: Path) -> None:
    """Pasted into a shell it is the run that was measured, but for the rows that were set apart."""
    import shlex

    file = tmp_path / "my run.toml"
    file.write_text("rounds = 5\n[train]\nlr = 0.001\n")
    texts = [
        "train.lr=1e-3,6e-3",
        'adapter.targets=["q_proj", "v_proj"],all-linear',
        "strategy.server_optimizer=none,{name='nesterov', lr=0.7}",
        "log.project='a, b'",
    ]
    sweep = definition.make(file, texts)
    for values in sweep.settings() or ():
        words = shlex.split(sweep.command(values))
        assert words[:3] == ["apiary", "simulate", str(file)]
        overrides = words[4::2]
        assert set(words[3::2]) == {"-s"}
        made = loading.load(words[2], [*overrides, "evaluate.set_apart=true"])
        assert made == sweep.config(values, 0)
