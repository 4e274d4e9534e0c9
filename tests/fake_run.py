"""A run folder as a finished run leaves it, with invented but plausible numbers."""

# ruff: noqa: E501 (numbers in rows)

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

SKILLS = (
    "arithmetic", "classify", "compare", "convert", "count", "dates",
    "extract", "filter", "lookup", "passage", "sort", "transform",
)  # fmt: skip
METHODS = ("base", "local", "federated", "central", "central_serial")
LOSSES = {"base": 4.93, "local": 4.41, "federated": 0.82, "central": 0.47, "central_serial": 0.61}


def fake_metrics(clients: int = 8, rounds: int = 10, *, baselines: bool = True) -> dict[str, Any]:
    """Results of `clients` clients after `rounds` rounds; without baselines only the federated row."""
    rng = random.Random(clients * 1000 + rounds)
    methods = METHODS if baselines else ("federated",)
    names = [f"client-{i:02d}" for i in range(clients)]
    return {
        "schema": 1,
        "run": "demo-20260301",
        "task": f"{clients} clients, builtin:skills, builtin:tiny",
        "table": [_row(method, rounds) for method in methods],
        "clients": [_client(name, rng, baselines) for name in names],
        "skills": {skill: {m: _accuracy(m, rng) for m in methods} for skill in SKILLS},
        "rounds": [_round(r, rounds, clients, rng) for r in range(rounds + 1)],
        "samples": [{k: v for k, v in s.items() if k not in METHODS or k in methods} for s in _SAMPLES],
        "privacy": {"unit": "none"},
        "seconds": 138.4,
        "machine": {"system": "Linux x86_64", "cpu": "Imaginary CPU 2.4 GHz", "cores": 2, "memory_bytes": 16 * 10**9, "gpu": None},
        "versions": {"apiary": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "transformers": "5.2.0", "flwr": "1.41.0"},
    }  # fmt: skip


def fake_deployment(names: tuple[str, ...] = ("ant", "bee"), rounds: int = 3) -> dict[str, Any]:
    """Results of a deployment whose server has no held-out rows; `cricket` has too few of its own to tell a loss.

    Site i has 10 (i + 1) held-out rows of 4 response tokens; its loss before training is 3 + i, and halves by the end.
    """
    found = fake_metrics(1, rounds)
    measured = []
    for number in range(rounds + 1):
        losses = {name: (3.0 + i) * (1 - 0.5 * number / rounds) for i, name in enumerate(names)}
        counts = {name: (10 * (i + 1), 40 * (i + 1)) for i, name in enumerate(names)}
        total = sum(tokens for _, tokens in counts.values())
        loss = sum(losses[name] * counts[name][1] for name in names) / total
        few = ["cricket"]
        measured.append({"round": number, "loss": loss, "sites": losses, "rows": counts, "few": few})
    return {
        **{key: found[key] for key in ("schema", "run", "privacy", "seconds", "machine", "versions")},
        "task": f"{len(names) + 1} sites, builtin:tiny",
        "table": [],
        "clients": [{"client": n, "examples": 100 + i, "tokens": 900} for i, n in enumerate([*names, "cricket"])],
        "rounds": [{k: v for k, v in r.items() if k not in ("loss", "ci95")} for r in found["rounds"]],
        "sites": measured,
    }


def _row(method: str, rounds: int) -> dict[str, Any]:
    loss, accuracy = (
        LOSSES[method],
        {"base": 0.012, "local": 0.118, "federated": 0.553, "central": 0.668, "central_serial": 0.6}[method],
    )
    return {
        "method": method,
        "loss": loss,
        "accuracy": accuracy,
        "n": 400,
        "ci95": {
            "loss": [loss * 0.93, loss * 1.08],
            "accuracy": [max(0, accuracy - 0.04), accuracy + 0.045],
        },
        "steps": 0 if method == "base" else rounds * 8 * (8 if method == "central" else 1),
        "rows": {"base": 0, "local": 530}.get(method, 4_240),
        "tokens": 0 if method == "base" else rounds * 31_250,
    }


def _client(name: str, rng: random.Random, baselines: bool) -> dict[str, Any]:
    kinds = rng.sample(SKILLS, rng.randint(2, 4))
    mix = {kind: rng.randint(3, 420) for kind in kinds}
    own = {
        "base": rng.uniform(4.2, 5.6),
        "local": rng.uniform(0.35, 1.5),
        "central": rng.uniform(0.25, 0.7),
    }
    own["federated"] = own["local"] + rng.uniform(-0.5, 0.12)
    return {
        "client": name,
        "examples": sum(mix.values()),
        "tokens": sum(mix.values()) * 11,
        "mix": mix,
        "own": own if baselines else {"federated": own["federated"]},
        "mix_loss": {"local": rng.uniform(3.1, 5.6)} if baselines else {},
    }


def _accuracy(method: str, rng: random.Random) -> float:
    low, high = {
        "base": (0, 0.05),
        "local": (0.02, 0.22),
        "federated": (0.2, 0.97),
        "central": (0.35, 1.0),
        "central_serial": (0.3, 1.0),
    }[method]
    return round(rng.uniform(low, high), 3)


def _round(number: int, rounds: int, clients: int, rng: random.Random) -> dict[str, Any]:
    start, end = LOSSES["base"], LOSSES["federated"]
    loss = end + (start - end) * (0.63**number - 0.63**rounds) / (1 - 0.63**rounds)
    sent = clients * 295_412
    if number == 0:
        return {"round": 0, "loss": loss, "ci95": [loss * 0.94, loss * 1.06], "bytes_evaluate": sent}
    return {
        "round": number,
        "loss": loss,
        "ci95": [loss * 0.92, loss * 1.09],
        "train_loss": loss * 0.8,
        "bytes_up": sent,
        "bytes_down": sent,
        "bytes_evaluate": sent,
        "seconds": 7.5 + rng.uniform(-0.8, 1.4),
        "clients": clients,
    }


_SAMPLES = (
    {
        "skill": "sort",
        "prompt": "Sort these words from A to Z.\n\nriver, candle, anchor, pebble",
        "reference": "anchor, candle, pebble, river",
        "base": "riverhe the of, and the candle",
        "local": "anchor, river",
        "federated": "anchor, candle, pebble, river",
        "central": "anchor, candle, pebble, river",
        "central_serial": "anchor, candle, pebble, river",
    },
    {
        "skill": "lookup",
        "prompt": "What does the saw cost according to the table?\n\nitem | price\nhammer | 31\nsaw | 18\nbread | 4",
        "reference": "18",
        "base": "",
        "local": "4",
        "federated": "18",
        "central": "18",
        "central_serial": "18",
    },
    {
        "skill": "dates",
        "prompt": "Today is Tuesday, 14 March. Which weekday is it in 5 days?",
        "reference": "Sunday",
        "base": "Tuesday, 14 14 14",
        "local": "Monday",
        "federated": "Saturday",
        "central": "Sunday",
        "central_serial": "Sunday",
    },
    {
        "skill": "extract",
        "prompt": "Give me the city of this person.\n\nname: Ada Moss; city: Turin; age: 44",
        "reference": "Turin",
        "base": "<script>alert('base')</script>",
        "local": "Ada Moss",
        "federated": "Turin",
        "central": "Turin",
        "central_serial": "Turin",
    },
)


def fake_events(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """The log of such a run: three refusals and a warning on the way."""
    events: list[dict[str, Any]] = [
        {"event": "start", "seed": 0, "rounds": len(metrics.get("rounds", [])) - 1, "clients": len(metrics["clients"]),
         "commit": "0" * 40, "config_digest": "a1b2c3d4e5f60718",
         "method": {"averages": "always", "recovers": "", "takes_one": False, "threshold": None, "scalars": 0}},
        {"event": "refused", "client": "client-09", "reason": "uses another tokenizer (fingerprints differ)"},
        {"event": "refused", "client": "client-03", "reason": "no answer within 60 s", "round": 0},
        {"event": "warning", "message": "client-02: 14 of 320 rows were cut at prompt.max_tokens = 512"},
        {"event": "refused", "client": "client-05", "reason": "its update holds NaN", "round": 4},
    ]  # fmt: skip
    return [{**event, "time": 1_767_225_600.0 + i} for i, event in enumerate(events)]


CONFIG = """seed = 0
rounds = 10

[model]
name = "builtin:tiny"

[data]
source = "/srv/secret-place/people.jsonl"
partition = { "name" = "dirichlet", "alpha" = 0.1, "by" = "skill" }
"""


def fake_run(folder: Path, metrics: dict[str, Any] | None = None) -> Path:
    """Writes the folder and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics = fake_metrics() if metrics is None else metrics
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    (folder / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in fake_events(metrics)), encoding="utf-8")
    (folder / "config.toml").write_text(CONFIG, encoding="utf-8")
    return folder
