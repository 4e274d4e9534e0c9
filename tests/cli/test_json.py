"""What other programs read: one JSON document on stdout and nothing else, and the schema of a configuration."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from command_line import ROOT, apiary, assert_refused, with_overrides

from apiary.config import loading, toml_text


def _document(*words: str | Path) -> Any:
    done = apiary(*words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def checker() -> jsonschema.Draft202012Validator:
    schema = _document("config", "--schema")
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_defaults_are_those_of_an_empty_configuration() -> None:
    everything = _document("config", "--json")
    assert everything == json.loads(loading.load().to_json())
    assert loading.parse(everything) == loading.load()
    assert _document("config", "strategy.name", "--json") == {"strategy": {"name": "fedavg"}}
    assert _document("config", "rounds", "--json") == {"rounds": everything["rounds"]}
    assert _document("config", "wire", "--json") == {"wire": everything["wire"]}
    assert_refused(apiary("config", "strateg", "--json"), "did you mean 'strategy'?")
    assert_refused(apiary("config", "strategy", "--schema"), "--schema")


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "configs").glob("*.toml")))
def test_the_schema_takes_every_recipe(checker: jsonschema.Draft202012Validator, recipe: str) -> None:
    written = tomllib.loads((ROOT / "configs" / recipe).read_text(encoding="utf-8"))
    assert [error.message for error in checker.iter_errors(written)] == []
    whole = json.loads(loading.load(ROOT / "configs" / recipe).to_json())
    assert [error.message for error in checker.iter_errors(whole)] == []


@pytest.mark.parametrize(
    ("setting", "good"),
    [
        ("data.partition=iid", True),
        ('data.partition={ name = "dirichlet", alpha = 0.3, by = "skill" }', True),
        ("data.partition={ alpha = 0.3 }", False),
        ('curate.steps=["mask", { name = "length", max = 9 }]', True),
        ("curate.steps=[3]", False),
        ("train.lrr=1", False),
        ("train.lr=0", False),
        ("rounds=0", False),
        ("rounds=3", True),
        ("adapter.train=c", False),
        ('adapter.targets=["q_proj"]', True),
        ("evaluate.clients=true", True),
        ("trane.lr=1", False),
        ("strategy.options={ byzantine = 1 }", True),
    ],
)
def test_the_schema_and_the_program_refuse_the_same(
    checker: jsonschema.Draft202012Validator, setting: str, good: bool
) -> None:
    values: dict[str, Any] = {}
    toml_text.override(values, setting, partition={})
    assert checker.is_valid(values) == good
    if good:
        loading.parse(values)
    else:
        with pytest.raises(loading.UserError):
            loading.parse(values)


def test_the_schema_tells_what_each_key_means(checker: jsonschema.Draft202012Validator) -> None:
    described = {}
    for table, part in checker.schema["properties"].items():
        name = part.get("$ref", "").rpartition("/")[2]
        for key, value in checker.schema["$defs"][name]["properties"].items() if name else [("", part)]:
            described[f"{table}.{key}".rstrip(".")] = value["description"]
    assert described == {name: meaning for name, _, meaning in loading.describe()}


def test_the_plan_of_privacy_has_the_numbers_that_are_printed() -> None:
    keys = ("privacy", "plan", "--rows", "400", *with_overrides([], "privacy.unit=record", "rounds=5"))
    made, lines = _document(*keys, "--json"), apiary(*keys).stdout.splitlines()
    noise, rows, steps = (
        next(line for line in lines if line.startswith(name)).split()[1] for name in ("noise", "rows", "steps")
    )
    assert (f"{made['noise_multiplier']:.4f}", made["rows"], made["steps"]) == (noise, [int(rows)], int(steps))
    told = [re.split(" +", line.strip())[:4] for line in lines[-5:]]
    spent = [
        [str(at["round"]), str(at["steps"]), f"{at['epsilon_pld']:.3f}", f"{at['epsilon_rdp']:.3f}"]
        for at in made["spent"]
    ]
    assert spent == told
    assert [at["chance"] for at in made["rounds"]] == [pytest.approx(64 / 400)] * 5
    assert (made["unit"], made["epsilon"], made["delta"], made["client"]) == ("record", 8.0, 1e-5, None)
    assert_refused(apiary("privacy", "plan", "--rows", "20", "--json"), "privacy.batch_rows", "20 rows")


def test_the_doctor_tells_the_same_to_programs(small_run: list[str]) -> None:
    found = _document("doctor", "--json", *with_overrides(small_run, "seed=5"))
    assert found["problems"] == []
    assert found["config"] == json.loads(loading.load(None, [*small_run, "seed=5"]).to_json())
    assert (found["machine"]["device"], found["machine"]["dtype"]) == ("cpu", "float32")
    assert found["data"]["rows"] == found["data"]["usable"] == 120
    assert sum(client["examples"] for client in found["clients"]) == found["data"]["train"]
    # Rank 4 on two layers of width 32 and 64: four square layers and three of the MLP; both ways in three rounds, and
    # down for the evaluation before the first and after each.
    parameters, cost = 2 * 4 * (4 * (32 + 32) + 3 * (32 + 64)), found["cost"]
    assert (cost["trained_parameters"], cost["bytes_down"], cost["bytes_up"]) == (parameters, *[4 * parameters] * 2)
    assert (cost["steps"], cost["bytes"]) == (18, 3 * 4 * parameters * (2 * 3 + 4))
    assert cost["seconds_with_baselines"] == pytest.approx(4 * cost["seconds"])
    assert cost["memory_bytes"] > 0


def test_what_the_doctor_finds_is_in_the_document_and_on_stderr(tmp_path: Path, small_run: list[str]) -> None:
    wrong = [f"data.source={tmp_path / 'nowhere.jsonl'}", "model.device=cuda:99"]
    done = apiary("doctor", "--json", *with_overrides(small_run, *wrong))
    found = json.loads(done.stdout)
    assert done.returncode == 2
    assert len(found["problems"]) == 2 and "data" not in found and found["config"]["rounds"] == 3
    assert [line for line in done.stderr.splitlines() if line.startswith("apiary: ")] == [
        f"apiary: {problem}" for problem in found["problems"]
    ]
    broken = apiary("doctor", "--json", "-s", "rounds=0")
    assert json.loads(broken.stdout) == {
        "problems": ["rounds = 0: must be a whole number, at least 1"],
        "warnings": [],
    }
    assert_refused(broken, "rounds = 0")
