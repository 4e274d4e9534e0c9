"""`apiary` as processes of its own: what all the other tests, which call it in theirs, take for granted."""

from __future__ import annotations

import filecmp
from pathlib import Path

import pytest
from command_line import apiary, in_a_process, with_overrides

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["config", "strategy"], 0),
        (["simulate", "-s", "rounds=0", "-s", "train.lr=fast"], 2),
        (["evaluate", "nowhere", "--data", "builtin:skills"], 2),
    ],
)
def test_a_process_says_and_does_what_a_call_does(words: list[str], code: int) -> None:
    process, call = in_a_process(*words), apiary(*words)
    assert process.returncode == call.returncode == code
    assert (process.stdout, process.stderr) == (call.stdout, call.stderr)
    assert process.stdout if code == 0 else process.stderr


def test_a_whole_run_and_a_conversation(tmp_path: Path, small_run: list[str]) -> None:
    words = ["simulate", *with_overrides(small_run, "rounds=1", "evaluate.baselines=['base']"), "--out"]
    process, call = in_a_process(*words, tmp_path / "process"), apiary(*words, tmp_path / "call")
    assert process.returncode == call.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr + call.stderr
    # The table on one side, the progress on the other; times and rates differ.
    for done in (process, call):
        assert "federated" in done.stdout and "report.html" in done.stdout
        assert any("round 1/1" in line for line in done.stderr.splitlines())
    weights = Path("adapter") / "adapter_model.safetensors"
    assert filecmp.cmp(tmp_path / "process" / weights, tmp_path / "call" / weights, shallow=False)

    chat = ["chat", tmp_path / "process", "--max-new-tokens", "2"]
    asked = "hello\nagain\n\n"
    process, call = in_a_process(*chat, stdin=asked), apiary(*chat, stdin=asked)
    assert process.returncode == call.returncode == 0, process.stderr
    assert process.stdout == call.stdout and process.stdout.count("\n") >= 2
