# ruff: noqa: RUF001 (whole lines, and dashes as they are shown)

from __future__ import annotations

import io
import os
import pty
import threading
from typing import Any

import pytest
from rich.console import Console

from apiary.core.formatting import clean
from apiary.tracking.console import Board, Lines, State, board, eta, fold, line, make_progress

NAMES = [f"client-{i:02d}" for i in range(8)]


def story() -> list[dict[str, Any]]:
    """Two rounds of eight clients, 10 s each, and the first replies of a third; time starts at 100."""
    events: list[dict[str, Any]] = [
        {"event": "start", "clients": 8, "rounds": 4, "seed": 0, "outline": "flora; LoRA rank 4 (lora)", "time": 100.0},
        {"event": "phase", "name": "training", "time": 100.0},
    ]
    for number in (1, 2, 3):
        begin = 100.0 + 10 * (number - 1)
        asked = {"event": "asked", "round": number, "clients": NAMES, "time": begin}
        events.append(asked)
        for i, name in enumerate(NAMES[: 8 if number < 3 else 2]):
            reply = {"event": "client", "round": number, "client": name, "tokens": 500}
            events.append({**reply, "loss": 2.0, "time": begin + i + 1})
        if number < 3:
            end = {"round": number, "time": begin + 10}
            cost = {"tokens": 4000, "bytes_up": 1_000_000, "bytes_down": 2_000_000, "seconds": 10.0}
            clients = {"clients": 8, "asked": 8, "train_loss": 2.0}
            events.append({"event": "round", **end, **clients, **cost})
            loss = {"loss": 3.0 - number / 4, "ci95": [2.0, 3.0], "n": 400, "bytes_evaluate": 500_000}
            events.append({"event": "evaluate", **end, **loss})
    return events


def told(events: list[dict[str, Any]]) -> State:
    state = State()
    for event in events:
        state = fold(state, event)
    return state


def shown(state: State, now: float, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(board(state, now))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_template_is_one_line() -> None:
    event = {"event": "template", "template": "chat (the \x1b[31mtokenizer's own)", "time": 100.0}
    assert line(told(story()), event) == "prompt template: chat (the ?[31mtokenizer's own)"
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Board(console) as shown_board:
        shown_board(event)
    assert "prompt template: chat (the" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_state_is_what_the_events_add_up_to() -> None:
    state = told(story())
    assert (state.round, state.finished_rounds, state.rounds) == (3, 2, 4)
    assert state.waiting == tuple(NAMES[2:])
    assert (state.bytes_up, state.bytes_down) == (2_000_000, 2 * 2_000_000 + 2 * 500_000)
    assert state.losses == (2.75, 2.5)
    assert state.rate == pytest.approx(1000 / 2)  # two replies of 500 tokens in 2 s


def test_the_forecast_is_rounds_left_times_their_recent_length() -> None:
    state = told(story())
    assert eta(state, 120.0) == pytest.approx(2 * 10)
    assert eta(state, 124.0) == pytest.approx(2 * 10 - 4)
    assert eta(state, 500.0) == 0.0
    assert eta(told(story()[:4]), 105.0) is None


def test_what_comes_after_the_rounds_is_named_and_then_forecast() -> None:
    """By the work done, not by the number: pooled training is as much as all clients' together."""
    start = {"event": "start", "time": 100.0, "clients": 8, "rounds": 4, "after": ["baselines", "own models"]}
    state = told([*story(), start])
    assert "about 18 s of rounds left, then baselines and own models" in shown(state, 122.0)
    made = {"event": "baseline", "method": "local", "done": 1, "total": 10, "share": 0.04, "time": 204.0}
    last = {**made, "done": 10, "share": 1.0, "time": 300.0}
    own = {"event": "personal", "client": "a", "kept": "tuned", "weight": 0.0, "done": 2, "total": 8, "time": 330.0}
    lines = []
    phases = ({"event": "phase", "name": name, "time": time} for name, time in (("baselines", 200.0), ("own", 310.0)))
    for event in (next(phases), made, last, next(phases), own):
        state = fold(state, event)
        lines.append(line(state, event))
    assert lines[1] == "baselines: 1 of 10 trained, about 1 min 36 s left of this"
    assert lines[2] == "baselines: trained in 1 min 40 s"
    assert lines[4] == "own model of a: kept tuned, 2 of 8, about 1 min 00 s left of this"


def test_the_board_says_all_that_was_promised() -> None:
    text = shown(told(story()), 122.0)
    for part in (
        "training",
        "3 of 4",
        "2 of 8 done",
        "2.000 nats per token",
        "2.500 (−0.250)",
        "500 tokens/s",
        "2.00 MB up, 5.00 MB down",
        "22 s so far, about 18 s of rounds left",
        "client-02, client-03, client-04, client-05, client-06, client-07",
    ):
        assert part in text


def test_a_refused_client_is_no_longer_waited_for() -> None:
    event = {"event": "refused", "round": 3, "client": "client-07", "reason": "NaN", "time": 123.0}
    state = fold(told(story()), event)
    assert "client-07" not in state.waiting
    assert "3 of 8 done, 1 refused" in shown(state, 123.0)


def test_who_sat_a_round_out_is_told_with_the_reason() -> None:
    round_ = next(event for event in reversed(story()) if event["event"] == "round")
    asked = {"event": "asked", "round": 3, "clients": ["a", "b", "c"], "time": 123.0}
    out = [
        {"event": "declined", "round": 3, "client": name, "reason": reason, "time": 124.0}
        for name, reason in (("a", "idle"), ("b", "budget"), ("c", "idle"))
    ]
    state = told([*story(), asked, *out])
    assert state.waiting == ()
    assert (line(state, round_) or "").splitlines()[1:] == [
        "sat out: a, c (no rows of this stage, or too few)",
        "sat out: b (the privacy budget is spent)",
    ]
    assert "sat out" not in (line(told([*story(), asked, *out, {**asked, "round": 4}]), round_) or "")


def test_the_board_holds_at_every_moment_and_width() -> None:
    events = [
        *story(),
        {"event": "phase", "name": "baselines", "time": 140.0},
        {"event": "baseline", "method": "local", "done": 3, "total": 8, "time": 141.0},
        {"event": "from a later version", "time": 142.0},
        {"event": "finish", "seconds": 43.0, "time": 143.0},
    ]
    state = State()
    for event in events:
        state = fold(state, event)
        for width in (30, 80):
            assert max(map(len, shown(state, event["time"], width).splitlines())) <= width
        if event["event"] == "baseline":
            assert "3 of 8" in shown(state, event["time"])


def test_many_waiting_clients_are_counted_not_listed() -> None:
    names = [f"c{i}" for i in range(1000)]
    state = told([{"event": "asked", "round": 1, "clients": names, "time": 0.0}])
    assert "c0, c1, c2, c3, c4, c5 and 994 more" in shown(state, 1.0)


def test_plain_lines_are_one_a_round_and_one_an_evaluation() -> None:
    out = io.StringIO()
    observe = Lines(out)
    for event in story():
        observe(event)
    over_rows = "95% interval over rows 2.000 to 3.000"
    assert out.getvalue().splitlines() == [
        "run: 8 clients, 4 rounds, seed 0",
        "made by: flora; LoRA rank 4 (lora)",
        "round 1/4: 8 of 8 clients, train loss 2.000, 400 tokens/s, 1.00 MB up, 2.00 MB down, 10 s, about 30 s left",
        f"round 1/4: held-out loss 2.750 nats per token, {over_rows}, 500 kB down to measure",
        "round 2/4: 8 of 8 clients, train loss 2.000, 400 tokens/s, 1.00 MB up, 2.00 MB down, 10 s, about 20 s left",
        f"round 2/4: held-out loss 2.500 (−0.250) nats per token, {over_rows}, 500 kB down to measure",
    ]


def own(number: int, few: tuple[str, ...] = (), **losses: float) -> dict[str, Any]:
    """An evaluation on the sites' own rows; the loss over all is their mean here, as if each had as many tokens."""
    told = {"clients": losses, "clients_loss": sum(losses.values()) / len(losses) if losses else None}
    return {"event": "evaluate", "round": number, "time": 100.0 + number, **told, "clients_few": list(few)}


def test_without_rows_on_the_server_the_sites_own_losses_are_told() -> None:
    events = [
        {"event": "start", "clients": 3, "rounds": 3, "seed": 0, "time": 100.0},
        own(0, ("cricket",), ant=3.0, bee=4.0),
        own(1, ("cricket",), ant=2.0, bee=3.0),
        own(2, ("cricket",), ant=1.5),
        own(3, ("cricket",), ant=1.25),
        {"event": "finish", "seconds": 43.0, "time": 143.0},
    ]
    out = io.StringIO()
    observe = Lines(out)
    for event in events:
        observe(event)
    few = "; too few held-out rows to tell a loss: cricket"
    whose = "loss on each site's own held-out rows"
    assert out.getvalue().splitlines() == [
        "run: 3 clients, 3 rounds, seed 0",
        f"before training: {whose} 3.500 nats per token: ant 3.000, bee 4.000{few}",
        f"round 1/3: {whose} 2.500 (−1.000) nats per token: ant 2.000, bee 3.000{few}",
        f"round 2/3: {whose} 1.500 nats per token: ant 1.500{few}",  # other rows: no change is told
        f"round 3/3: {whose} 1.250 (−0.250) nats per token: ant 1.250{few}",
        f"finished in 43 s; {whose} 1.250 nats per token, −0.250 since round 2",
    ]
    text = shown(told([*story()[:1], own(0, ant=3.0), own(1, ant=2.0)]), 122.0, 120)
    assert "2.000 (−1.000) nats per token on each site's own held-out rows, −1.000 since before" in text


def test_many_sites_are_not_listed_and_their_names_cannot_drive_the_terminal() -> None:
    state, event = State(), own(1, ("\x1b[2J",), **{f"s{i}": 1.0 for i in range(7)})
    text = line(fold(state, event), event)
    assert text is not None and "1.000 nats per token at 7 sites; too few" in text and "\x1b" not in text
    event = own(1, **{"\x1b[2J": 1.0})
    assert "\x1b" not in (line(fold(state, event), event) or "\x1b")


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (
            {"event": "evaluate", "round": 0},
            "before training: held-out loss not measured: the server has no data.test, and sites are not asked for "
            "theirs",
        ),
        ({"event": "evaluate", "round": 1}, None),
        ({"event": "evaluate", "round": 1, "clients": {}}, "round 1/0: no site told a loss on its own held-out rows"),
        ({"event": "refused", "client": "a", "reason": "other base"}, "refused: a (handshake): other base"),
        (
            {"event": "refused", "client": "a", "reason": "no answer", "round": 0},
            "refused: a (before training): no answer",
        ),
        ({"event": "warning", "message": "cut"}, "warning: cut"),
        ({"event": "baseline", "method": "local", "done": 1, "total": 2}, "baselines: 1 of 2 trained"),
        ({"event": "baseline", "method": "local", "done": 2, "total": 2}, "baselines: trained"),
        ({"event": "baseline", "method": "local", "done": 4, "total": 100}, None),
        (
            {"event": "evaluate", "round": 0, "loss": None},
            "before training: held-out loss – nats per token",
        ),
        ({"event": "stop", "round": 4, "reason": "patience"}, "stopped after round 4: patience"),
        ({"event": "client", "round": 1, "client": "a"}, None),
    ],
)
def test_lines_of_single_events(event: dict[str, Any], expected: str | None) -> None:
    event = {"time": 0.0, **event}
    state = State() if event["event"] == "refused" else fold(State(), event)
    assert line(state, event) == expected


def test_text_from_clients_cannot_drive_the_terminal() -> None:
    reason = "bad\x1b[2J\x1b]0;owned\x07 \r\n second line [red]" + "x" * 1000
    assert clean(reason).startswith("bad?[2J?]0;owned? second line [red]")
    event = {"event": "refused", "client": "\x1b[1mA", "reason": reason, "round": 1, "time": 0.0}
    out = io.StringIO()
    Lines(out)(event)
    assert out.getvalue().count("\n") == 1
    assert "\x1b" not in out.getvalue()
    assert len(out.getvalue()) < 400
    screen = Console(width=500, file=io.StringIO(), force_terminal=False)
    Board(screen)(event)
    assert isinstance(screen.file, io.StringIO)
    assert "\x1b" not in screen.file.getvalue()
    assert "[red]" in screen.file.getvalue()  # shown, not obeyed as markup


def test_quiet_lets_only_refusals_through() -> None:
    out = io.StringIO()
    with make_progress(True, out) as observe:
        for event in story():
            observe(event)
        assert out.getvalue() == ""
        observe({"event": "refused", "client": "a", "reason": "NaN", "round": 2, "time": 1.0})
    assert out.getvalue() == "refused: a (round 2): NaN\n"


def _read_to_end(terminal: int, shown: list[bytes]) -> None:
    """Collects what is written to a terminal until its other end is closed (Linux says so with EIO)."""
    try:
        while piece := os.read(terminal, 1 << 16):
            shown.append(piece)
    except OSError:
        pass


def test_a_pipe_gets_lines_and_a_terminal_gets_the_board(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with make_progress(False, io.StringIO()) as observe:
        assert isinstance(observe, Lines)
    master, slave = pty.openpty()
    shown: list[bytes] = []
    reader = threading.Thread(target=_read_to_end, args=(master, shown))
    reader.start()
    with os.fdopen(slave, "w") as terminal, make_progress(False, terminal) as observe:
        assert isinstance(observe, Board)
        for event in story():
            observe(event)
    reader.join()
    os.close(master)
    written = b"".join(shown).decode()
    assert "waiting for" in written
    assert "\x1b[?25h" in written  # the cursor is given back


def test_a_method_that_does_not_average_apart_is_not_said_to_miss_it() -> None:
    for told, said in (
        ({"averages": "never"}, "would miss"),
        ({"averages": "sometimes"}, "misses"),
        ({"averages": "always"}, "misses"),
        (None, "misses"),  # as an earlier version logged: the outline's words decide nothing
    ):
        start = {"event": "start", "clients": 8, "rounds": 4, "outline": "flora; LoRA rank 4", "time": 100.0}
        state = fold(State(), start | ({"method": told} if told else {}))
        event = {"event": "round", "round": 1, "clients": 8, "asked": 8, "gauge": {"relative": 0.05}, "time": 110.0}
        assert f"averaging A and B apart {said} 5.0% of the change" in str(line(fold(state, event), event))
