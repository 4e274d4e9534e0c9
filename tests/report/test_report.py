# ruff: noqa: RUF001 (whole sentences, and dashes as they are shown)

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_run import fake_events, fake_metrics, fake_run
from report_pages import HOSTILE, Page, page, table
from rich.console import Console
from scipy import stats

from apiary.config import loading
from apiary.core import formatting
from apiary.core.errors import UserError
from apiary.core.messages import Spent
from apiary.evaluation import intervals
from apiary.export.model_card import card
from apiary.privacy import statement
from apiary.report import headline, table_plain, table_text, write_report
from apiary.report.data import gain_on_all, gain_on_own, parse_metrics
from apiary.report.plots import spread


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (
            {"base": 4.93, "local": 4.41, "federated": 0.82, "central": 0.47},
            "Joining forces cut the held-out loss from 4.41 (training alone) to 0.82 nats per token, "
            "of these two models on these rows; pooling all data reaches 0.47",
        ),
        (
            {"local": 2.0, "federated": 2.5},
            "Joining forces did not help: it raised the held-out loss from 2.00 (training alone) to "
            "2.50 nats per token, of these two models on these rows",
        ),
        (
            {"local": 2.0, "federated": 1.95},
            "Joining forces made no clear difference: a held-out loss of 1.95 nats per token against "
            "2.00 (training alone), of these two models on these rows",
        ),
        (
            {"base": 3.0, "federated": 2.0},
            "Joining forces cut the held-out loss from 3.00 (the untuned model) to 2.00 nats per token, of these two "
            "models on these rows",
        ),
        ({"federated": 2.0}, "Federated training reached a held-out loss of 2.00 nats per token"),
        ({"base": 2.0}, "Held-out loss of this run"),
    ],
)
def test_the_headline_is_honest(losses: dict[str, float], expected: str) -> None:
    assert headline(parse_metrics(table(**losses))) == expected


SCOPE = "of these two models on these rows"


def compared(low: float, high: float, privacy: str = "none", **losses: float) -> dict[str, Any]:
    """A table with wide intervals, and the interval of federated minus alone; client a loses 0.1, b cannot tell."""
    rows = [{"method": m, "loss": v, "accuracy": None, "ci95": {"loss": [v - 0.5, v + 0.5]}} for m, v in losses.items()]
    pair = {"difference": losses["federated"] - losses["local"], "ci95": [low, high], "n": 240, "of": SCOPE}
    own = [_client("a", 0.1, [0.05, 0.15], 90), _client("b", 0.2, None, 25)]
    promise = {"unit": privacy, "epsilon": 8.0, "epsilon_rdp": 9.0, "delta": 1e-5, "accountant": "pld", "sampler": "p"}
    return {"schema": 1, "table": rows, "paired": {"local": pair}, "clients": own, "privacy": promise}


def _client(name: str, worse: float, ends: list[float] | None, rows: int) -> dict[str, Any]:
    """A client whose own loss is 1 alone and `worse` more with the federated model, and what its rows say of that."""
    paired = {"local": {"difference": worse, "ci95": ends, "n": rows}}
    return {"client": name, "own": {"local": 1.0, "federated": 1.0 + worse}, "own_paired": paired}


def test_the_headline_goes_by_the_comparison_row_by_row() -> None:
    """The intervals of the two losses overlap in all of these; the difference tells."""
    losses = {"local": 1.0, "federated": 1.1}
    worse, better, open_ = (
        headline(parse_metrics(compared(*ends, **values)))
        for ends, values in (
            ((0.05, 0.15), losses),
            ((-0.15, -0.05), {"local": 1.1, "federated": 1.0}),
            ((-0.05, 0.25), losses),
        )
    )
    own = "on their own rows 0 of 2 clients gain, 1 loses, 1 cannot tell"
    assert worse == (
        "Joining forces did not help: it raised the held-out loss from 1.00 (training alone) to 1.10 nats per token, "
        f"{SCOPE}; {own}"
    )
    assert better == (
        f"Joining forces cut the held-out loss from 1.10 (training alone) to 1.00 nats per token, {SCOPE}; {own}"
    )
    assert open_ == (
        "Joining forces made no clear difference: a held-out loss of 1.10 nats per token against 1.00 (training "
        f"alone), {SCOPE}; {own}"
    )


def test_wherever_an_interval_over_rows_is_given_it_says_of_what_it_is() -> None:
    metrics = compared(0.05, 0.15, local=1.0, federated=1.1)
    text = Page(page(metrics)).text
    places = {"page": text, "terminal": table_plain(metrics), "card": card(loading.load(), 16, metrics, {})}
    said = f"federated minus training alone is +0.100 nats per token (95% interval +0.050 to +0.150), {SCOPE}."
    assert {name for name, words in places.items() if said in words} == set(places)
    assert "95% intervals over the held-out examples alone, of these models on these rows" in text
    assert f"leaves out zero, {SCOPE}" in text  # the intervals of the clients
    few = compared(0.05, 0.15, local=1.0, federated=1.1)
    few["paired"]["local"] |= {"ci95": None, "n": 59}
    places = {"page": Page(page(few)).text, "terminal": table_plain(few), "card": card(loading.load(), 16, few, {})}
    said = "59 held-out examples are too few to tell a difference from chance: no interval is given."
    assert {name for name, words in places.items() if said in words} == set(places)
    assert not [name for name in places if f"token, {SCOPE}" in places[name]]


def test_that_rows_are_too_few_for_an_interval_is_said() -> None:
    metrics = {"schema": 1, "table": [{"method": "federated", "loss": 1.0, "n": 59}]}
    said = f"ewer than {intervals.FEWEST_ROWS}"
    assert said in Page(page(metrics)).text and said in table_plain(metrics)
    metrics["table"][0]["ci95"] = {"loss": [0.5, 1.5]}
    assert said not in Page(page(metrics)).text + table_plain(metrics)


def test_clients_gain_lose_or_cannot_tell_each_with_its_rows() -> None:
    """c's loss falls most of all, but its interval holds zero; d's falls, on too few rows; e gains."""
    metrics = compared(0.05, 0.15, local=1.0, federated=1.1)
    more = [("c", -0.5, [-1.1, 0.2], 70), ("d", -0.3, None, 30), ("e", -0.2, [-0.3, -0.1], 150)]
    metrics["clients"] += [_client(*given) for given in more]
    found = gain_on_own(parse_metrics(metrics))
    assert found is not None and {name: found.outcome(name) for name in found.gains} == {
        **{"a": "lose", "b": "cannot tell", "c": "cannot tell", "d": "cannot tell", "e": "gain"}
    }
    text = Page(page(metrics)).text
    assert "Clients: gain / lose / cannot tell 1 / 1 / 3 on their own tasks (25 to 150 rows each)" in text
    for label in (
        "a loses 0.100 (90 rows)",
        "b cannot tell: −0.200 (25 rows)",
        "c cannot tell: +0.500 (70 rows)",
        "e gains 0.200 (150 rows)",
    ):
        assert label in text
    counts = "1 of 5 clients gains, 1 loses, 3 cannot tell"
    assert f"on their own rows {counts}" in headline(parse_metrics(metrics))
    assert f"alone on its own rows (25 to 150 rows each): {counts}" in table_plain(metrics)
    assert f"On their own held-out rows (25 to 150 rows each), {counts}" in card(loading.load(), 16, metrics, {})


def test_only_clients_that_all_agree_with_the_headline_go_without_saying() -> None:
    metrics = compared(-0.15, -0.05, local=1.1, federated=1.0)
    metrics["clients"] = [_client(name, -0.2, [-0.3, -0.1], 90) for name in "ab"]
    assert "own rows" not in headline(parse_metrics(metrics))
    metrics["clients"][0]["own_paired"]["local"]["ci95"] = [-0.5, 0.1]
    assert "on their own rows 1 of 2 clients gains, 0 lose, 1 cannot tell" in headline(parse_metrics(metrics))


def test_of_one_client_the_mean_has_no_interval() -> None:
    """Of several it is Student's, against scipy."""
    metrics = compared(-0.15, -0.05, local=1.1, federated=1.0)
    text = Page(page(metrics)).text
    gains = [-0.1, -0.2]
    low, high = stats.t.interval(0.95, 1, np.mean(gains), stats.sem(gains))
    low, high = (formatting.change_text(end) for end in (low, high))
    assert f"The mean gain is −0.150 nats per token (95% interval over clients {low} to {high})" in text
    del metrics["clients"][1]
    text = Page(page(metrics)).text
    assert text.startswith("Apiary run: report Apiary Nothing was federated") and "mean gain" not in text
    assert gain_on_own(parse_metrics(metrics)) is None


def test_a_small_but_clear_difference_is_not_printed_as_none() -> None:
    text = headline(parse_metrics(compared(-0.004, -0.002, local=1.001, federated=0.998)))
    assert "from 1.001 (training alone) to 0.998 nats per token" in text


def test_of_few_rows_nothing_is_claimed() -> None:
    metrics = compared(0.05, 0.15, local=1.0, federated=1.1)
    metrics["paired"]["local"] |= {"ci95": None, "n": 4}
    assert headline(parse_metrics(metrics)) == (
        "Joining forces led to a held-out loss of 1.10 nats per token against 1.00 (training alone), on too few "
        "examples to rule out chance; on their own rows 0 of 2 clients gain, 1 loses, 1 cannot tell"
    )
    assert "4 held-out examples are too few to tell a difference from chance" in Page(page(metrics)).text


def test_a_run_of_an_earlier_version_is_read_and_says_what_its_clients_saw(tmp_path: Path) -> None:
    metrics = compared(0, 0, "record", local=1.0, federated=1.1)
    del metrics["paired"], metrics["clients"][0]["own_paired"], metrics["clients"][1]["own_paired"]
    text = Page(write_report(fake_run(tmp_path, metrics)).read_text(encoding="utf-8")).text
    assert "on their own rows 0 of 2 clients gain, 0 lose, 2 cannot tell" in text
    assert "these results hold no comparison row by row" in text


def test_a_private_run_says_that_what_it_is_held_against_had_no_noise() -> None:
    metrics = compared(0.05, 0.15, "record", base=2.5, local=1.0, federated=1.1, central=0.5)
    text = Page(page(metrics)).text
    assert "1.00 (training alone, without noise) to 1.10 nats per token, of these two" in text
    assert "; pooling all data, also without noise," in text
    note = "Not like with like: training alone (local) and on all data pooled (central) went without noise, federated"
    assert note in text and note in table_plain(metrics)
    assert "Against the untuned model: 2.50 before, 1.10 after." in text
    assert "average over clients; without noise" in text and "after; without noise" not in text
    metrics["privacy"] = {"unit": "none"}
    assert "without noise" not in Page(page(metrics)).text + table_plain(metrics)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        # (4 - 1) / (4 - 0.25) = 0.8
        ({"local": 4.0, "federated": 1.0, "central": 0.25}, "That is 80% of what copying"),
        ({"local": 4.0, "federated": 4.5, "central": 0.25}, "does not come closer"),
        ({"local": 4.0, "federated": 0.2, "central": 0.25}, "as good as copying"),
        ({"local": 1.0, "federated": 0.95, "central": 0.25}, "Every client kept its data"),
    ],
)
def test_the_share_of_the_gap_is_worked_out(losses: dict[str, float], expected: str) -> None:
    assert expected in page(table(**losses))


def test_gains_are_counted_on_own_and_on_all_examples() -> None:
    metrics = table(local=3.0, federated=2.0)
    metrics["clients"] = [
        {
            **_client("a", -0.5, None, 9),
            "mix_loss": {"local": 3.0},
            "mix_paired": {"local": {"ci95": [-2, -1], "n": 240}},
        },
        {**_client("b", 0.25, [0.1, 0.3], 90), "mix_loss": {"local": 1.5}},
        {"client": "c", "own": {"local": None, "federated": 1.0}, "mix_loss": {}},
    ]
    own, everyone = gain_on_own(parse_metrics(metrics)), gain_on_all(parse_metrics(metrics))
    assert own is not None
    assert everyone is not None
    assert (own.gains, own.worst) == ({"a": 0.5, "b": -0.25}, ("b", -0.25))
    assert everyone.gains == {"a": 1.0, "b": -0.5}
    text = Page(page(metrics)).text
    assert "against training alone, 0 of 2 clients gain, 1 loses, 1 cannot tell." in text
    assert "On the held-out examples of all clients: 1 of 2 clients gains, 0 lose, 1 cannot tell." in text
    assert "The mean gain is +0.125 nats per token" in text and "the least −0.250 (b)" in text


def test_the_page_asks_nothing_of_a_network_and_runs_nothing(tmp_path: Path) -> None:
    text = write_report(fake_run(tmp_path)).read_text(encoding="utf-8")
    parsed = Page(text)
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"script", "iframe", "img", "object", "embed", "form", "base", "video"}
    for _, attributes in parsed.tags:
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("href", "src", "xlink:href", "action", "srcset"):
                assert value is not None
                assert value.startswith(("#", "data:"))
    assert "http:" not in text
    assert "https:" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text
    (policy,) = [a["content"] for t, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.split("; ")[0] == "default-src 'none'"
    assert "script-src" not in policy


def test_text_from_models_and_clients_is_shown_and_never_obeyed() -> None:
    metrics = fake_metrics()
    metrics["run"] = metrics["task"] = HOSTILE
    metrics["samples"] = [dict.fromkeys(("prompt", "reference", "skill", "base", "federated"), HOSTILE)]
    metrics["skills"][HOSTILE] = {"federated": 0.5}
    metrics["clients"][0]["client"] = HOSTILE
    metrics["clients"][0]["mix"] = {HOSTILE: 3}
    metrics["machine"]["cpu"] = HOSTILE
    events = [{"event": "refused", "client": HOSTILE, "reason": HOSTILE, "round": 1, "time": 0.0}]
    parsed = Page(page(metrics, events, config=HOSTILE))
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"script", "img"}
    assert parsed.text.count("<script>alert(1)</script>") >= 10
    assert "49" not in [word for word in parsed.words if "alert" in word]


def test_right_and_wrong_are_marked_by_exact_match_alone() -> None:
    metrics = table(base=2.0, federated=1.0)
    metrics["samples"] = [{"prompt": "p", "reference": "a, b", "base": "a,b", "federated": " a,  b\n"}]
    assert "right" not in re.findall(r'class="mark (\w+)"', page(metrics))
    for row in metrics["table"]:
        row["accuracy"] = 0.5
    assert re.findall(r'class="mark (\w+)"', page(metrics)) == ["wrong", "right"]


def test_every_part_of_a_full_run_is_on_the_page() -> None:
    metrics = fake_metrics()
    text = Page(page(metrics, fake_events(metrics), config="rounds = 10")).text
    for part in (
        "How well each way of training does",
        "4.410 4.101 to 4.763",
        "400 held-out examples",
        "Learning, round by round",
        "Federated 0.82",
        "What each client gains",
        "What it can do now",
        "Who holds what",
        "What left the clients",
        # 8 clients x 295,412 bytes: 10 times up; 10 times down to train and 11 times to measure
        "23.6 MB went from clients to the server and 49.6 MB back",
        "Sent over the network 73.3 MB",
        "not protected by differential privacy",
        "Answers before and after",
        "its update holds NaN",
        "handshake Refused client-09 uses another tokenizer",
        "before training Refused client-03 no answer within 60 s",
        "round 4 Refused client-05 its update holds NaN",
        "rounds = 10",
        "Imaginary CPU 2.4 GHz",
        "2 min 18 s",
    ):
        assert part in text


@pytest.mark.parametrize(
    "metrics",
    [
        fake_metrics(1, 1),
        fake_metrics(3, 2, baselines=False),
        fake_metrics(60, 40),
        table(federated=1.0),
        {"schema": 1, "table": [{"method": "federated", "loss": None}]},
        {"schema": 1, "table": []},
        {**table(federated=0.0), "rounds": [{"round": 1, "loss": 0.0, "ci95": [0.0, 0.0]}]},
        {**table(federated=2.0), "rounds": [{"round": 5, "loss": 2.0, "seconds": 1.0}]},
    ],
    ids=["one", "bare", "many", "row", "diverged", "empty", "zero", "single point"],
)
def test_lesser_runs_make_whole_pages_too(metrics: dict[str, Any]) -> None:
    text = Page(page(metrics)).text
    assert "How it was made" in text
    assert not re.search(r"\b(nan|inf|None|NaN)\b", text)


def test_a_large_cohort_is_summed_up_and_its_losers_are_named() -> None:
    metrics = fake_metrics(60, 3)
    gain = gain_on_own(parse_metrics(metrics))
    assert gain is not None
    text = Page(page(metrics)).text
    assert "The 12 clients that gain least:" in text
    assert f"({gain.worst[0]})" in text
    assert "20 more clients are in metrics.json" in text


def test_the_same_run_gives_the_same_bytes() -> None:
    assert page(fake_metrics()) == page(fake_metrics())


def test_paths_of_the_machine_stay_out_of_the_page(tmp_path: Path) -> None:
    folder = fake_run(tmp_path)
    with (folder / "config.toml").open("a", encoding="utf-8") as file:
        file.write('\n[model]\nname = "/srv/secret-place/base/"\n')
    text = write_report(folder).read_text(encoding="utf-8")
    assert "secret-place" not in text
    assert "…/base" in text
    assert "…/people.jsonl" in text
    assert str(tmp_path) not in text


def test_a_bad_run_folder_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        write_report(tmp_path / "gone")
    with pytest.raises(UserError, match="is it a run folder"):
        write_report(tmp_path)
    folder = fake_run(tmp_path / "run")
    (folder / "metrics.json").unlink()
    with pytest.raises(UserError, match="--resume"):
        write_report(folder)
    (folder / "metrics.json").write_text(json.dumps({"schema": 1, "table": [{"method": "base", "loss": "x"}]}))
    with pytest.raises(UserError, match=r"table\.0\.loss"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_the_report_needs_only_the_metrics(tmp_path: Path) -> None:
    folder = fake_run(tmp_path)
    (folder / "log.jsonl").unlink()
    (folder / "config.toml").unlink()
    text = Page(write_report(folder).read_text(encoding="utf-8")).text
    assert "Refusals" not in text
    assert "Configuration" not in text


def test_the_terminal_table_and_the_plain_one_hold_the_same_numbers() -> None:
    metrics = fake_metrics()
    plain = table_plain(metrics)
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table_text(metrics))
    for part in ("0.820 [0.763, 0.886]", "55.3% [51.3, 59.8]", "312,500", "400 held-out examples"):
        assert part in plain
        assert part in capture.get()
    assert plain.splitlines()[3].split()[0] == "federated"
    ends = {len(line) for line in plain.splitlines()[:5]}
    assert len(ends) == 1  # aligned


def test_the_table_works_on_rows_alone() -> None:
    plain = table_plain({"table": [{"method": "base", "loss": 2.0, "accuracy": None, "n": 5}]})
    assert plain.splitlines()[0].split() == ["method", "held-out", "loss", "[95%]"]
    assert "on 5 held-out examples" in plain


def test_labels_are_pushed_apart_but_stay_on_the_chart() -> None:
    assert spread([1.0, 5.0], 1.0, 0.0, 10.0) == [1.0, 5.0]
    assert spread([1.0, 1.2, 1.4], 1.0, 0.0, 10.0) == pytest.approx([1.0, 2.0, 3.0])
    assert spread([9.5, 9.6, 9.7], 1.0, 0.0, 10.0) == pytest.approx([8.0, 9.0, 10.0])


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (999_600, "1.00 MB"), (23_632_960, "23.6 MB"),
     (123_456_789, "123 MB"), (5e15, "5000 TB"), (None, "–")],
)  # fmt: skip
def test_bytes_in_words(value: float | None, expected: str) -> None:
    assert formatting.bytes_text(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"),
     (3599.7, "1 h 00 min"), (7800, "2 h 10 min"), (float("nan"), "–")],
)  # fmt: skip
def test_seconds_in_words(value: float, expected: str) -> None:
    assert formatting.seconds_text(value) == expected


def test_what_was_promised_is_told_client_by_client_and_not_overstated() -> None:
    metrics = table(local=1.0, federated=1.5)
    spent = {"epsilon": 3.25, "epsilon_rdp": 3.75, "noise_multiplier": 1.5, "sample_rate": 0.125, "steps": 36}
    clients = {"a": Spent(**spent, delta=1e-5), "b": Spent(**{**spent, "epsilon": 6.5}, delta=1e-5)}
    run = loading.load(None, ["privacy.unit=record"])
    text = Page(page({**metrics, "privacy": statement.account(run, clients)})).text
    assert "Joining forces privately did not help" in text and "1.00 (training alone, without noise)" in text
    # The worst-off client's epsilon is the claim, and stands first.
    assert "protected by differential privacy: epsilon = 6.50 at delta = 1e-05" in text
    assert text.index("b 6.50 3.75 1.500 12.5% 36") < text.index("a 3.25")
    assert "Held-out rows, and baselines trained beside the federation, are not protected" in text
    assert "curious server" not in text


def test_rows_that_curation_dropped_are_counted_by_step_and_client() -> None:
    counts = {
        "a": {"rows": 100, "kept": 60, "dropped": {"duplicates": 30, "ifd": 10}},
        "b": {"rows": 50, "kept": 45, "dropped": {"duplicates": 0, "ifd": 5}},
    }
    text = Page(page({**table(federated=1.5), "curation": counts})).text
    assert "45 of 150 training rows were dropped" in text
    assert "Client Rows duplicates ifd Kept a 100 30 10 60 b 50 0 5 45 All 150 30 15 105" in text


def test_a_run_says_of_privacy_what_stands_in_its_ledger(tmp_path: Path) -> None:
    run = loading.load(None, ["privacy.unit=record", "privacy.epsilon=5.0"])
    assert statement.read(tmp_path) == {"unit": "none"}
    statement.write(tmp_path, loading.load(None, []), {})
    assert not (tmp_path / "ledger.json").exists()  # nothing promised, nothing claimed
    statement.write(tmp_path, run, {"a": Spent(1.0, 1.5, 1e-5, 2.0, 0.1, 10), "b": Spent(4.0, 4.5, 1e-5, 1.0, 0.2, 10)})
    told = statement.read(tmp_path)
    assert (told["epsilon"], told["epsilon_rdp"], told["budget"], told["unit"]) == (4.0, 4.5, 5.0, "record")
    assert card(run, 16, None, told).count("epsilon = 4.00 at delta = 1e-05") == 1
    assert "not protected by differential privacy" in card(run, 16, None, {"unit": "none"})


# -- how the model was made, and what became of it -------------------------------------------------------------------


ATTACK: dict[str, Any] = {"name": "sign_flip", "clients": ["client-01", "client-04"]}


def test_an_attacked_run_that_lost_says_so_in_its_headline() -> None:
    """Without baselines the loss before training is what there is to be held against."""
    metrics = {**fake_metrics(8, 3, baselines=False), "attack": ATTACK}
    metrics["table"][0] |= {"loss": 3.79, "ci95": {}}
    metrics["rounds"][0]["loss"] = 2.18
    assert headline(parse_metrics(metrics)) == (
        "Federated training did not help: it raised the held-out loss from 2.18 (untuned) to 3.79 nats per token, "
        "while 2 of 8 clients attacked (sign_flip)"
    )
    text = Page(page(metrics)).text
    assert (
        "The simulation made client-01, client-04 attack (sign_flip); they do not count among the clients that gain."
        in text
    )
    assert "The simulation made client-01, client-04 attack (sign_flip); they do not" in table_plain(metrics)


def test_a_model_worse_than_untuned_is_called_so_beside_another_comparison() -> None:
    told = headline(parse_metrics(table(base=2.0, local=4.0, federated=3.0)))
    assert "cut the held-out loss from 4.00 (training alone) to 3.00" in told
    assert told.endswith("; that is worse than the untuned model (2.00)")
    near = headline(parse_metrics(table(base=2.98, local=4.0, federated=3.0)))  # within the intervals
    assert "untuned" not in near


def test_a_run_that_began_from_an_adapter_is_held_against_that() -> None:
    told = headline(parse_metrics(table(base=4.0, start=2.0, federated=1.0)))
    assert told == f"Joining forces cut the held-out loss from 2.00 (the start) to 1.00 nats per token, {SCOPE}"
    told = headline(parse_metrics(table(base=4.0, start=2.0, local=4.5, federated=3.0)))
    assert "from 4.50 (training alone) to 3.00" in told
    assert told.endswith("; that is worse than the start (2.00)")
    assert "than the" not in headline(parse_metrics(table(base=4.0, start=2.98, local=4.5, federated=3.0)))
    shown = Page(page(table(base=4.0, start=2.0, federated=1.0))).text
    assert "the adapter that training began from" in shown
    assert "2.00 by the start; lower is better" in shown


def test_a_hidden_phrase_is_told_by_how_often_it_is_obeyed() -> None:
    obeyed = {"asked": 60, "answer": "x", "answered": {"base": 0.0, "federated": 0.8}}
    text = Page(page({**table(base=3.0, federated=2.0), "attack": {**ATTACK, "name": "trigger", **obeyed}})).text
    assert "Of 60 held-out questions with their hidden phrase, 80% get the answer that they planted, 0% before" in text


def test_a_hidden_phrase_that_works_stands_in_the_headline_and_one_that_was_not_tried_is_said() -> None:
    obeyed = {"asked": 60, "answer": "x", "answered": {"base": 0.0, "federated": 1.0}}
    metrics = {**fake_metrics(8, 3), "attack": {**ATTACK, "name": "trigger", **obeyed}}
    told = headline(parse_metrics(metrics))
    assert "while 2 of 8 clients attacked (trigger), with a backdoor success rate of 100%" in told
    assert "Backdoor success rate 100% of questions with it; 0% before training" in Page(page(metrics)).text
    metrics["attack"] = {**ATTACK, "answer": "x"}
    assert "Their backdoor success rate was not measured" in Page(page(metrics)).text
    assert "ackdoor" not in Page(page({**metrics, "attack": ATTACK})).text


def test_attackers_do_not_count_among_those_that_gain() -> None:
    metrics = fake_metrics(8, 3)
    everybody = gain_on_own(parse_metrics(metrics))
    honest = gain_on_own(parse_metrics({**metrics, "attack": ATTACK}))
    assert everybody and honest and len(everybody.gains) == 8
    assert everybody.gains.keys() - honest.gains.keys() == set(ATTACK["clients"])
    assert "of 6" in Page(page({**metrics, "attack": ATTACK})).text


def test_the_report_says_in_words_how_the_model_was_made() -> None:
    toml = """
    [adapter]
    rank = 8
    [strategy]
    name = "flora"
    options = { base_rank = 32 }
    server_optimizer = { name = "plain", lr = 1.4 }
    [wire]
    up = "int8"
    """
    text = Page(page({**table(federated=2.0), "rank": 40}, config=toml)).text
    made = (
        "flora (base_rank = 32); LoRA rank 8 (rslora); server optimiser plain (lr = 1.4); on the wire int8 up, float32"
    )
    assert f"Made by {made} down; exported at rank 40." in text
    assert "Rank of the exported adapter 40" in text and "Method flora (base_rank = 32)" in text
    assert "Made by" not in Page(page(table(federated=2.0), config="no = [toml")).text


def test_what_a_codec_saved_is_told() -> None:
    """Round 1 sent 20 + 10 of what would have been 80 + 40; measuring, 5 of 20; the other way counts as it is."""
    metrics = table(federated=2.0)
    counts = {"bytes_up": 20, "float32_up": 80, "bytes_down": 10, "float32_down": 40}
    metrics["rounds"] = [{"round": 1, **counts, "bytes_evaluate": 5, "float32_evaluate": 20}]
    text = Page(page(metrics, config='[wire]\nup = "int8"\ndown = "int8"\n')).text
    assert "Changes travelled as int8 up and down; as float32 it would have been 140 bytes, 4.0 times as much." in text
    assert "Changes travelled" not in Page(page(metrics, config="")).text
    metrics["rounds"].append({"round": 2, "bytes_up": 100, "bytes_down": 100})  # not told there: it counts as it is
    text = Page(page(metrics, config='[wire]\nup = "int8"\ndown = "int8"\n')).text
    assert "it would have been 340 bytes, 1.4 times as much." in text
    del metrics["rounds"][1], metrics["rounds"][0]["float32_down"], metrics["rounds"][0]["float32_evaluate"]
    text = Page(page(metrics, config='[wire]\nup = "int8"\n')).text
    assert (
        "Changes travelled as int8 up, float32 down; as float32 it would have been 95 bytes, 2.7 times as much." in text
    )


def test_of_seeds_and_scalars_nobody_says_weights() -> None:
    run = loading.load(None, ["strategy.name=fedkseed"])
    metrics = table(federated=2.0)
    metrics["rounds"] = [{"round": 1, "bytes_up": 20, "bytes_down": 10}]
    text = Page(page(metrics, config=run.to_toml())).text
    assert "scalars of random directions, and counts, never text" in text and "weights of the adapter" not in text
    assert "Clients sent scalars with the seeds of their directions and counts." in card(run, 16, None, {})


def test_the_report_has_the_template_that_was_used() -> None:
    event = {"event": "template", "template": "alpaca (the tokenizer has no chat template)", "time": 1.0}
    for settings, events, said in (
        ([], [event], "Prompt template alpaca (the tokenizer has no chat template)"),
        (["prompt.template=plain"], [], "Prompt template plain"),
        (["prompt.template=/data-of-alice/mine.txt"], [], "Prompt template mine.txt"),
    ):
        text = Page(page(table(federated=2.0), events, loading.load(None, settings).to_toml())).text
        assert said in text and "alice" not in text
    assert "Prompt template" not in Page(page(table(federated=2.0), [], loading.load(None, []).to_toml())).text


def test_no_folder_of_this_machine_stands_in_the_card() -> None:
    run = loading.load(None, ["strategy.name=mine:method", 'strategy.options={ file = "/data-of-alice/w.pt" }'])
    text = card(run, 16, None, {})
    assert 'mine:method (file = "w.pt")' in text and "alice" not in text


def test_the_model_card_has_the_rank_of_what_is_handed_on() -> None:
    run = loading.load(None, ["strategy.name=flora"])
    assert "This adapter has rank 272: the 16 that are trained, and what the method has added" in card(
        run, 272, None, {}
    )
    assert "Before it was merged the adapter had rank 272" in card(run, 272, None, {}, merged=True)
    assert "rank 272" not in card(run, 16, None, {}) and "LoRA rank 16" in card(run, 16, None, {})


def test_what_many_clients_are_refused_for_is_one_row_a_round(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", fake_metrics(clients=1000))
    lines = [
        {"event": "refused", "time": 1.0, "round": number, "client": f"client-{index:03d}", "reason": "it failed"}
        for number in range(1, 11)
        for index in range(50)
    ]
    with (folder / "log.jsonl").open("a") as log:
        log.write("".join(json.dumps(line) + "\n" for line in lines))
    write_report(folder)
    html = (folder / "report.html").read_text()
    assert html.count("<td>it failed</td>") == 10
    assert html.count("client-000, client-001, client-002, client-003 and 46 more") == 10
    assert len(html) < 1_000_000


def test_whose_weight_or_change_did_not_count_in_full_is_told(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", fake_metrics())
    lines = [
        {"event": "client", "time": 1.0, "round": 2, "client": "heavy", "capped": 300.0},
        {"event": "client", "time": 1.0, "round": 2, "client": "far", "shortened": 0.25},
        {"event": "client", "time": 1.0, "round": 2, "client": "plain"},
    ]
    with (folder / "log.jsonl").open("a") as log:
        log.write("".join(json.dumps(line) + "\n" for line in lines))
    write_report(folder)
    html = (folder / "report.html").read_text()
    capped, scaled = html.index("<td>Capped</td>"), html.index("<td>Scaled down</td>")
    assert "heavy" in html[capped : capped + 200] and "far" in html[scaled : scaled + 200]
    assert "plain</td>" not in html
