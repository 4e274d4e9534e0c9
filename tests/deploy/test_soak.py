"""The soak's short form: faults that no other test brings about, once each, in two runs of real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[2]
FAULTS = ("door", "site_disk", "network", "clock", "straggler")


def test_private_runs_outlive_cuts_a_full_disk_a_wrong_clock_and_a_straggler(tmp_path: Path) -> None:
    out = tmp_path / "soak.jsonl"
    command = [sys.executable, "-m", "benchmarks.soak", "--times", "1", "--faults", ",".join(FAULTS), "--out", str(out)]
    command += ["--rounds", "25", "--seed", "205", "--private", "all", "--together", "--no-reference"]
    with (tmp_path / "said").open("wb") as said:
        soak = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = soak.wait(timeout=1200)
        finally:
            if soak.poll() is None:
                os.kill(soak.pid, signal.SIGTERM)  # it ends what it has started
                soak.wait(timeout=120)
    text = (tmp_path / "said").read_text(errors="replace")
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    assert [line for row in rows for line in row["failures"]] == [], text
    tried = {row["fault"] for row in rows}
    if "nothing may be mounted here" in text:
        assert tried == set(FAULTS) - {"site_disk"}
        return
    assert tried == set(FAULTS) and code == 0, text
    assert {row["ledger"] for row in rows} == {"exact"}
