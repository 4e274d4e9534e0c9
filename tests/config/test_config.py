"""The configuration: what goes in comes out again, and what is wrong is said in one line a key."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from apiary.config import loading
from apiary.config.schema import Method, RunConfig
from apiary.core.errors import UserError

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.toml"))

_text = st.text(st.characters(codec="utf-8"), max_size=20)
_share = st.floats(0.0, 0.99)
_positive = st.floats(1e-12, 1e12)
_count = st.integers(1, 10**6)
_option = st.one_of(st.booleans(), st.integers(-(10**9), 10**9), _positive, _text)
_method = st.one_of(
    st.from_regex(r"[a-z_]{1,12}", fullmatch=True),
    st.builds(
        lambda name, options: {**options, "name": name},
        st.from_regex(r"[a-z_]{1,12}", fullmatch=True),
        st.dictionaries(st.from_regex(r"[a-z]{1,8}", fullmatch=True), _option, max_size=3),
    ),
)


def _table(**keys: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keys)


_steps = st.one_of(_table(), _table(steps=_count), _table(epochs=_positive))
_train = st.builds(
    lambda length, rest: {**length, **rest},
    _steps,
    _table(lr=_positive, warmup=_share, penalties=st.lists(_method, max_size=2)),
)
_config = _table(
    seed=st.integers(0, 2**63 - 1),
    rounds=_count,
    model=_table(name=_text, revision=_text, dtype=st.sampled_from(["auto", "float32"])),
    adapter=_table(alpha=_positive, targets=st.one_of(_text, st.lists(_text, max_size=3))),
    data=_table(columns=st.dictionaries(_text, _text, max_size=3), test=_text, partition=_method),
    prompt=_table(template=_text, system=_text),
    train=_train,
    strategy=_table(options=st.dictionaries(_text, _option, max_size=3), quorum=_share.filter(bool)),
    evaluate=_table(baselines=st.lists(st.sampled_from(["base", "local", "central", "central_serial"]), max_size=3)),
    log=_table(trackers=st.lists(st.sampled_from(["wandb", "mlflow"]), max_size=2)),
)


@given(_config)
@example({"prompt": {"system": 'tab\t "quoted" \\ \n \x7f \x00 ü 🐝'}})
@example({"data": {"columns": {"a.b c": "d", "": "\x7f"}}})
@settings(max_examples=150, deadline=None)
def test_toml_and_json_give_the_same_configuration_back(values: dict[str, Any]) -> None:
    config = loading.parse(values)
    assert loading.parse(tomllib.loads(config.to_toml())) == config
    assert loading.from_json(config.to_json()) == config


def test_the_written_file_is_whole_and_loads(tmp_path: Path) -> None:
    config = loading.load(None, ["train.epochs=0.5", "data.partition=iid"])
    (tmp_path / "run.toml").write_text(config.to_toml(), encoding="utf-8")
    assert loading.load(tmp_path / "run.toml") == config
    text = (tmp_path / "run.toml").read_text(encoding="utf-8")
    assert "steps" not in tomllib.loads(text)["train"]  # exclusive with epochs


def test_no_file_is_the_demo() -> None:
    assert loading.load() == RunConfig()
    assert RunConfig().train.steps is not None


@pytest.mark.parametrize(
    ("override", "section", "key", "expected"),
    [
        ("train.lr=1e-4", "train", "lr", 1e-4),
        ("model.name=gpt2", "model", "name", "gpt2"),
        ("model.name=org/some-model", "model", "name", "org/some-model"),
        ("model.name=a=b", "model", "name", "a=b"),
        ('prompt.system="Be brief # really."', "prompt", "system", "Be brief # really."),
        ("prompt.system=Be brief # really.", "prompt", "system", "Be brief # really."),
        ("evaluate.baselines=[]", "evaluate", "baselines", ()),
        ('evaluate.baselines=["base"]', "evaluate", "baselines", ("base",)),
        ('adapter.targets=["q_proj", "v_proj"]', "adapter", "targets", ("q_proj", "v_proj")),
        ('data.columns={ output = "reply" }', "data", "columns", {"output": "reply"}),
        ("data.columns.output=reply", "data", "columns", {"output": "reply"}),
        ("strategy.options.momentum=0.9", "strategy", "options", {"momentum": 0.9}),
        ("train.epochs=2", "train", "epochs", 2.0),
        ('train.penalties=["fedprox"]', "train", "penalties", (Method(name="fedprox"),)),
    ],
)
def test_an_override_is_a_toml_value_or_a_bare_word(override: str, section: str, key: str, expected: object) -> None:
    assert getattr(getattr(loading.load(None, [override]), section), key) == expected


def test_a_method_may_be_given_by_its_name_alone() -> None:
    assert loading.load(None, ["data.partition=iid"]).data.partition == Method(name="iid")


def test_an_option_goes_on_top_of_the_partition_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[data]\npartition = "by_value"\n', encoding="utf-8")
    partition = loading.load(path, ["data.partition.by=category"]).data.partition
    assert (partition.name, partition.options) == ("by_value", {"by": "category"})
    default = loading.load(None, ["data.partition.alpha=2.5"]).data.partition
    assert (default.name, default.options) == ("dirichlet", {"alpha": 2.5, "by": "skill"})
    other = loading.load(None, ["data.partition.name=iid"]).data.partition
    assert (other.name, other.options) == ("iid", {})


def test_the_newer_of_steps_and_epochs_wins(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[train]\nsteps = 5\n", encoding="utf-8")
    train = loading.load(path, ["train.epochs=1.5"]).train
    assert (train.steps, train.epochs) == (None, 1.5)
    train = loading.load(path, ["train.epochs=1.5", "train.steps=3"]).train
    assert (train.steps, train.epochs) == (3, None)


def test_a_file_with_both_lengths_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[train]\nsteps = 5\nepochs = 1.0\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"train\.steps and train\.epochs are exclusive"):
        loading.load(path)


def test_a_train_table_without_a_length_keeps_the_default_one(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[train]\nlr = 0.1\n", encoding="utf-8")
    train = loading.load(path).train
    assert train.lr == 0.1
    assert train.steps == RunConfig().train.steps is not None


def test_paths_beside_the_file_are_found_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    path = tmp_path / "run.toml"
    text = '[data]\nsource = "rows.jsonl"\ntest = "absent.jsonl"\n[model]\nname = "gpt2"\n'
    path.write_text(text, encoding="utf-8")
    config = loading.load(path)
    assert config.data.source == str(tmp_path / "rows.jsonl")
    assert (config.data.test, config.model.name) == ("absent.jsonl", "gpt2")


def _problems(*overrides: str) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        loading.load(None, overrides)
    return caught.value.problems


@pytest.mark.parametrize(
    ("override", "offered"),
    [
        ("train.lrr=1", "'train.lr'"),
        ("trian.lr=1", "'train'"),
        ("adapter.rnak=4", "'adapter.rank'"),
        ("lr=1", "'train.lr'"),  # the right name in the wrong table
        ("train.rank=4", "'adapter.rank'"),
        ("simulate.engin=ray", "'simulate.engine'"),
    ],
)
def test_an_unknown_key_offers_the_nearest(override: str, offered: str) -> None:
    (line,) = _problems(override)
    assert line.startswith("unknown key ")
    assert line.endswith(f"did you mean {offered}?")


def test_an_unknown_key_like_nothing_lists_what_there_is() -> None:
    (line,) = _problems("log.xyzzy=1")
    assert line == "unknown key 'log.xyzzy': allowed are trackers, project"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.lr=fast", "train.lr = 'fast': must be a number, above 0"),
        ("train.lr=-1", "train.lr = -1: must be a number, above 0"),
        ("train.lr=inf", "train.lr = inf: must be finite, above 0"),
        (
            "strategy.fraction=1.5",
            "strategy.fraction = 1.5: must be a number, above 0 and at most 1",
        ),
        ("rounds=2.5", "rounds = 2.5: must be a whole number, at least 1"),
        ("data.clients=true", "data.clients = true: must be a whole number, at least 1"),
        ("evaluate.generate=1", "evaluate.generate = 1: must be true or false"),
        ("model.name=5", "model.name = 5: must be text"),
        (
            "model.dtype=float23",
            "model.dtype = 'float23': allowed are 'auto', 'float32', 'bfloat16'; did you mean 'float32'?",
        ),
        (
            "evaluate.baselines=['bas']",
            "evaluate.baselines[0] = 'bas': allowed are 'base', 'local', 'central', 'central_serial'; "
            "did you mean 'base'?",
        ),
        (
            "evaluate.baselines=base",
            "evaluate.baselines = 'base': must be a list of 'base', 'local', 'central', 'central_serial'",
        ),
        ("adapter.targets=5", 'adapter.targets = 5: must be text or a list of texts, such as ["a", "b"]'),
        (
            "data.partition=5",
            'data.partition = 5: must be a name, or a table such as { name = "..." }',
        ),
        ("data.partition={alpha=1}", "data.partition = { alpha = 1 }: it has no name; name = ... is needed"),
        ("data.columns=5", "data.columns = 5: must be a table, such as { key = ... }"),
        ("data.columns.output=5", "data.columns.output = 5: must be text"),
        ("log=5", "log = 5: must be a table with the keys trackers, project"),
        ("train.lr", "-s 'train.lr': expected KEY=VALUE, for example -s train.lr=1e-4"),
    ],
)
def test_a_wrong_value_is_one_line_with_key_value_and_what_is_allowed(override: str, line: str) -> None:
    assert _problems(override) == (line,)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("strategy.options.limit=inf", "strategy.options.limit = inf"),
        ('simulate.attack={ name = "alie", z = nan }', "simulate.attack.z = nan"),
        ('train.penalties=[{ name = "fedprox", mu = -inf }]', r"train.penalties\[0\].mu = -inf"),
    ],
)
def test_an_option_that_json_cannot_carry_is_refused(override: str, key: str) -> None:
    """It would arrive at the other side as null, and be taken for the default."""
    with pytest.raises(UserError, match=rf"^{key}: must be finite"):
        loading.load(None, ["strategy.name=norm_clip", override])


def test_an_odd_item_of_a_list_that_might_be_a_word_is_told_by_its_place() -> None:
    with pytest.raises(UserError) as caught:
        loading.load(None, ["adapter.ranks=[4, 2.5]"])
    assert caught.value.problems == ("adapter.ranks[1] = 2.5: must be a whole number",)
    with pytest.raises(UserError, match=r"'lots': must be a list of whole numbers, such as \[4, 8\], or 'memory'$"):
        loading.load(None, ["adapter.ranks=lots"])


def test_a_long_value_is_cut() -> None:
    (line,) = _problems("train.lr=" + "x" * 5000)
    assert len(line) < 120
    assert "\n" not in line


def test_all_problems_are_collected_and_the_first_is_the_message() -> None:
    overrides = ("nonsense", "train.lr=-1", "data.clients=0", "modle.name=x")
    with pytest.raises(UserError, match=r"^-s 'nonsense'.*\(and 3 more: run `apiary doctor`\)$") as caught:
        loading.load(None, overrides)
    heads = [problem.split(" = ")[0].split(":")[0] for problem in caught.value.problems]
    assert sorted(heads) == sorted(["-s 'nonsense'", "train.lr", "data.clients", "unknown key 'modle'"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"rounds = = 3", "is not valid TOML"),
        (b"\xff\xfe", "is not valid TOML"),
        (None, "does not exist"),
    ],
)
def test_a_broken_or_missing_file_is_one_line(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        loading.load(path)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_config_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        loading.load(tmp_path)


def test_nothing_in_a_configuration_can_be_changed() -> None:
    config = RunConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.train.lr = 1.0  # type: ignore[misc]


def test_every_key_is_described_with_a_default_that_it_accepts() -> None:
    rows = loading.describe()
    keys = {f"{s}.{k}" for s, t in RunConfig().model_dump().items() if isinstance(t, dict) for k in t}
    assert {key for key, _, _ in rows} == keys | {"seed", "rounds"}
    for key, default, description in rows:
        assert len(description) > 10, key
        assert "\n" not in description
        if default != "unset":
            assert loading.load(None, [f"{key}={default}"]) is not None


def _choices(kind: Any) -> Iterator[str]:
    if get_origin(kind) is Literal:
        yield from map(str, get_args(kind))
    else:
        for part in get_args(kind):
            yield from _choices(part)


def test_a_description_names_all_that_may_be_chosen() -> None:
    meanings = {key: meaning for key, _, meaning in loading.describe()}
    fields = {
        f"{name}.{key}": inner
        for name, field in RunConfig.model_fields.items()
        for key, inner in getattr(type(field.default), "model_fields", {}).items()
    }
    known = {key: list(_choices(inner.annotation)) for key, inner in fields.items()}
    assert known["prompt.on_long"] == ["truncate", "drop"]
    for key, choices in known.items():
        assert all(choice in meanings[key] for choice in choices), (key, choices)


def test_the_recipes_are_where_they_are_looked_for() -> None:
    assert CONFIGS, "no configs/*.toml found"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_loads_and_names_what_a_reader_looks_for(path: Path) -> None:
    config = loading.load(path)
    written = tomllib.loads(path.read_text(encoding="utf-8"))
    assert loading.parse(tomllib.loads(config.to_toml())) == config
    assert path.read_text(encoding="utf-8").startswith("#"), "say in a comment what the recipe is for"
    assert {"rounds", "data", "prompt", "train"} <= set(written)
    assert {"source", "partition"} <= set(written["data"])


@pytest.mark.parametrize("buffer", [1.0, 1.5, 1.001, 2.5, 100.5])
def test_a_buffer_that_can_only_be_a_slip_is_refused(buffer: float) -> None:
    with pytest.raises(
        UserError, match=r"continual\.buffer = .*: must be a fraction below 1, such as 0\.1, or a whole"
    ):
        loading.load(None, [f"continual.buffer={buffer}", 'continual.stages=[["sort"]]'])


@pytest.mark.parametrize("buffer", [0.0, 0.999, 2.0, 500.0])
def test_fractions_and_whole_numbers_of_rows_are_buffers(buffer: float) -> None:
    settings = [f"continual.buffer={buffer}", 'continual.stages=[["sort"]]']
    assert loading.load(None, settings).continual.buffer == buffer
