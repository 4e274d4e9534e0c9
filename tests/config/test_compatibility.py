"""Every pair of methods either works or is refused at start; the documentation's table is what the code decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import in_a_process, with_overrides
from conftest import instruction_rows

from apiary.config import loading
from apiary.config.compatibility import POINTWISE
from apiary.core.errors import UserError
from apiary.tracking.event_log import read_events
from benchmarks import together
from strategies import AGGREGATORS

ROOT = Path(__file__).resolve().parents[2]
PAIRS = list(together.pairs())
SHORT = ["evaluate.baselines=[]", "evaluate.generate=false"]
STAGES = 'continual.stages=[["first"], ["last"]]'


def test_the_table_in_the_documentation_is_the_codes_own() -> None:
    text = (ROOT / "docs" / "together.md").read_text(encoding="utf-8")
    assert together.table() in text and together.methods_table() in text


def test_every_feature_works_by_itself() -> None:
    for feature in together.FEATURES:
        loading.load(None, feature.settings)


@pytest.mark.parametrize(
    ("settings", "why", "way_out"),
    [
        (["privacy.unit=record", 'curate.steps=["ifd"]'], "'ifd' may let one row decide", "mask, length"),
        (["privacy.unit=record", 'curate.steps=["mine:step"]'], "'mine:step' may let one row", "mask, length"),
        (["privacy.unit=record", STAGES, "continual.buffer=0.1"], "drives another out", '"poisson"'),
        (['curate.steps=[{ name = "ifd", warmup = 3 }]'], "waits for 3 rounds", "set curate.every"),
        (["privacy.unit=record", "evaluate.clients=true"], "would leave without noise", "leave the key out"),
        (["privacy.unit=record", "adapter.dropout=0.1"], "masks are drawn for a whole batch", "set 0"),
        (["privacy.unit=record", "train.accumulate=2"], "one random draw", "privacy.batch_rows"),
        ([STAGES, "rounds=1"], "names 2 stages", "a round at least"),
        (
            ["privacy.unit=record", STAGES, "continual.buffer=20.0", "continual.policy=poisson"],
            "depend on the",
            "below 1",
        ),
        (["privacy.unit=record", "data.max_rows=50"], "depends on how many", "smaller file"),
        (
            [
                STAGES,
                "continual.by=label",
                'data.columns={instruction="text", output="label"}',
                'curate.steps=["mask"]',
            ],
            "may rewrite",
            "another column",
        ),
        (["continual.buffer=0.1"], "nothing to replay", "name the stages"),
        ([STAGES, "evaluate.patience=2"], "leave out the later", "set 0"),
        (["evaluate.patience=2", "evaluate.every=0"], "measures nothing between rounds", "evaluate.every = 1"),
        (["evaluate.patience=2", "adapter.share=a"], "no earlier one could be delivered", "set 0"),
    ],
)
def test_what_cannot_go_together_is_refused_with_reason_and_way_out(
    settings: list[str], why: str, way_out: str
) -> None:
    with pytest.raises(UserError) as told:
        loading.load(None, settings)
    (line,) = told.value.problems
    assert why in line and way_out in line and "\n" not in line


def test_each_reason_is_met_by_some_pair_or_by_a_single_setting() -> None:
    """A rule that nothing can break would be dead code."""
    refused = {reason.split(" =")[0].split(":")[0] for _, _, reasons in PAIRS for reason in reasons}
    assert refused == {
        "curate.steps",
        "continual.policy",
        "evaluate.clients",
        "adapter.dropout",
        "train.accumulate",
        "train.penalties",
        "adapter.share",
        "strategy.name",
        "continual.stages",
        "evaluate.patience",
    }


def _small(settings: tuple[str, ...]) -> list[str]:
    """The settings with the tasks of the test's own rows."""
    return [STAGES if setting.startswith("continual.stages") else setting for setting in settings]


PRIVATE = "record-level privacy"
WORKING = [
    pytest.param(one, other, id=f"{one.name} with {other.name}")
    for one, other, reasons in PAIRS
    if not reasons and "Ray engine" not in (one.name, other.name)
]


@pytest.mark.slow
@pytest.mark.parametrize(("one", "other"), WORKING)
def test_a_pair_that_is_allowed_runs_and_learns(
    one: together.Feature, other: together.Feature, small_run: list[str], tmp_path: Path
) -> None:
    metrics = _run([*small_run, *_small(one.settings), *_small(other.settings)], tmp_path)
    assert [entry["round"] for entry in metrics["rounds"]] == [0, 1, 2, 3]
    names = (one.name, other.name)
    # Each method did what it is for.
    assert bool(metrics["curation"]) == (any("curation" in name for name in names) and PRIVATE not in names)
    assert ("continual" in metrics) == any("stage" in name or "replay" in name for name in names)
    assert metrics["privacy"]["unit"] == ("record" if PRIVATE in names else "none")
    events = [event for event in read_events(tmp_path / "run") if event["event"] == "client"]
    assert any(event["replayed"] > 0 for event in events) == any("replay," in name for name in names)
    measured = "clients_loss" if "a B of each client's own" in names and PRIVATE not in names else "loss"
    losses = [entry[measured] for entry in metrics["rounds"] if measured in entry]
    if PRIVATE in names:  # under noise a run this short may not learn
        assert 0 < metrics["privacy"]["epsilon"] <= metrics["privacy"]["budget"]
        assert all(entry["rates"] for entry in _charges(tmp_path / "run"))
    else:
        assert losses[-1] < losses[0]


METHODS = [
    pytest.param(name, chosen, id=f"{name} with {', '.join(feature.name for feature in chosen)}")
    for name in AGGREGATORS
    for chosen in together.runs(name)
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "chosen"), METHODS)
def test_a_method_runs_with_all_that_is_allowed_beside_it(
    name: str, chosen: tuple[together.Feature, ...], small_run: list[str], tmp_path: Path
) -> None:
    settings = [*together.method(name).settings, *(s for feature in chosen for s in _small(feature.settings))]
    if name == "fltrust":
        rows = "".join(json.dumps(row) + "\n" for row in instruction_rows(20, 9))
        (tmp_path / "root.jsonl").write_text(rows, encoding="utf-8")
        settings.append(f"strategy.root={tmp_path / 'root.jsonl'}")
    metrics = _run([*small_run, *settings], tmp_path)
    assert [entry["round"] for entry in metrics["rounds"]] == [0, 1, 2, 3]
    events = read_events(tmp_path / "run")
    assert not [event for event in events if event["event"] == "refused"]
    assert [event["clients"] for event in events if event["event"] == "round"] == [3, 3, 3]
    assert not any(entry.get("unchanged") for entry in metrics["rounds"])
    features = {feature.name for feature in chosen}
    assert ("attack" in metrics) == ("attackers" in features)
    assert (metrics["privacy"]["unit"] == "record") == ("record-level privacy" in features)
    ranks = {client["rank"] for client in metrics["clients"]}
    assert ranks == ({2, 4} if "several ranks" in features else {4})
    up = {"`int8` up", "`int4` up"} & features
    assert all(("float32_up" in event) == bool(up) for event in events if event["event"] == "round")


@pytest.mark.slow
@pytest.mark.ray
def test_curation_replay_privacy_and_ray_in_one(small_run: list[str], tmp_path: Path) -> None:
    wanted = ("curation, row by row", "replay, poisson", "record-level privacy", "FedProx", "Ray engine")
    settings = [s for feature in together.FEATURES if feature.name in wanted for s in _small(feature.settings)]
    # Ray takes longer than 0.2 s to start on any machine: no client may be given up for that. It has a process of its
    # own, for it leaves files and processes open.
    settings += ["strategy.join_timeout_s=0.2", *SHORT]
    done = in_a_process("simulate", "--quiet", "--out", tmp_path / "run", *with_overrides(small_run, *settings))
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert len(metrics["continual"]["loss"]) == 3
    assert 0 < metrics["privacy"]["epsilon"] <= metrics["privacy"]["budget"]
    assert len(metrics["privacy"]["clients"]) == 3


def _charges(folder: Path) -> list[dict[str, Any]]:
    ledgers = [json.loads(path.read_text()) for path in (folder / "clients").glob("*/ledger.json")]
    assert len(ledgers) == 3
    return [entry for ledger in ledgers for entry in ledger["entries"]]


def _run(settings: list[str], folder: Path) -> dict[str, Any]:
    from simulation.run import simulate

    return simulate(loading.load(None, [*settings, *SHORT]), folder / "run")


def test_the_steps_allowed_under_privacy_are_those_that_look_at_one_row() -> None:
    from apiary.config.schema import Method
    from client.curation import STEPS, build_steps

    needed = {"random": {"keep": 0.5}}
    flags = {name: build_steps([Method(name=name, **needed.get(name, {}))])[0][1].pointwise for name in STEPS}
    assert {name for name, pointwise in flags.items() if pointwise} == set(POINTWISE)
