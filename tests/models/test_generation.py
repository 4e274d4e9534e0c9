"""What a base brings besides weights: of its generation configuration nothing counts but where answers end."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import small_models
import torch
from chat_templates import CHATML
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from apiary.config.schema import AdapterConfig, ModelConfig
from apiary.core.errors import UserError
from apiary.data.turns import Turn
from apiary.export.export import export_run
from apiary.export.tuned import open_tuned, reply, score
from apiary.models import adapter_files, adapters, generation
from apiary.models.inference import ModelProbe, check_decoding, stop_ids

ADAPTER = AdapterConfig(rank=4, alpha=6)
FILE = "generation_config.json"
NEW = 10

# Keys that published models set, and others that `generate()` knows; by what they are about.
HOSTILE: dict[str, dict[str, Any]] = {
    "a penalty": {"repetition_penalty": 1.1},
    "a strong penalty": {"repetition_penalty": 1.8},
    "n-grams": {"no_repeat_ngram_size": 2},
    "a forced first token": {"forced_bos_token_id": 77},
    "a forced last token": {"forced_eos_token_id": 1},
    "suppressed tokens": {"suppress_tokens": list(range(2, 200))},
    "a suppressed first token": {"begin_suppress_tokens": list(range(2, 200))},
    "a least length": {"min_length": 30},
    "least new tokens": {"min_new_tokens": 6},
    "a greatest length": {"max_length": 20},
    "few new tokens": {"max_new_tokens": 2},
    "both lengths": {"max_length": 5, "min_length": 40},
    "beams": {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True},
    "groups of beams": {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "sampling": {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20},
    "other sampling": {"do_sample": True, "min_p": 0.1, "typical_p": 0.4, "eta_cutoff": 0.3, "epsilon_cutoff": 0.2},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "layers that are compared": {"dola_layers": "high"},
    "constraints": {"force_words_ids": [[77]], "num_beams": 2},
    "texts that stop": {"stop_strings": ["a", "e"]},
    "a static cache": {"cache_implementation": "static", "max_cache_len": 4},
    "a quantized cache": {"cache_implementation": "quantized"},
    "a paged cache": {"cache_implementation": "paged"},
    "a cache that nobody knows": {"cache_implementation": "of the future"},
    "no cache": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 2},
    "lookup in the prompt": {"prompt_lookup_num_tokens": 3},
    "an early exit": {"assistant_early_exit": 1},
    "an assistant": {"is_assistant": True, "assistant_confidence_threshold": 0.99, "num_assistant_tokens": 5},
    "predicted tokens": {"use_mtp": True},
    "several answers": {"num_return_sequences": 3},
    "several drawn answers": {"num_return_sequences": 3, "do_sample": True},
    "an older cache": {"return_legacy_cache": True},
    "scores": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "inner states": {"output_attentions": True, "output_hidden_states": True},
    "logits in order": {"renormalize_logits": True, "remove_invalid_values": True},
    "a decay": {"exponential_decay_length_penalty": [2, 3.0]},
    "biases": {"sequence_bias": [[[77], 10.0]]},
    "bad words": {"bad_words_ids": [[i] for i in range(2, 150)]},
    "guidance": {"guidance_scale": 1.5},
    "penalties of an encoder": {"encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 2},
    "a watermark": {"watermarking_config": {"greenlist_ratio": 0.25, "bias": 50.0}},
    "no time": {"max_time": 1e-6},
    "healed tokens": {"token_healing": True},
    "other special tokens": {"pad_token_id": -1, "bos_token_id": 5, "decoder_start_token_id": 7},
    "a word for a number": {"early_stopping": "sometimes"},
    "compiling": {"compile_config": {"fullgraph": True}},
    "an argument of generate()": {"logits_processor": [], "input_ids": [3], "attention_mask": [1]},
    "keys of its own": {"chat_format": "chatml", "trust_remote_code": True, "custom_generate": "somebody/decoding"},
}


class Case(NamedTuple):
    """A base, prompts, and the greedy answers after them."""

    folder: Path
    stops: list[int]
    state: dict[str, torch.Tensor]
    prompts: list[list[int]]
    expected: list[str]


def load(folder: Path, state: dict[str, torch.Tensor] | None = None) -> adapters.LanguageModel:
    lm = adapters.load(ModelConfig(name=str(folder), dtype="float32", device="cpu"), ADAPTER)
    adapters.set_adapter(lm, state or small_models.random_state(adapters.get_adapter(lm), 0.1))
    return lm


@pytest.fixture(scope="module")
def case(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Answers end at different places: the base's stop ids are among those that it writes most."""
    folder = small_models.make_folder("llama", tiny_model, tmp_path_factory.mktemp("bases") / "plain")
    (folder / FILE).unlink()
    lm, rng = load(folder), np.random.default_rng(5)
    prompts = [rng.integers(2, 320, n).tolist() for n in (9, 3, 14, 1, 6, 11, 2, 8)]
    written = Counter(token for prompt in prompts for token in small_models.greedy(lm, prompt, NEW, []))
    stops = sorted({1, *(token for token, _ in written.most_common(6)[2:])})
    answers = [small_models.greedy(lm, prompt, NEW, stops) for prompt in prompts]
    assert len({len(ids) for ids in answers}) > 2
    texts = [str(lm.tokenizer.decode(ids, skip_special_tokens=True)) for ids in answers]
    return Case(folder, stops, adapters.get_adapter(lm), prompts, texts)


def with_file(case: Case, folder: Path, content: dict[str, Any] | str | bytes | None) -> Path:
    """The same base with this generation_config.json."""
    shutil.copytree(case.folder, folder)
    if content is not None:
        text = json.dumps({"eos_token_id": case.stops, **content}) if isinstance(content, dict) else content
        (folder / FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


@pytest.mark.parametrize("about", HOSTILE)
def test_answers_are_greedy_whatever_the_base_says_of_generation(about: str, case: Case, tmp_path: Path) -> None:
    lm = load(with_file(case, tmp_path / "base", HOSTILE[about]), case.state)
    check_decoding(lm)
    assert stop_ids(lm) == case.stops
    assert ModelProbe(lm).generate(case.prompts, NEW) == case.expected
    assert ModelProbe(lm, batch_tokens=1).generate(case.prompts[:3], NEW) == case.expected[:3]


def test_nothing_is_left_in_a_model_for_generate_to_inherit(case: Case, tmp_path: Path) -> None:
    """It takes for each value that our configuration leaves unset that of the model's own."""
    everything = {key: value for keys in HOSTILE.values() for key, value in keys.items()}
    lm = load(with_file(case, tmp_path / "base", everything), case.state)
    own = lm.model.get_base_model().generation_config
    assert own.to_diff_dict().keys() <= {"eos_token_id", "transformers_version"}
    assert set(everything) - {"bos_token_id", "pad_token_id", "use_cache"} == set(lm.generation.unused)


@pytest.mark.parametrize(
    ("content", "stops"),
    [
        ({"eos_token_id": 7}, [1, 7]),
        ({"eos_token_id": [7, 9, 7]}, [1, 7, 9]),
        ({"eos_token_id": [7, None, True, "</s>", -1, 10**9, 9.0]}, [1, 7]),
        ({"eos_token_id": "</s>"}, [1, 4]),
        ({"eos_token_id": None}, [1, 4]),
        ({}, [1, 4]),
        (None, [1, 4]),
        ("{not json", [1, 4]),
        ("[]", [1, 4]),
        ("[" * 100_000, [1, 4]),
        (b"\xff\xfe\x00", [1, 4]),
    ],
)
def test_stop_ids_are_the_files_or_those_of_the_models_configuration(
    content: dict[str, Any] | str | bytes | None, stops: list[int], case: Case, tmp_path: Path
) -> None:
    folder = with_file(case, tmp_path / "base", None)
    model_config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(model_config | {"eos_token_id": 4}))
    if content is not None:
        text = json.dumps(content) if isinstance(content, dict) else content
        (folder / FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    lm = load(folder)
    assert stop_ids(lm) == stops
    assert bool(lm.generation.fault) == (not isinstance(content, dict | None))
    if lm.generation.fault:
        assert lm.generation.fault_line.startswith("the base's generation_config.json cannot be read (")


def test_a_penalty_in_an_old_config_json_does_not_count(case: Case, tmp_path: Path) -> None:
    """Before there was a generation_config.json, config.json had such keys, and Transformers still reads them."""
    folder = with_file(case, tmp_path / "base", None)
    old = {"repetition_penalty": 1.8, "temperature": 0.3, "max_length": 40, "eos_token_id": case.stops}
    values = json.loads((folder / "config.json").read_text()) | old
    (folder / "config.json").write_text(json.dumps(values))
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.repetition_penalty == 1.8
    lm = load(folder, case.state)
    assert ModelProbe(lm).generate(case.prompts, NEW) == case.expected
    generation.hand_on(lm.generation, tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).repetition_penalty == 1.8


PENALISED = {"repetition_penalty": 1.8, "suppress_tokens": list(range(2, 100)), "do_sample": True, "top_p": 0.3}


def adapter_of(case: Case, base: Path, folder: Path) -> Path:
    adapter_files.save_adapter(load(base, case.state), case.state, folder)
    return folder


def test_evaluate_and_chat_say_the_same_with_a_base_that_would_be_served_otherwise(
    case: Case, rows_file: Path, tmp_path: Path
) -> None:
    tables, replies = [], []
    for name, content in {"plain": {}, "penalised": PENALISED, "refused": HOSTILE["several answers"]}.items():
        adapter = adapter_of(case, with_file(case, tmp_path / name, content), tmp_path / f"{name}-adapter")
        settings = ["prompt.template=plain", "prompt.max_tokens=96", "evaluate.max_examples=12"]
        tuned = open_tuned(adapter, [*settings, "model.dtype=float32", "model.device=cpu"])
        rows, _ = score(tuned, str(rows_file))
        tables.append({method: (run.texts, run.loss, run.accuracy) for method, run in rows.items()})
        replies.append(reply(tuned, [Turn("user", "Say the last word: bee hive wax")], 12))
    assert any(tables[0]["federated"][0])
    assert tables[1:] == tables[:1] * 2
    assert replies[1:] == replies[:1] * 2


def export(case: Case, base: Path, tmp_path: Path) -> Path:
    return export_run(adapter_of(case, base, tmp_path / "adapter"), tmp_path / "merged", merge=True).folder


def test_a_merged_export_has_the_bases_generation_configuration(case: Case, tmp_path: Path) -> None:
    base = with_file(case, tmp_path / "base", {**PENALISED, "chat_format": "chatml"})
    merged = export(case, base, tmp_path)
    assert (merged / FILE).read_bytes() == (base / FILE).read_bytes()
    assert AutoModelForCausalLM.from_pretrained(merged).generation_config.repetition_penalty == 1.8


@pytest.mark.parametrize("content", [HOSTILE["several answers"], HOSTILE["compiling"], "{not json", "[]", None])
def test_a_faulty_generation_configuration_breaks_no_export(
    content: dict[str, Any] | str | None, case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    merged = export(case, with_file(case, tmp_path / "base", content), tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert plain.generation_config.eos_token_id == 1  # config.json's
    told = [line for line in caplog.messages if FILE in line]
    assert len(told) == (content is not None)
    assert all("is not handed on, for Transformers refuses it" in line for line in told)


def test_what_fails_in_decoding_is_one_line(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = load(case.folder)

    def fails(*given: Any, **options: Any) -> None:
        raise RuntimeError("no kernel for this device\nmore of it")

    monkeypatch.setattr(lm.model, "generate", fails)
    with pytest.raises(UserError) as error:
        check_decoding(lm)
    assert error.value.problems == (
        f"model.name = {str(case.folder)!r}: answers cannot be decoded (no kernel for this device); "
        "set evaluate.generate = false to measure losses alone",
    )


def odd_tokenizer(base: Path) -> None:
    """Settings that do not count here, and count for whoever serves the model."""
    settings = json.loads((base / "tokenizer_config.json").read_text())
    odd = {"padding_side": "left", "model_max_length": 8, "clean_up_tokenization_spaces": True}
    odd |= {"tokenizer_class": "PreTrainedTokenizerFast", "somebody": {"else": "reads this"}}
    (base / "tokenizer_config.json").write_text(json.dumps(settings | odd))
    spec = json.loads((base / "tokenizer.json").read_text())
    spec["truncation"] = {"direction": "Left", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    spec["model"]["dropout"] = 0.2
    (base / "tokenizer.json").write_text(json.dumps(spec))
    templates = base / "additional_chat_templates"
    templates.mkdir()
    (base / "chat_template.jinja").write_text(CHATML)
    (templates / "tool_use.jinja").write_text("{{ tools }}")


@pytest.mark.parametrize("merge", [False, True])
def test_an_exported_tokenizer_is_the_bases_file_by_file(merge: bool, case: Case, tmp_path: Path) -> None:
    base = with_file(case, tmp_path / "base", {})
    odd_tokenizer(base)
    adapter = adapter_of(case, base, tmp_path / "adapter")
    exported = export_run(adapter, tmp_path / "exported", merge=merge).folder
    kept = [*base.glob("tokenizer*"), *base.glob("**/*.jinja")]
    assert len(kept) == 4
    for file in kept:
        assert (exported / file.relative_to(base)).read_bytes() == file.read_bytes()
    again = AutoTokenizer.from_pretrained(exported)
    assert (again.padding_side, again.model_max_length) == ("left", 8)
    assert again.backend_tokenizer.model.dropout == pytest.approx(0.2)
    assert set(again.chat_template) == {"default", "tool_use"}


def test_a_tokenizer_that_does_not_name_its_class_is_written_by_transformers(case: Case, tmp_path: Path) -> None:
    """A folder with an adapter has no config.json, by which alone it could be told."""
    base = with_file(case, tmp_path / "base", {})
    settings = json.loads((base / "tokenizer_config.json").read_text())
    del settings["tokenizer_class"]
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    spec = json.loads((base / "tokenizer.json").read_text())
    spec["model"]["dropout"] = 0.2
    (base / "tokenizer.json").write_text(json.dumps(spec))
    exported = export_run(adapter_of(case, base, tmp_path / "adapter"), tmp_path / "exported", merge=False).folder
    again = AutoTokenizer.from_pretrained(exported)
    assert again.backend_tokenizer.model.dropout == pytest.approx(0.2)


def test_padding_and_chance_in_a_tokenizers_file_change_no_answer(case: Case, tmp_path: Path) -> None:
    base = with_file(case, tmp_path / "base", {})
    odd_tokenizer(base)
    lm = load(base, case.state)
    assert ModelProbe(lm).generate(case.prompts, NEW) == case.expected


def test_a_pad_token_that_is_in_no_vocabulary_is_not_added(case: Case, tmp_path: Path) -> None:
    """Padding as the tokenizers library sets it by default, saved with the tokenizer: the model has no [PAD]."""
    base = with_file(case, tmp_path / "base", {})
    settings = json.loads((base / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    file = str(base / "tokenizer.json")
    core = Tokenizer.from_file(file)
    core.enable_padding()
    core.save(file)
    assert len(AutoTokenizer.from_pretrained(base)) == core.get_vocab_size() + 1
    lm = load(base, case.state)
    assert len(lm.tokenizer) == core.get_vocab_size()
    assert ModelProbe(lm).generate(case.prompts, NEW) == case.expected
