"""A site's own split and counts: what a server that asks cleverly learns of its rows, over the messages of a site."""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import instruction_rows
from deployment import overrides, write_rows
from flwr.app import ArrayRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from typer.testing import CliRunner

from apiary.cli import main
from apiary.config import loading
from apiary.config.schema import Method, RunConfig
from apiary.core import counts
from apiary.core.counts import EXACT, ROUNDED, CountPolicy
from apiary.core.errors import UserError
from apiary.core.messages import CurationCounts, Decline, FitReport, Hello, Payload, Score, Visit
from apiary.data import split
from apiary.data.availability import parse_columns
from apiary.data.examples import read
from apiary.data.federation import decides, federate, is_held_out
from apiary.models import adapters
from apiary.transport import flower_records
from client import site_worker, told
from client.site import Facts, at_home
from client.site_worker import Service
from client.worker import Worker
from client.worker_rpc import Envelope
from deploy import kits, processes
from server import client_scores, validation


class Server:
    """A server that asks one site what it likes, in Flower's own bytes."""

    def __init__(self, facts: Facts, run: RunConfig) -> None:
        self.facts, self.run, self.service = facts, run, Service(facts)
        lm = adapters.load(run.model, run.adapter)
        self.adapter = adapters.fresh_adapter(lm, 0)
        self._content = flower_records.request(1, flower_records.to_arrays(self.adapter), ArrayRecord())

    def settings(self, *changes: str) -> RunConfig:
        """The run, where `changes` are settings of it that the server chooses."""
        values = self.run.model_dump(mode="json")
        for change in changes:
            key, _, value = change.partition("=")
            *parents, last = key.split(".")
            part = values
            for parent in parents:
                part = part[parent]
            part[last] = json.loads(value)
        return loading.parse(values)

    def ask(self, kind: str, *changes: str, name: str = "run") -> Envelope:
        """The answer to a message of a run with these `changes`."""
        content = RecordDict() if kind == flower_records.HELLO else self._content
        body = recorddict_to_proto(content).SerializeToString()
        header = {"kind": kind, "round": "1", "config": self.settings(*changes).to_json(), "name": name}
        return self.service.answer(Envelope(header, body))

    def hello(self, *changes: str) -> Hello | str:
        answer = self.ask(flower_records.HELLO, *changes)
        return str(answer.header["error"]) if answer.header else flower_records.read_hello_reply(_content(answer))

    def visit(self, *changes: str) -> Visit | Decline:
        return flower_records.read_train_reply(_content(self.ask("train", *changes)))


def _content(answer: Envelope) -> RecordDict:
    assert "error" not in answer.header, answer.header
    return recorddict_from_proto(RecordDictProto.FromString(answer.body))


@pytest.fixture
def serve(tmp_path: Path, tiny_model: Path) -> Callable[..., Server]:
    folder = write_rows(tmp_path / "rows")

    def made(name: str = "ant", rows: list[dict[str, Any]] | None = None, *more: str, **facts: Any) -> Server:
        data = folder / f"{name}.jsonl"
        if rows is not None:
            data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        run = loading.load(None, [*overrides(tiny_model, folder), "evaluate.clients=true", *more])
        state, agreed = tmp_path / f"state-{name}", facts.pop("agreed", False)
        if agreed:
            split.repin(state, run.data.test_fraction, new_key=True, agreed=run)
        return Server(Facts("ant", data, state, run.model.name, **facts), run)

    return made


# -- the split ----------------------------------------------------------------------------------------


def _just_around(row: dict[str, str]) -> tuple[float, float]:
    """The fractions between which a row changes sides by the hash that anybody can compute."""
    (example,) = _examples([row])
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if is_held_out(example, middle) else (middle, high)
    return low, high


def _examples(rows: list[dict[str, str]]) -> Any:
    return read(rows_file(rows)).examples


def rows_file(rows: list[dict[str, str]]) -> str:
    path = rows_file.folder / f"{random.randrange(10**9)}.jsonl"  # type: ignore[attr-defined]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path) -> None:
    (tmp_path / "candidates").mkdir()
    rows_file.folder = tmp_path / "candidates"  # type: ignore[attr-defined]


def test_two_handshakes_with_chosen_fractions_do_not_tell_whether_a_row_is_there(serve: Callable[..., Server]) -> None:
    """The attack, on exact counts: by a hash that the server can compute they differ where the row is there."""
    there = instruction_rows(40)[7]
    low, high = _just_around(there)
    simulated = serve("exact", instruction_rows(40))
    trained = [
        len(federate(simulated.run.data.model_copy(update=_alone(simulated, f)), 0).clients[0].train)
        for f in (low, high)
    ]
    assert trained[0] - trained[1] == 1  # by the public key the attack works, as it must for this test to mean anything
    answers = []
    for name, rows in (("with", instruction_rows(40)), ("without", instruction_rows(40, seed=5))):
        server = serve(name, rows, counts=EXACT)
        first, second = (server.hello(f"data.test_fraction={f!r}") for f in (low, high))
        assert isinstance(first, Hello) and isinstance(second, str)
        answers.append(second)
    assert answers[0] == answers[1] and "pinned" in answers[0]


def _alone(server: Server, fraction: float) -> dict[str, Any]:
    partition = Method(name="iid")
    return {"source": str(server.facts.data), "clients": 1, "partition": partition, "test_fraction": fraction}


def test_each_site_deals_its_rows_by_a_key_that_nobody_else_can_compute(serve: Callable[..., Server]) -> None:
    """Of the sites with one and the same file no two hold out the same rows, nor those that a simulation does."""
    fraction, sides = 0.3, []
    for name in ("a", "b"):
        server = serve(name, instruction_rows(40), "data.test_fraction=0.3")
        server.hello()
        config = at_home(server.run, server.facts)
        sides.append({row.turns[0].text for row in site_worker._read_site(config, server.facts, "run").test})
    public = {row.turns[0].text for row in _examples(instruction_rows(40)) if is_held_out(row, fraction)}
    assert sides[0] != sides[1] and public not in sides
    assert all(0 < len(side) < 40 for side in sides)


def test_rows_of_one_question_stay_on_one_side(serve: Callable[..., Server]) -> None:
    rows = [{**row, "output": answer} for row in instruction_rows(40) for answer in ("one", "two", "three")]
    server = serve("ant", rows, "data.test_fraction=0.3")
    site = site_worker._read_site(at_home(server.run, server.facts), server.facts, "run")
    sides = [{row.turns[0].text for row in part} for part in (site.train, site.test)]
    assert all(sides) and not sides[0] & sides[1]
    assert len(site.train) + len(site.test) == 120 and len(site.test) == 3 * len(sides[1])


def test_a_restarted_site_keeps_its_split_and_refuses_another(serve: Callable[..., Server]) -> None:
    server = serve("ant", None, "data.test_fraction=0.3", counts=EXACT)
    first = server.hello()
    path = server.facts.state / split.FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.parent.stat().st_mode & 0o077 == 0
    server.service = Service(server.facts)
    assert server.hello() == first
    for fraction in ("0.1", "0.30001", "0.0", "0.999"):
        for kind in (flower_records.HELLO, "train", "evaluate"):
            line = server.ask(kind, f"data.test_fraction={fraction}").header["error"]
            assert "this site has pinned 0.3" in line and "\n" not in line and str(path) not in line
    assert server.hello() == first
    assert "data.max_rows = 7" in str(server.hello("data.max_rows=7"))


def test_a_run_that_is_refused_pins_nothing(serve: Callable[..., Server]) -> None:
    server = serve("ant", None, max_epsilon=8.0)
    for change in ("data.test_fraction=0.9", "data.max_rows=3", 'prompt.template="/etc/passwd"'):
        assert isinstance(server.hello(change), str)
    assert not (server.facts.state / split.FILE).exists()


def test_differences_of_own_row_scores_do_not_give_a_rows_loss(serve: Callable[..., Server]) -> None:
    """All scores that a server can get by choosing the rows are one and the same number, or none."""
    server = serve("ant", instruction_rows(120), "data.test_fraction=0.3", counts=EXACT)
    scores = set()
    for change in ("data.test_fraction=0.3", "data.test_fraction=0.2", "data.max_rows=119", "data.max_rows=60"):
        answer = server.ask("evaluate", change)
        if not answer.header:
            scores.add(flower_records.read_score_reply(_content(answer)))
    assert len(scores) == 1 and next(iter(scores))[1].examples >= 5


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b"[]",
        b'{"schema": 2, "test_fraction": 0.1, "key": "00"}',
        b'{"schema": 1, "test_fraction": 0.1}',
        b'{"schema": 1, "test_fraction": 0.1, "key": ""}',
        b'{"schema": 1, "test_fraction": 0.1, "key": "zz"}',
        b'{"schema": 1, "test_fraction": 1.5, "key": "' + b"00" * 32 + b'"}',
        b'{"schema": 1, "test_fraction": NaN, "key": "' + b"00" * 32 + b'"}',
    ],
)
def test_a_garbled_split_is_one_clear_line(content: bytes, serve: Callable[..., Server]) -> None:
    server = serve()
    server.facts.state.mkdir()
    (server.facts.state / split.FILE).write_bytes(content)
    with pytest.raises(
        UserError, match=r"the held-out split '.*split\.json' cannot be read.*apiary deploy split"
    ) as line:
        site_worker.check(server.facts)
    assert "\n" not in str(line.value)
    told = str(server.hello())
    assert "errors.log" in told and "json" not in told
    assert (server.facts.state / split.FILE).read_bytes() == content


def test_a_split_that_was_lost_is_not_drawn_again_by_itself(serve: Callable[..., Server]) -> None:
    """Else rows that earlier runs trained on would be held out, and measured on."""
    server = serve()
    assert isinstance(server.visit(), Visit)
    (server.facts.state / split.FILE).unlink()
    with pytest.raises(UserError, match=r"is gone, but this site has taken part in runs: put it back, or pin"):
        site_worker.check(server.facts)
    server.service = Service(server.facts)
    assert isinstance(server.hello(), str) and not (server.facts.state / split.FILE).exists()


def test_the_operator_changes_the_split_and_nobody_else(tmp_path: Path) -> None:
    kits.init(tmp_path / "fed", "localhost:18443", ["north"])
    kit, state = tmp_path / "fed" / "north", tmp_path / "fed" / "north" / "state"

    def call(*words: str) -> str:
        done = CliRunner().invoke(main.app, ["deploy", "split", str(kit), *words])
        if done.exception is not None:
            raise done.exception
        return done.stdout.strip()

    assert "nothing yet" in call() and not (state / split.FILE).exists()
    rest = "pinned: nothing else: of prompt, own models, stages and curation the first run decides, with all rows"
    assert call("--test-fraction", "0.1").splitlines() == ["pinned: data.test_fraction = 0.1", rest]
    assert call().splitlines() == ["pinned: data.test_fraction = 0.1", rest]
    first = split.load(state)
    told = call("--test-fraction", "0.3").splitlines()
    assert told == ["pinned: data.test_fraction = 0.3", rest, "no more: data.test_fraction = 0.1"]
    second = split.load(state)
    assert first is not None and second == split.Split(0.3, first.key)
    small, large = ({i for i in range(200) if _held(i, made)} for made in (first, second))
    assert small < large  # under one key
    call("--test-fraction", "0.3", "--new-key")
    third = split.load(state)
    assert third is not None and third.key != first.key
    (state / split.FILE).write_text("garbled")
    with pytest.raises(UserError, match="cannot be read"):
        call("--test-fraction", "0.1")
    call("--test-fraction", "0.1", "--new-key")
    for wrong in ("1", "-0.1", "nan"):
        with pytest.raises(UserError, match="--test-fraction"):
            call("--test-fraction", wrong)
    with processes.hold(state), pytest.raises(UserError, match="another `apiary deploy` is running"):
        call("--test-fraction", "0.2")


def _held(number: int, made: split.Split) -> bool:
    (example,) = _examples([{"instruction": f"question {number}", "output": "a"}])
    return is_held_out(example, made.fraction, made.key)


# -- the counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "told_as"),
    [
        (0, 0),
        (4, 0),
        (5, 10),
        (7, 10),
        (43, 40),
        (99, 100),
        (104, 100),
        (1_249, 1_200),
        (1_250, 1_300),
        (98_765, 99_000),
    ],
)
def test_counts_are_rounded_to_two_digits_and_tens(count: int, told_as: int) -> None:
    assert counts.rounded(count) == told_as
    assert counts.most("rounded", told_as) >= count
    assert count <= counts.raised(count) == counts.rounded(counts.raised(count)) < count + max(10, count / 10)
    assert ROUNDED.told_some(count) == max(told_as, 10 if count else 0)


@pytest.mark.parametrize("text", ["", "none", "5000", "0:10", "10:5", "-1:5", "1:2:3", "1.5:7"])
def test_a_policy_that_states_nothing_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--counts .*expected rounded, exact, or ROWS:TOKENS"):
        counts.parse(text, "--counts")


def test_a_policy_is_read_as_it_is_written() -> None:
    for policy in (EXACT, ROUNDED, CountPolicy("declared", 5_000, 120_000)):
        assert counts.parse(counts.text_of(policy), "--counts") == policy


def _numbers(made: Visit) -> list[float]:
    curated = made.curated or CurationCounts(0, 0)
    return [
        made.update.weight,
        *made.report[:3],
        made.report.replayed,
        curated.rows,
        curated.kept,
        *curated.dropped.values(),
    ]


CURATED = ('curate.steps=[{name="length", max=30}]', "train.epochs=1")


def test_a_site_rounds_its_counts_unless_its_operator_says_otherwise(serve: Callable[..., Server]) -> None:
    """Every number of the messages of a run with curation and epochs, in which the counts depend on the rows."""
    rows = [*instruction_rows(40), {"instruction": "long " * 30, "output": "long", "skill": "first"}]
    settings = (*CURATED, "data.test_fraction=0.3")
    exact, plain = (serve(n, rows, *settings, **facts) for n, facts in (("e", {"counts": EXACT}), ("p", {})))
    for server in (exact, plain):
        # The same rows, to compare.
        split.save(server.facts.state, split.Split(0.3, bytes(32), split.reading(server.run)))
    true, told_ = exact.hello(), plain.hello()
    assert isinstance(true, Hello) and isinstance(told_, Hello)
    assert (true.counts, told_.counts) == ("exact", "rounded")
    assert true.examples and true.examples % 10 and told_.examples == counts.rounded(true.examples)
    assert true.tokens and told_.tokens == counts.rounded(true.tokens)
    a, b = exact.visit(), plain.visit()
    assert isinstance(a, Visit) and isinstance(b, Visit)
    assert a.curated and b.curated and a.curated.rows == sum((a.curated.kept, *a.curated.dropped.values()))
    assert any(number % 10 for number in _numbers(a))
    assert b.update.weight == b.report.tokens == counts.rounded(a.report.tokens)
    assert b.report.examples == counts.rounded(a.report.examples)
    assert b.report.steps == counts.raised(a.report.steps)
    assert all(number % 10 == 0 for number in (b.curated.rows, b.curated.kept, *b.curated.dropped.values()))
    assert a.report.loss == b.report.loss
    scores = [flower_records.read_score_reply(_content(each.ask("evaluate")))[1] for each in (exact, plain)]
    assert scores[0].examples % 10 and scores[0].tokens % 10 and scores[0].loss == pytest.approx(scores[1].loss)
    assert scores[1][1:] == (counts.rounded(scores[0].tokens), counts.rounded(scores[0].examples))
    most = counts.most(told_.counts, told_.examples)
    validation._check_report(b.report, plain.run, most, private=False)  # the server takes them for possible numbers
    validation._check_curated(b.curated, plain.run, private=False, examples=most)


def test_declared_counts_are_all_that_leaves(serve: Callable[..., Server]) -> None:
    """Sites with other numbers of rows, and other rows, tell the same."""
    stated = CountPolicy("declared", 500, 9_000)
    seen = []
    for name, rows in (("few", instruction_rows(30)), ("many", instruction_rows(47, seed=3))):
        server = serve(name, rows, *CURATED, "data.test_fraction=0.5", counts=stated, agreed=True)
        hello, visit = server.hello(), server.visit()
        _, score = flower_records.read_score_reply(_content(server.ask("evaluate")))
        assert isinstance(hello, Hello) and isinstance(visit, Visit) and math.isfinite(visit.report.loss)
        validation._check_report(visit.report, server.run, hello.examples, private=False)
        validation.check_score(score, server.run)
        assert visit.curated is None and visit.update.weight == visit.report.tokens == 9_000
        report = visit.report._replace(loss=0.0, seconds=0.0)
        seen.append((hello, report, visit.update.weight, score._replace(nats=0.0)))
    assert seen[0] == seen[1] and seen[0][0][3:5] == (500, 9_000) and seen[0][3] == (0.0, 9_000, 500)


@pytest.mark.parametrize("policy", [ROUNDED, CountPolicy("declared", 7, 20_000), CountPolicy("declared", 10**6, 10**9)])
@pytest.mark.parametrize("length", ["train.steps=3", "train.epochs=0.5", "train.epochs=2.7"])
def test_what_any_policy_tells_is_possible_for_the_server(policy: CountPolicy, length: str) -> None:
    """For any true numbers that a visit can have: no honest client is refused for the way it tells its counts."""
    rng = random.Random(4)
    config = loading.load(None, [length, "train.batch_tokens=64", "prompt.max_tokens=48", "train.accumulate=2"])
    for _ in range(500):
        rows = rng.randint(1, 3_000)
        tokens = rng.randint(rows, 48 * rows)
        examples, response = told.handshake(policy, rows, tokens, config)
        assert validation.possible(response, examples, config) and response > 0
        epochs = config.train.epochs
        steps = 3 if epochs is None else rng.randint(1, max(1, math.ceil(epochs * rows / 2)))
        trained = rng.randint(1, 128 * steps)
        made = FitReport(trained, rng.randint(1, min(trained, 2 * rows)), steps, 1.0, 1.0)
        report = told.report(policy, made, config, rows)
        validation._check_report(report, config, counts.most(policy.kind, examples), private=False)
        score = told.score(policy, Score(2.0 * tokens, tokens, rows), config)
        validation.check_score(score, config)
        assert score.loss == pytest.approx(2.0)


# -- record-level privacy -----------------------------------------------------------------------------

PRIVATE = ("privacy.unit=record", "privacy.batch_rows=8", "privacy.noise_multiplier=1.0", "evaluate.clients=false")


def _without_noise(answer: Envelope) -> str:
    """All of an answer but the bits of the change, which noise protects, and the fingerprint's long digests."""
    if answer.header:
        return json.dumps(dict(answer.header))
    content = _content(answer)
    parts = {
        name: sorted(record) if isinstance(record, ArrayRecord) else {key: str(record[key]) for key in sorted(record)}
        for name, record in sorted(content.items())
    }
    return json.dumps(parts)


@pytest.mark.parametrize("length", ["train.steps=2", "train.epochs=0.5"])
@pytest.mark.parametrize("policy", [ROUNDED, CountPolicy("declared", 60, 900)])
def test_under_record_level_privacy_no_number_depends_on_the_rows(
    policy: CountPolicy, length: str, serve: Callable[..., Server]
) -> None:
    """Every message of two sites whose rows differ, in number as well, byte for byte but for the noised change."""
    curate = 'curate.steps=[{name="length", max=30}]'
    long = {"instruction": "a much longer row " * 20, "output": "long", "skill": "first"}
    seen = []
    for name, rows in (("one", instruction_rows(40)), ("other", [*instruction_rows(43, seed=9)[:42], long])):
        fraction = 0.3 if policy.kind == "declared" else 0.0  # rounded, another split could be another number
        more = (*PRIVATE, length, curate, f"data.test_fraction={fraction}")
        server = serve(name, rows, *more, counts=policy, agreed=True)
        answers = [server.ask(kind) for kind in (flower_records.HELLO, "train", "evaluate")]
        assert not any(answer.header for answer in answers)
        visit = flower_records.read_train_reply(_content(answers[1]))
        assert isinstance(visit, Visit) and math.isnan(visit.report.loss) and math.isnan(visit.report.seconds)
        assert visit.curated is None
        seen.append([_without_noise(answer) for answer in answers])
    assert seen[0] == seen[1]
    assert '"counts": {"rank": "' in seen[0][0] and "examples" not in seen[0][0] and "tokens" not in seen[0][0]


def test_what_goes_wrong_under_privacy_says_nothing_of_the_rows(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever error it is, wherever it comes up: one row may decide about that."""
    lines = set()
    for number, error in enumerate((ValueError("row 7"), KeyError("row 9"), UserError("client has no row left"))):

        def broken(*args: Any, error: Exception = error, **kwargs: Any) -> Any:
            raise error

        for place in ("client.worker.private_visit.visit", "client.site_worker.stages.rows_of_run"):
            server = serve(f"s{number}{len(place)}", None, *PRIVATE, "privacy.epsilon=50.0")
            with monkeypatch.context() as patched:
                patched.setattr(place, broken)
                lines.add(server.ask("train").header["error"])
            assert (
                "row" in (server.facts.state / "errors.log").read_text()
                or (server.facts.state / "runs" / "run" / "errors.log").exists()
            )
    (line,) = lines
    assert "not told under record-level privacy" in line and ".py" not in line


def test_a_declared_number_of_rows_sets_the_sampling_rate_that_is_charged(serve: Callable[..., Server]) -> None:
    server = serve(
        "ant", None, *PRIVATE, "train.steps=2", "privacy.epsilon=50.0", counts=CountPolicy("declared", 80, 900)
    )
    visit = server.visit()
    assert isinstance(visit, Visit) and visit.spent is not None and visit.spent.sample_rate == 8 / 80
    (entry,) = json.loads((server.facts.state / "ledger.json").read_text())["entries"]
    assert entry["rates"] == {"0": 0.1}
    assert visit.update.weight == 16.0


# -- which rows count, and how they are read ----------------------------------------------------------

STATED = CountPolicy("declared", 60, 900)
_PRIVATE_RUN = (*PRIVATE, "privacy.epsilon=50.0", "train.steps=2")
MODES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "plain": (("train.steps=2",), {}),
    "plain, exact counts": (("train.steps=2",), {"counts": EXACT}),
    "plain, stated counts": (("train.steps=2",), {"counts": STATED}),
    "private": (_PRIVATE_RUN, {}),
    "private, stated counts": (_PRIVATE_RUN, {"counts": STATED}),
}
_ANN, _STAGE = 'continual.by="name"', 'continual.stages=[["Ann Smith"]]'
# What a server may set to ask for few rows, or for rows read otherwise; together they name every key that could.
QUESTIONS: tuple[tuple[str, ...], ...] = (
    (_ANN, _STAGE),
    (_ANN, 'continual.stages=[["Ann Smith"], ["person 1"]]', "rounds=2"),
    (
        _ANN,
        'continual.stages=[["person 1"], ["Ann Smith"]]',
        "rounds=2",
        "continual.buffer=0.9",
        'continual.policy="poisson"',
        "continual.replay=0.9",
    ),
    *(
        (_ANN, f"continual.stages={json.dumps([['Ann Smith', *(f'person {i}' for i in range(known))]])}")
        for known in range(1, 8)  # with four to train on, hers is the fifth
    ),
    ('continual.by="instruction"', 'continual.stages=[["What does Ann Smith have?"]]'),
    (
        'data.columns={"instruction": "output", "output": "instruction"}',
        'continual.by="instruction"',
        'continual.stages=[["What does Ann Smith have?"]]',
    ),
    ('data.columns={"instruction": "instruction", "output": "only"}',),
    ('data.columns={"messages": "messages"}',),
    ("data.test_fraction=0.9",),
    ("data.max_rows=1",),
    ('data.split="test"',),
    ('data.source="builtin:skills"', 'data.test="builtin:skills"', "data.clients=9"),
    ('data.source="sqlite:///rows.db"', 'data.query="select * from rows where name = 1"'),
    ('data.partition={"name": "by_value", "by": "name"}',),
    ('curate.steps=[{"name": "length", "max": 5}]',),
    ('curate.steps=[{"name": "length", "min": 50}]', "curate.every=1"),
    ('curate.steps=[{"name": "length", "max": 10000}]', "curate.every=1"),
    ("prompt.max_tokens=36", 'prompt.on_long="drop"'),
    ('prompt.system="' + "word " * 20 + '"', "prompt.max_tokens=60", 'prompt.on_long="drop"'),
    ('prompt.template="plain"', "prompt.max_tokens=16", 'prompt.on_long="drop"'),
    ("prompt.max_tokens=8", 'prompt.on_long="drop"'),
    ('prompt.boundary="structured"', "prompt.injected=1.0"),
    ("train.steps=1", "train.batch_tokens=16", "train.lr=1e-12"),
    ("train.steps=null", "train.epochs=1.0", "train.batch_tokens=16", "train.accumulate=1"),
    ("evaluate.patience=1",),
    ("seed=5", "rounds=1"),
    ("personal.enabled=true", "personal.validation=0.4"),
    ("personal.enabled=true", "personal.validation=0.4", "seed=9"),
    ("personal.enabled=true", "personal.validation=0.97"),  # leaves fewer rows than are told
)
# The other keys: they neither take a part of the rows nor change what is read of them.
_OF_NO_ROWS = ("model.", "adapter.", "strategy.", "wire.", "evaluate.", "simulate.", "log.", "privacy.", "train.")
_OF_NO_ROWS += tuple(f"personal.{key}" for key in ("weights", "budget", "lr_factor", "margin"))  # how models are made


def _keys(question: tuple[str, ...]) -> set[str]:
    return {change.partition("=")[0] for change in question}


def test_the_questions_name_every_key_that_can_choose_rows() -> None:
    """A key that is added to these parts of a configuration has to be asked for here as well."""
    values = RunConfig().model_dump()
    keys = {
        f"{part}.{key}" if isinstance(values[part], dict) else part for part in values for key in _inner(values[part])
    }
    asked = set().union(*map(_keys, QUESTIONS))
    assert asked <= keys
    assert {key for key in keys if not key.startswith(_OF_NO_ROWS)} <= asked


def _inner(part: Any) -> Any:
    return part if isinstance(part, dict) else [""]


def _others() -> list[dict[str, str]]:
    """So many that no rounded count of the handshake or of steps stands at a border, which one row may cross."""
    return [{**row, "name": f"person {i}"} for i, row in enumerate(instruction_rows(52))]


ANN = {"instruction": "What does Ann Smith have?", "output": "flu", "skill": "last", "name": "Ann Smith", "only": "x"}
PAIRS: dict[str, tuple[list[dict[str, str]], list[dict[str, str]]]] = {
    "another person's": ([ANN], [{**ANN, "name": "Bob Jones", "instruction": "What does Bob Jones have?"}]),
    "a short one": ([{**ANN, "instruction": "?", "output": "y"}], [ANN]),
    "one more": ([ANN], []),
}


def _told(server: Server, *changes: str, name: str = "run") -> list[str]:
    """All that a site answers in turn to a handshake, a visit and a question for its score, but what must differ.

    That is the bits of a change, and losses over many rows; whether there is a loss is kept. Rounded counts of a visit
    follow its batches, which another row deals anew, and may cross a border, exact ones differ; whether there are any
    is kept.
    """
    counted = server.facts.counts.kind != "declared" and server.run.privacy.unit == "none"
    seen = []
    for kind in (flower_records.HELLO, "train", "evaluate"):
        answer = server.ask(kind, *changes, name=name)
        if answer.header or kind != "evaluate":
            numbers = "loss|seconds" + "|tokens|examples|replayed|weight" * (counted and kind == "train")
            seen.append(
                re.sub(rf'"({numbers})": "(?!0(\.0)?")[0-9][^"]*"', r'"\1": "a number"', _without_noise(answer))
            )
        else:
            _, score = flower_records.read_score_reply(_content(answer))
            seen.append(str(score._replace(nats=float(score.nats > 0))))
    return seen


def _two(pair: str, mode: str, serve: Callable[..., Server], suffix: str = "") -> list[Server]:
    """Two sites that differ in one row and deal their rows by one key, which the server does not have."""
    settings, facts = MODES[mode]
    made = []
    for name, more in zip("ab", PAIRS[pair], strict=True):
        server = serve(f"{name}{suffix}", [*_others(), *more], *settings, "data.test_fraction=0.2", **facts)
        split.save(server.facts.state, split.Split(0.2, bytes(32)))
        made.append(server)
    return made


def _questions(server: Server) -> list[tuple[str, ...]]:
    """The questions that a run of this kind can hold: of a private one some clash with the rest."""
    held = []
    for question in QUESTIONS:
        with contextlib.suppress(UserError):
            server.settings(*question)
            held.append(question)
    return held


@pytest.mark.parametrize(
    ("pair", "mode"),
    [(pair, mode) for pair in PAIRS for mode in MODES if "exact" not in mode or pair == "another person's"],
)
def test_no_question_after_an_honest_run_tells_apart_sites_that_differ_in_one_row(
    pair: str, mode: str, serve: Callable[..., Server]
) -> None:
    """Whatever the server sets, all answers are equal, or refused in equal words."""
    one, other = _two(pair, mode, serve)
    assert _told(one) == _told(other)
    for number, question in enumerate(_questions(one)):
        answers = [_told(server, *question, name=f"run{number}") for server in (one, other)]
        assert answers[0] == answers[1], question


@pytest.mark.parametrize("mode", ["plain", "private"])
@pytest.mark.parametrize("pair", PAIRS)
def test_no_first_question_tells_apart_sites_that_differ_in_one_row(
    pair: str, mode: str, serve: Callable[..., Server]
) -> None:
    questions = _questions(_two(pair, mode, serve)[0])
    assert len(questions) >= len(QUESTIONS) - 2
    for number, question in enumerate(questions):
        answers = [_told(server, *question) for server in _two(pair, mode, serve, f"-{number}")]
        assert answers[0] == answers[1], question


def _staged(person: str) -> list[dict[str, str]]:
    """Rows of two tasks, and one of a third."""
    rows = [{**row, "task": ("sort", "count")[i % 2]} for i, row in enumerate(instruction_rows(60))]
    return [*rows, {**ANN, "task": person}]


STAGES = ('continual.by="task"', 'continual.stages=[["Ann"], ["sort"]]', "rounds=2", "data.test_fraction=0.0")


@pytest.mark.parametrize("stages", ['[["Ann"], ["sort"]]', '[["Ann"]]'])
@pytest.mark.parametrize("policy", [ROUNDED, STATED])
def test_under_privacy_a_stage_without_rows_answers_like_any_other(
    policy: CountPolicy, stages: str, serve: Callable[..., Server]
) -> None:
    """Of an agreed stage: noise alone, by planned numbers, and charged."""
    seen, changes = [], set()
    for person in ("Ann", "Bob"):
        server = serve(
            person, _staged(person), *_PRIVATE_RUN, *STAGES, f"continual.stages={stages}", counts=policy, agreed=True
        )
        seen.append(_told(server))
        content = _content(server.ask("train"))
        assert isinstance(flower_records.read_train_reply(content), Visit)
        assert (server.facts.state / "ledger.json").exists()
        changes.add(flower_records.read_message(content))
    assert seen[0] == seen[1] and len(changes) == 2 and b"" not in changes


@pytest.mark.parametrize("policy", [ROUNDED, STATED, EXACT])
def test_without_privacy_a_stage_of_few_rows_is_sat_out_as_one_of_none(
    policy: CountPolicy, serve: Callable[..., Server]
) -> None:
    for number, people in enumerate((0, 1, 4, 5)):
        rows = [*_staged("Bob"), *({**ANN, "task": "Ann", "instruction": f"{i}?"} for i in range(people))]
        server = serve(f"s{number}", rows, "train.steps=2", *STAGES, counts=policy, agreed=True)
        assert isinstance(server.hello(), Hello)
        answer = server.visit()
        assert isinstance(answer, Visit) if people == 5 else answer == Decline("ant", "idle"), people
        assert not isinstance(answer, Visit) or math.isfinite(answer.report.loss)


@pytest.mark.parametrize("policy", [ROUNDED, STATED, EXACT])
def test_a_site_without_rows_of_any_stage_tells_what_one_of_few_does(
    policy: CountPolicy, serve: Callable[..., Server]
) -> None:
    more = ("train.steps=2", *STAGES, 'continual.stages=[["Ann"]]')
    seen = [_told(serve(person, _staged(person), *more, counts=policy, agreed=True)) for person in ("Ann", "Bob")]
    assert seen[0] == seen[1] and not any("error" in answer for answer in seen[0])


@pytest.mark.parametrize("policy", [ROUNDED, STATED, EXACT])
def test_no_loss_of_few_rows_is_told(policy: CountPolicy, serve: Callable[..., Server]) -> None:
    """A step may hold one row; the server takes a visit without a loss, and tells the round's loss without it."""
    server = serve("ant", None, counts=policy)
    for steps, rows in ((1, 1), (4, 4), (5, 5)):
        visit = server.visit("train.batch_tokens=16", f"train.steps={steps}", "train.lr=1e-12")
        assert isinstance(visit, Visit) and math.isfinite(visit.report.loss) == (rows >= 5)
        validation._check_report(visit.report, server.settings(f"train.steps={steps}"), None, private=False)
    reports = [FitReport(30, 10, 1, math.nan, 1.0), FitReport(10, 10, 1, 2.0, 1.0), FitReport(30, 10, 1, 4.0, 1.0)]
    assert client_scores.training_fields(reports) == {"clients": 3, "tokens": 70, "train_loss": 3.5}
    assert "train_loss" not in client_scores.training_fields(reports[:1])


def test_a_site_that_a_run_leaves_few_rows_has_none(serve: Callable[..., Server]) -> None:
    """By the first run's prompt, which alone it can be: nothing is told of four rows that is not told of none."""
    others = [{**row, "instruction": row["instruction"] + " and so on" * 20} for row in _others()]
    for few in (0, 4, 5):
        rows = [*others, *({**ANN, "instruction": f"{i}", "output": "y"} for i in range(few))]
        server = serve(f"few{few}", rows, "data.test_fraction=0.0", "prompt.max_tokens=60", "prompt.on_long=drop")
        hello = server.hello()
        assert isinstance(hello, Hello) and (hello.examples, hello.tokens) == ((10, 10) if few == 5 else (0, 0)), few


def test_a_site_tells_no_half_of_its_scores_that_leaves_few_rows(serve: Callable[..., Server]) -> None:
    """Else the sum over all held-out rows, less that over the half that decides, would be theirs."""
    rows = _others()
    examples = _examples(rows)
    halves = [[row for row, e in zip(rows, examples, strict=True) if decides(e) == side] for side in (True, False)]
    one, other = (_examples(half) for half in halves)
    for rest, told_ in ((0, True), (1, False), (4, False), (5, True)):
        server = serve(f"rest{rest}", rows, "evaluate.patience=1")
        site = site_worker._read_site(at_home(server.run, server.facts), server.facts, "run")
        test = (*one[:8], *other[:rest])
        worker = Worker(server.run)
        score = worker.evaluate(site._replace(test=test), Payload(server.adapter, {}))
        assert (score.examples > 0) is told_, rest


def test_the_operator_agrees_to_a_runs_choice_of_rows_and_to_no_other(serve: Callable[..., Server]) -> None:
    server = serve("ant", _staged("Ann"), "train.steps=2", *STAGES)
    refused = server.hello()
    assert "continual.by, continual.stages" in str(refused) and "apiary deploy split KIT --agree run.toml" in str(
        refused
    )
    assert not (server.facts.state / split.FILE).exists()
    split.repin(server.facts.state, 0.0, new_key=True, agreed=server.run)
    assert isinstance(server.hello(), Hello)
    for other in (
        'continual.stages=[["Ann"]]',
        "continual.stages=[]",
        'continual.by="skill"',
        "prompt.max_tokens=60",
        'curate.steps=["duplicates"]',
    ):
        line = str(server.hello(other))
        assert other.partition("=")[0] in line and "this site has pinned another value" in line and "Ann" not in line
    assert isinstance(server.hello("train.lr=0.5", "rounds=4"), Hello)


def test_agreement_is_given_by_the_command_that_pins(tmp_path: Path) -> None:
    kits.init(tmp_path / "fed", "localhost:18443", ["north"])
    kit, state, file = tmp_path / "fed" / "north", tmp_path / "fed" / "north" / "state", tmp_path / "run.toml"
    file.write_text('[data]\ntest_fraction = 0.2\n[continual]\nby = "task"\nstages = [["a"], ["b"]]\n')
    run = loading.load(file, [])

    def call(*words: str) -> str:
        done = CliRunner().invoke(main.app, ["deploy", "split", str(kit), *words])
        if done.exception is not None:
            raise done.exception
        return done.stdout.strip()

    lines = call("--agree", str(file)).splitlines()
    assert lines[0] == "pinned: data.test_fraction = 0.2"
    rest = "pinned: all else of prompt, own models, stages and curation as by default"
    assert lines[1:] == ['pinned: continual.by = "task"', 'pinned: continual.stages = [["a"], ["b"]]', rest]
    assert call().splitlines() == lines
    made = split.load(state)
    assert made is not None and split.of_run(state, run) == made
    assert call("--test-fraction", "0.3").splitlines()[1:-1] == lines[1:]  # what was agreed to stays
    with pytest.raises(UserError, match=r"--agree: the run has data.test_fraction = 0.2, .* pinned 0.3; .*name it"):
        call("--agree", str(file))
    call("--agree", str(file), "--test-fraction", "0.2")
    assert split.load(state) == made
    file.write_text("[data]\ntest_fraction = 0.2\n")
    gone = [line.replace("pinned", "no more") for line in lines[1:-1]]
    assert call("--agree", str(file)).splitlines() == [lines[0], rest, *gone]
    with pytest.raises(split.AnotherSplit):
        split.of_run(state, run)


def test_a_split_of_an_older_version_takes_all_rows_and_the_next_runs_prompt(serve: Callable[..., Server]) -> None:
    server = serve()
    server.facts.state.mkdir()
    (server.facts.state / split.FILE).write_text(json.dumps({"schema": 1, "test_fraction": 0.1, "key": "00" * 32}))
    assert isinstance(server.hello("data.test_fraction=0.1"), Hello)
    assert "prompt.max_tokens" in str(server.hello("data.test_fraction=0.1", "prompt.max_tokens=50"))


def test_a_site_names_its_own_columns(serve: Callable[..., Server]) -> None:
    """What the run names of columns is for the server's rows, and changes nothing at a site."""
    rows = [{"q": row["instruction"], "a": row["output"], "z": "no"} for row in instruction_rows(40)]
    server = serve("ant", rows, columns={"instruction": "q", "output": "a"})
    assert site_worker.check(server.facts).total == 40
    first = server.hello()
    assert isinstance(first, Hello) and first == server.hello('data.columns={"instruction": "a", "output": "z"}')
    with pytest.raises(UserError, match=r"no columns known.*--column instruction=NAME"):
        site_worker.check(server.facts._replace(columns={}))
    for wrong in (["q"], ["instruction="], ["instruction=q", "instruction=a"], ["question=q"], ["instruction=q"]):
        with pytest.raises(UserError):
            parse_columns(wrong)
    assert parse_columns(["instruction=q", "output=a=b"]) == {"instruction": "q", "output": "a=b"}


# -- rows for the site's own model -----------------------------------------------------------------------------------

OWN = ("personal.enabled=true", "personal.validation=0.3")


def test_the_first_run_says_which_share_is_set_apart_for_own_models_and_no_later_one(
    serve: Callable[..., Server],
) -> None:
    server = serve("ant", instruction_rows(200), *OWN, counts=EXACT)
    first = server.hello()
    assert isinstance(first, Hello) and first.examples is not None and 90 < first.examples < 160
    for changes in (["personal.validation=0.2"], ["personal.enabled=false"], ["personal.validation=0.300001"]):
        for kind in (flower_records.HELLO, "train", "evaluate"):
            line = server.ask(kind, *changes).header["error"]
            assert "personal." in line and "another value" in line and "\n" not in line
    # What says how models are made, and the seed, choose no rows.
    assert server.hello("personal.budget=5", "personal.margin=0", "seed=7") == first
    pinned = split.load(server.facts.state)
    assert pinned is not None and pinned.reading is not None and pinned.reading["personal.validation"] == 0.3
    told = split.lines(pinned)
    assert "personal.enabled = true" in told and "personal.validation = 0.3" in told


def test_a_site_that_has_pinned_no_own_models_makes_way_for_them_when_its_operator_agrees(
    serve: Callable[..., Server],
) -> None:
    """Also a split of an older version, which names no such keys: they are those of a run without own models."""
    server = serve("ant", instruction_rows(200), counts=EXACT)
    whole = server.hello("personal.validation=0.5")  # says nothing where none are made
    path = server.facts.state / split.FILE
    values = json.loads(path.read_text())
    values["reading"] = {k: v for k, v in values["reading"].items() if not k.startswith("personal.")}
    path.write_text(json.dumps(values))
    server.service = Service(server.facts)
    assert server.hello() == whole and isinstance(whole, Hello)
    line = server.hello("personal.enabled=true", "personal.validation=0.3")
    assert "personal.enabled, personal.validation: this site has pinned another value" in str(line)
    run = server.settings("personal.enabled=true", "personal.validation=0.3")
    split.repin(server.facts.state, run.data.test_fraction, new_key=False, agreed=run)
    server.service = Service(server.facts)
    less = server.hello("personal.enabled=true", "personal.validation=0.3")
    assert isinstance(less, Hello) and less.examples is not None and whole.examples is not None
    assert less.examples < 0.85 * whole.examples
    assert "this site has pinned another value" in str(server.hello())


def test_the_rows_set_apart_at_a_site_follow_its_key_and_not_the_servers_seed(serve: Callable[..., Server]) -> None:
    sides = []
    for name, seed in (("a", 0), ("a", 1), ("b", 0)):
        server = serve(name, instruction_rows(200), *OWN, f"seed={seed}")
        config = at_home(server.run, server.facts)
        site = site_worker._read_site(config, server.facts, "run")
        train, test = ({row.turns[0].text for row in part} for part in (site.train, site.test))
        assert not train & test and 15 < 200 - len(train | test) < 90  # neither trained nor measured
        sides.append((train, test))
    assert sides[0] == sides[1] != sides[2]


def test_a_site_whose_rows_are_all_set_apart_is_not_told_from_one_with_few(serve: Callable[..., Server]) -> None:
    """An error would say that a site has one question or two; the fraction is the server's at the first run."""
    rows = [{"instruction": "Say bee", "output": answer} for answer in ("bee", "a bee", "bees")]
    answers = []
    for name, own in (("none", "personal.validation=0.999999"), ("few", "personal.validation=0.000001")):
        server = serve(name, rows, "personal.enabled=true", own, "data.test_fraction=0")
        told = server.hello()
        assert isinstance(told, Hello)
        answers.append((told.examples, told.tokens, server.visit()))
    assert answers[0] == answers[1] and answers[0][0] == 0
