"""Chat templates in the styles that are about, and a small tokenizer to try them on."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from apiary.config.schema import PromptConfig
from apiary.data import tokenization
from apiary.data.examples import Example
from apiary.data.turns import Turn

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>"]
SPECIAL += ["<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]", "<start_of_turn>"]
SPECIAL += ["<end_of_turn>"]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (  # no generation prompt, a space before the answer, strict roles, no system
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
HEADLESS = (  # ignores add_generation_prompt, and its end mark is plain text
    "{% for m in messages %}{{ '## ' + m['role'] + '\n' + m['content'] + '\n##\n' }}{% endfor %}"
)
UNENDED = (  # ends an answer only when another turn follows
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'A: ' + m['content'] + '\n' }}"
    "{% if not loop.last %}{{ eos_token }}{% endif %}"
    "{% else %}{{ 'Q: ' + m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)
FORGETFUL = CHATML.replace(  # only the last answer keeps its text
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}",
    "{{ (m['content'] if loop.last else '...') + '<|im_end|>' }}{% endgeneration %}",
)
THOUGHTLESS = CHATML.replace(
    "{{ m['content'] + '<|im_end|>' }}{% endgen",
    "{{ m['content'].split('</think>')[-1] + '<|im_end|>' }}{% endgen",
)
CHATS = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "mistral": (MISTRAL, "</s>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "headless": (HEADLESS, "\n##</s>"),
    "unended": (UNENDED, "</s>"),
}


def make_tokenizer(chat: str | None = None, *, bos: bool = False, pad: str = "<pad>") -> Any:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ["The bees fly home to the hive.", "\n\nAssistant:\n", "### Response: The answer is"]
    core.train_from_iterator(text * 9, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": pad}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.chat_template = chat
    return tokenizer


def talk(*texts: str, system: str | None = None) -> Example:
    """User and assistant in turn."""
    turns = [Turn(role, text) for role, text in zip(itertools.cycle(("user", "assistant")), texts)]
    return Example((*([Turn("system", system)] if system else []), *turns), {})


def trained_texts(encoded: Any, tokenizer: Any) -> list[str]:
    """The trained stretches, decoded."""
    pairs = zip(encoded.ids.tolist(), encoded.trained.tolist(), strict=True)
    groups = itertools.groupby(pairs, key=lambda pair: pair[1])
    return [tokenizer.decode([i for i, _ in group]) for trained, group in groups if trained]


def build(name: str, tokenizer: Any, **options: Any) -> tuple[tokenization.Template, PromptConfig]:
    config = PromptConfig(template=name, **options)
    return tokenization.make_template(config, tokenizer), config


BYTE_TOKENIZER = make_tokenizer()
TALK = talk("Who flies?", "The bees — 蜂 🐝.", "Where to?", "Home, to the hive.")

_CACHE: dict[str, Any] = {}


def cached(chat: str | None, pad: str = "<pad>") -> Any:
    key = f"{pad}{chat}"
    if key not in _CACHE:
        _CACHE[key] = make_tokenizer(chat, pad=pad)
    return _CACHE[key]


def builtin() -> Any:
    if "builtin" not in _CACHE:
        folder = Path(tokenization.__file__).parent.parent / "models" / "tiny" / "checkpoint"
        if not (folder / "tokenizer.json").exists():
            pytest.skip("the built-in model is not here")
        _CACHE["builtin"] = AutoTokenizer.from_pretrained(folder)
    return _CACHE["builtin"]
