"""Sites with a few made-up rows, and workers that train on them privately."""

from __future__ import annotations

from pathlib import Path

import torch

from apiary.config import loading
from apiary.config.schema import RunConfig
from apiary.core.messages import Payload
from apiary.data.examples import Example
from apiary.data.turns import Turn
from apiary.models import adapters
from client.site import Site
from client.worker import Worker

STAGES = ['continual.stages=[["a"], ["b"], ["c"]]', "continual.buffer=0.5", "continual.policy=poisson", "rounds=6"]


def settings(model: Path, *more: str) -> RunConfig:
    base = [f"model.name={model}", "model.dtype=float32", "model.device=cpu", "adapter.rank=2", "prompt.template=plain"]
    train = ["prompt.max_tokens=64", "train.steps=2", "train.batch_tokens=256", "train.threads=1"]
    private = ["privacy.unit=record", "privacy.batch_rows=8", "privacy.noise_multiplier=1.0", "privacy.epsilon=50.0"]
    return loading.load(None, [*base, *train, *private, *more])


def rows(n: int, word: str = "honey", skill: str = "a") -> tuple[Example, ...]:
    return tuple(
        Example((Turn("user", f"{word} {i}?"), Turn("assistant", f"{word} {i}")), {"skill": skill}) for i in range(n)
    )


def site(folder: Path, train: tuple[Example, ...]) -> Site:
    return Site("s", train, (), folder / "run", folder / "ledger.json", 2)


def payload(worker: Worker, fill: float = 0.01) -> Payload:
    adapter = adapters.load(worker.config.model, worker.config.adapter).adapter
    return Payload({name: torch.full(p.shape, fill) for name, p in adapter.items()}, {})
