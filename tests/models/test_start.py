"""The adapter that a run begins from, against plain peft; and which settings go with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from conftest import overrides_for
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import strategies
from apiary.config import loading
from apiary.config.schema import RunConfig
from apiary.core import lora
from apiary.core.errors import UserError
from apiary.models import adapter_files, adapters, start

IDS = torch.arange(2, 34).reshape(2, 16)
WEIGHTS = "adapter_model.safetensors"
FRESH = ["model.dtype=float32", "model.device=cpu"]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def make(base: Path, folder: Path, **settings: Any) -> Path:
    return small_models.make_adapter(base, folder, 0.1, 3, **{"target_modules": ["q_proj", "up_proj"], **settings})


def expected(base: Path, folder: Path) -> torch.Tensor:
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(plain, folder).eval())


def run(folder: Path, *keys: str) -> RunConfig:
    return start.resolved(loading.load(None, [*FRESH, f"adapter.start={folder}", *keys]))


def begun(config: RunConfig) -> tuple[adapters.LanguageModel, dict[str, torch.Tensor]]:
    lm = adapters.load(config.model, config.adapter)
    state = start.starting_adapter(lm, config)
    adapters.set_adapter(lm, state)
    return lm, state


def refused(folder: Path, *keys: str) -> str:
    with pytest.raises(UserError) as caught:
        strategies.from_config(run(folder, *keys))
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


def test_what_the_run_does_not_set_is_as_it_is_in_the_start(tiny_model: Path, tmp_path: Path) -> None:
    folder = make(tiny_model, tmp_path / "a")
    config = run(folder)
    adapter = config.adapter
    assert (adapter.rank, adapter.alpha, adapter.scaling, adapter.targets) == (4, 6.0, "lora", ("q_proj", "up_proj"))
    assert (config.model.name, config.model.revision) == (str(tiny_model), None)
    assert adapter.start == str(folder)
    assert len(adapter.start_digest or "") == 16
    assert start.resolved(config) == config
    assert start.resolved(loading.from_json(config.to_json())) == config
    lm, state = begun(config)
    assert small_models.same(state, load_file(folder / WEIGHTS))
    torch.testing.assert_close(logits(lm.model), expected(tiny_model, folder), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("keys", "scale"),
    [
        (["adapter.rank=16"], 1.5),
        (["adapter.alpha=3"], 3 / 4),
        (["adapter.scaling=rslora"], 1.5),
        (["adapter.rank=9", "adapter.alpha=5", "adapter.scaling=rslora"], 5 / 3),
        (["adapter.targets=['q_proj','up_proj']"], 1.5),
        (["adapter.targets=['self_attn.q_proj','mlp.up_proj']"], 1.5),
    ],
)
def test_what_the_run_sets_changes_no_product(keys: list[str], scale: float, tiny_model: Path, tmp_path: Path) -> None:
    folder = make(tiny_model, tmp_path / "a")
    lm, _ = begun(run(folder, *keys))
    assert lm.scale == pytest.approx(scale)
    torch.testing.assert_close(logits(lm.model), expected(tiny_model, folder), rtol=0, atol=2e-5)


def test_directions_that_the_start_has_not_can_learn(tiny_model: Path, tmp_path: Path) -> None:
    """A zero row of A beside a zero column of B would get no gradient for ever."""
    folder = make(tiny_model, tmp_path / "a", rank_pattern={"q_proj": 2})
    config = run(folder, "adapter.rank=6")
    lm, state = begun(config)
    torch.testing.assert_close(logits(lm.model), expected(tiny_model, folder), rtol=0, atol=2e-5)
    fresh = lora.split(adapters.fresh_adapter(lm, config.seed))
    for module, (b, a) in lora.split(state).items():
        own = 2 if "q_proj" in module else 4
        assert not b[:, own:].any()
        assert torch.equal(a[own:], fresh[module].a[own:])
        assert a[own:].any(1).all()


@pytest.mark.parametrize(
    "settings", [{"init_lora_weights": "pissa"}, {"rank_pattern": {"q_proj": 7}}, {"use_rslora": True}]
)
def test_a_start_of_another_form(settings: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    folder = make(tiny_model, tmp_path / "a", **settings)
    lm, _ = begun(run(folder))
    torch.testing.assert_close(logits(lm.model), expected(tiny_model, folder), rtol=0, atol=2e-5)


def test_a_client_of_a_lower_rank_gets_the_best_start_of_its_rank(tiny_model: Path, tmp_path: Path) -> None:
    config = run(make(tiny_model, tmp_path / "a"), "adapter.ranks=[2,4]", "strategy.name=flexlora")
    whole, state = begun(config)
    small = adapters.load(config.model, config.adapter.of_rank(2))
    part = lora.split(start.starting_adapter(small, config))
    sent = lora.split(strategies.aggregator.of_rank(state, 2, lora.scaling(6.0, "lora")))
    for module, (b, a) in lora.split(state).items():
        u, s, vt = torch.linalg.svd(whole.scale * b @ a)
        best = u[:, :2] @ s[:2].diag() @ vt[:2]
        torch.testing.assert_close(small.scale * part[module].b @ part[module].a, best, rtol=0, atol=1e-5)
        torch.testing.assert_close(small.scale * sent[module].b @ sent[module].a, best, rtol=0, atol=1e-5)


def test_a_run_and_its_adapter_are_starts(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    config = loading.load(None, overrides_for(tiny_model, rows_file))
    lm = adapters.load(config.model, config.adapter)
    state = small_models.random_state(adapters.get_adapter(lm))
    adapter_files.save_adapter(lm, state, tmp_path / "run" / "adapter")
    for place in (tmp_path / "run", tmp_path / "run" / "adapter"):
        found = run(place)
        assert (found.adapter.rank, found.adapter.targets) == (4, "all-linear")
        assert small_models.same(begun(found)[1], state)


def test_without_a_start_nothing_changes() -> None:
    config = RunConfig()
    assert start.resolved(config) is config
    assert start.remarks(config) == []
    lm = adapters.load(config.model, config.adapter)
    assert small_models.same(start.starting_adapter(lm, config), adapters.fresh_adapter(lm, config.seed))


def test_settings_that_do_not_go_with_it_are_refused_by_name(tiny_model: Path, tmp_path: Path) -> None:
    folder = make(tiny_model, tmp_path / "a")
    assert "adapter.rank = 3: adapter.start" in (said := refused(folder, "adapter.rank=3"))
    assert "has rank 4; set that or more" in said
    assert "adapter.targets leaves out 'model.layers.0.mlp.up_proj.weight'" in refused(folder, "adapter.targets=q_proj")
    assert "adapter.targets names 'model.layers.0.mlp.down_proj.weight'" in refused(
        folder, "adapter.targets=all-linear"
    )
    assert "adapter.init = 'orthonormal'" in refused(folder, "adapter.init=orthonormal")
    assert "adapter.start: with adapter.share = 'a'" in refused(folder, "adapter.share=a")
    assert "adapter.start: strategy.name = 'fedkseed'" in refused(folder, "strategy.name=fedkseed")
    assert "adapter.ranks = [8]: 8 is not from 1 to adapter.rank = 4" in refused(
        folder, "adapter.ranks=[8]", "strategy.name=flexlora"
    )
    assert "adapter.start: " in (said := refused(tmp_path / "nowhere")) and "no such folder" in said
    with pytest.raises(UserError, match="start_digest is of an"):
        loading.load(None, ["adapter.start_digest=abc"])


def test_a_key_that_cannot_be_honoured_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = make(tiny_model, tmp_path / "a")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True}))
    assert refused(folder).startswith(f"adapter.start: {str(folder)!r}: adapter_config.json: use_dora = true")


def test_a_start_that_was_changed_meanwhile_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = make(tiny_model, tmp_path / "a")
    config = run(folder)
    save_file({name: 2 * t for name, t in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    for read in (lambda: start.resolved(config), lambda: begun(config)):
        start.forget()
        with pytest.raises(UserError, match="holds another adapter than the one that the run began from"):
            read()


def test_what_there_is_to_say(tiny_model: Path, tmp_path: Path) -> None:
    folder = make(tiny_model, tmp_path / "a")
    assert start.remarks(run(folder)) == []
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "someone/llama"}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    private = ["privacy.unit=record", "privacy.epsilon=8"]
    lines = start.remarks(run(folder, f"model.name={tiny_model}", *private))
    assert str(tmp_path) not in str(lines)  # they stand in the log
    tokenizer, first, second = lines
    assert tokenizer.startswith("adapter.start: the tokenizer and its template are those of the base")
    assert first == f"adapter.start: made on the base 'someone/llama'; in use is {tiny_model.name!r}"
    assert "does not cover rows that the start was tuned on" in second
