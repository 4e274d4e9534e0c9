"""A byte-level BPE tokenizer in a GGUF file.

llama.cpp does not read how a tokenizer splits text before its merges: it knows a number of ways by name. A tokenizer
is written where it is one of them exactly, by its own description, and refused where it is not: under a wrong name
llama.cpp would split text otherwise, and say nothing.
"""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from apiary.core.errors import UserError

_CONVERT = "export with --merge alone and convert the folder with llama.cpp's convert_hf_to_gguf.py"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.cpp's kinds of tokens


def _split_by(letters: str, digits: str, tail: str = "") -> str:
    return (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?{letters}+|\p{{N}}{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n{tail}]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


# Name in llama.cpp -> the steps of the pre-tokenizer, and whether a word that is a token is looked up whole.
_PRE_TOKENIZERS: dict[str, tuple[list[Any], bool]] = {
    "gpt-2": (["bytes"], False),
    "smollm": (["digits", "bytes"], False),
    "llama-bpe": ([_split_by(r"\p{L}", "{1,3}")], True),
    "qwen2": ([_split_by(r"\p{L}", "")], False),
}


def check(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that llama.cpp has a tokenizer like this one.

    Raises:
        UserError: it has none, with the reason.
    """
    _named(tokenizer)


def add(writer: Any, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Writes a tokenizer into a GGUF file.

    Args:
        writer: of the file.
        tokenizer: the model's.
        rows: of the embedding; those beyond the vocabulary become unused tokens.

    Raises:
        UserError: llama.cpp has none like it.
    """
    name, described = _named(tokenizer)
    model, added = described["model"], {token["id"]: token for token in described["added_tokens"]}
    by_id = {number: token for token, number in model["vocab"].items()} | {n: t["content"] for n, t in added.items()}
    kinds = {n: _CONTROL if token["special"] else _USER_DEFINED for n, token in added.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list([by_id.get(n, f"[PAD{n}]") for n in range(rows)])
    writer.add_token_types([kinds.get(n, _NORMAL) if n in by_id else _UNUSED for n in range(rows)])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    ends = (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    )
    for write, number in ends:
        if isinstance(number, int):
            write(number)
    bare, whole = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    writer.add_add_bos_token(len(whole) > len(bare) and whole[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(whole) > len(bare) and whole[-1] == tokenizer.eos_token_id)
    writer.add_add_space_prefix(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _named(tokenizer: PreTrainedTokenizerBase) -> tuple[str, dict[str, Any]]:
    """llama.cpp's name for how a tokenizer splits text, and the tokenizer's own description."""
    say = "--gguf: the tokenizer"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {"model": {"type": "Python"}}
    model = described["model"]
    if model["type"] != "BPE" or model["byte_fallback"]:
        kind = "SentencePiece's BPE" if model["type"] == "BPE" else model["type"]
        raise UserError(f"{say} is no byte-level BPE but of the kind {kind}; {_CONVERT}")
    if not model["merges"]:
        raise UserError(f"{say} has no merges, and llama.cpp reads none without; {_CONVERT}")
    normal = described["normalizer"]
    if normal is not None and normal != {"type": "NFC"}:  # Qwen's; llama.cpp takes text as it comes
        raise UserError(f"{say} rewrites text ({normal['type']}), which llama.cpp does not; {_CONVERT}")
    for token in described["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise UserError(f"{say}: {token['content']!r} takes white space or whole words alone; {_CONVERT}")
    steps, whole_words = _steps(described["pre_tokenizer"]), bool(model.get("ignore_merges"))
    for name, known in _PRE_TOKENIZERS.items():
        if (steps, whole_words) == known:
            return name, described
    raise UserError(f"{say} splits text in a way that llama.cpp has no name for here; {_CONVERT}")


def _steps(pre: Any) -> list[Any]:
    """The steps of a pre-tokenizer: `bytes` and `digits` as GPT-2 has them, a pattern, or a step as it is described."""
    parts = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre]
    found: list[Any] = []
    for part in parts:
        match part:
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
                found.append("bytes")
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False} if len(found) == 1:
                pass  # the pattern before it has split the text
            case {"type": "Digits", "individual_digits": True}:
                found.append("digits")
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                found.append(pattern)
            case _:
                found.append(part)
    return found
