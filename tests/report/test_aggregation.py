"""What log, terminal and report tell of how the updates were put together."""

from __future__ import annotations

import io
import json
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_run import fake_events, fake_metrics, fake_run
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from report_pages import Page, page
from rich.console import Console
from torch import Generator, Tensor

from apiary.config import loading
from apiary.core.lora import is_b, scaling, split
from apiary.core.messages import Fingerprint, FitReport, Hello, Update, Visit
from apiary.core.tensors import add, digest, generator
from apiary.report import write_report
from apiary.tracking.console import Lines, State, board, fold
from apiary.tracking.event_log import RunLog, read_events
from apiary.tracking.metrics_file import read_metrics, rounds_table, write_metrics
from apiary.transport import flower_records
from server import round_metrics
from server.rounds import Hooks, Rounds
from simulation.engines import LocalGrid
from strategies import AGGREGATORS, Aggregator, Gradient, Reducer, ServerState, traits
from strategies.averaging_error import exact

PRINT = Fingerprint("m", "t", "c", "a")
RANK, SHAPE = 4, (10, 12)  # of the adapter, d_out and d_in
HEAD = "How the updates were put together"


# -- the log ----------------------------------------------------------------------------------------------------------


def _factors(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    rng = generator(seed, "factors")
    d_out, d_in = SHAPE
    return {
        f"m.{i}.lora_{x}.weight": scale * torch.randn((RANK, d_in) if x == "A" else (d_out, RANK), generator=rng)
        for i in range(2)
        for x in "AB"
    }


Delta = Callable[[int], dict[str, Tensor]]


def _spread(i: int) -> dict[str, Tensor]:
    """Clients go their own ways, far enough for averaging apart to miss a good part."""
    return _factors(i, 0.5)


def _clients(delta: Delta) -> ClientApp:
    app = ClientApp()

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        i = int(context.node_config["partition-id"])
        return Message(flower_records.hello_reply(Hello(f"c{i}", PRINT, RANK, 10, 100)), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        i = int(context.node_config["partition-id"])
        update = Update(f"c{i}", delta(i), 10.0 * (i + 1), RANK)
        return Message(
            flower_records.train_reply(Visit(update, FitReport(10 * (i + 1), 5, 1, 2.0, 0.1))), reply_to=message
        )

    return app


def _run(
    folder: Path, method: Aggregator, n: int = 5, delta: Delta = _spread, overrides: tuple[str, ...] = ()
) -> ServerState:
    base = ["rounds=2", f"adapter.rank={RANK}", "adapter.alpha=16", "evaluate.every=0", "strategy.min_clients=1"]
    base.append("train.lr=100")  # the changes here are long
    run = loading.load(None, [*base, *overrides])
    state = ServerState(0, _factors(99), {}, {})
    log = RunLog(folder)
    made = Rounds(run, method, PRINT, state, Hooks(log)).run(LocalGrid(_clients(delta), n), n)
    log.close()
    return made


def _method(name: str, **options: Any) -> Aggregator:
    return AGGREGATORS.build(name, options, scaling=scaling(16.0, "rslora"), seed=0, weighting="tokens")


def _rounds(folder: Path) -> list[dict[str, Any]]:
    return [event for event in read_events(folder) if event["event"] == "round"]


def _expected(weights: Mapping[str, float]) -> float:
    """By client, how much it counts."""
    fold, state = exact(scaling(16.0, "rslora")), ServerState(0, _factors(99), {}, {})
    acc = fold.start(state, Generator())
    for client, weight in weights.items():
        acc = fold.add(acc, Update(client, _spread(int(client[1:])), weight, RANK))
    return fold.finish(state, acc).relative


@pytest.mark.parametrize("name", ["fedavg", "flora", "fedex", "flexlora", "rank_slices", "geometric_median", "auto"])
def test_every_round_tells_its_gauge_whatever_the_method(tmp_path: Path, name: str) -> None:
    _run(tmp_path, _method(name))
    first, second = _rounds(tmp_path)
    told = first["gauge"]
    # A robust method's clients count by the shares that it gives them.
    expected = _expected(first.get("shares") or {f"c{i}": 10.0 * (i + 1) for i in range(5)})
    assert 0.1 < expected < 0.6
    assert abs(told["relative"] - expected) < 1e-4 + 4 * told["stderr"]
    assert (told["stderr"] > 0) == (name in ("fedavg", "rank_slices"))  # they see sums alone
    assert told["flora"] == told["fedex"] == told["relative"] > told["flexlora"] > 0
    assert set(second["gauge"]) == set(told)
    assert first.get("method") == ("flexlora" if name == "auto" else None)


def test_who_is_cut_has_no_part_in_the_gauge(tmp_path: Path) -> None:
    """The change of an attacker would drown what is missed of all others."""

    def attack(i: int) -> dict[str, Tensor]:
        return {n: 1e4 * t for n, t in _spread(i).items()} if i == 0 else _spread(i)

    _run(tmp_path, _method("multi_krum", byzantine=1), delta=attack)
    (first, _) = _rounds(tmp_path)
    assert list(first["cut"]) == ["c0"]
    assert first["gauge"]["relative"] == pytest.approx(_expected({f"c{i}": 1.0 for i in range(1, 5)}), abs=1e-4)


def test_who_sends_nan_stands_among_those_that_were_cut(tmp_path: Path) -> None:
    def attack(i: int) -> dict[str, Tensor]:
        return {n: t * math.nan for n, t in _spread(i).items()} if i == 0 else _spread(i)

    _run(tmp_path, _method("multi_krum", byzantine=1), delta=attack)
    (first, _) = _rounds(tmp_path)
    assert first["shares"] == {"c0": 0.0, **{f"c{i}": 0.25 for i in range(1, 5)}}
    assert list(first["cut"]) == ["c0"] and "NaN" in first["cut"]["c0"]


def test_one_client_has_no_error(tmp_path: Path) -> None:
    _run(tmp_path, _method("fedavg"), n=1)
    assert [event["gauge"]["relative"] for event in _rounds(tmp_path)] == [0.0, 0.0]


def test_the_uniform_weighting_is_that_of_the_gauge_too(tmp_path: Path) -> None:
    _run(tmp_path / "a", _method("flexlora"))
    _run(tmp_path / "b", _method("flexlora"), overrides=("strategy.weighting=uniform",))
    one, two = (_rounds(tmp_path / x)[0]["gauge"]["relative"] for x in "ab")
    assert abs(one - two) > 1e-3


def _noisy() -> Aggregator:
    """Averages, and adds noise from the round's generator, as a private method might."""
    plain = _method("fedavg")

    def finish(state: ServerState, acc: Any, rng: Generator) -> Gradient:
        mean = plain.reduce.finish(state, acc, rng).adapter
        return Gradient({n: t + torch.randn(t.shape, generator=rng) + torch.randn(t.shape) for n, t in mean.items()})

    return plain._replace(reduce=Reducer(plain.reduce.start, plain.reduce.add, finish))


def test_the_gauge_changes_no_bit_of_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    with_it = _run(tmp_path / "with", _noisy())
    blind = round_metrics.ErrorFold(exact(scaling(16.0, "rslora")), with_it, None, None)
    monkeypatch.setattr(round_metrics, "start", lambda *_: blind)
    torch.manual_seed(5)
    without = _run(tmp_path / "without", _noisy())
    assert "gauge" in _rounds(tmp_path / "with")[0] and "gauge" not in _rounds(tmp_path / "without")[0]
    assert digest(with_it.adapter) == digest(without.adapter)


def test_the_random_signs_are_others_in_each_round() -> None:
    state = ServerState(0, _factors(99), {}, {})
    run = loading.load(None, [f"adapter.rank={RANK}"])
    folds = [round_metrics.start(run, _method("fedavg"), state._replace(round=i)) for i in (0, 0, 1)]
    seen = [fold.accumulator.sums[0].probes for fold in folds]
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


def test_an_adapter_without_factors_or_an_update_without_one_has_no_gauge() -> None:
    run = loading.load(None, [f"adapter.rank={RANK}"])
    odd = round_metrics.start(run, _method("fedavg"), ServerState(0, {"a": torch.zeros(3)}, {}, {}))
    watched = round_metrics.start(run, _method("fedavg"), ServerState(0, _factors(99), {}, {}))
    half = {n: t for n, t in _spread(0).items() if not is_b(n)}
    for one in (odd, watched):
        for update in (Update("a", half, 1.0, RANK), Update("b", _spread(1), 1.0, RANK)):
            one = round_metrics.add(one, update)
        assert round_metrics.round_fields(one, Gradient({}), one.state) == {}


def test_what_a_bound_on_the_base_drops_is_told(tmp_path: Path) -> None:
    """One round of FLoRA, against numpy's decomposition of what the unbounded method puts into the base."""
    whole = _run(tmp_path / "whole", _method("flora"), overrides=("rounds=1",))
    spectra = [
        np.linalg.svd(f.b.double().numpy() @ f.a.double().numpy(), compute_uv=False) ** 2
        for f in split(whole.base_delta).values()
    ]
    expected = sum(s[RANK:].sum() for s in spectra) / sum(s.sum() for s in spectra)
    _run(tmp_path / "cut", _method("flora", base_rank=RANK))
    first, second = (event["dropped"] for event in _rounds(tmp_path / "cut"))
    assert first == pytest.approx(expected, abs=2e-5) and 0.001 < expected < 0.9
    assert all("dropped" not in event for event in _rounds(tmp_path / "whole"))
    write_metrics(tmp_path / "cut", {"table": [], "rounds": rounds_table(read_events(tmp_path / "cut"))})
    text = Page(write_report(tmp_path / "cut").read_text(encoding="utf-8")).text
    assert f"(base_rank) in 2 rounds, and lost {(first + second) / 2:.1%} of its squared norm" in text


def _one_shouts(i: int) -> dict[str, Tensor]:
    return add(_factors(0, 0.1), _factors(9 + i, 5.0 if i == 3 else 0.02))


def test_the_log_says_who_was_cut_and_why(tmp_path: Path) -> None:
    # Without the guard, which refuses such a change before the method sees it.
    _run(tmp_path, _method("geometric_median"), delta=_one_shouts, overrides=("strategy.norm_guard=0",))
    for event in _rounds(tmp_path):
        assert list(event["cut"]) == ["c3"] and "as far off as is typical" in event["cut"]["c3"]
        assert sorted(event["shares"]) == [f"c{i}" for i in range(5)]
        assert event["shares"]["c3"] < 0.01 < event["shares"]["c0"]
        assert sum(event["shares"].values()) == pytest.approx(1, abs=1e-3)
    kept = rounds_table(read_events(tmp_path))
    write_metrics(tmp_path, {"table": [], "rounds": kept})
    for event, row in zip(_rounds(tmp_path), read_metrics(tmp_path)["rounds"], strict=True):
        assert {k: row[k] for k in ("gauge", "shares", "cut")} == {k: event[k] for k in ("gauge", "shares", "cut")}
    text = Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    assert re.search(r"c3 2 2 0\.\d% ", text) and "as far off as is typical (round 2, the last time)" in text
    assert "1 of 5 clients was cut at least once" in text


# -- the terminal -----------------------------------------------------------------------------------------------------


def _event(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "event": "round",
        "round": number,
        "time": 10.0 * number,
        "clients": 4,
        "asked": 4,
        "seconds": 10.0,
    } | fields


def _lines(*events: dict[str, Any]) -> list[str]:
    out = io.StringIO()
    observe = Lines(out)
    for event in events:
        observe(event)
    return out.getvalue().splitlines()


def test_a_round_tells_its_error_and_a_line_who_was_cut() -> None:
    cut = {"client-03": "norm 14 times the median", "client-05": "cosine -0.20 to the server's own update"}
    told = _lines(_event(1, gauge={"relative": 0.0432, "stderr": 0.001}, shares={"client-00": 0.5}, cut=cut))
    assert "averaging A and B apart misses 4.3% of the change" in told[0]
    assert told[1:] == [
        "cut: client-03 (norm 14 times the median), client-05 (cosine -0.20 to the server's own update)"
    ]
    many = {f"c{i}": "far" for i in range(9)}
    assert _lines(_event(1, cut=many))[1] == "cut: " + ", ".join(f"c{i} (far)" for i in range(6)) + " and 3 more"
    assert len(_lines(_event(1), _event(2, cut={}))) == 2  # as an earlier version logged, and a round without a cut


def test_names_and_reasons_cannot_command_the_terminal() -> None:
    told = _lines(_event(1, cut={"\x1b[2Ja\nb": "why\x1b[0m"}))
    assert len(told) == 2 and "\x1b" not in "".join(told)


def test_the_method_of_a_round_is_told_when_it_changes() -> None:
    methods = ["fedavg", "fedavg", "flexlora", "flexlora", "fedavg"]
    missed = [0.04, 0.05, 0.142, 0.2, 0.01]
    events = [
        _event(i + 1, method=m, gauge={"relative": g}) for i, (m, g) in enumerate(zip(methods, missed, strict=True))
    ]
    assert [line for line in _lines(*events) if line.startswith("method")] == [
        "method: fedavg from round 1 on: averaging A and B apart missed 4.0%",
        "method: flexlora from round 3 on: averaging A and B apart missed 14.2%",
        "method: fedavg from round 5 on: averaging A and B apart missed 1.0%",
    ]
    state = State()
    for event in events[:3]:
        state = fold(state, event)
    console = Console(width=100, file=io.StringIO(), color_system=None)
    console.print(board(state, 40.0))
    assert isinstance(console.file, io.StringIO)
    assert "averaging misses  14.2%; averaged by flexlora" in console.file.getvalue()


# -- the report -------------------------------------------------------------------------------------------------------


def _metrics(*missed: float | None, left: float = 0.25, stderr: float = 0.0, **fields: Any) -> dict[str, Any]:
    """A run whose rounds missed so much; FlexLoRA would leave `left` of each."""
    metrics = fake_metrics(8, len(missed))
    for row, value in zip(metrics["rounds"][1:], missed, strict=True):
        gain = None if value is None else value * (1 - left)
        row["gauge"] = {"relative": value, "stderr": stderr, "flora": value, "fedex": value, "flexlora": gain}
        row |= fields
    return metrics


def _text(metrics: dict[str, Any], toml: str = '[strategy]\nname = "fedavg"\n') -> str:
    """The page of a run with this configuration, whose log tells the traits of its method."""
    strategy = tomllib.loads(toml)["strategy"]
    options = {**({"byzantine": 1} if "krum" in strategy["name"] else {}), **strategy.get("options", {})}
    start = {"event": "start", "method": traits(_method(strategy["name"], **options)), "time": 0.0}
    return Page(page(metrics, [start], toml)).text


def test_the_report_says_what_averaging_missed() -> None:
    text = _text(_metrics(0.02, 0.05, 0.13))
    assert HEAD in text
    assert (
        "Averaging A and B apart missed 5.0% of what the clients learnt in a typical round, and 13.0% at "
        "most. Exact methods recover it: FLoRA and FedEx-LoRA 100%, by adding ranks to the base; FlexLoRA, which "
        "keeps to the adapter's rank, 75%. Whether the loss falls with it is another question" in text
    )
    assert "Apart 13.0%" in text and "FlexLoRA 3.2%" in text and "Switch" not in text
    assert "an estimated 75% or more." in _text(_metrics(0.02, 0.05, 0.13, stderr=0.001))
    assert "missed 4.0% of what the clients learnt. Exact methods" in _text(_metrics(0.04))


def test_rounds_that_changed_nothing_are_counted() -> None:
    metrics = _metrics(0.02, 0.05, 0.13)
    metrics["rounds"][2] = {"round": 2, "unchanged": True}
    assert "1 round changed nothing, for too few clients answered well" in _text(metrics)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("fedex", "", "fedex recovered it; factors of the adapter's rank could have held 75%."),
        ("fedex", "base_rank = 0", "fedex recovered it; factors"),
        ("fedex", "rank = 2", "fedex recovered it but for what its bounds on the rank cut;"),
        ("flora", "base_rank = 8", "flora recovered it but for what its bounds on the rank cut;"),
        ("flexlora", "", "flexlora recovered 75% of it, which is what factors of the adapter's rank can hold."),
        ("flexlora", 'form = "absolute"', "Exact methods would have recovered it: FLoRA and FedEx-LoRA 100%"),
        ("lora_fair", "", "Exact methods would have recovered it: FLoRA and FedEx-LoRA 100%"),
        ("auto", "", "Exact methods recover it: FLoRA and FedEx-LoRA 100%"),
    ],
)
def test_an_exact_method_is_not_said_to_have_missed_it(name: str, options: str, said: str) -> None:
    text = _text(_metrics(0.02, 0.05), f'[strategy]\nname = "{name}"\noptions = {{ {options} }}\n')
    assert f"apart {'misses' if name == 'auto' else 'would have missed'} 3.5% of what the clients learnt" in text
    assert said in text
    assert ("Exact methods" in text) == said.startswith("Exact methods")


def test_no_method_for_one_rank_is_recommended_to_clients_of_several() -> None:
    metrics = _metrics(0.02, 0.05)
    for number, client in enumerate(metrics["clients"]):
        client["rank"] = 8 if number % 2 else 4
    text = _text(metrics, '[strategy]\nname = "rank_slices"\n')
    assert "recovered it: FLoRA 100%, by adding ranks" in text and "FedEx" not in text
    assert "Ranks of the clients 4: client-00, client-02, client-04, client-06; 8: client-01," in text


ATTACK = {"name": "sign_flip", "clients": ["client-01", "client-04"]}


def test_in_an_attacked_run_no_exact_method_is_recommended() -> None:
    text = _text({**_metrics(0.02, 0.05), "attack": ATTACK})
    assert "An exact method would follow them exactly, and is no way out" in text
    assert "FLoRA" not in text and "FlexLoRA" not in text and "At best 1.2%" in text


def test_the_report_says_which_of_the_cut_were_made_to_attack() -> None:
    metrics = {**_metrics(0.02, 0.02), "attack": ATTACK}
    for row in metrics["rounds"][1:]:
        row["shares"] = {"client-00": 0.25, "client-01": 0.0, "client-02": 0.75}
        row["cut"] = {"client-01": "far", "client-00": "far"}
    text = _text(metrics, '[strategy]\nname = "multi_krum"\n')
    assert (
        "2 of 3 clients were cut at least once. Cut were 2 of the 2 changes that attackers sent, and 2 of the 4" in text
    )
    assert "client-00 2 2 25.0% no far" in text and "client-01 2 2 0.0% yes far" in text


def test_in_an_attacked_run_of_krum_to_be_cut_still_says_little() -> None:
    metrics = {**_metrics(0.02, 0.02), "attack": ATTACK}
    for row in metrics["rounds"][1:]:
        row["shares"], row["cut"] = {"client-00": 1.0, "client-01": 0.0}, {"client-01": "far"}
    text = _text(metrics, '[strategy]\nname = "krum"\n')
    assert "Cut were 2 of the 2 changes that attackers sent, and 0 of the 2 of the others. That says little" in text


def test_a_configuration_that_this_version_refuses_still_names_its_method() -> None:
    text = _text(_metrics(0.02, 0.05), '[strategy]\nname = "flora"\n\n[old]\nkey = 1\n')
    assert "would have missed" in text and "flora recovered it;" in text and "Made by" not in text
    for odd in ('strategy = "flora"\n', '[strategy]\nname = 3\noptions = "none"\n'):
        assert HEAD in Page(page(_metrics(0.02, 0.05), config=odd)).text


def test_of_a_run_of_an_earlier_version_nothing_is_claimed() -> None:
    """Its log does not say what the method is like, and the report guesses from no name."""
    for name in ("fedavg", "flora", "flexlora", "auto"):
        for events in ([], [{"event": "start", "time": 0.0}]):
            text = Page(page(_metrics(0.02, 0.05), events, f'[strategy]\nname = "{name}"\n')).text
            assert "Averaging A and B apart misses 3.5% of what the clients learnt" in text
            assert "Exact methods recover it: FLoRA and FedEx-LoRA 100%" in text and "Switch" not in text
    assert "apart is as good as exact" in Page(page(_metrics(0.0, 0.0))).text


def test_a_method_of_ones_own_is_told_by_its_traits() -> None:
    start = {"event": "start", "time": 0.0, "method": traits(_method("fedavg")._replace(takes_one=True))}
    metrics = _metrics(0.02, 0.05, shares={"a": 1.0, "b": 0.0}, cut={"b": "far"})
    text = Page(page(metrics, [start], '[strategy]\nname = "mine:method"\n')).text
    assert "apart over the clients that counted missed 3.5%" in text
    assert "That says little of them: mine:method takes one client's change a round" in text


def test_a_run_that_an_earlier_version_began_is_told_by_the_one_that_resumed_it() -> None:
    starts = [{"event": "start", "time": 0.0}, {"event": "start", "time": 1.0, "method": traits(_method("flora"))}]
    text = Page(page(_metrics(0.02, 0.05), starts, '[strategy]\nname = "flora"\n')).text
    assert "would have missed" in text and "flora recovered it;" in text


def test_where_nothing_was_missed_a_sentence_is_all() -> None:
    text = _text(_metrics(0.0, 0.00002))
    assert "Averaging A and B apart was as good as exact." in text
    assert "Apart" not in text and "FedEx" not in text


def test_a_run_that_chose_says_how_often_and_where_the_line_is() -> None:
    metrics = _metrics(0.02, 0.2, 0.3)
    for row, method in zip(metrics["rounds"][1:], ("fedavg", "flexlora", "flexlora"), strict=True):
        row["method"] = method
    text = _text(metrics, '[strategy]\nname = "auto"\n')
    assert "The run chose by this from round to round: flexlora in 2 rounds and fedavg in 1 round." in text
    assert "Switch 10%" in text
    assert "Switch 25%" in _text(metrics, '[strategy]\nname = "auto"\noptions = { "threshold" = 0.25 }\n')


def test_the_report_names_who_was_cut_how_often_and_why() -> None:
    metrics = _metrics(0.02, 0.02, 0.02)
    cuts = ({"b": "norm 5 times the median"}, {"a": "norm 9 times the median", "b": "norm 7 times the median"}, {})
    for number, (row, cut) in enumerate(zip(metrics["rounds"][1:], cuts, strict=True), 1):
        row["shares"], row["cut"] = dict.fromkeys(("a", "b", "c", "d")[: 4 if number < 3 else 3], 0.25), cut
    text = _text(metrics, '[strategy]\nname = "norm_clip"\n')
    assert (
        "Client Rounds cut Rounds taken part Mean share Why b 2 3 25.0% norm 7 times the median (round 2, the last "
        "time) a 1 3 25.0% norm 9 times the median (round 2)" in text
    )
    assert "2 of 4 clients were cut at least once. That is no proof of ill will" in text
    assert "Averaging A and B apart over the clients that counted would have missed 2.0% of what they learnt" in text
    for row in metrics["rounds"][1:]:
        row["cut"] = {}
    text = _text(metrics)
    assert "None of the 4 clients was cut." in text and "Rounds cut" not in text


def test_names_and_reasons_are_shown_and_never_obeyed() -> None:
    metrics = _metrics(0.02)
    hostile = "<script>alert(1)</script>"
    metrics["rounds"][1] |= {"shares": {hostile: 0.0}, "cut": {hostile: "<img src=x>"}}
    parsed = Page(page(metrics))
    assert hostile in parsed.text and "<img src=x>" in parsed.text
    assert not {tag for tag, _ in parsed.tags} & {"script", "img"}


def test_many_cut_clients_are_summed_up() -> None:
    metrics = _metrics(0.02)
    names = [f"c{i:03d}" for i in range(60)]
    metrics["rounds"][1] |= {"shares": dict.fromkeys(names, 0.0), "cut": dict.fromkeys(names, "far")}
    text = _text(metrics)
    assert "c039 1 1 0.0%" in text and "c040 1 1" not in text and "20 more clients are in metrics.json" in text


def test_runs_of_earlier_versions_and_of_one_client_have_no_such_section(tmp_path: Path) -> None:
    old = fake_metrics()
    assert HEAD not in Page(write_report(fake_run(tmp_path, old)).read_text(encoding="utf-8")).text
    assert HEAD not in _text(_metrics(0.0, 0.0, clients=1))
    assert HEAD in Page(page(_metrics(0.02), fake_events(old), "no = [toml")).text
    assert "NaN" not in _text(_metrics(None, None)) and HEAD in _text(_metrics(0.02, None))
    assert json.dumps(old) == json.dumps(fake_metrics())
