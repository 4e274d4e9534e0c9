"""Chat templates that do harm, in real processes; and that the sandbox writes what transformers writes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATML, CHATS, TALK, build, make_tokenizer, talk
from command_line import in_a_process

from apiary.core.errors import UserError
from apiary.data import rendering, tokenization
from apiary.data.chat_messages import render
from apiary.data.rendering import DATE, Job, render_ahead, rendered
from apiary.data.segments import Unwritable

NESTED = "".join("{% for x in range(99999) %}" for _ in range(8)) + "{% endfor %}" * 8
DOUBLED = (
    "{% set ns = namespace(s='x') %}{% for i in range(50) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s | length }}"
)
DEEP = "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}"
BRACKETS = "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"
REFUSED = {  # what it does -> the template before an honest one, and what is said
    "attributes": ("{{ ''.__class__.__mro__ }}", "refuses a conversation"),
    "attributes by a filter": ("{{ ('' | attr('__class__')).x }}", "refuses a conversation"),
    "globals of a function": ("{{ strftime_now.__globals__['x'] }}", "refuses a conversation"),
    "a namespace's insides": ("{{ namespace(__class__=1) }}", "refuses a conversation"),
    "changes a message": ("{{ messages.append(1) }}", "refuses a conversation"),
    "another file": ("{% include '/etc/passwd' %}", "refuses a conversation"),
    "draws lots": ("{{ [1, 2] | random }}", "refuses a conversation"),
    "10 MB of output": ("{{ 'x' * 10000000 }}", "writes far more than it is given"),
    "10 MB in pieces": ("{% for i in range(100000) %}{{ 'x' * 100 }}{% endfor %}", "writes far more than it is given"),
    "a huge range": ("{{ range(10000000000) | list | length }}", "refuses a conversation"),
    "a huge text": ("{{ ('x' * 10000000000) | length }}", "needs too much memory"),
    "a huge field": ("{{ '%9999999999d' % 1 }}", "needs too much memory|refuses a conversation"),
    "a huge list": ("{{ (range(100000) | list * 100000) | length }}", "needs too much memory"),
    "doubled and doubled again": (DOUBLED, "needs too much memory"),
    "deep recursion": (DEEP, "refuses a conversation"),
    "deep brackets": (BRACKETS, "refuses a conversation|ends the process"),
    "a huge source": ("{# " + "x" * (1 << 20) + " #}", "has more than 1,048,576 characters"),
}
ENDLESS = {
    "an endless loop": NESTED,
    "a huge number": "{{ 7 ** (10 ** 9) }}",  # one operation in C, which nothing in the process can stop
    "a filter of filters": "{{ range(100000) | map('center', 100000) | map('upper') | map('trim') | join }}",
}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own for this test, with a shorter limit."""
    monkeypatch.setattr(rendering, "SECONDS", 0.5)
    monkeypatch.setattr(rendering, "_process", None)
    monkeypatch.setattr(rendering, "_refused", {})


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("what", REFUSED)
def test_a_hostile_template_is_refused_in_one_line(what: str) -> None:
    source, words = REFUSED[what]
    began = time.monotonic()
    with pytest.raises(UserError, match=words) as caught:
        build("chat", make_tokenizer(source + CHATML))
    assert "\n" not in str(caught.value) and "alpaca" in str(caught.value) and len(str(caught.value)) < 700
    assert time.monotonic() - began < 30
    build("chat", make_tokenizer(CHATML))  # and the next one is served


def test_a_format_tells_nothing_of_what_the_template_was_given() -> None:
    assert rendered(Job("{{ '{0.__class__}{0.__globals__}'.format(raise_exception) }}", DATE, "{}")) == ""
    by_filter = "{{ ('{0.__class__}{0.__globals__}' | attr('format'))(raise_exception) }}"  # CVE-2025-27516
    assert rendered(Job(by_filter, DATE, "{}")) == ""


def test_of_what_a_template_says_in_refusing_little_is_kept_and_nothing_reaches_the_counts() -> None:
    quoting = "{% if 'secret' in messages[0].content %}{{ raise_exception(messages[0].content) }}{% endif %}"
    tokenizer = make_tokenizer(quoting + CHATML)
    template, config = build("chat", tokenizer)
    row = talk("secret\n" * 100, "a")
    with pytest.raises(Unwritable) as caught:
        template.segments(row.turns)
    assert 0 < str(caught.value).count("secret") < 50 and "\n" not in str(caught.value)
    corpus = tokenization.encode_all([row], template, tokenizer, config)
    assert corpus.dropped == {0: "the chat template refuses a conversation"}


@pytest.mark.parametrize("what", ENDLESS)
def test_what_would_not_end_is_ended(what: str, quick: None) -> None:
    build("chat", make_tokenizer(CHATML))
    assert rendering._process is not None
    pid = rendering._process._popen.pid
    with pytest.raises(UserError, match=r"needs more than 0.5 s of the processor for one conversation"):
        build("chat", make_tokenizer(ENDLESS[what] + CHATML))
    assert gone(pid)
    build("chat", make_tokenizer(CHATML))


def test_what_did_not_end_is_not_tried_again(quick: None) -> None:
    job = Job(NESTED, DATE, "{}")
    for _ in range(2):
        began = time.process_time() + sum(os.times()[2:4])
        with pytest.raises(UserError, match="needs more than"):
            rendered(job)
    assert time.process_time() + sum(os.times()[2:4]) - began < 0.1


def test_the_limit_holds_where_its_signal_is_blocked_and_ignored(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "WAIT", 120.0)
    handler = signal.signal(signal.SIGPROF, signal.SIG_IGN)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF})
    try:
        with pytest.raises(UserError, match=r"needs more than 0.5 s of the processor"):
            rendered(Job(NESTED, DATE, "{}"))
    finally:
        signal.signal(signal.SIGPROF, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def test_a_process_that_does_not_answer_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    process = rendering._Process()
    request = rendering._request([Job("{{ 1 }}", DATE, "{}")])
    assert process.ask(request) == [["written", "1"]]
    os.kill(process._popen.pid, signal.SIGSTOP)
    monkeypatch.setattr(rendering, "WAIT", 0.2)
    assert process.ask(request) == ("gives no answer within 0.2 s", False)
    assert gone(process._popen.pid)


def test_without_a_timer_of_the_processor_there_is_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import signal\ndel signal.setitimer, signal.SIGPROF, signal.ITIMER_PROF\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delattr(signal, "SIGPROF")
    process = rendering._Process()
    assert process.ask(rendering._request([Job("{{ 1 }}", DATE, "{}")])) == [["written", "1"]]
    monkeypatch.setattr(rendering, "WAIT", 0.2)
    ended = process.ask(rendering._request([Job(NESTED, DATE, "{}")]))
    assert ended == ("gives no answer within 0.2 s", False)


def test_a_process_of_whose_end_nothing_is_known_is_no_traceback() -> None:
    process = rendering._Process()
    process.close.detach()  # as when the interpreter exits: nobody waits for it
    process.close = lambda: None  # type: ignore[assignment]
    process._popen.kill()
    ended = process.ask(rendering._request([Job("{{ 1 }}", DATE, "{}")]))
    rendering._end(process._popen)
    assert ended == ("ends the process that it runs in (as this program does)", False)


@pytest.mark.parametrize("planned", [False, True])
def test_a_process_that_somebody_ends_is_started_again(planned: bool, quick: None) -> None:
    assert rendered(Job("{{ 'a' }}", DATE, "{}")) == "a"
    assert rendering._process is not None
    rendering._process._popen.kill()
    jobs = [Job("{{ x }}", DATE, f'{{"x": {x}}}') for x in range(3)]
    render_ahead(jobs if planned else [])
    assert [rendered(job) for job in jobs] == ["0", "1", "2"]
    assert not rendering._refused


def test_a_text_on_which_the_process_ends_twice_is_not_tried_again(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []
    ask = rendering._Process.ask

    def ended(process: rendering._Process, request: bytes) -> Any:
        process._popen.kill()
        killed.append(process._popen.pid)
        return ask(process, request)

    monkeypatch.setattr(rendering._Process, "ask", ended)
    for _ in range(2):
        with pytest.raises(UserError, match="ends the process that it runs in"):
            rendered(Job("{{ 'a' }}", DATE, "{}"))
    assert len(set(killed)) == 2


def test_a_template_that_turns_hostile_in_the_middle_of_the_rows_ends_the_run(quick: None) -> None:
    trap = "{% if 'now' in messages[0].content %}" + NESTED + "{% endif %}"
    tokenizer = make_tokenizer(trap + CHATML)
    template, config = build("chat", tokenizer)
    rows = [talk("q", "a"), talk("now", "a")]
    assert tokenization.encode(rows[0], template, tokenizer, config) is not None
    with pytest.raises(UserError, match="needs more than") as caught:
        tokenization.encode_all(rows, template, tokenizer, config)
    assert not isinstance(caught.value, Unwritable)


def test_a_row_for_which_too_much_is_written_is_left_out() -> None:
    trap = "{% if 'now' in messages[0].content %}{{ 'x' * 3000000 }}{% endif %}"
    tokenizer = make_tokenizer(trap + CHATML)
    template, config = build("chat", tokenizer)
    corpus = tokenization.encode_all([talk("q", "a"), talk("now", "a")], template, tokenizer, config)
    assert corpus.dropped == {1: "the chat template writes far more than it is given"}
    long = talk("q" * 3_000_000, "a")  # what is long itself may be written
    assert len(template.prompt(long.turns)) > 3_000_000


@pytest.mark.parametrize(
    "trap", ["{{ range(100000) | list * 100000 }}", "{{ raise_exception('needs too much memory') }}"]
)
def test_a_row_that_needs_too_much_memory_is_left_out(trap: str) -> None:
    """Or says so, which is no limit that it breaks."""
    tokenizer = make_tokenizer("{% if 'now' in messages[0].content %}" + trap + "{% endif %}" + CHATML)
    template, config = build("chat", tokenizer)
    rows = [talk("q", "a"), talk("now", "a"), talk("r", "b")]
    corpus = tokenization.encode_all(rows, template, tokenizer, config)
    (why,) = corpus.dropped.items()
    assert why == (1, f"the chat template {'refuses a conversation' if 'raise' in trap else 'needs too much memory'}")


@pytest.mark.slow
def test_a_hostile_template_ends_doctor_with_one_line_and_exit_code_2(tmp_path: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(NESTED + CHATML)
    done = in_a_process("doctor", "-s", f"model.name={tmp_path / 'model'}", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    said = [line for line in (done.stdout + done.stderr).splitlines() if "needs more than 5 s of the processor" in line]
    assert len(said) == 1 and "Traceback" not in done.stderr


def test_the_process_has_no_secrets_and_ends_with_its_owner() -> None:
    code = (
        "from apiary.data import rendering as r; import os\n"
        "print(r.rendered(r.Job('{{ 1 + 1 }}', r.DATE, '{}')), r._process._popen.pid)\n"
        "print(open(f'/proc/{r._process._popen.pid}/environ').read().count('HF_TOKEN'), flush=True)\n"
        "os._exit(0)"
    )
    if not Path("/proc/self/environ").exists():
        pytest.skip("no /proc here")
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_TOKEN": "a secret"},
    )
    text, pid, secrets = done.stdout.split()
    assert (text, secrets) == ("2", "0")
    for _ in range(100):
        if gone(int(pid)):
            return
        time.sleep(0.05)
    raise AssertionError("the process outlives its owner")


def test_a_fork_has_a_process_of_its_own() -> None:
    assert rendered(Job("{{ 'a' }}", DATE, "{}")) == "a"
    code = (
        "import os, warnings; warnings.simplefilter('ignore')\n"
        "from apiary.data import rendering as r\n"
        "ask = lambda: r.rendered(r.Job('{{ x }}', r.DATE, '{\"x\": 1}'))\n"
        "ask(); mine = r._process._popen.pid; child = os.fork()\n"
        "if child == 0:\n"
        "    ask(); os._exit(r._process._popen.pid == mine)\n"
        "print(os.waitpid(child, 0)[1], ask())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["0", "1"]


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The bytes of each request in this test, and the characters of the reply."""
    seen: list[tuple[int, int]] = []
    ask = rendering._Process.ask

    def noted(process: rendering._Process, request: bytes) -> Any:
        replies: Any = ask(process, request)
        seen.append((len(request), sum(len(reply[1]) for reply in replies)))
        return replies

    monkeypatch.setattr(rendering._Process, "ask", noted)
    return seen


def test_what_is_planned_is_written_in_one_request(requests: list[tuple[int, int]]) -> None:
    jobs = [Job("{{ x if x % 2 else x.y.z }}", DATE, f'{{"x": {x}}}') for x in range(6)]
    render_ahead([*jobs, jobs[0]])
    assert [rendered(job) for job in jobs[1::2]] == ["1", "3", "5"]
    for job in jobs[::2]:
        with pytest.raises(Unwritable, match="refuses a conversation"):
            rendered(job)
    assert len(requests) == 2  # the first job was passed over, and was asked for by itself then
    render_ahead([])
    assert rendered(jobs[1]) == "1" and len(requests) == 3


def test_jobs_are_cuts_of_what_is_sent_once(requests: list[tuple[int, int]]) -> None:
    source = "{{ n }}{% for m in messages %}{{ m.content }}{% endfor %}"
    said = tuple(f'{{"content": "{c * 1000}"}}' for c in "abcd")
    cuts = [said[:1], said[:2], said, said[2:], said[2:], (said[2], said[0]), ()]
    jobs = [Job(source, DATE, f'{{"n": {n}}}', messages) for n, messages in enumerate(cuts)]
    render_ahead(jobs)
    texts = ["a", "ab", "abcd", "cd", "cd", "ca", ""]
    expected = [f"{n}" + "".join(c * 1000 for c in text) for n, text in enumerate(texts)]
    assert [rendered(job) for job in jobs] == expected
    ((sent, _),) = requests
    assert 8000 < sent < 9000  # abcd, cd and ca


def test_requests_and_replies_are_bounded(monkeypatch: pytest.MonkeyPatch, requests: list[tuple[int, int]]) -> None:
    bound = 1 << 18
    monkeypatch.setattr(rendering, "_REQUEST", bound)
    template, config = build("chat", tokenizer := make_tokenizer(CHATML), max_tokens=4096)
    requests.clear()
    exchanges, letters = 40, 400
    rows = [talk(*[c * letters] * 2 * exchanges) for c in "xyz"]
    assert len(tokenization.encode_all(rows, template, tokenizer, config)) == 3
    every = 3 * letters * (2 * exchanges) * exchanges  # letters in all cuts: k questions with k - 1 and with k answers
    sent, got = (sum(sizes) for sizes in zip(*requests, strict=True))
    assert every < got < 1.5 * every and sent < 0.3 * every
    assert max(max(sizes) for sizes in requests) < 1.5 * bound


def test_what_has_no_room_in_a_reply_is_asked_for_again(requests: list[tuple[int, int]]) -> None:
    jobs = [Job("{{ 'x' * 1000000 + n | string }}", DATE, f'{{"n": {n}}}') for n in range(20)]
    render_ahead(jobs)
    assert [rendered(job).strip("x") for job in jobs] == [str(n) for n in range(20)]
    assert [round(got / 1e6) for _, got in requests] == [9, 9, 2]


@pytest.mark.slow
def test_long_honest_conversations_are_written() -> None:
    template, config = build("chat", tokenizer := make_tokenizer(CHATML))
    rows = [talk(*[f"{k} " + "bee " * 100] * 600) for k in range(5)]
    assert len(tokenization.encode_all(rows, template, tokenizer, config)) == 5


@pytest.mark.parametrize("name", CHATS)
def test_the_sandbox_writes_what_transformers_writes(name: str) -> None:
    tokenizer = make_tokenizer(CHATS[name][0])
    messages: list[dict[str, Any]] = [{"role": turn.role, "content": turn.text} for turn in TALK.turns]
    for upto, ask in ((1, True), (2, False), (3, True), (4, False)):
        given: dict[str, Any] = {"tokenize": False, "add_generation_prompt": ask}
        theirs = tokenizer.apply_chat_template(messages[:upto], **given)
        assert render(tokenizer, messages[:upto], ask=ask) == theirs


def test_a_template_is_told_one_day_for_ever_and_the_start_says_so() -> None:
    dated = "{{ strftime_now('%d %B %Y %H:%M') + date_string }}" + CHATML
    template, _ = build("chat", make_tokenizer(dated))
    assert template.prompt(TALK.turns).startswith("26 July 2024 00:0026 Jul 2024<|im_start|>")
    assert template.words == "chat (the tokenizer's own, always dated 2024-07-26)"
    assert build("chat", make_tokenizer(CHATML))[0].words == "chat (the tokenizer's own)"
