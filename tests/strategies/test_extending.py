"""A new method with both halves, as docs/extending.md shows it: one file, run by module:function."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import overrides_for
from safetensors.torch import load_file
from typer.main import get_command

from apiary.cli.main import app
from apiary.config import loading
from apiary.core.errors import UserError
from simulation.run import check_names, simulate
from strategies.from_config import check_for_sites

ROOT = Path(__file__).resolve().parents[2]
PLAIN = [
    "rounds=2",
    "train.optimizer=sgd",
    "train.schedule=constant",
    "train.warmup=0.0",
    "train.steps=1",
    "strategy.weighting=uniform",
    "evaluate.baselines=[]",
    "evaluate.generate=false",
]


@pytest.fixture
def steer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The documentation's file in a folder of its own, from which it can be imported; its name."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "LocalAlgorithm" in block]
    assert len(code.splitlines()) < 80
    (tmp_path / "steering.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "steering:steer"


def test_the_file_of_the_documentation_corrects_each_client_by_what_it_says(
    steer: str, tmp_path: Path, tiny_model: Path, rows_file: Path
) -> None:
    """By hand: with one step of plain descent a visit's change is -lr (g + s (d_k - d) / lr), d_k that of round 1."""
    changes: dict[float, list[dict[str, dict[str, torch.Tensor]]]] = {}
    for strength in (0.0, 0.5):
        method = [f"strategy.name={steer}", f"strategy.options.strength={strength}"]
        config = loading.load(None, [*overrides_for(tiny_model, rows_file), *PLAIN, *method])
        simulate(config, tmp_path / f"run-{strength}")
        folders = sorted((tmp_path / f"run-{strength}" / "clients").iterdir())
        changes[strength] = [
            {folder.name: load_file(folder / f"steer-000{number}.safetensors") for folder in folders}
            for number in (1, 2)
        ]
    (first, plain), (same, corrected) = changes[0.0], changes[0.5]
    assert len(first) == 3
    names = [name for name in next(iter(first.values())) if name != "lr_sum"]
    far = 0.0
    for client, before in first.items():
        for name in names:
            assert torch.equal(before[name], same[client][name])  # nothing is known yet in round 1
            mean = torch.stack([other[name].double() for other in first.values()]).mean(0)
            expected = plain[client][name].double() - 0.5 * (before[name].double() - mean)
            torch.testing.assert_close(corrected[client][name].double(), expected, rtol=1e-4, atol=1e-8)
            far = max(far, float((expected - plain[client][name].double()).abs().max()))
    assert far > 1e-5


def test_under_privacy_a_correction_is_refused_at_the_start(steer: str, small_run: list[str]) -> None:
    config = loading.load(None, [*small_run, f"strategy.name={steer}", "privacy.unit=record", "privacy.batch_rows=8"])
    with pytest.raises(UserError, match=r"privacy\.unit = 'record'.*steering:steer"):
        check_names(config)


def test_a_deployment_refuses_a_method_whose_client_half_its_sites_would_not_load(
    steer: str, small_run: list[str]
) -> None:
    settings = [part for setting in [*small_run, f"strategy.name={steer}"] for part in ("-s", setting)]
    done = CliRunner().invoke(get_command(app), ["deploy", "submit", "no-kit", *settings])
    assert isinstance(done.exception, UserError)
    assert str(done.exception).startswith("strategy.name = 'steering:steer': this method has a part at the clients")
    check_for_sites(loading.load(None, [*small_run, "strategy.name=scaffold", "train.optimizer=sgd"]))
