"""Adapters that plain peft made and saved, against what plain peft makes of them when it loads them."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_families
import pytest
import small_models
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from apiary.config.schema import ModelConfig
from apiary.core import lora
from apiary.core.errors import UserError
from apiary.models import adapter_files, adapters, peft_folder, peft_keys

IDS = torch.arange(2, 34).reshape(2, 16)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
DOCS = Path(__file__).parents[2] / "docs" / "models.md"


def config(base: Path) -> ModelConfig:
    return ModelConfig(name=str(base), dtype="float32", device="cpu")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def plain_base(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def make(base: Path, folder: Path, **settings: Any) -> Path:
    return small_models.make_adapter(base, folder, 0.05, 1, **settings)


def theirs(base: Path, folder: Path) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(plain_base(base), folder).eval()


def opened(base: Path, folder: Path) -> Any:
    return peft_folder.load(peft_keys.read_folder(folder), config(base))


def refusal(base: Path, folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        opened(base, folder)
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


def rewrite(folder: Path, **values: Any) -> Path:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def retensor(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


Q, V = "model.layers.0.self_attn.q_proj", "v_proj"
HONOURED = {
    "lora": {"target_modules": ["q_proj", "v_proj"]},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "all-linear": {"target_modules": "all-linear"},
    "regular expression": {"target_modules": r".*layers\.1\..*(q|up)_proj"},
    "exclude_modules": {"target_modules": "all-linear", "exclude_modules": ["down_proj", "layers.0.self_attn.k_proj"]},
    "exclude_modules, expression": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*layers\.0\.mlp.*"},
    "layers_to_transform": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "layers_pattern": {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "rank_pattern": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2, r"layers\.1\..*v_proj": 7}},
    "rank_pattern, lower alone": {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}},
    "alpha_pattern": {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": 40, "^model.layers.0": 1}},
    "both patterns, rslora": {
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {"up_proj": 9, "q_proj": 1},
        "alpha_pattern": {"up_proj": 3, "v_proj": 11},
    },
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "mica": {"target_modules": ["q_proj"], "init_lora_weights": "mica"},
    "eva": {"target_modules": ["q_proj"], "init_lora_weights": "eva"},
    "pissa": {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "pissa"},
    "pissa, patterns": {
        "target_modules": ["q_proj", "down_proj"],
        "init_lora_weights": "pissa",
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"q_proj": 9},
    },
    "olora": {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "olora"},
    "target_parameters": {"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]},
    "dropout": {"target_modules": ["q_proj"], "lora_dropout": 0.3},
    "ensure_weight_tying": {"target_modules": ["q_proj"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("feature", HONOURED)
def test_an_adapter_computes_what_it_does_in_plain_peft(feature: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = make(tiny_model, tmp_path / "theirs", **HONOURED[feature])
    reference = theirs(tiny_model, folder)
    expected = logits(reference)
    lm, state, foreign = opened(tiny_model, folder)
    torch.testing.assert_close(logits(lm.model), expected, rtol=0, atol=2e-5)
    assert (expected - logits(plain_base(tiny_model))).abs().max() > 1e-3
    torch.testing.assert_close(logits(adapter_files.merged(lm, state)), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(logits(reference.merge_and_unload()), expected, rtol=0, atol=2e-5)
    adapter_files.save_adapter(lm, state, tmp_path / "ours")
    torch.testing.assert_close(logits(theirs(tiny_model, tmp_path / "ours")), expected, rtol=0, atol=2e-5)
    named = {name.partition(".lora_")[0] for name in load_file(folder / WEIGHTS)}
    assert {name.partition(".lora_")[0] for name in lm.adapter} == named
    with lm.model.disable_adapter():  # the weights of the base, which all models share, are as they were
        torch.testing.assert_close(logits(lm.model), logits(plain_base(tiny_model)), rtol=0, atol=1e-6)
    assert foreign.settings.rank == lm.rank


def test_factors_of_one_rank_and_scale_are_kept_to_the_bit(tiny_model: Path, tmp_path: Path) -> None:
    folder = make(tiny_model, tmp_path / "theirs", r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    lm, state, foreign = opened(tiny_model, folder)
    assert (lm.rank, lm.scale, foreign.settings.targets) == (4, 1.5, ("q_proj", "v_proj"))
    assert small_models.same(dict(state), load_file(folder / WEIGHTS))


def test_a_pattern_is_folded_into_b_and_zeros(tiny_model: Path, tmp_path: Path) -> None:
    """q: rank 2 and alpha 6 are a scale of 3, where the largest rank, 8, keeps the 1.5 of rank 4: B is doubled."""
    pattern = {"rank_pattern": {"q_proj": 2, "v_proj": 8}}
    folder = make(tiny_model, tmp_path / "theirs", r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], **pattern)
    lm, state, _ = opened(tiny_model, folder)
    saved = load_file(folder / WEIGHTS)
    name = f"base_model.model.{Q}"
    assert (lm.rank, lm.scale) == (8, 1.5)
    assert torch.equal(state[f"{name}.lora_B.weight"][:, :2], 2 * saved[f"{name}.lora_B.weight"])
    assert not state[f"{name}.lora_B.weight"][:, 2:].any()
    assert torch.equal(state[f"{name}.lora_A.weight"][:2], saved[f"{name}.lora_A.weight"])
    v = f"base_model.model.{Q}".replace("q_proj", "v_proj")
    assert torch.equal(state[f"{v}.lora_B.weight"], 0.5 * saved[f"{v}.lora_B.weight"])


def test_a_base_in_sixteen_bits_rounds_no_factor(tiny_model: Path, tmp_path: Path) -> None:
    folder = make(tiny_model, tmp_path / "theirs", target_modules=["q_proj", "v_proj"])
    model = ModelConfig(name=str(tiny_model), dtype="bfloat16", device="cpu")
    _, state, _ = peft_folder.load(peft_keys.read_folder(folder), model)
    assert small_models.same(dict(state), load_file(folder / WEIGHTS))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_changed_the_base_has_twice_the_rank_and_is_said(
    start: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = make(tiny_model, tmp_path / "a", target_modules=["q_proj"], init_lora_weights=start)
    lm, _, foreign = opened(tiny_model, folder)
    assert lm.rank == 8
    assert f"init_lora_weights = {start!r} changed the base" in foreign.remarks[0]


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_form_that_peft_converts_such_a_start_to_is_a_plain_one(
    start: str, tiny_model: Path, tmp_path: Path
) -> None:
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=start)
    model = get_peft_model(plain_base(tiny_model), settings)
    # As peft's documentation has it: the start is saved first, and taken from what training made of it.
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    expected = logits(model.eval())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    lm, _, foreign = opened(tiny_model, tmp_path / "plain")
    torch.testing.assert_close(logits(lm.model), expected, rtol=0, atol=2e-5)
    assert foreign.remarks == ()


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3-MoE", "GPT-OSS"])
def test_adapters_on_experts(family: str, tiny_model: Path, tmp_path: Path) -> None:
    base = model_families.make_folder(family, tmp_path / "base")
    settings: dict[str, Any] = {
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.down_proj", "experts.gate_up_proj"],
        "rank_pattern": {"experts.down_proj": 2},
    }
    folder = make(base, tmp_path / "theirs", **settings)
    expected = logits(theirs(base, folder))
    lm, state, _ = opened(base, folder)
    torch.testing.assert_close(logits(lm.model), expected, rtol=0, atol=1e-4)
    adapter_files.save_adapter(lm, state, tmp_path / "ours")
    torch.testing.assert_close(logits(theirs(base, tmp_path / "ours")), expected, rtol=0, atol=1e-4)


def test_an_adapter_on_experts_of_an_earlier_transformers(tiny_model: Path, tmp_path: Path) -> None:
    """Each expert had linear layers of its own then; peft joins their factors, of twice the rank and alpha."""
    base = model_families.make_folder("Mixtral", tmp_path / "base")
    shape = plain_base(base).config
    wide, deep = shape.hidden_size, shape.intermediate_size
    folder = tmp_path / "theirs"
    folder.mkdir()
    LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=["w1", "w2", "w3"]).save_pretrained(folder)
    rng, tensors = torch.Generator().manual_seed(5), dict[str, torch.Tensor]()
    for layer in range(shape.num_hidden_layers):
        for expert in range(shape.num_local_experts):
            for name, (rows, columns) in {"w1": (deep, wide), "w3": (deep, wide), "w2": (wide, deep)}.items():
                stem = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors[f"{stem}.lora_A.weight"] = 0.2 * torch.randn(4, columns, generator=rng)
                tensors[f"{stem}.lora_B.weight"] = 0.2 * torch.randn(rows, 4, generator=rng)
    save_file(tensors, folder / WEIGHTS)
    expected = logits(theirs(base, folder))
    assert (expected - logits(plain_base(base))).abs().max() > 0.1
    lm, _, foreign = opened(base, folder)
    torch.testing.assert_close(logits(lm.model), expected, rtol=0, atol=1e-4)
    assert foreign.settings.targets == ("down_proj", "gate_up_proj")


@pytest.mark.parametrize("settings", [{}, {"init_lora_weights": "pissa"}, {"fan_in_fan_out": True}])
def test_layers_whose_weights_are_the_other_way_round(
    settings: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    base = small_models.make_folder("gpt2", tiny_model, tmp_path / "base")
    folder = make(base, tmp_path / "theirs", target_modules=["c_attn", "c_fc"], **settings)
    expected = logits(theirs(base, folder))
    lm, state, _ = opened(base, folder)
    torch.testing.assert_close(logits(lm.model), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(adapter_files.merged(lm, state)), expected, rtol=0, atol=1e-4)


def test_a_head_of_its_own_may_have_an_adapter(tiny_model: Path, tmp_path: Path) -> None:
    base = small_models.make_folder("phi3", tiny_model, tmp_path / "base")
    folder = make(base, tmp_path / "theirs", target_modules=["qkv_proj", "lm_head"])
    lm, _, foreign = opened(base, folder)
    torch.testing.assert_close(logits(lm.model), logits(theirs(base, folder)), rtol=0, atol=1e-4)
    assert "weights of the base stand in it too (1)" in foreign.remarks[0]
    retensor(folder, lambda tensors: tensors["base_model.model.lm_head.base_layer.weight"].mul_(2))
    assert "lm_head.base_layer.weight' is a whole weight, and another one" in refusal(base, folder)


# -- what is refused --------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, r'modules_to_save = \["lm_head"\]'),
    "trainable_token_indices": ({"trainable_token_indices": [3]}, "trainable_token_indices = "),
    "bias": ({"bias": "lora_only"}, 'bias = "lora_only"'),
    "lora_bias": ({"lora_bias": True}, "lora_bias = true"),
    "use_dora": ({"use_dora": True}, "use_dora = true"),
    "use_qalora": ({"use_qalora": True}, "use_qalora = true"),
    "use_bdlora": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora = "),
    "alora_invocation_tokens": ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens = "),
    "arrow_config": ({"arrow_config": {"top_k": 2}}, "arrow_config = "),
    "kasa_config": ({"kasa_config": {"beta": 0.1}}, "kasa_config = "),
    "velora_config": ({"velora_config": {"num_groups": 2}}, "velora_config = "),
    "monteclora_config": ({"monteclora_config": {"x": 1}}, "monteclora_config = "),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication = "),
    "megatron_config": ({"megatron_config": {"x": 1}}, "megatron_config = "),
    "peft_type": ({"peft_type": "IA3"}, 'peft_type = "IA3": only LORA'),
    "no peft_type": ({"peft_type": None}, "peft_type = null: only LORA"),
    "task_type": ({"task_type": "SEQ_CLS"}, 'task_type = "SEQ_CLS": only CAUSAL_LM'),
    "pissa_niter": ({"init_lora_weights": "pissa_niter_4"}, 'init_lora_weights = "pissa_niter_4".*weight_conversion'),
    "corda": ({"init_lora_weights": "corda"}, 'init_lora_weights = "corda".*weight_conversion'),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, 'init_lora_weights = "lora_ga".*weight_conversion'),
    "loftq": ({"init_lora_weights": "loftq"}, 'init_lora_weights = "loftq".*merge it'),
    "a start of a later version": ({"init_lora_weights": "newest"}, 'init_lora_weights = "newest"'),
    "a key of a later version": ({"use_newest": True}, "use_newest = true.*another version of peft"),
    "r": ({"r": 0}, "r = 0: must be a whole number from 1"),
    "rank_pattern": ({"rank_pattern": {"q_proj": 1.5}}, r"rank_pattern\['q_proj'\] = 1.5"),
    "no table": ({"rank_pattern": [4]}, r"rank_pattern = \[4\]: must be a table"),
    "lora_alpha": ({"lora_alpha": 0}, "lora_alpha = 0: must be a number above 0"),
    "alpha_pattern": ({"alpha_pattern": {"q_proj": "2"}}, r"alpha_pattern\['q_proj'\] = \"2\""),
    "revision": ({"revision": 3}, "revision = 3: must be a text"),
    "base": ({"base_model_name_or_path": 3}, "base_model_name_or_path = 3: must be a text"),
    "target_modules": ({"target_modules": ["nowhere"]}, "peft can't load it on .*nowhere"),
    "target_parameters": ({"target_parameters": "q_proj.weight"}, "peft can't load it on .*target_parameters"),
    "layers_pattern": ({"layers_pattern": "layers"}, "peft can't load it on .*layers_pattern"),
    "no regular expression": ({"target_modules": "("}, "peft can't load it on "),
    "a rank beyond memory": ({"r": 10**9}, "its rank of 1000000000 is above 1024"),
    "a rank beyond memory of one": ({"rank_pattern": {"q_proj": 10**9}}, "its rank of 1000000000 is above 1024"),
    "an alpha beyond floats": ({"lora_alpha": 10**400}, "lora_alpha = 10+.*must be a number above 0"),
    "an alpha of nothing": ({"lora_alpha": 5e-324}, "lora_alpha = 5e-324: must be a number above 0"),
    "products beyond floats": ({"alpha_pattern": {"q_proj": 1e300}}, r"alpha_pattern\['q_proj'\] = 1e\+300"),
}


def test_settings_that_are_too_deep_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = make(tiny_model, tmp_path / "theirs", target_modules=["q_proj"])
    (folder / "adapter_config.json").write_text('{"r": ' + "[" * 100_000)
    assert "adapter_config.json cannot be read" in refusal(tiny_model, folder)


@pytest.mark.parametrize(
    "made", [{1: torch.ones(2, 2)}, {"x": torch.ones(2, 2).to_sparse()}, {"x": torch.ones(2, 2, device="meta")}]
)
def test_a_pickle_of_other_than_dense_tensors_by_name_is_refused(made: Any, tiny_model: Path, tmp_path: Path) -> None:
    folder = make(tiny_model, tmp_path / "theirs", target_modules=["q_proj"])
    (folder / "adapter_model.safetensors").unlink()
    torch.save(made, folder / "adapter_model.bin")
    assert "something else than dense tensors by name" in refusal(tiny_model, folder)


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_cannot_be_honoured_is_refused_by_its_name(key: str, tiny_model: Path, tmp_path: Path) -> None:
    values, words = REFUSED[key]
    folder = rewrite(make(tiny_model, tmp_path / "theirs", target_modules=["q_proj"]), **values)
    assert re.search(words, refusal(tiny_model, folder))


def test_every_key_of_peft_is_known_and_has_a_line_in_the_docs() -> None:
    """A key that a newer peft brings fails here, until somebody has looked at what it does."""
    known = {*peft_keys.HONOURED, *peft_keys.NO_BEARING, *peft_keys.REFUSED}
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= known
    assert len(known) == sum(map(len, (peft_keys.HONOURED, peft_keys.NO_BEARING, peft_keys.REFUSED)))
    table = DOCS.read_text(encoding="utf-8").partition("## Adapters from elsewhere")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    kinds = {"honoured": peft_keys.HONOURED, "no bearing": peft_keys.NO_BEARING, "refused": peft_keys.REFUSED}
    told = {
        kind: {key for row in rows if f"| {kind}" in row for key in re.findall(r"`(\w+)`", row.split("|")[1])}
        for kind in kinds
    }
    assert told == {kind: set(keys) for kind, keys in kinds.items()}


def test_an_unset_key_of_another_version_is_left_aside_and_said(tiny_model: Path, tmp_path: Path) -> None:
    folder = make(tiny_model, tmp_path / "theirs", target_modules=["q_proj"])
    expected = logits(theirs(tiny_model, folder))
    rewrite(folder, newest_config=None, use_newest=False)
    lm, _, foreign = opened(tiny_model, folder)
    assert [re.findall("'(newest_config|use_newest)'", line) for line in foreign.remarks] == [
        ["newest_config"],
        ["use_newest"],
    ]
    torch.testing.assert_close(logits(lm.model), expected, rtol=0, atol=2e-5)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def test_a_tensor_that_the_settings_do_not_explain_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = make(tiny_model, tmp_path / "theirs", target_modules=["q_proj", "v_proj"])
    rewrite(folder, target_modules=["v_proj"])
    assert re.search(rf"tensor '{FIRST}' is on no module .*\(4 such\)", refusal(tiny_model, folder))


def test_a_missing_tensor_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = make(tiny_model, tmp_path / "theirs", target_modules=["q_proj"])
    retensor(folder, lambda tensors: tensors.pop(FIRST))
    assert f"tensor {FIRST!r} is missing" in refusal(tiny_model, folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(2, 2)}),
            "lm_head.weight' is a whole weight, and another",
        ),
        (lambda t: t.update({"prompt_embeddings": torch.zeros(2, 2)}), "'prompt_embeddings' is no factor"),
        (lambda t: t.update({FIRST: torch.zeros(3, 32)}), "size mismatch for .*q_proj.lora_A.weight"),
        (lambda t: t.update({FIRST: torch.full((4, 32), float("nan"))}), f"{FIRST}' holds values that are no finite"),
        (lambda t: t.update({FIRST: torch.zeros(0)}), "before its shards were gathered"),
        (lambda t: t.clear(), "holds no factors"),
    ],
)
def test_broken_tensors_are_refused(change: Any, words: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = retensor(make(tiny_model, tmp_path / "theirs", target_modules=["q_proj"]), change)
    assert re.search(words, refusal(tiny_model, folder))


@pytest.mark.parametrize(
    ("target", "words"), [("lm_head", "is the head, whose weights"), ("embed_tokens", "Embedding")]
)
def test_targets_that_no_adapter_of_ours_has(target: str, words: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = make(tiny_model, tmp_path / "theirs", target_modules=["q_proj", target])
    assert re.search(
        f"lora_embedding_A' is no factor of an adapter|target_modules: .*{words}", refusal(tiny_model, folder)
    )


# -- files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_of_sixteen_bits(dtype: torch.dtype, tiny_model: Path, tmp_path: Path) -> None:
    folder = make(tiny_model, tmp_path / "theirs", target_modules=["q_proj"])
    retensor(folder, lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()}))
    lm, _, _ = opened(tiny_model, folder)
    torch.testing.assert_close(logits(lm.model), logits(theirs(tiny_model, folder)), rtol=0, atol=2e-5)


def test_a_pickle_is_read_as_tensors_alone(tiny_model: Path, tmp_path: Path) -> None:
    folder = make(tiny_model, tmp_path / "theirs", target_modules=["q_proj"])
    expected = logits(theirs(tiny_model, folder))
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    lm, _, foreign = opened(tiny_model, folder)
    torch.testing.assert_close(logits(lm.model), expected, rtol=0, atol=2e-5)
    assert "adapter_model.bin is read as plain tensors" in foreign.remarks[0]


class _Hostile:
    ran = False

    def __reduce__(self) -> Any:
        return setattr, (_Hostile, "ran", True)


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tiny_model: Path, tmp_path: Path) -> None:
    folder = make(tiny_model, tmp_path / "theirs", target_modules=["q_proj"])
    torch.save({FIRST: _Hostile()}, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    said = refusal(tiny_model, folder)
    assert "adapter_model.bin cannot be read as plain tensors" in said
    assert "save it as adapter_model.safetensors" in said
    assert not _Hostile.ran


def test_names_with_the_adapters_own_in_them(tiny_model: Path, tmp_path: Path) -> None:
    folder = make(tiny_model, tmp_path / "theirs", target_modules=["q_proj"])
    expected = logits(theirs(tiny_model, folder))
    tensors = {name.replace(".weight", ".default.weight"): t for name, t in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    lm, _, foreign = opened(tiny_model, folder)
    torch.testing.assert_close(logits(lm.model), expected, rtol=0, atol=2e-5)
    assert "'default' is taken out of its names" in foreign.remarks[0]


def test_folders_that_hold_no_adapter(tiny_model: Path, tmp_path: Path) -> None:
    folder = make(tiny_model, tmp_path / "runs" / "checkpoint-20", target_modules=["q_proj"])
    assert "its folder 'checkpoint-20' is one, give that" in refusal(tiny_model, folder.parent)
    (folder / WEIGHTS).rename(folder / "adapter_model-00001-of-00002.safetensors")
    assert "'adapter_model-00001-of-00002.safetensors' is a part of one" in refusal(tiny_model, folder)
    (folder / WEIGHTS).write_bytes(b"broken")
    assert f"{WEIGHTS} cannot be read" in refusal(tiny_model, folder)
    (folder / CONFIG).write_text("{")
    assert f"{CONFIG} cannot be read" in refusal(tiny_model, folder)
    (folder / CONFIG).write_text("[]")
    assert f"{CONFIG} holds no settings but list" in refusal(tiny_model, folder)
    assert "no such folder" in refusal(tiny_model, tmp_path / "nowhere")


def test_a_tokenizer_in_the_folder_is_said(tiny_model: Path, tmp_path: Path) -> None:
    folder = make(tiny_model, tmp_path / "theirs", target_modules=["q_proj"])
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert "the tokenizer and its template are those of the base" in opened(tiny_model, folder)[2].remarks[0]


def test_the_digest_is_of_what_the_adapter_computes(tiny_model: Path, tmp_path: Path) -> None:
    folder = make(tiny_model, tmp_path / "a", target_modules=["q_proj"])
    digest = opened(tiny_model, folder)[2].digest
    assert opened(tiny_model, rewrite(folder, inference_mode=False))[2].digest == digest
    assert opened(tiny_model, rewrite(folder, lora_alpha=7))[2].digest != digest
    rewrite(folder, lora_alpha=6)
    retensor(folder, lambda tensors: tensors[FIRST].mul_(1.001))
    assert opened(tiny_model, folder)[2].digest != digest


def test_the_change_of_a_weight_by_hand(tiny_model: Path, tmp_path: Path) -> None:
    """PiSSA of rank 4: W less its four leading singular directions, plus s B A, as its paper has it."""
    folder = make(tiny_model, tmp_path / "a", target_modules=["q_proj"], init_lora_weights="pissa")
    lm, state, _ = opened(tiny_model, folder)
    saved, name = load_file(folder / WEIGHTS), f"base_model.model.{Q}"
    weight = plain_base(tiny_model).get_submodule(Q).weight.detach().double()
    u, s, vt = torch.linalg.svd(weight)
    taken = u[:, :4] @ s[:4].diag() @ vt[:4]
    expected = 1.5 * saved[f"{name}.lora_B.weight"].double() @ saved[f"{name}.lora_A.weight"].double() - taken
    found = lora.split(state)[name]
    torch.testing.assert_close(lm.scale * found.b.double() @ found.a.double(), expected, rtol=0, atol=1e-5)


def test_adapters_share_one_base(tiny_model: Path, tmp_path: Path) -> None:
    before = adapters.load_base(config(tiny_model))[0].get_submodule(Q).weight.clone()
    for start in (True, "pissa", "olora"):
        opened(tiny_model, make(tiny_model, tmp_path / str(start), target_modules=["q_proj"], init_lora_weights=start))
    assert torch.equal(adapters.load_base(config(tiny_model))[0].get_submodule(Q).weight, before)
