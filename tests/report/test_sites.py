# ruff: noqa: RUF001 (whole sentences, and dashes as they are shown)
"""What a deployment shows whose server has no held-out rows, but whose sites have."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from deployment import SITES, overrides, write_rows
from fake_run import fake_deployment, fake_metrics
from report_pages import HOSTILE, Page, page, table
from rich.console import Console

from apiary.config import loading
from apiary.data import federation
from apiary.export.model_card import card
from apiary.report import headline, sites, table_plain, table_text, write_report
from apiary.report.data import parse_metrics
from apiary.tracking.console import Lines
from apiary.tracking.event_log import read_events
from apiary.tracking.metrics_file import read_metrics
from server.app import make_app
from simulation import engines

# Of the fake: ant 3.0 and bee 4.0 before training, half of it at the end, on 40 and 80 response tokens:
# (3.0 x 40 + 4.0 x 80) / 120 = 3.667 and 1.833.
SAID = (
    "On each site's own held-out rows, all sites together, the loss fell by 1.833 nats per response token: from 3.667 "
    "before training to 1.833 after round 3; it fell at 2 of 2 sites. cricket has fewer than 5 held-out rows and so "
    "tells no loss."
)


def said(metrics: dict[str, Any]) -> str:
    return " ".join(sites.sentences(parse_metrics(metrics)))


def test_the_report_tells_the_sites_own_losses() -> None:
    metrics = fake_deployment()
    assert headline(parse_metrics(metrics)) == (
        "Federated training cut the loss on the sites' own held-out rows from 3.67 (before training) to 1.83 nats per "
        "token, at 2 of 2 sites"
    )
    html = page(metrics)
    text = Page(html).text
    assert SAID in text
    for part in (
        "Site Rows to train on Response tokens Rows held out Before training After round 3 Change",
        "ant 100 900 10 3.000 1.500 −1.500",
        "bee 101 900 20 4.000 2.000 −2.000",
        "cricket 102 900 below 5 – – –",
        "all together 303 2,700 30 3.667 1.833 −1.833",
        "Loss on the sites' own held-out rows 1.83 3.67 before training; lower is better",
        "Rows to train on 303 at 3 sites",
        "so there is no interval",
    ):
        assert part in text
    assert 'aria-label="Loss on the sites&#x27; own held-out rows by round, from 3.667 to 1.833"' in html


def test_the_summary_on_the_terminal_tells_them_too() -> None:
    metrics = fake_deployment()
    plain = table_plain(metrics)
    console = Console(width=300, file=io.StringIO())
    console.print(table_text(metrics))
    assert isinstance(console.file, io.StringIO)
    for text in (" ".join(plain.split()), " ".join(console.file.getvalue().split())):
        assert SAID.split(". cricket")[0] in text and "cricket has fewer than 5" in text
        assert "nats per response token, on" not in text  # there is no table over rows of the server's
    assert plain.splitlines()[1].split() == ["ant", "100", "900", "10", "3.000", "1.500", "−1.500"]
    both = table_plain({**metrics, "table": table(base=2.0, federated=1.0)["table"]})
    assert both.startswith("method") and plain in both


def test_the_model_card_of_such_a_run_has_no_empty_table_and_names_no_site() -> None:
    text = card(loading.load(None, []), 16, fake_deployment(), {"unit": "none"})
    assert SAID.split(" cricket")[0] in text
    assert "cricket" not in text and "exact match" not in text


def test_a_run_directory_of_an_earlier_version_tells_them_from_its_log(tmp_path: Path) -> None:
    """Without counts of held-out rows and names of sites that told nothing, which were not logged then."""
    metrics = fake_deployment()
    measured = metrics.pop("sites")
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    events = [{"event": "evaluate", "round": r["round"], "clients": r["sites"]} for r in measured]
    events = [e | {"clients_loss": r["loss"], "time": 0.0} for e, r in zip(events, measured, strict=True)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    text = Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    assert SAID.split(" cricket")[0] in text
    assert "ant 100 900 3.000 1.500 −1.500" in text and "cricket 102 900 – – –" in text


def test_a_simulation_is_not_taken_for_a_deployment() -> None:
    metrics = fake_metrics()
    events = [{"event": "evaluate", "round": 0, "clients": {"client-00": 1.0}, "clients_loss": 1.0, "time": 0.0}]
    assert "At the sites" not in Page(page(metrics, events)).text
    assert "held-out loss" in table_plain(metrics) and "rows to train on" not in table_plain(metrics)


def test_before_and_after_are_over_the_same_sites() -> None:
    """Bee is hard and misses the last evaluation: without it nothing would have fallen by as much as it seems."""
    metrics = fake_deployment()
    last = metrics["sites"][-1]
    last["sites"], last["rows"], last["loss"] = {"ant": 2.9}, {"ant": (10, 40)}, 2.9
    assert "fell by 0.100 nats per response token: from 3.000 before training to 2.900 after round 3" in said(metrics)
    assert "it fell at 1 of 1 site that told one both times" in said(metrics)
    assert "bee 101 900 20 4.000 2.667 (after round 2) −1.333" in Page(page(metrics)).text
    for measured in metrics["sites"]:
        del measured["rows"]  # so the log of an earlier version
    assert "nats per response token: from" not in said(metrics)
    assert "from before training to after round 3: it fell at 1 of 1 site" in said(metrics)
    assert "3.67" not in headline(parse_metrics(metrics))


def test_a_loss_that_rose_is_not_called_a_success() -> None:
    metrics = fake_deployment()
    metrics["sites"] = [{**r, "round": 3 - r["round"]} for r in reversed(metrics["sites"])]
    assert headline(parse_metrics(metrics)) == (
        "Federated training did not help: it raised the loss on the sites' own held-out rows from 1.83 (before "
        "training) to 3.67 nats per token; it fell at 0 of 2 sites"
    )
    assert "the loss rose by 1.833" in said(metrics)


def test_without_a_measurement_before_training_it_counts_from_the_first() -> None:
    metrics = fake_deployment()
    del metrics["sites"][0]
    assert "after round 1 to 1.833 after round 3" in said(metrics)
    del metrics["sites"][:2]
    assert said(metrics).startswith("On each site's own held-out rows the loss is 1.833 nats per response token after")
    assert "bee 101 900 20 2.000" in Page(page(metrics)).text


def test_where_nobody_tells_a_loss_the_page_says_why() -> None:
    metrics = fake_deployment()
    for measured in metrics["sites"]:
        measured |= {"sites": {}, "rows": {}, "loss": None, "few": ["ant", "bee", "cricket"]}
    text = Page(page(metrics)).text
    assert "No held-out loss was measured in this run" in text
    assert "ant, bee and cricket have fewer than 5 held-out rows and so tell no loss." in text
    metrics["sites"] = []
    assert "No site was asked for the loss on its own held-out rows" in Page(page(metrics)).text
    ledger = {"unit": "record", "epsilon": 8.0, "epsilon_rdp": 9.0, "delta": 1e-5, "accountant": "pld", "sampler": "p"}
    text = Page(page({**metrics, "privacy": ledger})).text
    assert "Under differential privacy sites tell no loss of their own held-out rows; data.test names rows" in text
    assert "Site Rows to train on ant 100" in text  # what a private site calls its tokens are rows


def test_counts_that_are_not_exact_are_shown_as_what_they_are() -> None:
    metrics = fake_deployment()
    for client, policy in zip(metrics["clients"], ("exact", "rounded", "declared"), strict=True):
        client["counts"] = policy
    for shown in (Page(page(metrics)).text, table_plain(metrics)):
        rows = " ".join(shown.split())
        assert "ant 100 900 10" in rows and "bee about 101 about 900 about 20" in rows
        assert "cricket 102 (declared) 900 (declared) below 5" in rows and "all together about 303" in rows


def test_what_a_private_site_withholds_is_said_and_not_left_blank(tmp_path: Path, tiny_model: Path) -> None:
    """The server's own app against private clients: it weighs, logs and reports without a number of theirs."""
    rows = write_rows(tmp_path / "rows")
    private = ["privacy.unit=record", "privacy.batch_rows=8", "privacy.epsilon=50.0", "privacy.noise_multiplier=1.0"]
    given = [text for text in overrides(tiny_model, rows) if not text.startswith("evaluate.clients")]
    run = loading.load(None, [*given, *private, "evaluate.generate=false", "rounds=1"])
    folder = tmp_path / "run"
    engines.local()(make_app(), run, len(SITES), folder)
    metrics, events = read_metrics(folder), read_events(folder)
    hellos = [event for event in events if event["event"] == "handshake"]
    assert len(hellos) == 3 and all(hello["examples"] is hello["tokens"] is None for hello in hellos)
    visits = [event for event in events if event["event"] == "client"]
    steps = run.train.steps or 0
    assert {visit["tokens"] for visit in visits} == {8 * steps} and all(
        v["seconds"] is v["loss"] is None for v in visits
    )
    assert [client["examples"] for client in metrics["clients"]] == [None] * 3
    text = Page((folder / "report.html").read_text(encoding="utf-8")).text
    for shown in (text, " ".join(table_plain(metrics).split())):
        assert "and the loss in training, are not told under record-level privacy" in shown
        assert "Rows to train on ant not told" in shown.replace("rows to train", "Rows to train")
    lines = io.StringIO()
    observe = Lines(lines)
    for event in events:
        observe(event)
    (told,) = [line for line in lines.getvalue().splitlines() if line.startswith("round 1/1: 3 of 3")]
    assert "train loss not told under record-level privacy" in told and "expected rows/s" in told
    assert "tokens/s" not in told


def test_names_of_sites_are_shown_and_never_obeyed() -> None:
    metrics = json.loads(
        json.dumps(fake_deployment()).replace("cricket", "<b>$x$\\u001b[2J[red]").replace("ant", "$_$")
    )
    parsed = Page(page(metrics))
    assert "<b>$x$" in parsed.text and ("b", {}) not in parsed.tags[20:40]
    console = Console(width=300, file=io.StringIO())
    console.print(table_text(metrics))
    assert isinstance(console.file, io.StringIO)
    for text in (table_plain(metrics), console.file.getvalue()):
        assert "\x1b" not in text and "[red]" in text
    metrics = json.loads(json.dumps(fake_deployment()).replace('"ant"', json.dumps(HOSTILE)))
    assert not {tag for tag, _ in Page(page(metrics)).tags} & {"script", "img"}


def test_many_sites_are_summed_up() -> None:
    metrics = fake_deployment(tuple(f"site-{i:02d}" for i in range(60)))
    text = Page(page(metrics)).text
    assert "site-39 " in text and "21 more sites are in metrics.json" in text
    assert "21 more sites are in metrics.json" in table_plain(metrics)
    assert "it fell at 60 of 60 sites" in text


def test_the_report_knows_from_how_many_rows_on_a_site_tells_a_loss() -> None:
    assert sites.FEWEST == federation.FEWEST


def test_a_whole_deployment_without_rows_on_the_server(tmp_path: Path, tiny_model: Path) -> None:
    """The server's own app against three sites in this process; the hash holds out four rows of ant, more of others."""
    rows = write_rows(tmp_path / "rows")
    more = ["evaluate.clients=true", "data.test_fraction=0.2", "evaluate.generate=false"]
    run = loading.load(None, [*overrides(tiny_model, rows), *more])
    folder = tmp_path / "run"
    engines.local()(make_app(), run, len(SITES), folder)
    metrics, events = read_metrics(folder), read_events(folder)
    assert metrics["table"] == [] and [r["round"] for r in metrics["sites"]] == [0, 1, 2, 3]
    measured = [event for event in events if event["event"] == "evaluate"]
    for number, event in enumerate(measured):
        assert sorted(event["clients"]) == ["bee", "cricket"] and event["clients_few"] == ["ant"]
        tokens = {name: event["clients_rows"][name][1] for name in event["clients"]}
        pooled = sum(event["clients"][name] * tokens[name] for name in tokens) / sum(tokens.values())
        assert metrics["sites"][number]["loss"] == pytest.approx(pooled)
    first, last = measured[0]["clients_loss"], measured[-1]["clients_loss"]
    assert last < first
    text = Page((folder / "report.html").read_text(encoding="utf-8")).text
    for shown in (text, table_plain(metrics)):
        assert f"fell by {first - last:.3f} nats per response token: from {first:.3f} before training" in shown
        assert "ant has fewer than 5 held-out rows" in shown
    hello = {event["client"]: event["examples"] for event in events if event["event"] == "handshake"}
    assert f"ant {hello['ant']} " in text and f"cricket {hello['cricket']} " in text
    lines = io.StringIO()
    observe = Lines(lines)
    for event in events:
        observe(event)
    told = lines.getvalue()
    assert f"round 3/3: loss on each site's own held-out rows {last:.3f}" in told
    assert f"own held-out rows {last:.3f} nats per token, −{first - last:.3f} since before training" in told
    assert "held-out loss –" not in told
