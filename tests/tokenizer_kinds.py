"""Small tokenizers of the kinds that are about, each with a chat template and its own ways with control tokens."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chat_templates import CHATML, GEMMA, LLAMA3, MISTRAL
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

PHI = (  # the marks come about from the role
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<\uff5cUser\uff5c>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<\uff5cAssistant\uff5c>' + m['content'] + eos_token }}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c>' }}{% endif %}"
)
BERT = (
    "{{ '[CLS] ' }}{% for m in messages %}{{ '[' + m['role'].upper() + '] ' + m['content'] + ' [SEP] ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[ASSISTANT] ' }}{% endif %}"
)
LEGACY = (  # marks that are ordinary entries of the vocabulary
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + ' </s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
TEXT = ["The bees fly home to the hive.", "User and assistant say: yes or no?", "im_start im_end INST s user | < > [ ]"]
TEXT += ["eot id header end of turn system tool call"]
ROLES = ["system", "user", "assistant"]


def _byte_level(chat: str, special: list[str], added: list[Any] = [], **model: Any) -> Any:  # noqa: B006
    core = Tokenizer(models.BPE(**model))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(TEXT * 9, trainer)
    core.add_special_tokens(special)
    core.add_tokens(added)
    return _wrap(core, chat, bos_token=special[0], eos_token=special[1])


def _wrap(core: Tokenizer, chat: str, **names: str) -> Any:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.chat_template = chat
    return tokenizer


def _sentencepiece_bpe(chat: str, marks: list[str], legacy: bool) -> Any:
    """As Llama 2 (legacy: a space before each text) and Gemma are converted; merges lead to each mark's entry."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "\u2581", "\n", *marks]
    letters = sorted({c for text in [*TEXT, *marks] for c in text if not c.isspace()} | set("</s>"))
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *letters]))}
    merges: list[tuple[str, str]] = []
    for mark in ["</s>", *marks]:
        for end in range(2, len(mark) + 1):
            vocab.setdefault(mark[:end], len(vocab))
            merges.append((mark[: end - 1], mark[end - 1]))
    merges = list(dict.fromkeys(merges))
    core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "\u2581")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace]) if legacy else replace
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.add_tokens([AddedToken(mark, normalized=False, special=not legacy) for mark in marks])
    if not legacy:
        core.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("\u2581\u2581", normalized=False)])
        core.add_tokens([AddedToken("<table>", normalized=False)])
    return _wrap(core, chat, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>")


def _unigram() -> Any:
    """NFKC before the vocabulary, which holds the marks as pieces that cost nothing; the marks are matched after it."""
    marks = ["<|im_start|>", "<|im_end|>"]
    letters = sorted(
        {c for text in [*TEXT, *marks, "</s><s><unk>"] for c in text if not c.isspace()} | {"\u2581", "\n"}
    )
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((mark, 0.0) for mark in marks)]
    core = Tokenizer(models.Unigram([*pieces, *((letter, -3.0) for letter in letters)], unk_id=0))
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    core.add_special_tokens([AddedToken(t, normalized=True, special=True) for t in ("<s>", "</s>", *marks)])
    return _wrap(core, CHATML, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _word_piece() -> Any:
    marks = ["[CLS]", "[SEP]", "[SYSTEM]", "[USER]", "[ASSISTANT]"]
    letters = sorted({c for text in TEXT for c in text.lower() if not c.isspace()} | set("clsep[]"))
    entries = ["[UNK]", *marks, *letters, *(f"##{c}" for c in letters)]
    core = Tokenizer(models.WordPiece({e: i for i, e in enumerate(entries)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.add_special_tokens([AddedToken(m, normalized=True, special=True) for m in ["[UNK]", *marks]])
    return _wrap(core, BERT, bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]")


def _word_level() -> Any:
    """Whole words, and the marks are such words: no added token but EOS."""
    words = ["[UNK]", "</s>", *(f"[{role}]" for role in ROLES)]
    words += sorted({word for text in TEXT for word in re.findall(r"\w+|[^\w\s]", text)})
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    return _wrap(core, LEGACY, eos_token="</s>", unk_token="[UNK]")


class Letters(PreTrainedTokenizer):
    """A tokenizer in Python: a token a character, and added tokens found by the library's trie.

    whole: pieces that the vocabulary itself takes whole, as SentencePiece does with its user-defined symbols.
    """

    def __init__(self, whole: tuple[str, ...] = (), **given: Any) -> None:
        self.whole = whole
        letters = ["<unk>", *map(chr, range(1, 256))]
        self.vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*letters, "\uff5c", *whole]))}
        super().__init__(unk_token="<unk>", **given)

    @property
    def vocab_size(self) -> int:
        return len(self.vocab)

    def get_vocab(self) -> dict[str, int]:
        return {**self.vocab, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **given: Any) -> list[str]:
        pattern = "|".join([*map(re.escape, sorted(self.whole, key=len, reverse=True)), "."])
        return re.findall(pattern, text, re.DOTALL)

    def _convert_token_to_id(self, token: str) -> int:
        return self.vocab.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return {i: piece for piece, i in self.vocab.items()}[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


class Tiktoken(Letters):
    """One that reads its marks by itself and knows of no way to leave them be, as tiktoken's wrappers on the hub."""

    def tokenize(self, text: str, **given: Any) -> list[str]:
        return self._tokenize(text)


def _in_python(kind: type[Letters], chat: str, marks: tuple[str, ...], added: list[AddedToken]) -> Any:
    tokenizer = kind(marks, bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(added)
    tokenizer.chat_template = chat
    return tokenizer


def _phi(rstrip: bool = True) -> list[AddedToken]:
    return [AddedToken(f"<|{m}|>", rstrip=rstrip, normalized=False, special=True) for m in [*ROLES, "end"]]


_CHATML_MARKS = ["<|im_start|>", "<|im_end|>"]
_HEADERS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
_TURNS = ["<start_of_turn>", "<end_of_turn>"]
KINDS: dict[str, Callable[[], Any]] = {
    "byte-level BPE, ChatML": lambda: _byte_level(CHATML, ["<s>", "</s>", *_CHATML_MARKS]),
    "byte-level BPE, marks that are not special, and words": lambda: _byte_level(
        DEEPSEEK + "{% if tools %}{{ '<tool_call>' }}{% endif %}",
        ["<s>", "</s>"],
        ["<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<tool_call>", "<|fim_prefix|>", "hive", "  "],
    ),
    "byte-level BPE that looks words up whole, Llama 3": lambda: _byte_level(
        LLAMA3, ["<s>", "</s>", *_HEADERS], ignore_merges=True
    ),
    "byte-level BPE, Phi, marks that take white space": lambda: _byte_level(PHI, ["<s>", "</s>"], _phi()),
    "SentencePiece BPE with bytes, Mistral": lambda: _sentencepiece_bpe(MISTRAL, ["[INST]", "[/INST]"], legacy=True),
    "SentencePiece BPE with bytes, Gemma": lambda: _sentencepiece_bpe(GEMMA, _TURNS, legacy=False),
    "Unigram with NFKC": _unigram,
    "WordPiece in small letters": _word_piece,
    "WordLevel, marks in its vocabulary": _word_level,
    "in Python with a trie, Phi": lambda: _in_python(Letters, PHI, (), _phi()),
    "in Python, marks in its vocabulary": lambda: _in_python(Letters, CHATML, ("<|im_start|>", "<|im_end|>"), []),
    "tiktoken's way": lambda: _in_python(Tiktoken, CHATML, ("<|im_start|>", "<|im_end|>", "</s>"), []),
}


@functools.cache
def kind(name: str) -> Any:
    """A tokenizer of that kind, made once."""
    return KINDS[name]()


@functools.cache
def loaded(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
