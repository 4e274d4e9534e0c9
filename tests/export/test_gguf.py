"""GGUF files, held to readers that are none of ours: Transformers, plain sums in numpy, and llama.cpp where it is."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import served_models
import small_models
import tokenizer_kinds
import torch
from served_models import SERVED, TEXTS
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from apiary.config.schema import AdapterConfig, ModelConfig
from apiary.core import lora
from apiary.core.errors import UserError
from apiary.core.tensors import StateDict
from apiary.export import check, gguf_files, gguf_tokenizer
from apiary.models import adapter_files, adapters
from apiary.models.adapters import LanguageModel

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = served_models.make_folder(name, tmp_path_factory.mktemp("served") / "base")
        return made[name]

    return folder


def opened(folder: Path, **adapter: Any) -> tuple[LanguageModel, StateDict]:
    lm = adapters.load(
        ModelConfig(name=str(folder), dtype="float32", device="cpu"), AdapterConfig(rank=4, **{"alpha": 6.0, **adapter})
    )
    return lm, small_models.random_state(adapters.get_adapter(lm), 0.2)


def logits(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    return found


def tensors_of(file: Path) -> dict[str, np.ndarray]:
    return {t.name: np.array(t.data) for t in gguf.GGUFReader(str(file)).tensors}


def values_of(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(str(file)).fields.items()}


IDS = list(range(4, 60))


@pytest.mark.parametrize("name", SERVED)
def test_a_model_is_what_transformers_reads_again(name: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folder_of(name)
    lm, state = opened(folder)
    whole = adapter_files.merged(lm, state)
    gguf_files.write_model(whole, lm.tokenizer, tmp_path / "model.gguf", "f32")
    whole.config.save_pretrained(tmp_path)
    again = check.read_gguf(tmp_path / "model.gguf")
    torch.testing.assert_close(logits(again, IDS), logits(whole, IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "near"), [("f16", 5e-3), ("bf16", 5e-2), ("q8_0", 1e-1)])
def test_matrices_are_rounded_as_asked_and_vectors_are_not(
    kind: str, near: float, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of("Qwen3")
    lm, state = opened(folder)
    whole = adapter_files.merged(lm, state)
    gguf_files.write_model(whole, lm.tokenizer, tmp_path / "model.gguf", kind)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(str(tmp_path / "model.gguf")).tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["output.weight"] == kind.upper()
    assert kinds["blk.1.attn_q_norm.weight"] == kinds["output_norm.weight"] == "F32"
    whole.config.save_pretrained(tmp_path)
    again = check.read_gguf(tmp_path / "model.gguf")
    gap = float((logits(again, IDS) - logits(whole, IDS)).abs().max() / logits(whole, IDS).abs().max())
    assert 1e-6 < gap < near


@pytest.mark.parametrize("name", SERVED)
def test_an_adapter_added_by_hand_to_the_base_is_the_merged_model(
    name: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """As llama.cpp adds it: W + alpha / r B A, of the tensors as the files hold them."""
    lm, state = opened(folder_of(name))
    base = AutoModelForCausalLM.from_pretrained(folder_of(name), dtype=torch.float32)
    gguf_files.write_model(base, lm.tokenizer, tmp_path / "base.gguf", "f32")
    gguf_files.write_model(adapter_files.merged(lm, state), lm.tokenizer, tmp_path / "whole.gguf", "f32")
    gguf_files.write_adapter(adapter_files.as_written(lm, state), base.config, tmp_path / "adapter.gguf")
    values = values_of(tmp_path / "adapter.gguf")
    assert (values["general.type"], values["adapter.type"]) == ("adapter", "lora")
    assert values["adapter.lora.alpha"] == pytest.approx(6.0 / 4**0.5 * 4)  # the scale of rsLoRA, times the rank
    before, after, factors = (tensors_of(tmp_path / f"{n}.gguf") for n in ("base", "whole", "adapter"))
    assert before.keys() == after.keys()
    assert ("output.weight" in before) == (not base.config.tie_word_embeddings)  # a tied head is the embedding
    added = {n.removesuffix(".lora_a") for n in factors if n.endswith(".lora_a")}
    assert len(added) == len(lora.split(state)) and added <= before.keys()
    for tensor in before:
        moved = np.zeros_like(before[tensor])
        if tensor in added:
            moved = values["adapter.lora.alpha"] / 4 * factors[f"{tensor}.lora_b"] @ factors[f"{tensor}.lora_a"]
            assert np.abs(moved).max() > 0.01
        np.testing.assert_allclose(after[tensor], before[tensor] + moved, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "pairs"), [("Llama", True), ("Mistral", True), ("Qwen2", False), ("Qwen3", False)])
def test_rows_of_q_and_k_stand_in_pairs_where_llama_cpp_turns_pairs(
    name: str, pairs: bool, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder_of(name), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder_of(name))
    gguf_files.write_model(base, tokenizer, tmp_path / "base.gguf", "f32")
    found = tensors_of(tmp_path / "base.gguf")
    own = {n: t.numpy() for n, t in base.state_dict().items()}
    for kind, heads in (("q", 4), ("k", 2), ("v", 2)):
        weight = own[f"model.layers.1.self_attn.{kind}_proj.weight"]
        width, expected = len(weight) // heads, weight.copy()
        if pairs and kind != "v":
            for head in range(heads):
                for i in range(width // 2):
                    start = head * width
                    expected[start + 2 * i], expected[start + 2 * i + 1] = (
                        weight[start + i],
                        weight[start + width // 2 + i],
                    )
        np.testing.assert_array_equal(found[f"blk.1.attn_{kind}.weight"], expected)


def test_factors_are_read_back_with_their_scale(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    lm, state = opened(folder_of("Llama"))
    config = AutoConfig.from_pretrained(folder_of("Llama"))
    gguf_files.write_adapter(adapter_files.as_written(lm, state), config, tmp_path / "a.gguf")
    found = gguf_files.read_adapter(tmp_path / "a.gguf", [*lora.split(state)], config)
    for module, (b, a) in lora.split(state).items():
        torch.testing.assert_close(found[module].b @ found[module].a, lm.scale * b @ a)


def test_what_llama_cpp_has_no_place_for_is_refused_by_name(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(folder_of("Llama"))
    for key, value, said in (
        ("model_type", "phi3", "phi3 is not one of the architectures written here (llama, mistral, qwen2, qwen3)"),
        ("hidden_act", "gelu", "this model has hidden_act = 'gelu'"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}, "rope_type = 'yarn'"),
    ):
        other = AutoConfig.from_pretrained(folder_of("Llama"))
        setattr(other, key, value)
        with pytest.raises(UserError) as caught:
            gguf_files.check(other)
        assert said in caught.value.problems[0]
    gguf_files.check(config)
    lm, state = opened(folder_of("Llama"), targets=["lm_head"])
    with pytest.raises(UserError, match=r"llama\.cpp has no adapter on 'lm_head'"):
        gguf_files.write_adapter(adapter_files.as_written(lm, state), config, tmp_path / "a.gguf")


def test_a_window_that_llama_cpp_has_not_is_told(folder_of: Callable[[str], Path]) -> None:
    mistral, qwen = (AutoConfig.from_pretrained(folder_of(n)) for n in ("Mistral", "Qwen2"))
    assert gguf_files.remark(mistral) == gguf_files.remark(qwen) == []  # Qwen2's is there and not used
    mistral.sliding_window = 4096
    assert gguf_files.remark(mistral) == [
        "llama.cpp has no sliding window for mistral: answers differ past 4096 tokens"
    ]


@pytest.mark.parametrize("name", SERVED)
def test_a_tokenizer_is_written_under_the_name_that_splits_as_it_does(
    name: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder_of(name), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder_of(name))
    tokenizer.chat_template = "{{ messages }}"
    gguf_files.write_model(model, tokenizer, tmp_path / "model.gguf", "f16")
    values = values_of(tmp_path / "model.gguf")
    assert (values["tokenizer.ggml.model"], values["tokenizer.ggml.pre"]) == ("gpt2", SERVED[name].pre)
    assert values["tokenizer.ggml.add_bos_token"] is SERVED[name].bos
    assert values["tokenizer.ggml.eos_token_id"] == 1 and values["tokenizer.chat_template"] == "{{ messages }}"
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == 328
    assert tokens[:4] == ["<pad>", "<eos>", "<|im_start|>", "<|im_end|>"] and set(kinds[:4]) == {3}
    assert {tokens[n]: n for n in range(len(tokenizer))} == tokenizer.get_vocab()
    assert set(kinds[4:320]) == {1} and set(kinds[len(tokenizer) :]) == {5}


def changed(tokenizer: Any, change: Callable[[dict[str, Any]], None]) -> Any:
    from tokenizers import Tokenizer

    described = json.loads(tokenizer.backend_tokenizer.to_str())
    change(described)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(described)), eos_token="<eos>")


def test_a_tokenizer_that_llama_cpp_would_take_for_another_is_refused() -> None:
    llama, qwen, bytewise = (served_models.make_tokenizer(pre) for pre in ("llama-bpe", "qwen2", "gpt-2"))
    gguf_tokenizer.check(changed(qwen, lambda d: d.update(normalizer={"type": "NFC"})))
    own = served_models.make_tokenizer("qwen2", pattern=r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+ ?|\s+")
    for tokenizer, said in (
        (own, "splits text in a way that llama.cpp has no name for"),
        (changed(llama, lambda d: d["model"].update(ignore_merges=False)), "splits text in a way"),
        (changed(bytewise, lambda d: d["pre_tokenizer"].update(add_prefix_space=True)), "splits text in a way"),
        (changed(bytewise, lambda d: d["added_tokens"][2].update(rstrip=True)), "takes white space"),
        (changed(qwen, lambda d: d.update(normalizer={"type": "NFKC"})), "rewrites text (NFKC)"),
        (tokenizer_kinds.kind("SentencePiece BPE with bytes, Mistral"), "of the kind SentencePiece's BPE"),
        (tokenizer_kinds.kind("Unigram with NFKC"), "of the kind Unigram"),
        (tokenizer_kinds.kind("in Python with a trie, Phi"), "of the kind Python"),
    ):
        with pytest.raises(UserError, match="convert_hf_to_gguf") as caught:
            gguf_tokenizer.check(tokenizer)
        assert said in caught.value.problems[0]


@pytest.fixture
def llama_cpp() -> Iterator[Callable[..., Any]]:
    """llama.cpp itself: a function that serves a model, maybe with an adapter, and gives one that asks its server."""
    engine = pytest.importorskip("xllamacpp")
    servers = []

    def serve(model: Path, adapter: Path | None = None) -> Callable[[str, dict[str, Any]], Any]:
        options = engine.CommonParams()
        options.model.path, options.n_ctx, options.n_parallel, options.port = str(model), 256, 1, 0
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
        options.warmup = options.fit_params = False
        # Keys and values in 16 bits would hide what is wrong in the third digit.
        options.cache_type_k = options.cache_type_v = engine.ggml_type.GGML_TYPE_F32
        options.flash_attn_type = engine.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if adapter:
            options.lora_adapters = [engine.CommonAdapterLoraInfo(str(adapter), 1.0)]
        server = engine.Server(options)
        servers.append(server)

        def ask(path: str, body: dict[str, Any]) -> Any:
            request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode())
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)

        return ask

    yield serve
    servers.clear()


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVED)
def test_llama_cpp_says_what_the_model_says(
    name: str, folder_of: Callable[[str], Path], tmp_path: Path, llama_cpp: Callable[..., Any]
) -> None:
    """The same tokens of a text, the same greedy answers and the same log-probabilities, merged and as an adapter."""
    lm, state = opened(folder_of(name))
    whole, config = adapter_files.merged(lm, state), AutoConfig.from_pretrained(folder_of(name))
    plain = AutoModelForCausalLM.from_pretrained(folder_of(name), dtype=torch.float32)
    gguf_files.write_model(plain, lm.tokenizer, tmp_path / "base.gguf", "f32")
    gguf_files.write_model(whole, lm.tokenizer, tmp_path / "whole.gguf", "f32")
    gguf_files.write_adapter(adapter_files.as_written(lm, state), config, tmp_path / "adapter.gguf")
    for asked in (llama_cpp(tmp_path / "whole.gguf"), llama_cpp(tmp_path / "base.gguf", tmp_path / "adapter.gguf")):
        for text in TEXTS:
            ids = lm.tokenizer(text)["input_ids"]
            assert asked("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"] == ids
            body = {"prompt": ids, "n_predict": 6, "temperature": 0, "n_probs": 328, "return_tokens": True}
            found, greedy = asked("/completion", {**body, "cache_prompt": False}), [*ids]
            for _ in range(len(found["tokens"])):
                greedy.append(int(logits(whole, greedy)[-1].argmax()))
            assert greedy[len(ids) :] == found["tokens"] and found["tokens"]
            expected = logits(whole, ids)[-1].log_softmax(-1)
            first = found["completion_probabilities"][0]
            if first["id"] == found["tokens"][0]:  # it holds tokens back until they are whole characters
                told = {entry["id"]: entry["logprob"] for entry in first["top_logprobs"]}
                assert len(told) == 328
                assert max(abs(told[n] - float(expected[n])) for n in told) < 1e-3
