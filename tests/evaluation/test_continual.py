"""Continual learning: who stays in the buffer, what a visit trains on, and what is measured of remembering."""

from __future__ import annotations

import json
import random
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
from conftest import overrides_for
from fake_run import fake_metrics
from flwr.common.serde import recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from apiary.config import loading
from apiary.config.schema import ContinualConfig, RunConfig
from apiary.core.errors import UserError
from apiary.core.messages import Payload, Visit
from apiary.data import stages
from apiary.data.examples import Example, read
from apiary.data.federation import ClientData, Federation
from apiary.data.turns import ToolCall, Turn
from apiary.evaluation import continual as measures
from apiary.evaluation.comparison import HeldOut, Measured
from apiary.models import adapters
from apiary.report import render
from apiary.report.data import parse_metrics
from apiary.report.stages import stages_content
from apiary.tracking.event_log import read_events
from apiary.transport import flower_records
from client import replay, round_files, state
from client.continual import buffer
from client.continual import buffer as continual_buffer
from client.continual.buffer import Buffer
from client.site import Site
from client.training.trainer import Cursor
from client.worker import Worker
from simulation.run import simulate


def example(number: int, skill: str = "sort") -> Example:
    return Example((Turn("user", f"question {number}"), Turn("assistant", f"answer {number}")), {"skill": skill})


def rows_of(count: int, skill: str = "sort", start: int = 0) -> list[Example]:
    return [example(start + i, skill) for i in range(count)]


def buffer_of(seed: int, rows: int = 10, *, client: str = "a", **keys: Any) -> Buffer:
    settings = ContinualConfig.model_validate({"buffer": float(rows), **keys})
    return Buffer(buffer.buffer_rule(settings, seed, client, 50))


def kept(buffer: Buffer) -> set[str]:
    return {row.example.turns[0].text for row in buffer.rows}


# -- the reservoir ----------------------------------------------------------------------------------


def test_each_row_stays_with_the_same_chance_and_pairs_stay_independently() -> None:
    """Vitter 1985: M of N rows, every row with chance M/N and every pair with M(M-1)/N(N-1)."""
    n, m, runs = 50, 10, 2000
    rows = rows_of(n)
    places = {row.turns[0].text: i for i, row in enumerate(rows)}
    hits, pairs = np.zeros(n), 0
    for seed in range(runs):
        chosen = [places[text] for text in kept(buffer.admit(buffer_of(seed, m), rows, 0))]
        assert len(chosen) == m
        hits[chosen] += 1
        pairs += {0, 1} <= set(chosen)
    # Fixed-size draws vary less than independent ones, by (1 - M/N) N/(N-1); the statistic is scaled to match.
    chi = ((hits - runs * m / n) ** 2 / (runs * m / n)).sum() / (1 - m / n) * (n - 1) / n
    assert 0.001 < stats.chi2.sf(chi, n - 1) < 0.999
    assert stats.binomtest(pairs, runs, m * (m - 1) / (n * (n - 1))).pvalue > 0.001


@given(
    st.integers(0, 2**40), st.sampled_from([0, *range(2, 13)]), st.sampled_from(["reservoir", "poisson"]), st.randoms()
)
@settings(max_examples=60, deadline=None)
def test_neither_the_order_nor_how_often_rows_come_matters(
    seed: int, capacity: int, policy: str, rng: random.Random
) -> None:
    rows = rows_of(30)
    empty = buffer_of(seed, capacity, policy=policy)
    once = buffer.admit(empty, rows, 0)
    shuffled = rng.sample(rows, 30)
    parts = buffer.admit(buffer.admit(empty, shuffled[:11], 0), shuffled[5:], 0)
    assert parts == once
    assert buffer.admit(once, shuffled, 0) == once


def test_of_equal_conversations_one_stays_and_it_is_the_earliest() -> None:
    twins = [example(1, "count"), example(1, "sort"), example(2)]
    both = [buffer.admit(buffer_of(0), rows, 3).rows for rows in (twins, twins[::-1])]
    assert both[0] == both[1]
    assert len(both[0]) == 2
    later = buffer.admit(buffer.admit(buffer_of(0), [example(1)], 0), twins, 1).rows
    assert {row.example.turns[0].text: row.stage for row in later} == {"question 1": 0, "question 2": 1}


def test_clients_and_seeds_choose_for_themselves() -> None:
    rows = rows_of(50)
    chosen = {frozenset(kept(buffer.admit(buffer_of(s, client=c), rows, 0))) for s in (0, 1) for c in ("a", "b")}
    assert len(chosen) == 4


def test_poisson_keeps_each_row_by_itself() -> None:
    """The law that amplification by sampling needs: independent inclusion, so the size is binomial."""
    rows = rows_of(40)
    sizes, together, first, second = [], 0, 0, 0
    for seed in range(2000):
        texts = kept(buffer.admit(buffer_of(seed, buffer=0.3, policy="poisson"), rows, 0))
        sizes.append(len(texts))
        a, b = "question 0" in texts, "question 1" in texts
        first, second, together = first + a, second + b, together + (a and b)
    assert np.mean(sizes) == pytest.approx(12, abs=4 * np.sqrt(40 * 0.3 * 0.7 / 2000))
    assert np.var(sizes) == pytest.approx(40 * 0.3 * 0.7, rel=0.15)
    assert stats.binomtest(first, 2000, 0.3).pvalue > 0.001
    assert stats.binomtest(together, 2000, 0.09).pvalue > 0.001


@given(st.integers(0, 29), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_under_poisson_no_row_decides_about_another(left_out: int, seed: int) -> None:
    rows = rows_of(30)
    empty = buffer_of(seed, buffer=0.4, policy="poisson")
    whole = kept(buffer.admit(empty, rows, 0))
    without = kept(buffer.admit(empty, rows[:left_out] + rows[left_out + 1 :], 0))
    assert without == whole - {f"question {left_out}"}


@pytest.mark.parametrize(
    ("buffer", "policy", "expected"),
    [
        (0.1, "reservoir", (20, 1.0)),
        (0.001, "reservoir", (1, 1.0)),  # asked for a buffer, so there is one
        (7.0, "reservoir", (7, 1.0)),
        (0.0, "reservoir", (0, 1.0)),
        (0.1, "poisson", (None, 0.1)),
        (50.0, "poisson", (None, 0.25)),
        (900.0, "poisson", (None, 1.0)),
    ],
)
def test_the_size_is_a_share_below_one_and_a_number_from_one_on(
    buffer: float, policy: str, expected: tuple[int | None, float]
) -> None:
    settings = ContinualConfig.model_validate({"buffer": buffer, "policy": policy})
    made = continual_buffer.buffer_rule(settings, 0, "a", 200)
    assert (made.rows, made.chance) == expected


# -- on disk ----------------------------------------------------------------------------------------


def test_what_is_stored_comes_back_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    odd = Example((Turn("system", "a\u2028b"), Turn("user", "é\n\ud800"), Turn("assistant", "{}")), {"skill": "x\ny"})
    rows = buffer.admit(buffer_of(0), [odd, *rows_of(5)], 2).rows
    replay.save(tmp_path / "new", 3, rows)
    assert replay.load(tmp_path / "new", 3) == rows
    assert replay.load(tmp_path / "new", 2) == ()
    (path,) = (tmp_path / "new").iterdir()
    assert path.name == "buffer-0003.jsonl"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    draft = tmp_path / "new" / ".buffer-0003.jsonl.tmp"  # as a kill leaves it, open to others
    draft.write_text("half a row")
    replay.save(tmp_path / "new", 3, rows[:1])
    assert not draft.exists()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text('{"digest": 1}\n')
    with pytest.raises(ValueError, match="was it edited"):
        replay.load(tmp_path / "new", 3)


def test_a_row_that_calls_and_thinks_comes_back_from_the_buffer(tmp_path: Path) -> None:
    turns = (
        Turn("user", "Sum up.\n\nA text.", data=9),
        Turn("assistant", "", trained=False, thinking="Hm.", calls=(ToolCall("send", '{"to": 1}', "c1"),)),
        Turn("tool", "sent", name="send", call_id="c1"),
        Turn("assistant", "Done."),
    )
    rows = buffer.admit(buffer_of(0), [Example(turns, {"skill": "x"}, "[]"), Example(turns[3:], {})], 0).rows
    assert len(rows) == 2
    replay.save(tmp_path / "new", 1, rows)
    assert replay.load(tmp_path / "new", 1) == rows


@pytest.mark.parametrize(
    "change",
    [
        {"turns": [["user"]]},
        {"turns": [["bee", "a"]]},
        {"turns": [["user", 3]]},
        {"turns": ["user"]},
        {"turns": [["assistant", "", True, "", [["send"]]]]},
        {"turns": [3]},
        {"tools": 3},
        {"tags": {"skill": 3}},
        {"digest": None},
    ],
)
def test_a_row_of_another_shape_is_one_line(change: dict[str, Any], tmp_path: Path) -> None:
    replay.save(tmp_path / "new", 1, buffer.admit(buffer_of(0), rows_of(1), 0).rows)
    (path,) = (tmp_path / "new").iterdir()
    path.write_text(json.dumps(json.loads(path.read_text()) | change) + "\n")
    with pytest.raises(ValueError, match="does not hold rows: was it edited"):
        replay.load(tmp_path / "new", 1)
    for torn in ("[]", "3", '{"digest": "', "null"):
        path.write_text(torn)
        with pytest.raises(ValueError, match="does not hold rows: was it edited"):
            replay.load(tmp_path / "new", 1)


def test_removed_rows_are_gone_from_every_version_and_nothing_takes_their_place(tmp_path: Path) -> None:
    whole = buffer.admit(buffer_of(0), rows_of(30), 0)
    replay.save(tmp_path, 1, whole.rows)
    replay.save(tmp_path, 2, buffer.admit(whole, rows_of(30, start=30), 1).rows)
    before = [replay.load(tmp_path, n) for n in (1, 2)]
    gone = {row.digest for row in before[0][:4]} | {"0" * 64}
    (tmp_path / ".buffer-0002.jsonl.tmp").write_text("question 1")
    assert replay.remove(tmp_path, gone) == 4
    for number, rows in zip((1, 2), before, strict=True):
        assert replay.load(tmp_path, number) == tuple(row for row in rows if row.digest not in gone)
    assert replay.remove(tmp_path, gone) == 0
    assert not list(tmp_path.glob(".*"))


def test_the_memory_holds_stage_and_both_cursors_and_reads_old_files(tmp_path: Path) -> None:
    known = state.Memory(4, Cursor(1, 2), 3, Cursor(5, 6))
    state.save(tmp_path, known)
    assert state.load(tmp_path, 5) == known
    (tmp_path / "round-0004.json").write_text('{"round": 4, "cursor": [1, 2]}')
    assert state.load(tmp_path, 5) == state.Memory(4, Cursor(1, 2), 0, Cursor())


# -- a visit ----------------------------------------------------------------------------------------

STAGES = (("sort", "count"), ("lookup",), ("dates",))


def run_config(**keys: Any) -> RunConfig:
    values = {"stages": STAGES, "buffer": 8.0, **keys}
    return loading.parse({"rounds": 6, "continual": values})


ROWS = [*rows_of(20, "sort"), *rows_of(10, "count", 20), *rows_of(20, "lookup", 30), *rows_of(20, "dates", 50)]


class Client:
    """Walks a client through rounds as the worker does, with a blank trainer."""

    def __init__(self, folder: Path, config: RunConfig, rows: list[Example]) -> None:
        self.folder, self.config, self.rows = folder, config, rows

    def visit(self, number: int) -> replay.StageData:
        round_files.begin(self.folder, number)
        past = state.load(self.folder, before=number)
        data = replay.prepare(self.rows, self.folder, "a", self.config, number, past)
        if data.new:
            moved = data.cursor._replace(batch=data.cursor.batch + 1)
            old = data.replay_cursor._replace(batch=data.replay_cursor.batch + bool(data.replay))
            sound = round_files.sound_before(self.config, number)
            state.save(self.folder, state.Memory(number, moved, data.stage, old), sound)
        return data


def test_each_stage_trains_on_its_own_rows_and_replays_the_earlier_ones(tmp_path: Path) -> None:
    client = Client(tmp_path, run_config(), [*ROWS, example(99, "other"), example(98, "")])
    seen = [client.visit(number) for number in range(1, 7)]
    assert [data.stage for data in seen] == [0, 0, 1, 1, 2, 2]
    assert [{row.tags["skill"] for row in data.new} for data in seen[::2]] == [{"sort", "count"}, {"lookup"}, {"dates"}]
    assert [len(data.replay) for data in seen] == [0, 0, 8, 8, 8, 8]
    assert seen[2].replay == seen[3].replay
    for data in seen:
        assert all(row.stage < data.stage for row in data.replay)
        assert all(row.example not in data.new for row in data.replay)
    everything = buffer.admit(Buffer(buffer.buffer_rule(client.config.continual, 0, "a", 70)), ROWS[:50], 0)
    assert [row.digest for row in seen[4].replay] == [row.digest for row in everything.rows]
    assert [data.cursor for data in seen] == [Cursor(), Cursor(0, 1)] * 3
    assert [data.replay_cursor for data in seen] == [*[Cursor()] * 3, Cursor(0, 1), Cursor(), Cursor(0, 1)]
    assert [(data.rounds_before, data.rounds) for data in seen] == [(0, 2), (1, 2)] * 3


def test_old_rows_may_leave_the_site_once_their_stage_is_over(tmp_path: Path) -> None:
    settings = run_config(buffer=8.0)
    stays, leaves = (Client(tmp_path / name, settings, ROWS) for name in ("stays", "leaves"))
    for number in range(1, 7):
        stage = (number - 1) // 2
        leaves.rows = [row for row in ROWS if row.tags["skill"] in STAGES[stage]]
        assert leaves.visit(number).replay == stays.visit(number).replay


def test_a_client_without_rows_for_a_stage_still_keeps_its_own(tmp_path: Path) -> None:
    client = Client(tmp_path, run_config(), [row for row in ROWS if row.tags["skill"] != "lookup"])
    assert [len(client.visit(number).new) for number in range(1, 7)] == [30, 30, 0, 0, 20, 20]
    data = client.visit(6)
    assert len(data.replay) == 8
    assert {row.example.tags["skill"] for row in data.replay} <= {"sort", "count"}
    late = Client(tmp_path / "late", run_config(), ROWS)  # first asked in the last stage
    assert {row.stage for row in late.visit(5).replay} == {0, 1}


@pytest.mark.parametrize("policy", ["reservoir", "poisson"])
def test_a_run_that_goes_back_finds_the_buffer_of_that_moment(tmp_path: Path, policy: str) -> None:
    settings = run_config(policy=policy, buffer=0.2)
    straight, broken = (Client(tmp_path / name, settings, ROWS) for name in ("straight", "broken"))
    expected = {number: straight.visit(number) for number in range(1, 7)}
    for number in (1, 2, 3, 2, 3, 3, 4, 5, 4, 5, 6, 5, 6):  # as far back as a server goes, over stage ends
        assert broken.visit(number) == expected[number]
        ahead = broken.folder / "buffer-0003.jsonl"  # of a stage that is to be done again, perhaps on other rows
        assert ahead.exists() == (number > 4)
    names = sorted(path.name for path in broken.folder.glob("buffer-*"))
    assert names == sorted(path.name for path in straight.folder.glob("buffer-*"))
    for name in names:
        assert (broken.folder / name).read_bytes() == (straight.folder / name).read_bytes()


def test_only_versions_that_a_resumed_run_can_need_are_kept(tmp_path: Path) -> None:
    stages = [[f"s{i}"] for i in range(10)]
    settings = loading.parse({"rounds": 10, "continual": {"stages": stages, "buffer": 3.0}})
    client = Client(tmp_path, settings, [row for i in range(10) for row in rows_of(5, f"s{i}", 5 * i)])
    for number in range(1, 11):
        client.visit(number)
    assert sorted(p.name for p in tmp_path.glob("buffer-*")) == [f"buffer-{n:04d}.jsonl" for n in (8, 9, 10)]
    again = client.visit(9)  # a round, and so a stage, back
    assert again.stage == 8
    once = buffer.admit(Buffer(buffer.buffer_rule(settings.continual, 0, "a", 50)), client.rows[:40], 0)
    assert [row.digest for row in again.replay] == [row.digest for row in once.rows]


def test_a_run_that_goes_back_four_rounds_finds_rows_that_have_left_the_data(tmp_path: Path) -> None:
    """Its loss is measured every four rounds, and exploded after the eighth."""
    settings = loading.parse(
        {
            "rounds": 10,
            "continual": {"stages": [[f"s{i}"] for i in range(10)], "buffer": 3.0},
            "evaluate": {"every": 4},
        }
    )
    client = Client(tmp_path, settings, [row for i in range(10) for row in rows_of(5, f"s{i}", 5 * i)])
    seen = {number: client.visit(number) for number in range(1, 9)}
    client.rows = client.rows[20:]  # of the stages that are over
    again = client.visit(5)
    assert again.stage == 4 and again.replay == seen[5].replay and len(again.replay) == 3


def test_no_buffer_is_no_file_and_no_stages_are_all_rows(tmp_path: Path) -> None:
    none = Client(tmp_path / "none", run_config(buffer=0.0), ROWS)
    assert [none.visit(number).replay for number in range(1, 7)] == [()] * 6
    assert not list(none.folder.glob("*buffer*"))
    data = replay.prepare(ROWS, tmp_path, "a", loading.load(), 4, state.Memory(3, Cursor(1, 2)))
    assert data == (0, ROWS, (), Cursor(1, 2), Cursor(), 3, loading.load().rounds)


def test_rows_of_no_stage_are_left_out_and_told() -> None:
    clients = tuple(ClientData(name, tuple(ROWS), tuple(rows_of(4, "other", 900))) for name in ("a", "b"))
    held_out = (*rows_of(3, "dates", 700), *rows_of(3, "other", 800))
    federation = Federation(clients, held_out, ())
    inside = stages.within(federation, run_config(stages=(("sort",), ("dates",))))
    assert [len(client.train) for client in inside.clients] == [40, 40]
    assert [row.tags["skill"] for row in inside.test] == ["dates"] * 3
    assert inside.reports[0].lines() == [
        "all clients: 68 of 148 rows left out: their skill is in no stage of continual.stages"
    ]
    assert stages.within(federation, loading.load()) == federation
    with pytest.raises(UserError, match=r"continual.stages names 'sorting': .* there are count, dates, lookup, sort$"):
        stages.within(federation, run_config(stages=(("sorting",), ("dates",))))
    with pytest.raises(UserError, match=r"continual.by = 'topic': no row has that column"):
        stages.within(federation, run_config(by="topic"))
    poor = federation._replace(clients=(*clients, ClientData("c", (example(1, "lookup"),), ())))
    with pytest.raises(UserError, match="client 'c' has no row of any stage"):
        stages.within(poor, run_config(stages=(("sort",), ("dates",))))


def test_a_stage_that_cannot_be_measured_is_told() -> None:
    held_out = HeldOut(tuple(rows_of(3, "sort")), small_models.make_corpus(3), (), ("", "", ""))
    run = Measured(np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 2.0]), np.array([1.0, 0.0, 1.0]))
    scores = measures.by_stage(run, held_out, run_config())
    assert scores["n"] == [3, 0, 0]
    assert (scores["losses"][0], scores["accuracies"][0]) == (1.0, pytest.approx(2 / 3))
    assert np.isnan(scores["losses"][1:]).all()
    (line,) = measures.unmeasured(held_out, run_config())
    assert line.startswith("stages 2 and 3 have no held-out example")
    assert measures.unmeasured(held_out, loading.load()) == []


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"buffer": 110.0}, "buffer = 110: every client would keep all rows of earlier stages, 110 at most"),
        ({"buffer": 109.0}, None),  # limits one of two
        ({"buffer": 99.0}, None),
        ({"buffer": 0.9}, None),
        ({"buffer": 0.0}, None),
        ({"buffer": 110.0, "policy": "poisson"}, None),  # of 130 and 120 rows a share stays away
        ({"buffer": 5000.0, "policy": "poisson"}, "buffer = 5000: every client would keep all rows"),
    ],
)
def test_a_buffer_that_holds_everything_is_no_limit_and_told(keys: dict[str, Any], told: str | None) -> None:
    """Of 60 + 50 + 20 rows in three stages only the first 110 ever stand in a buffer that is replayed."""
    lines = stages.unlimited_buffers([[60, 50, 20], [60, 40, 20]], run_config(**keys))
    assert lines == [] if told is None else told in lines[0]
    assert len(lines) == (told is not None)


def test_a_buffer_too_large_for_most_clients_is_told_with_how_many() -> None:
    (line,) = stages.unlimited_buffers([[30, 9], [20, 9], [500, 9]], run_config(buffer=100.0))
    assert "2 of 3 clients would keep all rows of earlier stages, 30 at most" in line


def test_a_class_label_may_be_the_task() -> None:
    settings = loading.parse(
        {"data": {"columns": {"instruction": "text", "output": "label"}}, "continual": {"by": "label"}}
    )
    assert stages.task_of(example(7), settings) == "answer 7"


# -- what is remembered -----------------------------------------------------------------------------

# Rows: untuned, after stage 1, 2, 3. By hand: OP = (.8), (.5 + .6)/2, (.2 + .7 + .9)/3;
# BWT = ((.2 - .8) + (.7 - .6) + 0)/3; forgetting = ((.8 - .2) + (.6 - .7))/2.
R = [[0.1, 0.0, 0.2], [0.8, 0.1, 0.1], [0.5, 0.6, 0.3], [0.2, 0.7, 0.9]]


def test_a_matrix_by_hand() -> None:
    assert measures.overall(R) == pytest.approx([0.8, 0.55, 0.6])
    assert measures.backward_transfer(R) == pytest.approx(-0.5 / 3)
    assert measures.forgetting(R) == pytest.approx(0.25)


def test_for_losses_harm_and_forgetting_keep_their_signs() -> None:
    losses = 1 - np.array(R)  # the same story told by losses
    assert measures.overall(losses) == pytest.approx([0.2, 0.45, 0.4])
    assert measures.backward_transfer(losses, "lower") == pytest.approx(measures.backward_transfer(R))
    assert measures.forgetting(losses, "lower") == pytest.approx(measures.forgetting(R))


def test_forgetting_is_from_the_best_and_transfer_from_just_after_training() -> None:
    peak_later = [[0, 0, 0], [0.5, 0, 0], [0.9, 0.5, 0], [0.5, 0.5, 1]]
    assert measures.backward_transfer(peak_later) == pytest.approx(0)
    assert measures.forgetting(peak_later) == pytest.approx(0.2)


def test_perfect_memory_and_short_runs() -> None:
    perfect = [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert measures.overall(perfect) == [1, 1, 1]
    assert measures.backward_transfer(perfect) == 0
    assert measures.forgetting(perfect) == 0
    assert measures.overall(R[:1]) == []
    assert np.isnan(measures.backward_transfer(R[:1]))
    assert np.isnan(measures.forgetting(R[:2]))
    assert measures.forgetting(R[:3]) == pytest.approx(0.3)  # ended after two of three stages
    assert measures.overall([[0, None], [1, None], [1, None]]) == [1, 1]  # a stage without held-out rows


# -- the report -------------------------------------------------------------------------------------


def continual_metrics(accuracy: Any = R) -> dict[str, Any]:
    loss = (2 - 2 * np.array(R)).tolist()
    part = {
        "by": "skill",
        "stages": [["sort", "<b>count</b>"], ["lookup"], ["dates"]],
        "accuracy": accuracy,
        "loss": loss,
        "joint": {"central": {"losses": [0.2, 0.3, 0.4], "accuracies": [0.91, 0.81, 0.71] if accuracy else None}},
        "overall": {"accuracy": [0.8, 0.55, 0.6]},
        "backward_transfer": {"accuracy": -0.1667},
        "forgetting": {"accuracy": None},
    }
    return {**fake_metrics(), "continual": part}


def test_the_heat_map_shows_every_score_with_what_it_means() -> None:
    page = render(parse_metrics(continual_metrics()))
    section = page[page.index("stage by stage") : page.index("Who holds what")]
    for value in ("10%", "0%", "80%", "50%", "60%", "20%", "70%", "90%", "91%", "81%", "71%"):
        assert f">{value}<" in section
    assert section.count('class="now"') == 3
    assert section.count('class="ahead"') == 3 + 2 + 1
    assert "sort, &lt;b&gt;count&lt;/b&gt;" in section
    assert "--share:0.8" in section
    assert (
        "was forgotten most: its answers exactly right fell from 80% just after its training to 20% at the end; on "
        "average, earlier stages ended 25 points worse than at their best before." in section
    )
    assert "see all stages at once" in section
    assert "-16.7%" in section
    assert "stage by stage" not in render(parse_metrics(fake_metrics()))


def test_the_heat_map_falls_back_on_losses_and_says_when_nothing_was_lost() -> None:
    metrics = continual_metrics(accuracy=None)
    section = render(parse_metrics(metrics))
    assert "its held-out loss rose from 0.40 just after its training to 1.60 at the end" in section
    better = [[2.0, 2.0, 2.0], [1.0, 2.0, 2.0], [1.0, 1.0, 2.0], [0.5, 1.0, 1.0]]
    metrics["continual"]["loss"] = better
    assert "Nothing was forgotten" in render(parse_metrics(metrics))
    metrics["continual"]["loss"] = better[:2]
    assert "There was no earlier stage to forget" in render(parse_metrics(metrics))
    metrics["continual"]["loss"] = [[1.0, None, 1.0]] * 4
    assert "–" in render(parse_metrics(metrics))  # noqa: RUF001 (as it is shown)
    metrics["continual"]["loss"] = [[1.0, 2.0]]
    with pytest.raises(UserError, match="a column for each of 3 stages"):
        parse_metrics(metrics)


@pytest.mark.parametrize(
    ("accuracy", "loss", "said"),
    [
        # By hand, forgetting: 0 by accuracy, 1.2 - 1.0 = 0.2 by loss.
        (
            [[0, 0], [0.5, 0], [0.5, 0.9]],
            [[2, 2], [1.0, 2], [1.2, 0.5]],
            "No stage has fewer answers exactly right at the end than at its best before, but by loss, stage 1 (sort) "
            "was forgotten most: its held-out loss rose from 1.00 just after its training to 1.20 at the end; on "
            "average, earlier stages ended 0.20 nats per token worse than at their best before.",
        ),
        # Stage 1 ends as it was just after its training, yet fell from its best, after stage 2: 0.9 to 0.5.
        (
            [[0, 0, 0], [0.5, 0, 0], [0.9, 0.5, 0], [0.5, 0.5, 1]],
            None,
            "Stage 1 (sort) was forgotten most: its answers exactly right fell from 90% after stage 2 to 50% at the "
            "end; on average, earlier stages ended 20 points worse than at their best before.",
        ),
        # Too small for the sentence's usual digits, not for the figure's.
        (
            [[0, 0], [0.804, 0], [0.8, 0.9]],
            [[2, 2], [1, 2], [1, 0.5]],
            "fell from 80.4% just after its training to 80.0% at the end",
        ),
        ([[0, 0], [0.5, 0], [0.5, 0.9]], [[2, 2], [1, 2], [1, 0.5]], "Nothing was forgotten"),
    ],
)
def test_what_was_forgotten_agrees_with_the_figures(accuracy: Any, loss: Any, said: str) -> None:
    loss = loss or (2 - np.array(accuracy)).tolist()
    part = {
        "stages": [["sort"], ["count"], ["dates"]][: len(accuracy[0])],
        "accuracy": accuracy,
        "loss": loss,
        "forgetting": {"accuracy": measures.forgetting(accuracy), "loss": measures.forgetting(loss, "lower")},
    }
    shown = stages_content(parse_metrics({**fake_metrics(), "continual": part}).continual)
    assert shown is not None and said in shown["sentence"]
    figures = [value for name, value in shown["figures"] if name.startswith("Forgetting")]
    assert ("Nothing" in shown["sentence"]) == (figures == ["0.0%", "0.000"])


# -- end to end -------------------------------------------------------------------------------------


def staged(model: Path, rows: Path, *more: str) -> list[str]:
    stages = 'continual.stages=[["first"], ["last"]]'
    quiet = ["evaluate.baselines=[]", "evaluate.generate=false", "evaluate.max_examples=20"]
    return [*overrides_for(model, rows), "rounds=4", stages, "continual.buffer=0.3", *quiet, *more]


def run(folder: Path, overrides: list[str], **keys: Any) -> dict[str, Any]:
    return simulate(loading.load(None, overrides), folder, **keys)


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def events_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(folder) if event["event"] == kind]


def test_a_run_in_stages_measures_each_stage_and_tells_it(tmp_path: Path, tiny_model: Path, rows_file: Path) -> None:
    more = ("evaluate.generate=true", 'evaluate.baselines=["central"]')
    saved: list[bool] = []

    def note(event: dict[str, Any]) -> None:
        if event["event"] == "stage":
            saved.append((tmp_path / "checkpoints" / f"round-{event['round']:04d}").exists())

    metrics = run(tmp_path, staged(tiny_model, rows_file, *more), observers=[note])
    assert saved == [False] * 3  # told before the checkpoint: a kill between the two loses no measurement
    part = metrics["continual"]
    assert [(e["round"], e["stage"]) for e in events_of(tmp_path, "stage")] == [(0, 0), (2, 1), (4, 2)]
    assert np.shape(part["loss"]) == np.shape(part["accuracy"]) == (3, 2)
    assert min(part["n"]) > 0
    assert sum(part["n"]) == metrics["table"][0]["n"]
    federated = next(row for row in metrics["table"] if row["method"] == "federated")
    assert np.average(part["accuracy"][2], weights=part["n"]) == pytest.approx(federated["accuracy"])
    assert part["loss"][2][1] < part["loss"][1][1]  # the second stage taught what the first did not
    assert part["overall"]["loss"][-1] == pytest.approx(np.mean(part["loss"][2]))
    assert set(part["joint"]) == {"central"}
    assert "stage by stage" in (tmp_path / "report.html").read_text(encoding="utf-8")
    for event in events_of(tmp_path, "client"):
        assert (event["replayed"] > 0) == (event["round"] > 2)
        assert event["tokens"] > 0


def test_replayed_tokens_do_not_weigh(tmp_path: Path, tiny_model: Path, rows_file: Path) -> None:
    """A client rich in kept rows must not outweigh the others: only new tokens count."""
    worker = Worker(loading.load(None, staged(tiny_model, rows_file)))
    site = site_of(tmp_path, rows_file)
    adapter = adapters.fresh_adapter(adapters.load(worker.config.model, worker.config.adapter), 0)
    visits = [worker.train(site, number, Payload(adapter, {})) for number in (1, 2, 3)]
    last = visits[-1]
    assert isinstance(last, Visit)
    assert last.report.replayed > 0
    steps = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert last.update.weight == last.report.tokens == sum(s["tokens"] for s in steps if s["round"] == 3)
    assert last.report.replayed == sum(s["replayed"] for s in steps if s["round"] == 3)
    worker.train(site, 4, Payload(adapter, {}))
    before, after = (state.load(tmp_path, number + 1) for number in (3, 4))
    assert (before.stage, after.stage) == (1, 1)
    assert Cursor() < before.replay < after.replay  # the buffer is walked on, too


def site_of(folder: Path, rows_file: Path) -> Site:
    rows = read(str(rows_file)).examples
    return Site("a", rows[:60], rows[60:70], folder, folder / "ledger.json", 4)


def test_nothing_of_the_buffer_is_in_a_reply(tmp_path: Path, tiny_model: Path, rows_file: Path) -> None:
    worker = Worker(loading.load(None, staged(tiny_model, rows_file)))
    site = site_of(tmp_path, rows_file)
    adapter = adapters.fresh_adapter(adapters.load(worker.config.model, worker.config.adapter), 0)
    for number in (1, 3):
        answer = worker.train(site, number, Payload(adapter, {}))
    sent = flower_records.train_reply(answer)
    body = recorddict_to_proto(sent).SerializeToString() + repr(answer).encode()
    stored = replay.load(tmp_path, 1)
    assert len(stored) == 18
    for row in stored:
        assert row.digest.encode() not in body
        assert not any(turn.text.encode() in body for turn in row.example.turns if len(turn.text) > 12)
    (record,) = sent.array_records.values()
    assert set(flower_records.from_arrays(record)) == set(adapter)


class Killed(BaseException):
    """Ends the run where it is raised, as a kill would."""


def killer(kind: str, number: int) -> Any:
    def observe(event: dict[str, Any]) -> None:
        if event["event"] == kind and event.get("round") == number:
            raise Killed

    return observe


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["reservoir", "poisson"])
def test_killed_at_any_point_a_run_in_stages_resumes_bit_for_bit(
    tmp_path: Path, tiny_model: Path, rows_file: Path, policy: str
) -> None:
    overrides = staged(tiny_model, rows_file, "rounds=5", f"continual.policy={policy}")  # stages of 3 and 2 rounds
    whole = run(tmp_path / "whole", overrides)
    # Within the first stage; at its end, after the measurement and before the checkpoint; in the first visits of the
    # second, whose buffer is then on disk; and before the first round is saved.
    for at in (("stage", 0), ("client", 1), ("client", 3), ("stage", 3), ("client", 4), ("round", 5), ("stage", 5)):
        with pytest.raises(Killed):
            run(tmp_path / "broken", overrides, resume=(tmp_path / "broken").exists(), observers=[killer(*at)])
    resumed = run(tmp_path / "broken", overrides, resume=True)
    assert adapter_bytes(tmp_path / "broken") == adapter_bytes(tmp_path / "whole")
    assert resumed["continual"] == whole["continual"]
    assert [e["stage"] for e in events_of(tmp_path / "broken", "stage")] == [0, 1, 2]
    for path in sorted((tmp_path / "whole" / "clients").rglob("buffer-*")):
        twin = tmp_path / "broken" / path.relative_to(tmp_path / "whole")
        assert twin.read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_without_a_buffer_stages_are_forgotten_and_the_buffer_changes_the_result(
    tmp_path: Path, tiny_model: Path, rows_file: Path
) -> None:
    run(tmp_path / "none", staged(tiny_model, rows_file, "continual.buffer=0.0"))
    run(tmp_path / "kept", staged(tiny_model, rows_file))
    assert adapter_bytes(tmp_path / "none") != adapter_bytes(tmp_path / "kept")
    first = [events_of(tmp_path / name, "stage")[1]["losses"] for name in ("none", "kept")]
    assert first[0] == first[1]  # the first stage has nothing to replay
    assert not list((tmp_path / "none").rglob("buffer-*"))


def test_wrong_stages_are_one_line_before_anything_is_written(
    tmp_path: Path, tiny_model: Path, rows_file: Path
) -> None:
    with pytest.raises(UserError, match=r"continual\.stages names 'frist'"):
        run(tmp_path / "run", [*overrides_for(tiny_model, rows_file), 'continual.stages=[["frist"]]'])
    assert not (tmp_path / "run").exists()
