"""`evaluate`, `chat` and `export` on adapters that plain peft made, against plain peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import apiary, assert_refused
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from apiary.config import loading
from apiary.config.schema import RunConfig
from apiary.core.errors import UserError
from apiary.data import examples, tokenization
from apiary.export import export, model_card, tuned
from apiary.models.adapter_files import Written

IDS = torch.arange(2, 34).reshape(2, 16)
SETTINGS = {
    "r": 4,
    "lora_alpha": 6,
    "target_modules": r".*(q|up)_proj",
    "rank_pattern": {"q_proj": 7},
    "alpha_pattern": {"layers.1.mlp.up_proj": 30},
    "use_rslora": True,
}
OPEN = [
    "model.dtype=float32",
    "model.device=cpu",
    "prompt.template=plain",
    "prompt.max_tokens=96",
    "evaluate.max_examples=8",
]


def base_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """An adapter with patterns, moved as by training."""
    torch.manual_seed(2)
    model = get_peft_model(base_of(tiny_model), LoraConfig(task_type="CAUSAL_LM", **SETTINGS))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def plain(base: Path, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(base_of(base), folder).eval()


def rewrite(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_its_loss_is_that_of_plain_peft_merged(folder: Path, tiny_model: Path, rows_file: Path) -> None:
    opened = tuned.open_tuned(folder, [*OPEN, "evaluate.generate=false"])
    rows, remarks = tuned.score(opened, str(rows_file))
    assert "the row 'federated' is this adapter" in remarks[0]
    merged = plain(tiny_model, folder).merge_and_unload()
    nats, tokens = 0.0, 0
    chosen = tuned.comparison.evenly(examples.read(str(rows_file)).examples, opened.config)
    for row in chosen:
        encoded = tokenization.encode(row, opened.template, opened.lm.tokenizer, opened.config.prompt)
        assert encoded is not None
        with torch.no_grad():
            found = merged(input_ids=torch.tensor([encoded.ids.tolist()])).logits[0].log_softmax(-1)
        for at in np.flatnonzero(encoded.trained):
            nats -= float(found[at - 1, encoded.ids[at]])
            tokens += 1
    assert rows["federated"].loss == pytest.approx(nats / tokens, abs=1e-4)
    assert rows["federated"].loss != pytest.approx(rows["base"].loss, abs=0.01)


def test_an_export_drops_nothing(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    expected = logits(plain(tiny_model, folder))
    export.export_run(folder, tmp_path / "out", merge=False)
    torch.testing.assert_close(logits(plain(tiny_model, tmp_path / "out")), expected, rtol=0, atol=2e-5)
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (written["r"], written["use_rslora"], written["rank_pattern"]) == (7, True, {})
    assert (
        load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
        == load_file(folder / "adapter_model.safetensors").keys()
    )
    export.export_run(folder, tmp_path / "whole", merge=True)
    torch.testing.assert_close(logits(base_of(tmp_path / "whole")), expected, rtol=0, atol=2e-5)
    again = tuned.open_tuned(tmp_path / "out", ["model.dtype=float32", f"model.name={tiny_model}"])
    torch.testing.assert_close(logits(again.lm.model), expected, rtol=0, atol=2e-5)


def test_its_card_claims_no_federation_and_names_no_folder(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    export.export_run(folder, tmp_path / "out", merge=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "federated" not in card
    assert f"Made on `{tiny_model.name}` by another tool" in card
    assert "rank 7" in card
    assert "no hub knows it by that name" in card
    assert str(tiny_model) not in card
    assert not (tmp_path / "out" / "apiary.toml").exists()


def test_a_card_has_the_shape_that_is_handed_on() -> None:
    config = loading.load(None, ["model.name=~/private/llama", "adapter.rank=8"])
    cut = model_card.card_of_other(config, Written({}, 2, 4, False), merged=False, cut=True)
    assert "rank 2, alpha 4 and scaling lora, its products as near as that rank" in cut
    assert "cut to rank 2 from a higher one" in model_card.card(config, 2, None, {}, merged=False)
    assert "private" not in cut and "`llama`" in cut


@pytest.mark.parametrize("merged", [False, True])
def test_a_card_names_the_revision_of_the_base(merged: bool) -> None:
    config = loading.load(None, ["model.name=someone/llama", "model.revision=v1.2"])
    for card in (
        model_card.card(config, 16, None, {}, merged=merged),
        model_card.card_of_other(config, Written({}, 16, 16.0, True), merged=merged),
    ):
        assert "`someone/llama` (revision `v1.2`)" in card
        assert "base_model: someone/llama\n" in card
        assert "no hub knows" not in card
        assert ('from_pretrained("someone/llama", revision="v1.2")' in card) != merged


def test_a_card_says_that_the_base_is_a_local_folder(tiny_model: Path, tmp_path: Path) -> None:
    for name in (str(tiny_model), "../models/mine", str(tmp_path / "gone")):
        card = model_card.card(
            RunConfig().model_copy(update={"model": RunConfig().model.model_copy(update={"name": name})}), 16, None, {}
        )
        assert "The base is a folder on the machine" in card
        assert "base_model:" not in card
    assert "folder on the machine" not in model_card.card(RunConfig(), 16, None, {})


def test_the_revision_that_it_names_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(folder, base_model_name_or_path="someone/llama", revision="abc")
    asked: list[Any] = []

    def load(found: Any, model: Any) -> Any:
        asked.append(model)
        raise UserError("enough")

    monkeypatch.setattr(tuned.peft_folder, "load", load)
    for overrides in ([], ["model.revision=def"], ["model.name=other/llama"]):
        with pytest.raises(UserError, match="enough"):
            tuned.open_tuned(folder, overrides)
    assert [(m.name, m.revision) for m in asked] == [
        ("someone/llama", "abc"),
        ("someone/llama", "def"),
        ("other/llama", None),
    ]


def test_another_base_and_revision_are_said(folder: Path, tiny_model: Path) -> None:
    rewrite(folder, base_model_name_or_path="someone/llama", revision="abc")
    opened = tuned.open_tuned(folder, [*OPEN, f"model.name={tiny_model}"])
    (line,) = opened.remarks
    assert line.endswith(
        f"made on base_model_name_or_path = 'someone/llama', of revision 'abc'; in use is {str(tiny_model)!r}"
    )
    rewrite(folder, base_model_name_or_path=str(tiny_model))
    (line,) = tuned.open_tuned(folder, [*OPEN, "model.revision=def"]).remarks
    assert line.endswith("made on revision = 'abc'; in use is 'def'")


def test_commands_say_in_a_line_what_is_wrong(folder: Path) -> None:
    rewrite(folder, base_model_name_or_path="/nowhere/llama")
    assert_refused(
        apiary("chat", folder, "-p", "Hello?"), "base_model_name_or_path = '/nowhere/llama'", "-s model.name="
    )
    assert_refused(apiary("export", folder, "--to", folder.parent / "x"), "base_model_name_or_path")
    rewrite(folder, base_model_name_or_path=None)
    assert_refused(apiary("chat", folder, "-p", "Hello?"), "names no base_model_name_or_path")
    rewrite(folder, use_dora=True)
    assert_refused(apiary("chat", folder, "-p", "Hello?"), "use_dora = true")
    assert_refused(apiary("chat", folder, "-p", "Hello?", "-s", "adapter.rank=3"), "use_dora = true")
    rewrite(folder, use_dora=False)
    assert_refused(apiary("chat", folder, "-p", "Hello?", "-s", "adapter.rank=3"), "-s adapter.rank", "its own adapter")


def test_chat_says_what_is_not_used(folder: Path, tiny_model: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    done = apiary("chat", folder, "-p", "Hello?", *(part for key in OPEN for part in ("-s", key)))
    assert done.returncode == 0, done.stderr
    assert "the tokenizer and its template are those of the base" in done.stderr
