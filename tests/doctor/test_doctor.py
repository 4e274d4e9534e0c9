"""The doctor: all problems at once, and a plan whose numbers are right."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import instruction_rows
from rich.console import Console

from apiary.config import loading
from apiary.config.schema import RunConfig
from apiary.core.errors import UserError
from apiary.core.tensors import digest
from apiary.data import examples, federation, tokenization
from apiary.data.federation import federate
from apiary.doctor import document, examine, forecast, plan, values
from apiary.models import adapters
from apiary.privacy.accounting import Mechanism, epsilon
from apiary.tracking.event_log import read_events
from client.training import trainer
from simulation.run import simulate

_SENT = ("bytes_up", "bytes_down", "bytes_evaluate")


def _doctor(overrides: list[str], path: Path | None = None, *, colour: bool = False) -> tuple[bool, str]:
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=colour, highlight=False)
    return examine(lambda: loading.load(path, overrides), console), out.getvalue()


def _problems(text: str) -> list[str]:
    return re.findall(r"^  - (.*)$", text, re.MULTILINE)


def _fact(text: str, name: str) -> str:
    (line,) = re.findall(rf"^  {name} +(.*)$", text, re.MULTILINE)
    return str(line)


def test_a_sound_run_is_told_in_numbers_that_hold(small_run: list[str]) -> None:
    good, text = _doctor(small_run)
    assert good, text
    assert "no problem found" in text
    assert _fact(text, "rows") == "120, of them 120 usable (100.0%)"
    # Rank 4 on two layers of width 32 and 64: four square layers and three of the MLP.
    parameters = 2 * 4 * (4 * (32 + 32) + 3 * (32 + 64))
    assert _fact(text, "trained").startswith(f"{parameters:,} parameters")
    assert _fact(text, "per round").startswith("17.4 kB down and 17.4 kB up a client")
    # Three rounds down and up, and evaluations before the first round and after each.
    assert f"{3 * 4 * parameters * (2 * 3 + 4) / 1000:.0f} kB in the whole run" in text
    assert _fact(text, "steps") == "2 a client and round, 18 in 3 rounds"
    assert "baseline local: 18 more" in text
    assert "baseline central: 18 more" in text
    assert "baseline central_serial: 6 more, each on 3 times the tokens" in text
    assert "cpu (asked for)" in _fact(text, "device")
    assert _fact(text, "arithmetic") == "float32 (asked for)"


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        [],
        ["wire.up=int4", "wire.down=int8"],
        ["adapter.train=b"],
        ["adapter.ranks=[4, 8, 16]", "strategy.name=flexlora"],
        ["strategy.name=scaffold", "train.optimizer=sgd"],
        ["strategy.name=flora", "adapter.ranks=[4, 8, 16]"],
        ["strategy.name=fedex", "strategy.options.base_rank=20"],
        ["strategy.name=fedkseed", "train.steps=40"],
        ["adapter.train=b", "wire.down=sparse"],
    ],
)
def test_the_bytes_are_those_that_a_run_sends(small_run: list[str], tmp_path: Path, more: list[str]) -> None:
    """All that its log counts, messages' names and headers aside."""
    settings = [*small_run, "adapter.rank=16", *more, "evaluate.baselines=[]", "evaluate.generate=false"]
    run = loading.load(None, settings)
    simulate(run, tmp_path / "run")
    events = read_events(tmp_path / "run")
    sent = sum(e.get(key, 0) for e in events if e["event"] in ("round", "evaluate") for key in _SENT)
    steps = run.train.steps or 0
    planned = forecast.plan_traffic(
        run, adapters.load(run.model, run.adapter), forecast.Work((), (steps,) * 3, 3, 0, 0)
    )
    assert planned.total == pytest.approx(sent, rel=0.1)
    (up,) = {e["bytes_up"] / 3 for e in events if e["event"] == "round" and e["round"] == 2}
    assert planned.up == pytest.approx(up, rel=0.1)


def test_the_clients_are_told_with_their_tokens(small_run: list[str], tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    _, text = _doctor(small_run)
    federation = federate(loading.load(None, small_run).data, 0)
    for client in federation.clients:
        # Each answer and the end-of-sequence token behind it.
        tokens = sum(len(tokenizer(examples.answer(e))["input_ids"]) + 1 for e in client.train)
        (row,) = re.findall(rf"^ *{client.name} +(\d+) +(\d+) ", text, re.MULTILINE)
        assert row == (str(len(client.train)), str(tokens))


def test_how_a_file_was_read_is_told(small_run: list[str], tmp_path: Path) -> None:
    rows = [{**row, "output": f"à côté {row['output']}"} for row in instruction_rows(60)]
    path = tmp_path / "old.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="latin-1")
    _, text = _doctor([*small_run, f"data.source={path}"])
    assert "old.jsonl: read as cp1252 text, which is a guess by its letters; save it as UTF-8 to be sure" in text
    told = values.rows_values(federate(loading.load(None, [*small_run, f"data.source={path}"]).data, 0), {})
    assert [note["file"] for note in told["notes"]] == ["old.jsonl"] and "cp1252" in told["notes"][0]["note"]


def test_rows_that_spell_control_tokens_are_counted(small_run: list[str], tmp_path: Path) -> None:
    rows = [
        row | {"output": row["output"] + (" <eos> more" if k % 40 == 0 else "")}
        for k, row in enumerate(instruction_rows(120))
    ]
    path = tmp_path / "logs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    _, text = _doctor([*small_run, f"data.source={path}"])
    assert (
        "logs.jsonl: 3 of 120 rows spell control tokens of the tokenizer, which stay plain text (rows 1, 41, 81)"
        in text
    )
    count = re.match(r"tokens spelled in (\d) examples", _fact(text, "control"))
    assert count and int(count[1]) in (2, 3)  # of the clients' training rows; the others are held out
    _, text = _doctor(small_run)
    assert _fact(text, "control") == "tokens spelled in no example"


def test_the_preview_brackets_the_answer_and_nothing_else(small_run: list[str]) -> None:
    _, text = _doctor(small_run)
    shown = text.split("One example")[1].split("Cost")[0]
    (trained,) = re.findall(r"\[\[(.*)\]\]$", shown, re.MULTILINE)
    prompt = next(row for row in instruction_rows(120) if row["instruction"] in shown)
    assert trained == prompt["output"] + "<eos>"


def test_the_template_is_told_and_why(small_run: list[str], tmp_path: Path) -> None:
    for given, said in (
        (["prompt.template=auto"], "alpaca (the tokenizer has no chat template)"),
        (["prompt.template=auto", "model.name=builtin:tiny"], "chat (the tokenizer's own)"),
        ([f"data.source={tmp_path / 'none.jsonl'}"], "plain"),  # whatever else is wrong
    ):
        _, text = _doctor([*small_run, *given])
        assert re.findall(r"^  template +(.*)$", text, re.MULTILINE) == [said]
    _, text = _doctor([*small_run, "prompt.template=auto", f"model.name={tmp_path / 'none'}"])
    assert len(_problems(text)) == 1 and "model.name" in _problems(text)[0]  # nothing is said of a template then


def test_colour_adds_to_the_brackets(small_run: list[str]) -> None:
    _, plain = _doctor(small_run)
    _, coloured = _doctor(small_run, colour=True)
    assert "\x1b[" not in plain
    assert re.search(r"\x1b\[1;32m\[\[", coloured)
    assert re.search(r"\x1b\[2m", coloured)


def test_all_problems_are_told_at_once(small_run: list[str], tmp_path: Path) -> None:
    def refuse(config: RunConfig) -> None:
        raise UserError(f"strategy.name = {config.strategy.name!r}: allowed are fedavg")

    out = io.StringIO()
    wrong = [
        "model.device=cuda:99",
        f"model.name={tmp_path / 'no-model'}",
        f"data.source={tmp_path / 'no-data.jsonl'}",
        f"prompt.template={tmp_path / 'no-template.txt'}",
        "strategy.name=fedavgg",
    ]
    console = Console(file=out, width=60)
    assert not examine(lambda: loading.load(None, [*small_run, *wrong]), console, checks=[refuse])
    problems = _problems(out.getvalue())  # whole lines, though the console is narrow
    assert len(problems) == 5
    for key in ("strategy.name", "model.device", "data.source", "model.name", "prompt.template"):
        assert sum(key in problem for problem in problems) == 1, (key, problems)
    assert "5 problems" in out.getvalue()


def test_a_file_that_does_not_load_is_told_in_full(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[train]\nlr = -1.0\nstepz = 3\n[data]\nclients = 0\n", encoding="utf-8")
    good, text = _doctor([], path)
    assert not good
    assert sorted(problem.split()[0] for problem in _problems(text)) == [
        "data.clients",
        "train.lr",
        "unknown",
    ]


def test_what_works_is_told_beside_what_does_not(small_run: list[str], tmp_path: Path) -> None:
    good, text = _doctor([*small_run, f"model.name={tmp_path / 'no-model'}"])
    assert not good
    assert _fact(text, "rows").startswith("120,")
    assert len(_problems(text)) == 1


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("strategy.min_clients=4", "strategy.min_clients = 4: there are 3 clients"),
        ("data.test_fraction=0", "data.test_fraction = 0.0: leaves no held-out example"),
    ],
)
def test_what_would_end_the_run_later_is_a_problem_now(small_run: list[str], override: str, said: str) -> None:
    good, text = _doctor([*small_run, override])
    assert not good
    assert any(problem.startswith(said) for problem in _problems(text))


def test_a_tracker_that_is_not_installed_is_a_problem(small_run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    good, text = _doctor([*small_run, 'log.trackers=["wandb", "mlflow"]'])
    assert not good
    assert any("log.trackers" in problem and "pip install" in problem for problem in _problems(text))


def test_examples_that_cannot_fit_are_a_problem_of_each_client(small_run: list[str]) -> None:
    good, text = _doctor([*small_run, "prompt.max_tokens=8", "prompt.on_long=drop"])
    assert not good
    assert len(_problems(text)) == 4  # three clients and the held-out set
    assert all("prompt.max_tokens = 8" in problem for problem in _problems(text))


def test_bad_rows_and_long_rows_are_counted(small_run: list[str], tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    rows: list[dict[str, str]] = list(instruction_rows(60))
    rows[6]["output"] = ""
    rows[9]["output"] = ""
    for row in rows[20:30]:
        row["output"] = "honey " * 200
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    overrides = [*small_run, f"data.source={path}"]
    _, text = _doctor(overrides)
    assert _fact(text, "rows") == "60, of them 58 usable (96.7%)"
    assert "mixed.jsonl: 2 of 60 left out (7, 10)" in text
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    federation = federate(loading.load(None, overrides).data, 0)
    kept = [e for client in federation.clients for e in client.train]
    long = [e for e in kept if len(tokenizer(examples.answer(e))["input_ids"]) > 96]
    assert long, "the split left no long row to train on"
    share = 100 * len(long) / len(kept)
    assert _fact(text, "too long").startswith(f"{len(long)} cut ({share:.1f}%), 0 dropped")
    _, text = _doctor([*overrides, "prompt.on_long=drop"])
    assert _fact(text, "too long").startswith(f"0 cut (0.0%), {len(long)} dropped ({share:.1f}%)")


def test_lengths_are_counted_in_bins_that_end_at_the_limit() -> None:
    bins = plan.length_bins([1, 2, 4, 5, 32, 33, 64, 65, 512, 513, 9000], 64)
    assert bins[:3] == [(1, 4, 3), (5, 8, 1), (9, 16, 0)]
    assert bins[3:] == [(17, 32, 1), (33, 64, 2), (65, 128, 1), (129, 256, 0), (257, 512, 1), (513, None, 2)]


def test_lengths_and_trained_tokens_are_told_with_what_is_cut(small_run: list[str], tmp_path: Path) -> None:
    rows = [{"instruction": "q", "output": "a " * (90 if k % 2 else 1)} for k in range(60)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    overrides = [*small_run, f"data.source={path}", "prompt.max_tokens=64"]
    told = document(lambda: loading.load(None, overrides))
    clients, bins = told["clients"], told["lengths"]
    there = sum(client["examples"] for client in clients)
    assert sum(each["rows"] for each in bins) == there
    long = sum(each["rows"] for each in bins if each["first"] > 64)
    assert long == sum(client["cut"] for client in clients) == sum(c["cut_within_an_answer"] for c in clients) > 0
    assert sum(client["turns"] for client in clients) == 2 * there
    lost = sum(client["trained_tokens_cut"] for client in clients)
    _, text = _doctor(overrides)
    assert f"{lost:,} cut (" in text and f"{long} rows cut within an answer" in text
    assert _fact(text, "turns") == f"{2 * there} in these, of them {there} of the assistant, {there} trained"
    assert len(re.findall(r"#+ +\d+ rows .*too long$", text, re.MULTILINE)) >= 1


def test_nothing_in_the_data_steers_the_terminal(small_run: list[str], tmp_path: Path) -> None:
    rows = instruction_rows(60)
    for row in rows:
        row["instruction"] += " \x1b]0;owned\x07 [bold]no markup[/bold]"
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    good, text = _doctor([*small_run, f"data.source={path}"])
    assert good, text
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[bold]no markup[/bold]" in text


def test_many_clients_are_summed_up(small_run: list[str], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in instruction_rows(600)), encoding="utf-8")
    good, text = _doctor([*small_run, f"data.source={path}", "data.clients=30"])
    assert good, text
    assert "client-07" not in text
    sizes = [
        len(c.train)
        for c in federation.federate(
            loading.load(None, [*small_run, f"data.source={path}", "data.clients=30"]).data, 0
        ).clients
    ]
    for name, value in (("least", min(sizes)), ("median", np.median(sizes)), ("most", max(sizes))):
        assert re.search(rf"{name} of 30 +{value:.0f} ", text), (name, value)


def test_a_model_that_cannot_fit_is_never_loaded(small_run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "device_bytes", lambda device: 10_000)
    before = adapters.base_loads()
    good, text = _doctor([*small_run, "model.dtype=bfloat16", "model.revision=other"])
    assert not good
    (problem,) = _problems(text)
    assert "its weights take" in problem
    assert "cpu has 10.0 kB" in problem
    assert adapters.base_loads() == before


def test_the_size_of_a_model_is_known_without_its_weights(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    entries = sum(t.numel() for t in load_file(tiny_model / "model.safetensors").values())
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    model = loading.load(None, [f"model.name={tmp_path}", "model.dtype=float32"]).model
    assert forecast.weights_bytes(model, torch.device("cpu")) == 4 * entries
    absent = model.model_copy(update={"name": str(tmp_path / "absent")})
    assert forecast.weights_bytes(absent, torch.device("cpu")) is None


@pytest.mark.parametrize("override", ["train.steps=5", "train.epochs=1", "train.epochs=0.3", "train.epochs=2.5"])
def test_forecast_and_trainer_count_the_same_steps(small_run: list[str], override: str) -> None:
    config = loading.load(None, [*small_run, override, "train.accumulate=2", "strategy.fraction=0.5"])
    lm = adapters.load(config.model, config.adapter)
    template = tokenization.make_template(config.prompt, lm.tokenizer)
    clients = federation.federate(config.data, 0).clients
    corpora = [tokenization.encode_all(c.train, template, lm.tokenizer, config.prompt) for c in clients]
    work = forecast.plan_work(config, corpora)
    assert work.per_round == tuple(trainer.steps_per_round(config.train, c) for c in corpora)
    assert work.cohort == 2
    assert work.total == round(3 * 2 * np.mean(work.per_round))


def test_trying_out_leaves_the_adapter_alone_and_sees_the_activations(small_run: list[str]) -> None:
    config = loading.load(None, small_run)
    lm = adapters.load(config.model, config.adapter)
    template = tokenization.make_template(config.prompt, lm.tokenizer)
    rows = federation.federate(config.data, 0).clients[0].train
    corpus = tokenization.encode_all(rows, template, lm.tokenizer, config.prompt)
    before = digest(adapters.get_adapter(lm))
    trial = forecast.try_out(lm, corpus, config)
    assert digest(adapters.get_adapter(lm)) == before
    assert all(parameter.grad is None for parameter in lm.adapter.values())
    assert math.isfinite(trial.seconds)
    assert trial.tokens <= config.train.batch_tokens
    # At least the inputs of the seven adapted layers of each block: six of width 32, one of 64...
    per_token = 2 * 4 * (6 * 32 + 64)
    assert trial.activation_bytes > trial.tokens * per_token / 3  # q, k, v share one input
    assert trial.activation_bytes < trial.tokens * per_token * 30


def test_the_base_is_counted_once(small_run: list[str], tiny_model: Path) -> None:
    from safetensors.torch import load_file

    config = loading.load(None, small_run)
    entries = sum(t.numel() for t in load_file(tiny_model / "model.safetensors").values())
    held = forecast.base_bytes(adapters.load(config.model, config.adapter))
    assert 4 * entries <= held < 4 * entries + 10_000  # and a few buffers of rotary angles


def test_what_a_private_run_costs_is_told_before_it_starts(small_run: list[str]) -> None:
    good, text = _doctor([*small_run, "privacy.unit=record", "privacy.batch_rows=8", "privacy.noise_multiplier=1.0"])
    assert good, text
    # 8 rows expected of the smallest client's, 2 steps a round: the last line of the table is the whole run.
    rows = min(len(c.train) for c in federation.federate(loading.load(None, small_run).data, 0).clients)
    (last,) = re.findall(r"^ +3 +6 +([0-9.]+) ", text, re.MULTILINE)
    assert float(last) == pytest.approx(epsilon([Mechanism(1.0, 8 / rows, 6)], 1e-5), abs=1e-3)


def test_settings_that_hold_nothing_back_or_teach_nothing_are_warned_of(small_run: list[str]) -> None:
    good, text = _doctor([*small_run, 'continual.stages=[["first"], ["last"]]', "continual.buffer=5000"])
    assert good, text
    assert text.count("warning: continual.buffer = 5000: every client would keep all rows") == 1
    private = [*small_run, "privacy.unit=record", "privacy.batch_rows=8"]
    good, text = _doctor([*private, "privacy.noise_multiplier=20.0"])
    assert good and text.count("warning: noise drowns what the rows say") == 1
    good, text = _doctor([*private, "privacy.noise_multiplier=0.05"])
    assert not good and any("epsilon after round 1 would be" in line for line in _problems(text))


def test_promises_and_stages_that_the_data_cannot_keep_are_problems(small_run: list[str]) -> None:
    good, text = _doctor([*small_run, "privacy.unit=record", "privacy.batch_rows=1000"])
    assert not good and any("privacy.batch_rows = 1000" in line for line in _problems(text))
    good, text = _doctor([*small_run, 'continual.stages=[["first"], ["lost"]]'])
    assert not good and any("continual.stages names 'lost'" in line for line in _problems(text))


def test_what_is_read_otherwise_and_how_many_turns_there_are_is_told(small_run: list[str], tmp_path: Path) -> None:
    chat = [{"role": role, "content": "Who?"} for role in ("user", "user", "assistant", "user", "assistant", "user")]
    rows = [{"messages": [{**chat[0], "content": f"Case {i}"}, *chat[1:]]} for i in range(40)]
    rows[3]["messages"][2] = {**chat[2], "weight": 0}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [*small_run, f"data.source={path}", "data.partition=iid", "data.clients=2"]
    _, text = _doctor(overrides)
    assert "rows.jsonl: 40 of 40 (1, 2, 3, 4, 5, ...): turns of one role in a row are joined" in text
    assert "rows.jsonl: 40 of 40 (1, 2, 3, 4, 5, ...): what follows the last trained answer is left out" in text
    assert _fact(text, "turns") == "160 in these, of them 80 of the assistant, 79 trained"
    found = document(lambda: loading.load(None, overrides))["data"]
    assert (found["turns"], found["answers"], found["trained"], found["left_out"]) == (160, 80, 79, [])
    assert [(remark["rows"], remark["first"]) for remark in found["remarks"]] == [(40, [1, 2, 3, 4, 5])] * 2


def _with_generation(tiny_model: Path, folder: Path, text: str) -> str:
    shutil.copytree(tiny_model, folder)
    (folder / "generation_config.json").write_text(text)
    return f"model.name={folder}"


def test_what_of_the_bases_generation_does_not_count_is_named(
    small_run: list[str], tiny_model: Path, tmp_path: Path
) -> None:
    said = '{"eos_token_id": 1, "repetition_penalty": 1.3, "stop_strings": ["a"]}'
    good, text = _doctor([*small_run, _with_generation(tiny_model, tmp_path / "base", said)])
    assert good, text
    counts = "the base's generation_config.json counts for where they end alone"
    assert _fact(text, "answers") == f"decoded greedily; {counts}, not repetition_penalty, stop_strings"
    good, text = _doctor([*small_run, _with_generation(tiny_model, tmp_path / "other", "{not JSON")])
    assert good, text
    assert _fact(text, "answers") == "decoded greedily"
    (line,) = re.findall("warning: (the base's generation_config.json .*)", text)
    assert line.startswith("the base's generation_config.json cannot be read (Expecting property name")
    assert line.endswith("): answers end where its config.json says")


def test_a_model_that_cannot_decode_is_told_before_any_training(
    small_run: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*given: object, **options: object) -> None:
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr("transformers.generation.GenerationMixin.generate", fails)
    good, text = _doctor(small_run)
    (problem,) = _problems(text)
    assert not good
    assert problem.endswith(
        ": answers cannot be decoded (no kernel for this device); set evaluate.generate = false to measure losses alone"
    )
    with pytest.raises(UserError, match="answers cannot be decoded"):
        simulate(loading.load(None, small_run), tmp_path / "run")
    assert _doctor([*small_run, "evaluate.generate=false"])[0]


def test_the_default_rate_beside_a_wide_base_is_doubted(small_run: list[str], tiny_model: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    shutil.copytree(tiny_model, wide)
    shape = transformers.AutoConfig.from_pretrained(tiny_model)
    shape.update({"hidden_size": 320, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 80})
    transformers.LlamaForCausalLM(shape).save_pretrained(wide)
    run = [key for key in small_run if not key.startswith("train.lr=")]
    for keys, said in (([], False), ([f"model.name={wide}"], True), ([f"model.name={wide}", "train.lr=1e-3"], False)):
        _, text = _doctor([*run, *keys])
        assert bool(re.search(r"warning: train\.lr = 0\.006 is the default.* has 320 and may want less", text)) == said
